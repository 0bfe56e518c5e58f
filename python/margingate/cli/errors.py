"""The one exception that a subcommand raises for the user to read."""


class CliError(Exception):
    """One sentence: what is wrong, which value, and the way out. Exit status 1, no traceback."""

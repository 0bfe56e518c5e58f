"""The exception that a command turns into one line on stderr."""


class CliError(Exception):
    """One sentence: what is wrong, which value, and the way out. Exit status 2, no traceback."""

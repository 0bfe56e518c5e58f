"""The one exception that a subcommand raises for the user to read, and the exit statuses."""

CHANGED = 1  # an answer changed
FAILED = 2  # nothing was found out: a wrong option, a server that does not answer; argparse's too
INTERRUPTED = 130  # Ctrl-C, as shells have it
CUT_OFF = 141  # whoever read stdout left, as shells have it


class CliError(Exception):
    """One sentence: what is wrong, which value, and the way out. Exit status 2, no traceback."""

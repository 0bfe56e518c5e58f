"""The exit statuses of the `margingate` command; 0 is done."""

CHANGED = 1  # an answer changed
FAILED = 2  # nothing was found out: a wrong option, a server that does not answer; argparse's too
INTERRUPTED = 130  # Ctrl-C, as shells have it
CUT_OFF = 141  # whoever read stdout left, as shells have it

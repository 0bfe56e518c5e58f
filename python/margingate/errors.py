"""The exceptions that a command, and a server that starts, turn into one line on stderr."""


class CliError(Exception):
    """One sentence: what is wrong, which value, and the way out. Exit status 2, no traceback."""


class GateError(ValueError):
    """A setting the gate cannot serve; the text is one sentence with the way out."""


def first_line(error: BaseException) -> str:
    """What an exception says, as far as it fits a sentence of ours."""
    return str(error).strip().partition("\n")[0]

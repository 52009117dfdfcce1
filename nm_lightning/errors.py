"""The exceptions that the command line turns into one line."""


class InputError(ValueError):
    """Bad input: a message of one line that names the value and what to give instead.

    The command line prints it alone and exits with status 2; library callers catch it as a `ValueError`.
    """


class RankLost(RuntimeError):
    """Another of the processes that work together is gone; the command line exits with status 1."""

    def __init__(self, cause: Exception):
        reason = (str(cause).splitlines() or [""])[0][:200]
        super().__init__(f"another rank is gone, nothing was written: run it again ({reason})")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class, if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

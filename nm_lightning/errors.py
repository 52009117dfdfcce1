"""The one exception that means "what you asked for can't be done, and here is the way out"."""


class InputError(ValueError):
    """Bad input: a message of one line that names the value and what to give instead.

    The command line prints it alone and exits with status 2; library callers catch it as a `ValueError`.
    """

"""The one exception a user is meant to read: a sentence that says what, where and what to do."""


class VitslimError(ValueError):
    """Bad input, told in one sentence; the command line prints it without a traceback."""

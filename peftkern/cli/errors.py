"""What the command line tells the user and does not trace back."""


class UsageError(Exception):
    """Something the user gave cannot be used. The text is one line that names it; the exit code is 2."""


class Interrupted(Exception):
    """Ctrl-C, after the state was saved. The text says what was saved and how to go on; the exit code is 130."""


class Diverged(Exception):
    """Training went to infinity or NaN; the exit code is 1."""

"""The exception for mistakes of the user.

A `UserError` is one sentence that states what is wrong, where, and what to do. The command line prints it without a
traceback and exits with code 2. Any other exception is an internal error (code 1).
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user. The message states in one sentence what is wrong, where, and what to do."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """End an error message about an unknown name with the closest valid name, if any, and all valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(valid: {', '.join(valid)})"

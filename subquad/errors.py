"""The one exception that is meant for people.

Everything a user can get wrong ends in a `UserError`: one sentence that says what is wrong, where, and what to do.
The command line prints it without a traceback and exits with code 2; any other exception is our fault (code 1).
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and what to do, in one sentence."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an error message for an unknown name: the closest valid name if there is one, then all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(valid: {', '.join(valid)})"

"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message names the thing, its value and the fix, and is shown without a traceback."""

"""The exceptions a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message names the thing, its value and the fix, and is shown without a traceback."""

    exit_code = 2


class TrainingEnded(UserError):
    """The policy for bad steps ended the run: going on as it is would end it again."""

    exit_code = 86

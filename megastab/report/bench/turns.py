"""The child's end of the pipe: a request in, a reply out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Turns:
    """Requests in, replies out. Takes standard output for itself, so that no library's print is taken for a reply."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self) -> str | None:
        """The next request, or None when it is time to leave."""
        return sys.stdin.readline().strip() or None

    def reply(self, value: Any) -> None:
        """Answer a request."""
        self._replies.write(json.dumps(value) + "\n")
        self._replies.flush()

    def serve(self, step: Callable[[], dict[str, Any]], memory: Callable[[], Any]) -> None:
        """Answer until the parent has no more to ask."""
        self.reply("ready")
        while (request := self.next()) is not None:
            self.reply(step() if request == "step" else memory())

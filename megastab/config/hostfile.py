"""A hostfile, read as strictly as its launcher should: ``python -m megastab.config.hostfile FILE`` prints ``NAME:RANKS,NAME:RANKS``.

DeepSpeed's launcher ends with a traceback where a line is wrong, takes ``slots=2x`` for 2 and starts nothing on a host with no slots.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megastab.config.errors import UserError

LINE = re.compile(r"(?P<host>[\w.@:-]+)\s+slots=(?P<slots>\S*)(\s+\S+=\S+)*")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Ranks by host, in the order of the file; comments and empty lines are passed over.

    Raises:
        UserError: the file cannot be read, or names every line that cannot be used.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"HOSTFILE {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}.") from None
    found: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.split("#")[0].strip()
        if not stripped:
            continue
        if problem := _add(stripped, found):
            problems.append(f"line {number}, {stripped!r}: {problem}")
    if not found and not problems:
        problems.append("it names no host: write a line 'NAME slots=RANKS' for each.")
    if problems:
        raise UserError("\n  ".join([f"HOSTFILE {path} cannot be used:", *problems]))
    return found


def _add(line: str, found: dict[str, int]) -> str:
    """Enter the host of one line; what is wrong with it, or nothing."""
    match = LINE.fullmatch(line)
    if match is None:
        return "must be 'NAME slots=RANKS'."
    host, slots = match["host"], match["slots"]
    if not (slots.isascii() and slots.isdecimal()) or int(slots) == 0:
        return f"slots = {slots!r} must be the number of ranks on that host, 1 or more; to leave a host out, take its line away."
    if host in found:
        return f"{host} was named before: one line a host, with all its ranks."
    found[host] = int(slots)
    return ""


def check_node_rank(said: str, hosts: Sequence[str]) -> None:
    """NODE_RANK, where a host is started by hand, must be a place in the file.

    Raises:
        UserError: it is none.
    """
    if not (said.isascii() and said.isdecimal()) or int(said) >= len(hosts):
        raise UserError(f"NODE_RANK = {said!r} must be this host's place in HOSTFILE, from 0 to {len(hosts) - 1}.")


def host_of(rank: int, said: str) -> str | None:
    """The host of a rank, by what ``main`` printed; None where that does not tell."""
    for entry in said.split(","):
        host, _, slots = entry.rpartition(":")
        if not slots.isdecimal():
            return None
        rank -= int(slots)
        if rank < 0:
            return host
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the hosts; the exit code."""
    path = (sys.argv[1:] if argv is None else argv)[0]
    try:
        hosts = read_hostfile(path)
        if node := os.environ.get("NODE_RANK"):
            check_node_rank(node, list(hosts))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(",".join(f"{host}:{slots}" for host, slots in hosts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A host that can be connected to is there; one that cannot is named with its ranks."""

from __future__ import annotations

import pytest

from megastab.engine import reach
from megastab.engine.network import address_towards, interface_towards, own_address
from megastab.engine.reach import Hosts, Lost, Place
from tests.ports import free_port


def test_only_what_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "CONNECT_SECONDS", 0.5)
    listening, closed = reach._listen(), free_port()
    places = [Place("a", "127.0.0.1", 0), Place("a", "127.0.0.1", 0)]
    places += [Place("b", "127.0.0.2", listening), Place("b", "127.0.0.2", 0), Place("c", "127.0.0.3", closed), Place("c", "127.0.0.3", 0)]
    assert Hosts(places, rank=1).lost() == [Lost("host c (127.0.0.3; ranks 4, 5)", (4, 5))]
    assert Hosts(places, rank=4).lost() == [Lost("host a (127.0.0.1; ranks 0, 1)", (0, 1))]  # a has no port here: nothing listens on 0


def test_a_job_of_one_rank_has_no_other_host() -> None:
    assert Hosts.meet().lost() == []


def test_routes() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1" and interface_towards("127.0.0.1") is not None
    assert address_towards("no such host.invalid") is None and interface_towards("no such host.invalid") is None
    assert own_address().count(".") == 3

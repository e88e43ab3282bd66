"""Two hosts for real (namespaces with an address and an sshd each): the ways to start on both, and what is found before it does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import SSHD, Host, finish, refusal, start_sshd, two_hosts, wait_for
from tests.launching import ROOT, curve, environment, pretrain
from tests.ports import free_port

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())
over_ssh = pytest.mark.skipif(SSHD is None or shutil.which("pdsh") is None, reason="no sshd or no pdsh (openssh-server, pdsh)")

LAYOUT = ("megastab.parallel.tensor=2",)  # x data 2: tensor parallel inside a host, data parallel between them


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path) as both:
        yield both


def hostfile(folder: Path, hosts: tuple[Host, Host], *more: str, slots: int = 2) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{name} slots={slots}\n" for name in [*(host.address for host in hosts), *more]))
    return path


def variables(hosts_file: Path, **others: str) -> dict[str, str]:
    return {**environment(), "MEGASTAB_ENV": "active", "HOSTFILE": str(hosts_file), "MASTER_PORT": str(free_port()), **others}


def one_host_curve(config: Path, folder: Path, *more: str, ranks: int = 4) -> list[tuple[int, float, float, float]]:
    done = pretrain("--deepspeed_config", str(config), f"megastab.run.dir={folder}", *more, ranks=ranks, timeout=300)
    assert done.code == 0, done.text
    return curve(folder)


@over_ssh
def test_over_ssh_and_without_it(hosts: tuple[Host, Host], config_file: Path, tmp_path: Path) -> None:
    expected = one_host_curve(config_file, tmp_path / "one_host", *LAYOUT)
    script = ("bash", "run_scripts/multi_node.sh", str(config_file), *LAYOUT)

    ssh = start_sshd(hosts, tmp_path / "ssh")
    env = variables(hostfile(tmp_path, hosts), PATH=f"{ssh}{os.pathsep}{environment()['PATH']}")
    code, text = finish(hosts[0].start(*script, folder=ROOT, environment=env), 240)
    assert code == 0, text
    assert f"{hosts[1].address}:" in text  # the second host has spoken
    assert curve(tmp_path / "run") == expected  # to the last bit: the same layout, the same order of sums

    env = variables(hostfile(tmp_path, hosts), MASTER_ADDR=hosts[0].address)
    env.pop("PYTHONPATH")
    other = (*script, f"megastab.run.dir={tmp_path / 'by_hand'}")
    both = [host.start(*other, folder=ROOT, environment={**env, "NODE_RANK": str(i)}) for i, host in enumerate(hosts)]
    for code, text in [finish(process, 240) for process in both]:
        assert code == 0, text
    assert curve(tmp_path / "by_hand") == expected


@over_ssh
def test_a_host_that_cannot_be_reached_is_named(hosts: tuple[Host, Host], config_file: Path, tmp_path: Path) -> None:
    ssh = start_sshd(hosts, tmp_path / "ssh")
    absent = hosts[0].address.rsplit(".", 1)[0] + ".99"
    env = variables(hostfile(tmp_path, hosts, absent), PATH=f"{ssh}{os.pathsep}{environment()['PATH']}")
    code, text = finish(hosts[0].start("bash", "run_scripts/multi_node.sh", str(config_file), folder=ROOT, environment=env), 60)
    assert code == 2 and f"error: host {absent}" in text and "cannot be reached" in text, text
    assert not (tmp_path / "run").exists()


def test_slots_that_do_not_make_the_layout_are_told_before_anything_starts(
    hosts: tuple[Host, Host], config_file: Path, tmp_path: Path
) -> None:
    env = variables(hostfile(tmp_path, hosts), MASTER_ADDR=hosts[0].address)
    script = ("bash", "run_scripts/multi_node.sh", str(config_file), "megastab.parallel.tensor=3")
    both = [host.start(*script, folder=ROOT, environment={**env, "NODE_RANK": str(i)}) for i, host in enumerate(hosts)]
    ended = [finish(process, 240) for process in both]
    assert all(code != 0 for code, _ in ended)
    assert sum(text.count("megastab.parallel.tensor = 3") for _, text in ended) == 1, ended  # by rank 0 alone


def test_hosts_with_different_sources_leave_before_the_first_step(hosts: tuple[Host, Host], config_file: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(ROOT, stale, ignore=shutil.ignore_patterns(".*", "data", "runs", "__pycache__", "docs", "tests"))
    (stale / "megastab" / "config" / "errors.py").open("a").write("\n# an older checkout\n")
    env = variables(hostfile(tmp_path, hosts), MASTER_ADDR=hosts[0].address)
    env.pop("PYTHONPATH")
    script = ("bash", "run_scripts/multi_node.sh", str(config_file), *LAYOUT)
    both = [
        host.start(*script, folder=folder, environment={**env, "NODE_RANK": str(i), "PYTHONPATH": str(folder)})
        for i, (host, folder) in enumerate(zip(hosts, (ROOT, stale), strict=True))
    ]
    ended = [finish(process, 240) for process in both]
    assert all(code != 0 for code, _ in ended), ended
    told = "".join(text for _, text in ended)
    assert told.count("the hosts of this job differ") == 1 and "megastab's source" in told and "ranks 2, 3" in told, told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cut_link_ends_both_sides_and_the_run_goes_on_when_it_is_back(
    hosts: tuple[Host, Host], config_file: Path, tmp_path: Path
) -> None:
    long_enough = ("megastab.run.total_steps=80", "megastab.run.save_interval=10")
    expected = one_host_curve(config_file, tmp_path / "one_host", *long_enough, ranks=2)

    def start(*more: str) -> list[subprocess.Popen[str]]:
        env = variables(hostfile(tmp_path, hosts, slots=1), MASTER_ADDR=hosts[0].address)
        script = ("bash", "run_scripts/multi_node.sh", str(config_file), *long_enough, *more)
        return [host.start_alone(*script, folder=ROOT, environment={**env, "NODE_RANK": str(i)}) for i, host in enumerate(hosts)]

    both = start("megastab.run.hang_seconds=8")
    wait_for(tmp_path / "run" / "metrics.jsonl", 240, lines=25)
    for host in hosts:
        host.set_link(is_up=False)
    ended = [finish(process, 180) for process in both]
    for (code, text), other in zip(ended, reversed(hosts), strict=True):
        assert code not in (0, -9), text
        assert other.address in text and "cannot be reached over the network" in text, text
    for host in hosts:
        host.set_link(is_up=True)
    for code, text in [finish(process, 240) for process in start()]:
        assert code == 0, text
    assert curve(tmp_path / "run") == expected

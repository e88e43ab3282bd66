"""Two hosts on one machine: network namespaces, each with its own address, host name and sshd; the file system is shared, as on a cluster.

Needs root (or what lets ``ip netns add`` work); sshd and pdsh for what goes over ssh.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def sh(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run to the end, quietly."""
    return subprocess.run(command, check=check, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def refusal() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if shutil.which("ip") is None:
        return "no ip command (iproute2): network namespaces cannot be made"
    name = f"probe{os.getpid()}"
    tried = sh("ip", "netns", "add", name, check=False)
    if tried.returncode:
        return f"network namespaces are not permitted here ({tried.stdout.strip()})"
    sh("ip", "netns", "del", name)
    return ""


@dataclass
class Host:
    """One namespace."""

    namespace: str
    address: str
    link: str

    def command(self, *command: str) -> list[str]:
        """``command`` as it is run on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def start(self, *command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start it, in a process group of its own."""
        return subprocess.Popen(
            self.command(*command), cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def start_alone(self, *command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
        """As :meth:`start`, with a host name and processes of its own as well: nobody sees the other host's die."""
        name = f'hostname {self.namespace} && exec "$@"'
        own = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", name, "sh")
        return self.start(*own, *command, folder=folder, environment=environment)

    def set_link(self, is_up: bool) -> None:
        """Plug the cable in or out."""
        sh(*self.command("ip", "link", "set", self.link, "up" if is_up else "down"))


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by one cable; everything started on them ends with the context."""
    number = random.randint(1, 250)  # two tests at once must not share addresses
    hosts = [Host(f"megastab{number}{side}", f"10.77.{number}.{i}", f"ms{number}{side}") for i, side in enumerate("ab", 1)]
    try:
        for host in hosts:
            sh("ip", "netns", "add", host.namespace)
        sh("ip", "link", "add", hosts[0].link, "type", "veth", "peer", "name", hosts[1].link)
        for host in hosts:
            sh("ip", "link", "set", host.link, "netns", host.namespace)
            sh(*host.command("ip", "address", "add", f"{host.address}/24", "dev", host.link))
            sh(*host.command("ip", "link", "set", "lo", "up"))
            host.set_link(True)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            for pid in sh("ip", "netns", "pids", host.namespace, check=False).stdout.split():
                with suppress(ValueError, ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            sh("ip", "netns", "del", host.namespace, check=False)


def start_sshd(hosts: tuple[Host, Host], folder: Path) -> Path:
    """An sshd on each host that knows one key; returns a folder whose ``ssh`` uses it, to be put first on PATH."""
    assert SSHD is not None
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges
    for name in ("host_key", "key"):
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    for host in hosts:
        config = folder / f"sshd_{host.namespace}"
        config.write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nPidFile none\nStrictModes no\nUsePAM no\n"
            f"PermitRootLogin yes\nListenAddress {host.address}\n"
        )
        sh(*host.command(SSHD, "-f", str(config)))
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    options = f"-i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper.parent


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """(exit code, what it printed); killed with all its children where it does not end in time, which is then its code."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return -signal.SIGKILL, text
    return process.returncode, text


def wait_for(path: Path, seconds: float, lines: int = 1) -> None:
    """Until a file has that many lines."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} has not {lines} lines after {seconds} s")

"""Hosts on one machine: network namespaces, joined by a link of limited speed, each with a name and its own processes.

All of it is within namespaces of a user, of mounts and of the network that nobody else sees, so that it needs no root
where the kernel lets users have such namespaces, and nothing is left of it. Linux only.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_LINK = """
set -e
mount -t tmpfs none /run  # where ip keeps its namespaces
for host in host-a host-b; do ip netns add $host; ip -n $host link set lo up; done
ip link add eth-a type veth peer name eth-b
ip link set eth-a netns host-a
ip link set eth-b netns host-b
ip -n host-a address add 10.77.0.1/24 dev eth-a
ip -n host-b address add 10.77.0.2/24 dev eth-b
ip -n host-a link set eth-a up
ip -n host-b link set eth-b up
tc -n host-a qdisc add dev eth-a root tbf rate {mbit}mbit burst 64k latency 400ms
tc -n host-b qdisc add dev eth-b root tbf rate {mbit}mbit burst 64k latency 400ms
echo ready
exec cat
"""


class CannotHaveHosts(Exception):
    """The kernel, or whoever confines this process, does not allow such namespaces; the message says what failed."""


class TwoHosts:
    """Two hosts that stand as long as the `with` block, joined by a link of so many Mbit/s each way."""

    def __init__(self, mbit: int) -> None:
        self._mbit = mbit
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "TwoHosts":
        inside = ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c", _LINK.format(mbit=self._mbit)]
        try:
            self._link = subprocess.Popen(
                inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except FileNotFoundError as error:
            raise CannotHaveHosts(f"{error.filename} is not installed") from None
        assert self._link.stdout
        first = self._link.stdout.readline()
        if first != "ready\n":
            said, _ = self._link.communicate()
            raise CannotHaveHosts(f"{first}{said}".strip())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._running:
            self.kill(host)
        self._link.communicate()

    def start(
        self, host: int, command: Sequence[str], output: IO[bytes], env: Mapping[str, str] = os.environ
    ) -> "subprocess.Popen[bytes]":
        """Run a command on a host, as its first process: with it, all others of that host end."""
        enter = ["nsenter", "--target", str(self._link.pid), "--user", "--preserve-credentials", "--mount", "--net"]
        enter += [f"--wd={Path.cwd()}", "ip", "netns", "exec", NAMES[host]]
        enter += ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter += ["sh", "-c", f'hostname {NAMES[host]} && exec "$@"', "sh", *command]
        process = subprocess.Popen(enter, stdout=output, stderr=subprocess.STDOUT, env=env)
        self._running.append(process)
        return process

    def kill(self, host: "subprocess.Popen[bytes]") -> None:
        """End all processes of a host at once, as its power supply would (but that the kernel closes connections)."""
        gone = processes_of(host)
        host.kill()
        host.wait()
        psutil.wait_procs(gone, timeout=60)


def processes_of(host: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """All that runs on a host, its first process first."""
    try:
        return psutil.Process(host.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def sent_bytes(host: "subprocess.Popen[bytes]") -> int:
    """What has left a running host by its link, headers included."""
    for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines():
        device, _, numbers = line.partition(":")
        if device.strip().startswith("eth-"):
            return int(numbers.split()[8])
    raise OSError(f"process {host.pid} has no link")


def environment_of_hosts() -> dict[str, str]:
    """This process's, with the commands beside this Python and the code of this checkout."""
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[1])}
    return os.environ | here | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def said_by_workers(mbit: int, script: str, arguments: Sequence[str], more: Mapping[str, str] | None = None) -> Any:
    """Run a script as two workers on each of two hosts; the list that one of them printed as JSON in a line.

    Raises:
        RuntimeError: with what they printed in its place.
    """
    both = 'for n in 0 1; do RANK=$((FIRST + n)) LOCAL_RANK=$n "$@" & done; wait'
    command = ["bash", "-c", both, "bash", sys.executable, script, *arguments]
    env = environment_of_hosts() | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **(more or {})}
    env |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
    with tempfile.TemporaryFile() as output, TwoHosts(mbit) as hosts:
        for process in [hosts.start(host, command, output, env | {"FIRST": str(2 * host)}) for host in (0, 1)]:
            process.wait()
        output.seek(0)
        said = output.read().decode()
    lines = [line for line in said.splitlines() if line.startswith("[{")]
    if len(lines) != 1:
        raise RuntimeError(said[-3000:])
    return json.loads(lines[0])

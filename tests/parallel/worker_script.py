"""A worker for the tests of the launch: `python worker_script.py MODE FOLDER`. Each mode is one function."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.errors import UserError
from trainer.parallel import worker

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[2])
StopRequested = Callable[[], bool]


def ready(note: object = None) -> None:
    temporary = FOLDER / f"ready-{RANK}.tmp"
    temporary.write_text(json.dumps(note), encoding="utf-8")
    temporary.replace(FOLDER / f"ready-{RANK}")


def await_files(*names: str) -> None:
    while not all((FOLDER / name).exists() for name in names):
        time.sleep(0.01)


def steps(stop_requested: StopRequested) -> None:
    stop_requested()  # from here on, a stop signal is a wish; before, it would end the worker
    ready()
    while not stop_requested():
        time.sleep(0.01)
    (FOLDER / f"saved-{RANK}").touch()


def environment(stop_requested: StopRequested) -> None:
    ready({**os.environ, "sid": os.getsid(0), "pid": os.getpid()})
    print(f"hello from {RANK}")


def error(stop_requested: StopRequested) -> None:
    print(f"log of {RANK}")
    if RANK == 2:
        await_files("ready-0", "ready-1")
        raise ValueError("no such bucket")
    steps(stop_requested)


def user_error(stop_requested: StopRequested) -> None:
    raise UserError("model.path: not a folder", "data.sources: empty")


def echo(stop_requested: StopRequested) -> None:
    if RANK == 0:
        await_files("ready-1")
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:50234")
    if RANK == 1:
        stop_requested()  # from now on SIGTERM is a wish, as while training: the parent may be faster than this worker
        ready()
        await_files("rank-0.error.json")
        raise ValueError("the cause")
    steps(stop_requested)


def segfault(stop_requested: StopRequested) -> None:
    if RANK == 1:
        ctypes.string_at(0)
    steps(stop_requested)


def killed(stop_requested: StopRequested) -> None:
    if RANK == 1:
        print("reading shard 7")
        os.kill(os.getpid(), signal.SIGKILL)
    steps(stop_requested)


def deaf(stop_requested: StopRequested) -> None:
    """Never stops; has a child, as a loader process would be."""
    if os.environ.get("FAILING") == str(RANK):
        await_files("ready-0", "ready-1")
        raise ValueError("gave up")
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    stop_requested()  # from here on, stop signals end nothing
    ready([os.getpid(), child.pid])
    while True:
        time.sleep(1)


def store_socket(stop_requested: StopRequested) -> None:
    """What the store does with the parent's socket, without torch."""
    if RANK == 0:
        connection = socket.socket(fileno=int(os.environ[worker.STORE_FD])).accept()[0]
        ready(connection.recv(64).decode() == os.environ[worker.ATTEMPT])
    else:
        connection = socket.create_connection(("127.0.0.1", int(os.environ[worker.STORE_PORT])))
        connection.sendall(os.environ[worker.ATTEMPT].encode())


def collectives(stop_requested: StopRequested) -> None:
    import torch

    from trainer.parallel import comm

    here = comm.init_comm(timeout_s=600)
    comm.barrier(here)
    ready(
        {
            "comm": [here.rank, here.world, here.local_rank, here.device.type],
            "threads": torch.get_num_threads(),
            "sums": comm.sum_floats(here, [0.1 * (here.rank + 1), 2.0**53 if here.rank else 1.0]),
            "gathered": comm.gather_objects(here, {"rank": here.rank, "keys": "ä" * 1000 * here.rank}),
            "broadcast": comm.broadcast_object(here, {"from": here.rank}, source=1),
        }
    )
    comm.close(here)


if __name__ == "__main__":
    worker.run_worker(globals()[sys.argv[1]])

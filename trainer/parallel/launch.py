"""Start the workers of this host, watch them, and end them together. Standard library only: no torch.

Each launch is one attempt with a store, a port and log files of its own. It restarts nothing.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from trainer.parallel import sentinel, worker
from trainer.parallel.environment import threads_per_worker
from trainer.parallel.failure import Failure, failure_path, first_cause, oom_kills, read_failure, silent_failure
from trainer.parallel.heartbeat import Beat, beat_path, find_late, is_stopped, read_beat
from trainer.parallel.stop_signals import StopSignals, noted_signals
from trainer.parallel.worker_template import Adopted, WorkerTemplate, reap_group

POLL_S = 0.05
GRACE_S = 5.0
LOOK_S = 0.25  # between two looks at the heartbeats
STACKS_S = 1.0  # for the workers of a hung run to write down where they are
KILL_WAIT_S = 30.0
LOG_TAIL_LINES = 20
FLIGHT_RECORDS = "flight-record-rank-"
# Left over from another launcher, or from a launch that this one runs inside of.
_FOREIGN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", worker.STORE_FD)
# Where PyTorch 2.13 looks for its CUDA allocator's settings. The old name goes before the new one there.
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_WSL_GPU = Path("/dev/dxg")


@dataclass(frozen=True)
class WorkersResult:
    """How an attempt ended.

    `exit_code` is the command's: 0, 2 (user's mistake), 1 (failure), or 128 + signal (stopped without saving).
    `worker_codes` holds each worker's return code, negative for a signal, None for one that could not be reaped.
    `failure` is the cause, to be shown with `failure.message()`. `stopped_by` is the signal that asked for the end.
    `steps_taken`: by the workers' heartbeats. `recycled`: why the workers were asked to save and end, by a `Wish`.
    """

    exit_code: int
    worker_codes: tuple[int | None, ...]
    failure: Failure | None
    stopped_by: signal.Signals | None
    steps_taken: int = 0
    recycled: str = ""


@dataclass(frozen=True)
class Wish:
    """What whoever watches the host wants of the workers: that they save and end, or, as they cannot, that they end.

    `text` says why, `rank` whose card it is about; None: all workers save and end.
    """

    text: str
    rank: int | None = None


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes] | Adopted
    log: Path | None
    log_start: int


@dataclass
class _Ending:
    """What has been done to end the workers, and what was seen of their ends."""

    failures: list[Failure] = field(default_factory=list)
    terminated: bool = False
    kill_at_s: float | None = None
    killed_s: float | None = None
    oom_kills_before: int | None = field(default_factory=oom_kills)
    look_at_s: float = 0.0
    late: tuple[int, Beat] | None = None
    recycled: str = ""


def run_workers(
    argv: Sequence[str],
    *,
    workers: int,
    log_dir: Path,
    env: Mapping[str, str],
    threads: int | None,
    gpu: bool,
    stop_notice: str = "finishing the step and saving; once more ends at once, without saving",
    look: Callable[[Sequence[int], int], Wish | None] = lambda process_ids, steps_taken: None,
    own_env: Sequence[Mapping[str, str]] = (),
    template: WorkerTemplate | None = None,
) -> WorkersResult:
    """Run `workers` processes of the command `argv` until all have ended. Call it from the main thread.

    Rank 0 shares this process's terminal; rank K writes to `log_dir/rank-K.log`. SIGINT, SIGTERM and SIGHUP are
    passed on once, as SIGTERM, so that the workers save and end; a second one kills them. When a worker fails, the
    others get `GRACE_S` seconds. No process that a worker has started outlives this call, or this process.
    GPU workers allocate in expandable segments, unless `PYTORCH_ALLOC_CONF` says otherwise.

    Args:
        argv: the whole command line, such as `[sys.executable, "-m", "trainer.cli.tasks", ...]`.
        env: environment of the workers; ranks, threads and the store are added to it.
        threads: OpenMP threads per worker; None: an exported `OMP_NUM_THREADS`, else cores / workers.
        gpu: workers use one GPU each; else they must stay on the CPU.
        stop_notice: what a stop signal's first arrival sets going, for the person to read.
        look: called every `LOOK_S` seconds with the workers' process ids and the steps that they have taken; must
            return at once.
        own_env: of each worker, before that of all; or of none.
        template: of which the workers are forks, where it can be had; `argv` is then [python, "-c", code, ...].
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    for rank in range(workers):
        failure_path(log_dir, rank).unlink(missing_ok=True)
        beat_path(log_dir, rank).unlink(missing_ok=True)
    shared = _shared_environment(env, workers, log_dir, threads_per_worker(workers, threads, env), gpu)
    started: list[_Worker] = []
    with noted_signals() as signals, _sentinel() as guard:
        try:
            environments = [{**shared, **own} for own in own_env or [{}] * workers]
            if template is not None and not template.await_ready(shared, lambda: signals.first is not None):
                template = None
            if signals.first is None:
                _start(started, argv, log_dir, environments, guard, template)
            ending = _watch(started, log_dir, signals, stop_notice, look)
        finally:
            sentinel.end_groups([w.process.pid for w in started], lambda: _reap(started))
            for w in started:
                _tell(guard, f"-{w.process.pid}\n")
    steps_taken = _steps_taken(started, log_dir)
    _remove_what_says_nothing(log_dir, workers)
    result = _result(started, ending.failures, signals.first)
    return replace(result, steps_taken=steps_taken, recycled=ending.recycled)


def _steps_taken(started: Sequence[_Worker], log_dir: Path) -> int:
    return max((beat.taken for w in started if (beat := read_beat(log_dir, w.rank))), default=0)


def _remove_what_says_nothing(log_dir: Path, workers: int) -> None:
    """Heartbeats of workers that have ended, and files for stacks that nobody asked for."""
    for rank in range(workers):
        beat_path(log_dir, rank).unlink(missing_ok=True)
        stacks = worker.stacks_path(log_dir, rank)
        if stacks.exists() and not stacks.stat().st_size:
            stacks.unlink()


def _shared_environment(env: Mapping[str, str], workers: int, log_dir: Path, threads: int, gpu: bool) -> dict[str, str]:
    shared = {name: value for name, value in env.items() if name not in _FOREIGN_VARIABLES}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # All workers are here: the loopback works also where the host's name resolves to nothing.
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if gpu:  # where PyTorch writes, after a time-out, which exchange each worker was in
        shared.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(log_dir.resolve() / FLIGHT_RECORDS))
    return {**allocator_settings(env, gpu), **shared} | {
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        worker.PARENT_PID: str(os.getpid()),
        worker.LOG_DIR: str(log_dir.resolve()),
        worker.ATTEMPT: secrets.token_hex(4),
        worker.DEVICE: "cuda" if gpu else "cpu",
    }


def allocator_settings(env: Mapping[str, str], gpu: bool) -> dict[str, str]:
    """For workers on GPUs, where nobody has chosen: segments that grow.

    A run has some 40 shapes of batches. Each leaves gaps in segments of fixed sizes that tensors of the others do not
    fit into, and the card is full before its tensors fill it.
    """
    # NVIDIA's driver for WSL fails with such segments before release 615: github.com/pytorch/pytorch/issues/192330.
    if not gpu or _ALLOCATOR in env or _OLD_ALLOCATOR in env or _WSL_GPU.exists():
        return {}
    return {_ALLOCATOR: "expandable_segments:True"}


def _start(
    started: list[_Worker],
    argv: Sequence[str],
    log_dir: Path,
    environments: Sequence[Mapping[str, str]],
    guard: subprocess.Popen[bytes],
    template: WorkerTemplate | None,
) -> None:
    """Start all ranks; those started are in `started` even when a later one cannot be."""
    # Rank 0 takes this socket over for its store: the port is never free for somebody else to take.
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        for rank, given in enumerate(environments):
            env = {**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env[worker.STORE_PORT] = str(listener.getsockname()[1])
            if rank == 0 and len(environments) > 1:
                env[worker.STORE_FD] = str(listener.fileno())
            path = log_dir / f"rank-{rank}.log" if rank else None
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(path.open("ab")) if path else None
                handed = listener.fileno() if worker.STORE_FD in env else None
                process = template and template.fork(argv, env, log and log.fileno(), handed)
                if process is None:
                    template, process = None, _new_process(argv, env, log, handed)
                started.append(_Worker(rank, process, path, log.tell() if log else 0))
            _tell(guard, f"+{process.pid}\n")


def _new_process(
    argv: Sequence[str], env: Mapping[str, str], log: IO[bytes] | None, handed: int | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=() if handed is None else (handed,),
        # Its own session: Ctrl-C in the terminal reaches this process only, and the group can be killed.
        start_new_session=True,
    )


def _watch(
    started: Sequence[_Worker],
    log_dir: Path,
    signals: StopSignals,
    stop_notice: str,
    look: Callable[[Sequence[int], int], Wish | None],
) -> _Ending:
    """Wait until every worker has ended, ending them as the rules of `run_workers` ask."""
    ending, notified = _Ending(), False
    running = list(started)
    while running:
        for w in list(running):
            code = _exit_code(w.process.pid)
            if code is None:
                continue
            running.remove(w)
            if code != 0:
                _note_death(ending, w, code, log_dir)
        now = time.monotonic()
        if ending.kill_at_s is None and signals.first is None and now >= ending.look_at_s:
            ending.look_at_s = now + LOOK_S
            _end_if_hung(ending, running, log_dir)
            if len(running) == len(started):
                _follow(ending, look([w.process.pid for w in started], _steps_taken(started, log_dir)))
        if signals.first is not None and not notified:
            notified = True
            with contextlib.suppress(OSError):  # the terminal may be what went away
                print(f"{signals.first.name}: {stop_notice}", file=sys.stderr, flush=True)
        is_over = signals.first is not None or ending.kill_at_s is not None or ending.recycled
        if is_over and not ending.terminated:
            ending.terminated = True
            for w in running:
                os.kill(w.process.pid, signal.SIGTERM)
        if ending.killed_s is None and (signals.again or (ending.kill_at_s is not None and now >= ending.kill_at_s)):
            ending.killed_s = now
            for w in running:
                os.kill(w.process.pid, signal.SIGKILL)
        if ending.killed_s is not None and now - ending.killed_s > KILL_WAIT_S:
            break  # stuck in the kernel: nothing can end it
        if running:
            time.sleep(POLL_S)
    return ending


def _follow(ending: _Ending, wish: Wish | None) -> None:
    """Do what the watch over the host wants, once."""
    if wish is None or ending.recycled or ending.kill_at_s is not None:
        return
    if wish.rank is None:
        ending.recycled = wish.text
    else:
        ending.failures.append(Failure(wish.rank, "card", time.monotonic(), wish.text))
        ending.kill_at_s = time.monotonic() + STACKS_S


def _end_if_hung(ending: _Ending, running: Sequence[_Worker], log_dir: Path) -> None:
    """Note that a worker has stopped moving, and have all of them write down where they are before they are ended."""
    late = find_late(log_dir, [w.rank for w in running])
    if late is None or late != ending.late:  # twice in a row, for a record may be half written
        ending.late = late
        return
    pids = {w.rank: w.process.pid for w in running}
    # Of workers that wait for one another within a step, the beats do not tell who keeps the others waiting.
    stopped = [(each, beat) for each, pid in pids.items() if is_stopped(pid) and (beat := read_beat(log_dir, each))]
    rank, beat = stopped[0] if stopped else late
    why = "; it is stopped by a signal or a debugger" if stopped else ""
    silent_s = time.monotonic() - beat.since_s
    text = f"has not moved for {silent_s:.0f} s, in {beat.part} after step {beat.step}{why}"
    for each, pid in pids.items():
        if read_beat(log_dir, each):  # its handler is in place
            os.kill(pid, worker.DUMP_SIGNAL)
    elsewhere = [b for each in pids if each != rank and (b := read_beat(log_dir, each))]
    alone = bool(elsewhere) and not stopped and all((b.step, b.part) != (beat.step, beat.part) for b in elsewhere)
    ending.failures.append(Failure(rank, "hang", time.monotonic(), text, alone))
    ending.kill_at_s = time.monotonic() + STACKS_S


def _exit_code(pid: int) -> int | None:
    """A child's return code, negative for a signal; None while it runs.

    It stays unreaped, so that its process id, which names its group too, cannot pass to a stranger meanwhile.
    """
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _reap(started: Sequence[_Worker]) -> None:
    for w in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            w.process.wait(timeout=1.0)
            reap_group(w.process.pid)


def _note_death(ending: _Ending, w: _Worker, code: int, log_dir: Path) -> None:
    if ending.kill_at_s is None:
        # The others cannot go on without it.
        ending.kill_at_s = time.monotonic() + GRACE_S
    own_doing = (code == -signal.SIGTERM and ending.terminated) or (
        code == -signal.SIGKILL and ending.killed_s is not None
    )
    record = read_failure(log_dir, w.rank)
    if record is not None:
        ending.failures.append(record)
    elif not own_doing:
        ending.failures.append(silent_failure(w.rank, code, _log_tail(w), ending.oom_kills_before))


def _log_tail(w: _Worker) -> str:
    if w.log is None:
        return ""
    with w.log.open("rb") as file:
        file.seek(max(w.log_start, file.seek(0, os.SEEK_END) - 16384))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _result(
    started: Sequence[_Worker], failures: Sequence[Failure], stopped_by: signal.Signals | None
) -> WorkersResult:
    codes = tuple(w.process.returncode for w in started)
    failure = first_cause(failures)
    if failure is not None and failure.kind == "lost_peer" and stopped_by is not None:
        failure = None  # the lost peer had not come far enough to save, and ended at the signal
    if failure is not None:
        return WorkersResult(failure.exit_code, codes, failure, stopped_by)
    clean = bool(codes) and all(code == 0 for code in codes)
    return WorkersResult(0 if clean else 128 + (stopped_by or signal.SIGKILL), codes, None, stopped_by)


@contextlib.contextmanager
def _sentinel() -> Iterator[subprocess.Popen[bytes]]:
    """The process that ends the workers if this one is killed; see `trainer.parallel.sentinel`."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(sentinel.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    ) as process:
        yield process


def _tell(guard: subprocess.Popen[bytes], line: str) -> None:
    assert guard.stdin is not None
    # Somebody may have ended the sentinel; the run is worth more than its guard.
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(line.encode("ascii"))

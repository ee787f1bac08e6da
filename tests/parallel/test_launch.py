"""Launches with real processes: how workers start, stop, fail and disappear."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from trainer.parallel import launch, stop_signals
from trainer.parallel.launch import WorkersResult, run_workers
from trainer.parallel.worker_template import WorkerTemplate

HERE = Path(__file__).parent
LONG_S = 120  # for what takes a moment, on a machine that has other work
ENV = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
ENV["PYTHONPATH"] = str(HERE.parents[1])


@pytest.fixture(autouse=True, params=["started", "forked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each worker a new process, or a fork of a template that has imported the trainer's modules."""
    monkeypatch.setitem(ENV, "WAY", request.param)
    return request.param


def run(mode: str, folder: Path, workers: int = 3, gpu: bool = False, **env: str) -> WorkersResult:
    argv, env = worker_command(mode, folder), {**ENV, **env}
    with template() as of:
        return run_workers(argv, workers=workers, log_dir=folder, env=env, threads=1, gpu=gpu, template=of)


@contextmanager
def template() -> Iterator[WorkerTemplate | None]:
    if ENV["WAY"] == "started":
        yield None
        return
    with WorkerTemplate(["trainer.parallel.worker", "no.such.module"], str(HERE.parents[1])) as found:
        yield found


def worker_command(mode: str, folder: Path) -> list[str]:
    code = f"import runpy; runpy.run_path({str(HERE / 'worker_script.py')!r}, run_name='__main__')"
    return [sys.executable, "-c", code, mode, str(folder)]


def note(folder: Path, rank: int) -> object:
    return json.loads((folder / f"ready-{rank}").read_text(encoding="utf-8"))


@contextmanager
def parent(mode: str, folder: Path, workers: int, *, wait: bool = True) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, str(HERE / "parent_script.py"), mode, str(folder), str(workers)]
    with subprocess.Popen(argv, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            if wait:
                until(lambda: all((folder / f"ready-{rank}").exists() for rank in range(workers)))
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pids: Sequence[int]) -> list[int]:
    found: list[int] = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
            if state != "Z":
                found.append(pid)
    return found


def worker_and_child_pids(folder: Path, workers: int) -> list[int]:
    pids: list[int] = []
    for rank in range(workers):
        found = note(folder, rank)
        assert isinstance(found, list)
        pids += found
    return pids


def test_every_worker_gets_its_place_and_its_own_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "rank-1.error.json"
    stale.write_text("left by an earlier attempt", encoding="utf-8")
    result = run("environment", tmp_path, MASTER_ADDR="elsewhere", SDXL_TRAIN_STORE_FD="99")
    assert result == WorkersResult(0, (0, 0, 0), None, None)
    assert capfd.readouterr().out == "hello from 0\n"
    assert (tmp_path / "rank-1.log").read_text(encoding="utf-8") == "hello from 1\n"
    assert not stale.exists()
    places = [note(tmp_path, rank) for rank in range(3)]
    for rank, place in enumerate(places):
        assert isinstance(place, dict)
        assert (place["RANK"], place["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"], place["OMP_NUM_THREADS"]) == ("3", "3", "1")
        assert "MASTER_ADDR" not in place
        assert ("SDXL_TRAIN_STORE_FD" in place) == (rank == 0)
        assert place["sid"] == place["pid"], "not in the terminal's session: Ctrl-C would reach it"


@pytest.mark.parametrize(
    ("gpu", "on_wsl", "exported", "expected"),
    [
        (True, False, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (False, False, {}, {}),
        (True, True, {}, {}),
        (True, False, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        # PyTorch reads the old name first, and would not see the new one.
        (True, False, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_gpu_workers_allocate_in_segments_that_grow_unless_told_otherwise(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    on_wsl: bool,
    exported: dict[str, str],
    expected: dict[str, str],
) -> None:
    monkeypatch.setattr(launch, "_WSL_GPU", tmp_path if on_wsl else tmp_path / "none")
    assert run("environment", tmp_path, workers=1, gpu=gpu, **exported).exit_code == 0
    place = note(tmp_path, 0)
    assert isinstance(place, dict)
    assert {name: value for name, value in place.items() if name.endswith("_ALLOC_CONF")} == expected


@pytest.mark.e2e
def test_two_launches_at_once_keep_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with (
        parent("store_socket", folders[0], 2, wait=False) as one,
        parent("store_socket", folders[1], 2, wait=False) as two,
    ):
        assert [one.wait(LONG_S), two.wait(LONG_S)] == [0, 0]
    assert [note(folder, 0) for folder in folders] == [True, True]


def test_error_of_one_worker_ends_all(tmp_path: Path) -> None:
    result = run("error", tmp_path)
    assert result.exit_code == 1
    assert result.worker_codes == (0, 0, 1)
    assert result.failure is not None
    message = result.failure.message()
    assert message.startswith("worker 2 failed:\nTraceback")
    assert message.endswith("ValueError: no such bucket")
    assert "no such bucket" in (tmp_path / "rank-2.log").read_text(encoding="utf-8")


def test_user_error_is_its_lines_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run("user_error", tmp_path)
    assert result.exit_code == 2
    assert result.failure is not None
    assert result.failure.message() == "model.path: not a folder\ndata.sources: empty"
    assert "Traceback" not in capfd.readouterr().err


def test_cause_is_shown_not_its_echo(tmp_path: Path) -> None:
    result = run("echo", tmp_path)
    assert result.failure is not None
    assert (result.failure.rank, result.failure.kind) == (1, "error")


@pytest.mark.e2e
def test_segfault_is_named(tmp_path: Path) -> None:
    result = run("segfault", tmp_path)
    assert result.exit_code == 1
    assert result.failure is not None
    assert "worker 1 was ended by SIGSEGV" in result.failure.message()
    assert "in segfault" in result.failure.message(), "faulthandler's stack, from the log"


@pytest.mark.e2e
def test_kill_is_named_with_a_hint_and_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "rank-1.log").write_text("an earlier attempt\n", encoding="utf-8")
    result = run("killed", tmp_path)
    assert result.exit_code == 1
    assert result.failure is not None
    message = result.failure.message()
    assert "worker 1 was ended by SIGKILL (exit 137: somebody else's doing" in message
    assert message.endswith("reading shard 7")
    assert "earlier attempt" not in message


@pytest.mark.e2e
def test_deaf_workers_and_their_children_are_killed_after_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    result = run("deaf", tmp_path, FAILING="2")
    assert result.exit_code == 1
    assert result.worker_codes == (-signal.SIGKILL, -signal.SIGKILL, 1)
    assert result.failure is not None
    assert result.failure.message().endswith("ValueError: gave up")
    assert alive(worker_and_child_pids(tmp_path, 2)) == []


def test_command_that_cannot_start(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in a shell's background
    with pytest.raises(FileNotFoundError):
        run_workers([str(tmp_path / "none")], workers=2, log_dir=tmp_path, env=ENV, threads=1, gpu=False)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_lets_workers_save(tmp_path: Path, number: signal.Signals) -> None:
    with parent("steps", tmp_path, 2) as process:
        os.killpg(process.pid, number)
        assert process.wait(LONG_S) == 0
        assert process.stderr is not None
        assert process.stderr.read().startswith(f"{number.name}: finishing the step")
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


@pytest.mark.e2e
def test_second_signal_kills(tmp_path: Path) -> None:
    with parent("deaf", tmp_path, 2) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        time.sleep(stop_signals.SAME_SIGNAL_S + 0.2)
        assert process.poll() is None, "the same Ctrl-C, passed on by a wrapper, is no second one"
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG_S) == 128 + signal.SIGINT
    assert alive(worker_and_child_pids(tmp_path, 2)) == []


@pytest.mark.e2e
def test_killing_the_parent_leaves_no_orphan(tmp_path: Path) -> None:
    with parent("deaf", tmp_path, 2) as process:
        pids = worker_and_child_pids(tmp_path, 2)
        assert len(alive(pids)) == 4
        process.kill()
        until(lambda: alive(pids) == [])


@pytest.mark.e2e
def test_workers_end_with_the_parent_even_without_the_sentinel(tmp_path: Path) -> None:
    with parent("deaf", tmp_path, 2) as process:
        pids = worker_and_child_pids(tmp_path, 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        (sentinel,) = [int(pid) for pid in children if b"sentinel" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(sentinel, signal.SIGKILL)
        process.kill()
        try:
            until(lambda: alive(pids[::2]) == [])
        finally:
            for pid in pids[1::2]:
                os.kill(pid, signal.SIGKILL)


def test_forks_of_one_template_share_it_over_starts(tmp_path: Path, way: str) -> None:
    """Also after it was killed, and with another environment: then there is a new one."""
    if way == "started":
        pytest.skip("no template")
    code = "import os, sys; open(os.path.join(sys.argv[1], os.environ['RANK']), 'w').write(str(id(sys.modules)))"
    found, gone = list[str](), []
    with template() as of:
        assert of is not None
        for number, env in enumerate((ENV, ENV, ENV, {**ENV, "OTHER": "1"})):
            folder = tmp_path / str(number)
            folder.mkdir()
            argv = [sys.executable, "-c", f"VALUE = {number}; {code}", str(folder)]
            result = run_workers(argv, workers=2, log_dir=tmp_path, env=env, threads=1, gpu=False, template=of)
            assert result == WorkersResult(0, (0, 0), None, None)
            found += [(folder / "0").read_text(), (folder / "1").read_text()]
            gone.append(of.process_id)
            if number == 1:
                os.kill(of.process_id, signal.SIGKILL)
    assert gone[0] == gone[1] and len(set(gone)) == 3
    assert len(set(found[:4])) == 1, "the same objects at the same places"
    assert alive(gone) == []


@pytest.mark.parametrize("touched", ["initialized", "counted"])
def test_workers_do_not_inherit_a_cuda_that_was_touched(tmp_path: Path, way: str, touched: str) -> None:
    """By an import, as bitsandbytes does: then each is a process of its own, which has imported nothing yet."""
    if way == "started":
        pytest.skip("no template")
    (tmp_path / "torch").mkdir()
    stand_in = f"is_initialized = lambda: {touched == 'initialized'}\n_is_in_bad_fork = lambda: True\n"
    (tmp_path / "torch" / "cuda.py").write_text(stand_in)
    (tmp_path / "torch" / "__init__.py").write_text("from torch import cuda\n")
    env = {**ENV, "PYTHONPATH": f"{tmp_path}:{ENV['PYTHONPATH']}"}
    code = "import os, sys; open(os.path.join(sys.argv[1], os.environ['RANK']), 'w').write(str('torch' in sys.modules))"
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with WorkerTemplate(["torch"], str(HERE.parents[1])) as of:
        for _ in range(2):
            result = run_workers(argv, workers=2, log_dir=tmp_path, env=env, threads=1, gpu=True, template=of)
            assert result == WorkersResult(0, (0, 0), None, None)
            assert [(tmp_path / name).read_text() for name in "01"] == ["False", "False"]
            assert bool(of.process_id) == (touched == "counted")


def test_a_stop_while_the_template_imports_ends_the_command(tmp_path: Path, way: str) -> None:
    if way == "started":
        pytest.skip("no template")
    (tmp_path / "long_import.py").write_text(
        "import pathlib, time\npathlib.Path(__file__ + '.on').touch()\ntime.sleep(99)"
    )
    code = "import sys; from parent_script import launch; launch('long_import')"
    env = {**ENV, "PYTHONPATH": f"{ENV['PYTHONPATH']}:{HERE}:{tmp_path}"}
    argv = [sys.executable, "-c", code, "steps", str(tmp_path), "2"]
    with subprocess.Popen(argv, env=env, start_new_session=True) as process:
        until((tmp_path / "long_import.py.on").exists)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG_S) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 5


def test_launching_needs_no_torch() -> None:
    code = "import sys, trainer.parallel.launch, trainer.parallel.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, check=False).returncode == 0

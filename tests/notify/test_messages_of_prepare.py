"""Messages of `prepare`, by real commands over a real server: begun, done, stopped, killed, images of no use."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.evaluate.two_sources import two_sources
from tests.hosts.warm_server import warm_python
from tests.notify.test_messages import SECRET, Hook, hook
from tests.test_end_to_end import config_file, photos
from tests.train.real_run import model_of
from tests.warm_processes import WarmCommand, sdxl_train
from trainer.cli import run_messages
from trainer.cli.run_messages import PrepareMessages
from trainer.config.sections.notify_config import NotifyConfig
from trainer.data.prepare.stages import plan_prepare, unusable_so_far
from trainer.parallel.worker import process_name
from trainer.train.workers.prepare_worker import encode_share, prepare_settings

__all__ = ["config_file", "hook", "photos"]  # fixtures
pytestmark = pytest.mark.e2e

ALL = "notify.on=[start,finish,fault,bad_data]"


def overrides(tmp_path: Path, hook: Hook) -> list[str]:
    return [f"data.prepared={tmp_path / 'p'}", f"run.dir={tmp_path / 'fox'}", f"notify.webhook={hook.url}", ALL]


def told(hook: Hook) -> list[tuple[str, str]]:
    assert all(body["run"] == "fox" for _, body in hook.got)
    return [(body["event"], body["text"]) for _, body in hook.got]


def wait_for(hook: Hook, count: int, process: WarmCommand) -> None:
    for _ in range(6000):
        if len(hook.got) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no message came")


def cut(path: Path) -> None:
    """So that its header is sound, and only whoever decodes it sees that it is not whole."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_two_workers_tell_of_start_unusable_images_and_finish_once(
    tmp_path: Path, config_file: Path, photos: Path, hook: Hook
) -> None:
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    cut(source / "coffee-03.png")
    script = "import os, sys; open(sys.argv[1], 'a').write(os.environ['SDXL_TRAIN_EVENT'] + '\\n')"
    command = f"notify.command={json.dumps([sys.executable, '-c', script, str(tmp_path / 'told')])}"
    given = [*overrides(tmp_path, hook), f"data.sources=[{{path: {source}}}]", "launch.workers=2", command]
    done = sdxl_train("prepare", config_file, *given)
    prepared = tmp_path / "p"
    start, bad, finish = told(hook)
    assert start == ("start", f"preparing {prepared} begins: 36 images found, 36 to be encoded")
    limit = "more than data.max_bad_fraction = 0.001"
    assert bad == ("bad_data", f"1 of 36 images cannot be used, {limit}; see {prepared / 'bad.jsonl'}")
    assert finish[0] == "finish" and finish[1].startswith("prepared 35 images, 1 unusable in ")
    assert finish[1].endswith(f"; {prepared}")
    assert (tmp_path / "told").read_text().split() == ["start", "bad_data", "finish"]
    for file in [path for path in prepared.rglob("*") if path.is_file()]:
        assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in done.stderr + done.stdout

    # Nothing new: `prepare` says so, and a training that has nothing to prepare does not.
    hook.got.clear()
    sdxl_train("prepare", config_file, *given)
    assert [event for event, _ in told(hook)] == ["start", "bad_data", "finish"]
    assert "36 images found, 0 to be encoded" in told(hook)[0][1]
    hook.got.clear()
    sdxl_train(config_file, *given, "train.steps=1")
    assert [text.split(";")[0] for _, text in told(hook)] == ["training begins with 2 workers", "done"]


def test_sigterm_and_a_killed_worker_are_told_and_the_same_command_goes_on(
    tmp_path: Path, config_file: Path, hook: Hook
) -> None:
    given = ["prepare", str(config_file), *overrides(tmp_path, hook), "launch.workers=2"]
    with WarmCommand(*given) as process:
        wait_for(hook, 1, process)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=600)
    # Before its workers are there it ends by the signal itself.
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM), printed
    assert [event for event, _ in told(hook)] == ["start", "finish"]
    assert told(hook)[1][1].startswith("preparing is stopped by SIGTERM; ")
    assert told(hook)[1][1].endswith(" of 36 images are encoded, the same command goes on")

    hook.got.clear()
    with WarmCommand(*given) as process:
        wait_for(hook, 1, process)
        worker = wait_for_worker(process, 1)
        worker.kill()
        printed = process.communicate(timeout=600)
    assert process.returncode == 1, printed
    (start, fault) = told(hook)
    assert start[0] == "start" and fault[0] == "fault"
    assert fault[1].startswith("preparing is given up: worker 1 was ended by SIGKILL")

    hook.got.clear()
    sdxl_train(config_file, *overrides(tmp_path, hook), "train.steps=1", "samples.count=1")
    assert [text.split(" ")[0] for _, text in told(hook)] == ["preparing", "prepared", "training", "done;"]


def wait_for_worker(process: WarmCommand, rank: int) -> psutil.Process:
    for _ in range(6000):
        for child in psutil.Process(process.pid).children():
            if child.name() == process_name(rank):
                return child
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no worker came")


def test_a_mistake_is_told_too_and_a_wrong_address_changes_nothing(
    tmp_path: Path, config_file: Path, hook: Hook
) -> None:
    (tmp_path / "empty").mkdir()
    given = [*overrides(tmp_path, hook), f"data.sources=[{{path: {tmp_path / 'empty'}}}]"]
    failed = sdxl_train("prepare", config_file, *given, expect=2)
    assert told(hook) == [("fault", f"preparing is given up: data.sources ({tmp_path / 'empty'}): no image")]
    assert f"data.sources ({tmp_path / 'empty'}): no image" in failed.stderr
    options = ["notify.webhook=env:NO_SUCH_VARIABLE", "notify.on=[start,finish]", f"data.prepared={tmp_path / 'q'}"]
    done = sdxl_train("prepare", config_file, *options)
    assert "the variable NO_SUCH_VARIABLE is not set), 2 by now" in done.stderr and "prepared 36 images" in done.stdout


WAITING = """
import sys, time
from pathlib import Path
from trainer.cli.run_messages import telling_of_prepare
from trainer.config.load import load_config
config = load_config(Path(sys.argv[1]), sys.argv[2:], check_paths=False)
with telling_of_prepare(config, alone=True):
    print("looking", flush=True)
    time.sleep(600)
"""


def test_signals_while_no_workers_are_there(tmp_path: Path, config_file: Path, hook: Hook) -> None:
    """Told, and the process ends by the signal, as it does without messages."""
    command = [sys.executable, "-W", "error", "-c", WAITING, str(config_file), *overrides(tmp_path, hook)]
    for way in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        hook.got.clear()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "looking\n"
            os.kill(process.pid, way)
            process.communicate(timeout=600)
        assert process.returncode == -way
        assert told(hook) == [("finish", f"preparing is stopped by {way.name}")]


def test_unusable_images_are_told_while_others_are_encoded(
    tmp_path: Path, model_folder: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_sources(model_folder, tmp_path)
    for number in (1, 3):
        cut(tmp_path / "noise" / f"{number:02d}.png")
    notify = NotifyConfig.model_validate({"webhook": hook.url})
    data = config.data.model_copy(update={"prepared": tmp_path / "again"})
    config = config.model_copy(update={"data": data, "notify": notify})
    plan_prepare(prepare_settings(config, model_of(config)), show_progress=False)
    known: dict[str, tuple[int, int]] = {}
    assert unusable_so_far(tmp_path / "again", known) == (0, 0)
    monkeypatch.setattr(run_messages, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(run_messages, "_JUDGED_FROM", 1)
    with PrepareMessages(config, alone=True) as messages, messages.watching():
        encode_share(config, model_of(config))
        for _ in range(3000):
            if hook.got:
                break
            time.sleep(0.02)
        time.sleep(0.2)  # and no second one
    assert unusable_so_far(tmp_path / "again", known) == (2, 40)
    ((_, body),) = hook.got
    assert body["event"] == "bad_data"
    assert re.match(r"[12] of \d+ images tried so far cannot be used, more than", body["text"])


def joined(*arguments: object) -> int:
    """The exit code of torchrun with two workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "trainer"]
    env = os.environ | warm_python()
    return subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, timeout=800).returncode


def test_of_a_job_of_torchruns_one_worker_tells(tmp_path: Path, config_file: Path, hook: Hook) -> None:
    good = ["prepare", config_file, *overrides(tmp_path, hook)]
    assert joined(*good) == 0
    assert [event for event, _ in told(hook)] == ["start", "finish"]
    assert told(hook)[1][1].startswith("prepared 36 images in ")
    hook.got.clear()
    (tmp_path / "empty").mkdir()
    assert joined(*good, f"data.sources=[{{path: {tmp_path / 'empty'}}}]") != 0
    assert [event for event, _ in told(hook)] == ["fault"]

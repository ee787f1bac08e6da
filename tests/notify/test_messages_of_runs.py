"""Messages of whole commands: started, killed, started again by itself, stopped."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.notify.test_messages import SECRET, Hook, hook
from tests.test_end_to_end import (
    _wait_for_event,
    _wait_for_steps,
    _worker,
    config_file,
    photos,
)
from tests.warm_processes import WarmCommand, sdxl_train

__all__ = ["config_file", "hook", "photos"]  # fixtures
pytestmark = pytest.mark.e2e


def test_a_run_tells_of_its_start_its_fault_its_samples_and_its_end(
    tmp_path: Path, config_file: Path, hook: Hook
) -> None:
    run_dir = tmp_path / "run"
    told = ["start", "finish", "fault", "restart", "samples"]
    options = [f"run.dir={run_dir}", "launch.workers=2", "train.steps=400", "checkpoint.every_steps=3",
               f"notify.webhook={hook.url}", f"notify.on=[{','.join(told)}]", "samples.every_steps=4",
               "samples.count=1", "samples.steps=1"]  # fmt: skip
    with WarmCommand(config_file, *options) as process:
        _wait_for_steps(run_dir, 9, process)
        _worker(process, 1).kill()
        _wait_for_event(run_dir, "starting again", 1, process)
        _wait_for_a_newer_checkpoint(run_dir, process)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    events = [body["event"] for _, body in hook.got]
    assert events[0] == "start" and events[-1] == "finish" and events.count("fault") == 1
    texts = {body["event"]: body["text"] for _, body in hook.got}
    assert texts["start"] == "training begins with 2 workers"
    assert "worker 1 was ended by SIGKILL" in texts["fault"] and "starting again from" in texts["fault"]
    assert f"samples in {run_dir}/samples/step-" in texts["samples"]
    assert texts["finish"].startswith("stopped by SIGINT; newest checkpoint: step-")
    assert all(body["run"] == "run" for _, body in hook.got)
    for file in [path for path in run_dir.rglob("*") if path.is_file()]:
        assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in printed


def _wait_for_a_newer_checkpoint(run_dir: Path, process: WarmCommand) -> None:
    """The workers that were started again are at work."""
    before = max(path.name for path in (run_dir / "checkpoints").glob("step-????????"))
    for _ in range(3000):
        if max(path.name for path in (run_dir / "checkpoints").glob("step-????????")) > before:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no checkpoint came")


def test_a_wrong_address_and_a_wrong_command_change_nothing(tmp_path: Path, config_file: Path) -> None:
    run_dir = tmp_path / "run"
    options = [f"run.dir={run_dir}", "notify.webhook=env:NO_SUCH_VARIABLE", "notify.command=[/no/such]",
               "notify.on=[start,finish]", "train.steps=2"]  # fmt: skip
    done = sdxl_train(config_file, *options)
    assert "notify.webhook: a message was not sent (the variable NO_SUCH_VARIABLE is not set), 2 by now" in done.stderr
    assert "notify.command: a message was not sent (/no/such: No such file or directory), 2 by now" in done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]

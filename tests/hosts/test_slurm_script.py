"""scripts/slurm.sh as a batch job: its commands of SLURM are stood in for, the tasks that they start are real ones.

The stand-ins follow the manuals of srun, scancel and scontrol: tasks with SLURM's variables, all killed when one fails;
a signal to the tasks and not to the batch script; a note that the job was queued again.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.hosts.hosted_run import PATIENCE_S, steps_of, tensor_hashes, wait_until, write_run
from tests.hosts.warm_server import warm_python
from trainer.checkpoint.run_dir import list_checkpoints

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
STEPS = 12
STAND_INS = {
    "srun": """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
step=$(cat "$STAND_INS/steps" 2>/dev/null | wc -l)
echo >>"$STAND_INS/steps"
pids=()
for task in 0 1; do
    SLURM_STEP_ID=$step SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NODEID=$task SLURM_STEP_NUM_TASKS=2 \\
        SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" &
    pids+=($!)
done
echo "${pids[@]}" >"$STAND_INS/tasks"
worst=0
for _ in "${pids[@]}"; do
    code=0
    wait -n || code=$?
    if [ "$code" -gt "$worst" ]; then worst=$code; kill -KILL "${pids[@]}" 2>/dev/null; fi
done
exit "$worst"
""",
    "scancel": """#!/usr/bin/env bash
[ "$1" = --signal=TERM ] && [ "$2" = "$SLURM_JOB_ID" ] || exit 99
kill -TERM $(cat "$STAND_INS/tasks")
""",
    "scontrol": """#!/usr/bin/env bash
echo "$@" >>"$STAND_INS/queue"
""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{warm_python()['PATH']}"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "1"}
    here = {"PATH": path, "STAND_INS": str(tmp_path), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | here | slurm | {"CUDA_VISIBLE_DEVICES": "", "LINGER": "0"}


def start(job: dict[str, str], *arguments: object) -> "subprocess.Popen[str]":
    command = [str(ROOT / "scripts" / "slurm.sh"), *map(str, arguments)]
    return subprocess.Popen(command, env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_job_out_of_time_is_saved_queued_again_and_changes_no_bit(
    tmp_path: Path, job: dict[str, str], model_folder: Path
) -> None:
    """A task is killed first, and all of them start again."""
    config = write_run(tmp_path, model_folder)
    straight = start(job, config, f"run.dir={tmp_path / 'straight'}")
    said, _ = straight.communicate(timeout=PATIENCE_S)
    assert straight.returncode == 0, said
    run_dir, queue = tmp_path / "run", tmp_path / "queue"
    batch = start(job, config)
    wait_until(lambda: bool(list_checkpoints(run_dir)), lambda: batch.poll() is None, "a checkpoint")
    os.kill(int((tmp_path / "tasks").read_text().split()[1]), signal.SIGKILL)
    before = steps_of(run_dir)
    wait_until(lambda: steps_of(run_dir) > before, lambda: batch.poll() is None, "a step after the fault")
    batch.send_signal(signal.SIGUSR1)
    said, _ = batch.communicate(timeout=PATIENCE_S)
    assert batch.returncode == 0 and "slurm.sh: all tasks start again (exit code 137, 1 in a row failed soon)" in said
    assert queue.read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    assert 3 < int(list_checkpoints(run_dir)[-1].name.removeprefix("step-")) < STEPS
    again = start(job, config)
    said, _ = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, said
    assert queue.read_text().count("requeue") == 1
    assert tensor_hashes(run_dir, STEPS) == tensor_hashes(tmp_path / "straight", STEPS)
    assert not list(tmp_path.glob(".endings-*"))


def test_a_mistake_ends_the_job(tmp_path: Path, job: dict[str, str], model_folder: Path) -> None:
    done = start(job, write_run(tmp_path, model_folder), "optimizer.lr=fast")
    said, _ = done.communicate(timeout=PATIENCE_S)
    assert done.returncode == 2 and "optimizer.lr" in said and "start again" not in said


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_nothing_to_be_said_against_the_scripts() -> None:
    scripts = [ROOT / "scripts" / name for name in ("hosts.sh", "slurm.sh")]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert not done.stdout + done.stderr


def test_skypilots_task_trains(tmp_path: Path, model_folder: Path) -> None:
    """Its script on one machine of two workers, with the variables that SkyPilot's manual names."""
    task = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
    assert (ROOT / task["envs"]["CONFIG"]).is_file() and task["num_nodes"] == 2
    write_run(tmp_path, model_folder)
    (tmp_path / "sdxl-train").mkdir()
    (tmp_path / "sdxl-train" / "bin").symlink_to(Path(sys.executable).parent)
    sky = {"SKYPILOT_NODE_IPS": "127.0.0.1\n", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}
    sky |= {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    sky |= {"CONFIG": str(tmp_path / "config.yaml"), "SHARED": str(tmp_path), "OVERRIDES": "train.steps=2 run.dir=mine"}
    env = os.environ | sky | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    env["PYTHON_EXEC"] = warm_python()["PYTHON_EXEC"]
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "mine")] == ["step-00000002"]

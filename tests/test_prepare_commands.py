"""`prepare` as it is typed: by two hosts over a folder that both see, again after changes, and not at all."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.data.photographs import write_crops
from tests.warm_processes import WarmCommand, sdxl_train
from tests.worker_group import worker_environments
from trainer.data.catalog import catalog

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Path:
    write_crops(tmp_path / "photos", 48)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"""run: {{dir: {tmp_path}/run}}
model: {{path: {model_folder}, vae_precision: fp32}}
data:
  sources: [{{path: {tmp_path}/photos}}]
  prepared: {tmp_path}/one
  rows_per_shard: 4
  buckets: {{resolution: 128, min_px: 64, max_px: 256, step_px: 64}}
train: {{steps: 1}}
optimizer: {{lr: 1e-4}}
launch: {{workers: 1}}
"""
    )
    return path


def run(*arguments: object, code: int = 0) -> str:
    done = sdxl_train(*arguments, expect=code)
    return done.stdout + done.stderr


def finished(prepared: Path) -> dict[str, bytes]:
    kinds = ("shards", "snapshots", "edits", "settings.json", "CURRENT", "bad.jsonl")
    files = [path for kind in kinds for path in (prepared / kind, *(prepared / kind).rglob("*")) if path.is_file()]
    return {path.relative_to(prepared).as_posix(): path.read_bytes() for path in files}


def test_two_hosts_over_a_shared_folder(config: Path, tmp_path: Path) -> None:
    said = run("prepare", config)
    assert "prepared 48 images" in said and "img/s, " in said and " each of 1 worker" in said
    command = ["prepare", config, f"data.prepared={tmp_path}/two"]
    with ExitStack() as stack:
        hosts = [stack.enter_context(WarmCommand(*command, env=env)) for env in worker_environments(2, on_each_host=1)]
        told = [host.communicate(timeout=600)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert "prepared 48 images" in told[0] and " each of 2 workers" in told[0] and told[1] == ""
    assert finished(tmp_path / "two") == finished(tmp_path / "one")
    said = run("prepare", config, f"data.prepared={tmp_path}/part", "--part", "2/2")
    assert "part 2 of 2: " in said and "--merge FOLDER" in said and not (tmp_path / "part" / "CURRENT").exists()


def test_again_after_changes_and_without_the_source(config: Path, tmp_path: Path) -> None:
    photos, weighted = tmp_path / "photos", "data.sources=[{path: " + str(tmp_path / "photos") + ", weight: 0.5}]"
    run("prepare", config)
    (photos / "crop-0-001.txt").write_text("another text")
    for ending in ("jpg", "txt"):
        (photos / f"crop-0-002.{ending}").rename(photos / f"renamed.{ending}")
    assert "changes: 1 caption changed, 1 renamed" in run("prepare", config)
    for i in range(10, 40):
        (photos / f"crop-0-{i:03d}.jpg").unlink()
    said = run("prepare", config, code=2)
    assert "30 of its 48 prepared images are not there any more" in said and "--drop-removed" in said
    said = run("prepare", config, weighted, "--drop-removed", "--prune")
    assert "changes: 30 removed" in said and "prepared 18 images" in said
    assert " files deleted, 0.00 GB given back; a run that stopped within an epoch" in said
    assert "photos: 9 images per epoch, 100.0%" in run("plan", config, weighted)
    (photos / "crop-0-003.txt").write_text("seen at the start")
    said = run(config, weighted, "data.look_at_start=true")
    assert "changes: 1 caption changed" in said and "done: step 1" in said
    photos.rename(tmp_path / "gone")
    said = run(config, weighted, "train.steps=2")
    assert f"{photos} is not there; training on what was prepared from it" in said and "done: step 2" in said
    said = run("prepare", config, weighted, code=2)
    assert f"data.sources: path ({photos}): there is no such folder" in said and "Traceback" not in said


def test_images_at_two_resolutions_from_preparing_to_training(config: Path, tmp_path: Path) -> None:
    run("prepare", config)
    config.write_text(
        config.read_text().replace("step_px: 64}", "step_px: 64, also_at: [{resolution: 64, share: 0.5}]}")
    )
    (tmp_path / "photos" / "crop-0-007.jpg").unlink()
    said = run("prepare", config, "--keep-removed", code=2)
    assert "data.buckets.also_at" in said and "crop-0-007.jpg" in said
    said = run("prepare", config)
    assert "to be encoded: 0 at the main resolution, 47 at 64 px" in said and "prepared 47 images" in said
    said = run("plan", config)
    assert "at 128 px: 24 images per epoch, 51.1%" in said and "at 64 px: 23 images per epoch, 48.9%" in said
    assert "train, the same images at 64 px:" in run("data", "stats", config)
    told = run("data", "show", config, "crop-0-003", "--epochs", "6")
    assert 1 <= told.count("(at 64 x 64 px)") <= 5 and told.count("seen 1 time") == 6
    files = {}
    for name, steps in {"straight": (8,), "resumed": (3, 8)}.items():
        for total in steps:
            run(config, f"train.steps={total}", "train.global_batch_size=4", f"run.dir={tmp_path}/{name}")
        found = tmp_path / name / "checkpoints/step-00000008/unet/diffusion_pytorch_model.safetensors"
        files[name] = found.read_bytes()
    assert files["straight"] == files["resumed"]


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_dry_run_says_what_prepare_would_do_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    photos, prepared = tmp_path / "photos", tmp_path / "one"
    said = run("prepare", config, "--dry-run")
    assert "48 images found: 48 new, 0 prepared before, 0 unusable" in said and "48 would be encoded; how fast" in said
    assert not prepared.exists()
    run("prepare", config)
    (photos / "crop-0-001.txt").write_text("another text")
    (photos / "crop-0-002.jpg").write_bytes((photos / "crop-0-003.jpg").read_bytes() + b"\0")
    (photos / "crop-0-004.jpg").write_bytes(b"no image")
    (photos / "crop-0-005.jpg").rename(photos / "renamed.jpg")
    (photos / "crop-0-006.jpg").unlink()
    (photos / "new.jpg").write_bytes((photos / "crop-0-007.jpg").read_bytes() + b"\0")
    before = everything(prepared)
    filters = ("data.filters={min_side_px: 110}", "captions.max_empty_fraction=1")
    said = run("prepare", config, *filters, "--dry-run")
    assert everything(prepared) == before
    told = said.splitlines()[1:]
    assert " would be encoded, in about " in told[-1]
    assert told[-1].endswith(" img/s of the last time, with 1 worker; nothing was written")
    shown = [line.partition("; all in ")[0] for line in run("prepare", config, *filters).splitlines()]
    assert [line for line in told[:-1] if line not in shown] == [], "what prepare says, but for the places of lists"
    assert "1 caption changed, 1 renamed, 1 image changed, 1 removed" in said and "filters leave out" in said
    assert " is not an image of a known kind" in said
    assert "no image is to be encoded; nothing was written" in run("prepare", config, *filters, "--dry-run")
    for i in range(10, 40):
        (photos / f"crop-0-{i:03d}.jpg").unlink()
    said = run("prepare", config, "--dry-run", code=2)
    assert f"data.sources ({photos}): " in said and "are not there any more" in said
    said = run("prepare", config, "data.validation_fraction=0.5", "--dry-run", code=2)
    assert f"data.prepared ({prepared}): was prepared with " in said and "dry-run-" not in said
    assert "leave one of them out" in run("prepare", config, "--dry-run", "--prune", code=2)


WAITING = """
import sys, time
from pathlib import Path
from trainer.cli.prepare_set import PrepareWish, tell_plan
from trainer.cli import prepare_set
from trainer.cli.arguments import read_run
def wait(settings, **options):
    assert (settings.prepared / "catalog.sqlite").is_file()
    print("planning", flush=True)
    time.sleep(600)
prepare_set.plan_prepare = wait
config, model = read_run(Path(sys.argv[1]), [])
tell_plan(config, model, PrepareWish())
"""


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_dry_run_that_is_ended_leaves_no_copy(way: signal.Signals, config: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with catalog.open_catalog(tmp_path / "one"):
        pass
    place = tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-c", WAITING, str(config)]
    environment = ENVIRONMENT | {"TMPDIR": str(place)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"planning\n" in (process.stdout.readline(), process.stdout.readline())
        assert any(place.iterdir())
        process.send_signal(way)
        process.communicate(timeout=600)
    assert process.returncode == -way and not any(place.iterdir())

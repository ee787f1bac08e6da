"""Whole commands in real processes: what a person types, and what must lie on the disk afterwards."""

import hashlib
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
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.warm_processes import WarmCommand, sdxl_train
from trainer.checkpoint.run_dir import only_writer
from trainer.optim.ema_profile import PlainEma, PowerEma
from trainer.parallel.worker import process_name

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-W", "error", "-m", "trainer"]


def typed(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command as a new process; its exit code must be `expect`."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=12000)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of real photographs in a few shapes, with captions."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        picture = Image.fromarray(getattr(data, name)())
        for index, (width, height) in enumerate([(128, 128), (192, 96), (96, 192)] * 4):
            left, top = 7 * index, 5 * index
            crop = picture.crop((left, top, left + width, top + height))
            crop.save(folder / f"{name}-{index:02d}.png")
            (folder / f"{name}-{index:02d}.txt").write_text(f"photograph of {name}, part {index}")
    return folder


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, photos: Path) -> Path:
    """A config for quick runs; its data set is prepared by the first test that needs it."""
    folder = tmp_path_factory.mktemp("config")
    config = {
        "run": {"dir": str(folder / "unused"), "seed": 3},
        "launch": {"workers": 1, "threads_per_worker": 1},
        "model": {"path": str(model_folder)},
        "data": {
            "sources": [{"path": str(photos)}],
            "prepared": str(folder / "prepared"),
            "buckets": {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64},
            "validation_fraction": 0.15,
            "workers": 0,
        },
        "train": {"steps": 8, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    sdxl_train("prepare", path)
    return path


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def unet_hash(run_dir: Path, step: int) -> str:
    file = run_dir / f"checkpoints/step-{step:08d}/unet/diffusion_pytorch_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_smoke(tmp_path: Path, model_folder: Path, photos: Path, config_file: Path) -> None:
    """Two workers from nothing: prepare, train, sample, stop, resume, evaluate; exactly the promised files."""
    run_dir, prepared = tmp_path / "run", tmp_path / "prepared"
    overrides = [f"run.dir={run_dir}", f"data.prepared={prepared}", "launch.workers=2", "checkpoint.every_steps=3"]
    overrides += ["validation.every_steps=4", "samples.every_steps=8", "samples.count=3", "samples.steps=2"]
    done = typed(config_file, *overrides)
    assert "2 workers x 1 image x 2 accumulation = 4 images per step" in done.stderr
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tensorboard/events.")}
    assert len(events) == 1
    checkpoint_files = ["manifest.json", "training_state/optimizer.safetensors", "training_state/state.json"]
    checkpoint_files += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    expected = {f"checkpoints/step-{step:08d}/{name}" for step in (3, 6, 8) for name in checkpoint_files}
    expected |= {f"samples/step-00000008/{index:02d}.png" for index in range(3)} | {"samples/step-00000008.png"}
    expected |= {"config.resolved.yaml", "metrics.jsonl", "log.txt", "loss.png", "run.lock", "logs/rank-1.log"}
    assert names - events - {"host.jsonl"} == expected  # which is begun after some seconds

    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(run_dir / "checkpoints/step-00000008/unet", local_files_only=True)
    assert unet.config["addition_embed_type"] == "text_time"

    done = sdxl_train(run_dir / "config.resolved.yaml", "train.steps=10", "--resume", "true")
    assert "goes on after step 8, 2 steps to go" in done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kinds = {step: sorted(record["kind"] for record in records if record["step"] == step) for step in (8, 9, 10)}
    assert kinds == {8: (ends := ["phases", "train", "validation"]), 9: ["train"], 10: ends}

    done = typed("eval", run_dir, "samples.steps=2")
    record = json.loads((run_dir / "eval/step-00000010/validation.json").read_text())
    assert record["images"] > 0 and f"validation loss {record['loss']:.5f}" in done.stderr
    assert (run_dir / "eval/step-00000010/samples.png").is_file()
    sdxl_train("sample", run_dir, "--prompt", "a cat", "--out", tmp_path / "drawn", "samples.steps=2")
    with Image.open(tmp_path / "drawn/step-00000010/00.png") as image:
        assert image.size == (128, 128)
    (tmp_path / "prompts.txt").write_text("a dog --w 192 --ss ddim\na cat --d 5 --s 3\n")
    listed = [{"prompt": "a dog", "width": 192, "sample_sampler": "ddim"}, "a cat --d 5 --s 3"]
    (tmp_path / "prompts.json").write_text(json.dumps(listed))
    for ending in ("txt", "json"):
        sdxl_train("sample", run_dir, "--prompt-file", tmp_path / f"prompts.{ending}", "samples.steps=2")
    drawn = run_dir / "samples/drawn"
    assert sorted(path.name for path in drawn.iterdir() if path.name.startswith("step-")) == [
        "step-00000010", "step-00000010-2", "step-00000010-2.png", "step-00000010.png"
    ]  # fmt: skip
    with Image.open(drawn / "step-00000010-2/00.png") as image:
        assert image.size == (192, 128) and "Sampler: DDIM" in image.info["parameters"]
    assert sorted(path.name for path in (drawn / "step-00000010").iterdir()) == ["00.png", "01.png"]
    for name in ("00.png", "01.png"):  # the same prompts, however they are written
        assert (drawn / "step-00000010" / name).read_bytes() == (drawn / "step-00000010-2" / name).read_bytes()
    wrong = typed("sample", run_dir, "--prompt", "a", "samples.sampler=heun", expect=2)
    assert "samples.sampler = heun: must be one of euler, euler_a, ddim, dpmpp_2m" in wrong.stderr
    sdxl_train("sample", run_dir, "--timeline")
    assert (run_dir / "samples/timeline.png").is_file()


def test_one_worker_equals_four_and_accumulation(tmp_path: Path, config_file: Path) -> None:
    """The first 12 losses do not depend on how a step is cut (fp32)."""
    cuts = {"one": (1, 4), "four": (4, 1), "accumulated": (1, 1), "uneven": (3, 1)}
    curves = {}
    for name, (workers, batch) in cuts.items():
        run_dir = tmp_path / name
        sdxl_train(
            config_file,
            f"run.dir={run_dir}",
            f"launch.workers={workers}",
            f"train.batch_size_per_gpu={batch}",
            "train.steps=12",
        )
        curves[name] = losses(run_dir)
    assert len(curves["one"]) == 12
    for name in cuts:
        assert curves[name] == pytest.approx(curves["one"], abs=1e-5), name


@pytest.mark.parametrize(
    ("workers", "images"), [(2, 4), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((1, 4), (4, 4), (3, 6)))]
)
def test_interrupted_run_ends_with_the_same_bits(tmp_path: Path, config_file: Path, workers: int, images: int) -> None:
    """SIGTERM in mid-run, then the same command again: the UNet file has the hash of an uninterrupted run's."""
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    shared = [config_file, f"launch.workers={workers}", f"train.global_batch_size={images}", "train.steps=20"]
    shared += ["data.workers=1"]
    sdxl_train(*shared, f"run.dir={straight}")
    with WarmCommand(*shared, f"run.dir={interrupted}") as process:
        _wait_for_steps(interrupted, 5, process)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    (stopped,) = (interrupted / "checkpoints").iterdir()
    assert 5 <= int(stopped.name.removeprefix("step-")) < 20, "the run ended before the signal: make it longer"
    sdxl_train(*shared, f"run.dir={interrupted}")
    assert unet_hash(interrupted, 20) == unet_hash(straight, 20)
    assert losses(interrupted) == losses(straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """Thirty steps of two workers that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    sdxl_train(*_thirty_steps(config_file), f"run.dir={run_dir}")
    return run_dir


def _thirty_steps(config_file: Path) -> list[object]:
    return [config_file, "launch.workers=2", "train.steps=30", "checkpoint.every_steps=4"]


def test_a_worker_that_is_killed_or_stopped_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, config_file: Path, straight: Path
) -> None:
    """The same command goes on by itself, and ends with the same bits."""
    run_dir = tmp_path / "run"
    shared = [*_thirty_steps(config_file), f"run.dir={run_dir}", "launch.hang_after_s=2", "launch.hang_at_start_s=300"]
    with WarmCommand(*shared) as process:
        _wait_for_steps(run_dir, 9, process)
        _worker(process, 1).kill()
        _wait_for_event(run_dir, "starting again", 1, process)
        _wait_for_steps(run_dir, 17, process)
        _worker(process, 1).suspend()
        _wait_for_event(run_dir, "starting again", 2, process)
        _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    events = (run_dir / "events.txt").read_text().splitlines()
    assert len(events) == 2
    assert "worker 1 was ended by SIGKILL (exit 137: somebody else's doing" in events[0]
    assert re.search(r"starting again from step-000000(04|08|12) in 5 s \(1 of 3 without a new checkpoint\)", events[0])
    noticed = re.search(
        r"worker 1 has not moved for (\d+) s, in .* after step \d+; it is stopped by a signal", events[1]
    )
    assert noticed and int(noticed[1]) <= 10  # 2 s as configured, or five times the longest on a busy machine
    assert "most recent call first" in (run_dir / "logs/rank-0.stacks.txt").read_text()
    assert unet_hash(run_dir, 30) == unet_hash(straight, 30)
    assert losses(run_dir) == losses(straight)


def _wait_for_checkpoints(run_dir: Path, count: int, process: WarmCommand) -> None:
    """They are written beside the steps, and appear some steps later."""
    for _ in range(3000):
        if len(list((run_dir / "checkpoints").glob("step-????????/manifest.json"))) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no checkpoints came")


def _worker(process: WarmCommand, rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children()
    return next(child for child in children if child.name() == process_name(rank))


def _wait_for_event(run_dir: Path, words: str, count: int, process: WarmCommand) -> None:
    events = run_dir / "events.txt"
    for _ in range(3000):
        if events.is_file() and events.read_text().count(words) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{words} did not come")


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, config_file: Path, straight: Path) -> None:
    """SIGKILL of the whole command: no orphan goes on, nothing half-written is taken for whole, the end is the same."""
    killed, shared = tmp_path / "killed", _thirty_steps(config_file)
    with WarmCommand(*shared, f"run.dir={killed}") as process:
        _wait_for_checkpoints(killed, 2, process)
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _wait_for_end(started)  # the sentinel sees to it
    damaged = sorted((killed / "checkpoints").glob("step-????????"))[-1]
    weights = damaged / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    done = sdxl_train(*shared, f"run.dir={killed}")
    reason = "unet/diffusion_pytorch_model.safetensors has changed (checksum)"
    assert f"{damaged}: {reason}; set aside as {damaged.name}.damaged" in done.stderr
    assert unet_hash(killed, 30) == unet_hash(straight, 30)


def _copy_with_a_flipped_bit(config_file: Path, to: Path) -> Path:
    """The prepared set with one bit of one training image's latents flipped."""
    shutil.copytree(config_file.parent / "prepared", to)
    shard = next(path for path in sorted(to.rglob("train-*.safetensors")))
    content = bytearray(shard.read_bytes())
    content[4096 + 1000] ^= 4
    shard.write_bytes(content)
    return to


def test_a_flipped_bit_is_reported_and_workers_stay_in_step(tmp_path: Path, config_file: Path) -> None:
    """Three epochs on two workers: the row is missed in each, and the run ends as planned."""
    run_dir, prepared = tmp_path / "run", _copy_with_a_flipped_bit(config_file, tmp_path / "prepared")
    overrides = [f"run.dir={run_dir}", f"data.prepared={prepared}", "launch.workers=2", "train.steps=null"]
    done = sdxl_train(config_file, *overrides, "train.epochs=3")
    assert "  bad 3" in done.stderr
    lines = [json.loads(line) for line in (run_dir / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and len({(line["file"], line["row"], line["offset"]) for line in lines}) == 1
    assert lines[0]["offset"] == 4096 and lines[0]["reason"] == "checksum mismatch in the latents"
    state = json.loads((sorted((run_dir / "checkpoints").iterdir())[-1] / "training_state/state.json").read_text())
    assert state["position"]["epoch"] == 3
    assert (state["images_seen"] + 3) % 3 == 0


def test_too_many_bad_rows_stop_all_workers_with_one_line(tmp_path: Path, config_file: Path) -> None:
    run_dir, prepared = tmp_path / "run", _copy_with_a_flipped_bit(config_file, tmp_path / "prepared")
    overrides = [f"run.dir={run_dir}", f"data.prepared={prepared}", "launch.workers=2", "train.steps=1000"]
    overrides += ["train.global_batch_size=32", "train.batch_size_per_gpu=16", "data.max_bad_fraction=0.01"]
    done = sdxl_train(config_file, *overrides, expect=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sdxl-train:")]
    assert re.match(r"sdxl-train: data.max_bad_fraction = 0.01: \d+ of the last 1,0\d\d images could not be read", line)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").is_file()
    assert done.stderr.count("\n") < 30


@pytest.mark.slow
def test_more_workers_take_over_in_mid_epoch(tmp_path: Path, config_file: Path) -> None:
    """2 workers, then 3, whose step is larger: the epoch still sees every image once."""
    run_dir = tmp_path / "run"
    shared = [config_file, f"run.dir={run_dir}", "train.global_batch_size=null", "train.steps=null"]
    plan = sdxl_train("plan", *shared, "train.epochs=1", "launch.workers=2").stdout
    match = re.search(r"(\d+) training images in", plan)
    assert match
    with WarmCommand(*shared, "train.epochs=1", "launch.workers=2", "checkpoint.every_steps=3") as process:
        _wait_for_steps(run_dir, 3, process)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    stopped_at = len(losses(run_dir))
    sdxl_train(*shared, "train.epochs=1", "launch.workers=3")
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "training_state/state.json").read_text())
    assert 3 <= stopped_at < state["step"]
    assert state["images_seen"] == int(match.group(1))
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 0)


def test_two_commands_do_not_share_a_run_directory(tmp_path: Path, config_file: Path) -> None:
    run_dir = tmp_path / "run"
    with WarmCommand(config_file, f"run.dir={run_dir}", "train.steps=100000") as process:
        _wait_for_steps(run_dir, 1, process)
        second = sdxl_train(config_file, f"run.dir={run_dir}", expect=2)
        process.terminate()
    assert second.stderr == f"sdxl-train: {run_dir}: another sdxl-train is writing to this run directory\n"


def test_torchrun_joins(tmp_path: Path, config_file: Path) -> None:
    """Under torchrun the command is a worker of its job, and trains the same run as its own workers would."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    sdxl_train(config_file, f"run.dir={ours}", "launch.workers=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "trainer", str(config_file), f"run.dir={theirs}"]
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    assert unet_hash(theirs, 8) == unet_hash(ours, 8)


def test_a_wrong_config_is_one_line_per_problem(tmp_path: Path, config_file: Path) -> None:
    done = typed("prepare", config_file, "train.stpes=5", "optimizer.lr=fast", expect=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "did you mean `steps`" in lines[0] and "must be a number" in lines[1]
    missing = typed(tmp_path / "none.yaml", expect=2)
    assert len(missing.stderr.splitlines()) == 1


def test_resume_wishes_that_cannot_be_met(tmp_path: Path, config_file: Path) -> None:
    run_dir = tmp_path / "run"
    done = sdxl_train(config_file, f"run.dir={run_dir}", "--resume", "true", expect=2)
    assert "no checkpoint in" in done.stderr
    sdxl_train(config_file, f"run.dir={run_dir}", "train.steps=1")
    done = sdxl_train(config_file, f"run.dir={run_dir}", "--resume", "false", expect=2)
    assert "already holds a run (step-00000001)" in done.stderr
    done = sdxl_train(config_file, f"run.dir={run_dir}", "run.seed=4", expect=2)
    assert "was started with 3" in done.stderr


def test_a_moved_run_goes_on_where_it_lies_and_one_run_has_one_writer(tmp_path: Path, config_file: Path) -> None:
    first, moved = tmp_path / "first", tmp_path / "moved"
    sdxl_train(config_file, f"run.dir={first}", "train.steps=1")
    shutil.copytree(first, moved)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    sdxl_train(moved / "config.resolved.yaml", "train.steps=2", "--resume", "true")
    assert (moved / "checkpoints/step-00000002/manifest.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    joined = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"}
    with only_writer(moved):
        command = [*COMMAND, str(config_file), f"run.dir={moved}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | joined)
    assert done.returncode == 2 and "another sdxl-train is writing to this run directory" in done.stderr
    assert done.stderr.count("\n") == 1


def _wait_for_steps(run_dir: Path, count: int, process: WarmCommand) -> None:
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"kind": "train"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} steps in {run_dir}")


def _is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for_end(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 600
    while any(_is_at_work(process) for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def test_images_without_captions_are_refused_until_they_have_some(
    tmp_path: Path, photos: Path, config_file: Path
) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    for path in sorted(photos.glob("coffee-0*.png")):
        shutil.copy(path, source)
    overrides = [f"data.sources=[{{path: {source}, caption_files_hold: tags}}]", f"data.prepared={tmp_path / 'p'}"]
    overrides += ["captions={shuffle_tags: yes, keep_tokens: 1}", f"run.dir={tmp_path / 'run'}"]
    for command in (["prepare", config_file], [config_file]):
        refused = sdxl_train(*command, *overrides, expect=2)
        last = refused.stderr.splitlines()[-1]
        assert "captions.max_empty_fraction = 0.05" in last and "empty text, such as bare/" in last
    assert not (tmp_path / "p" / "shards").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    for path in source.glob("*.png"):
        path.with_suffix(".txt").write_text("cup, coffee, spoon, wood, table, steam")
    sdxl_train("prepare", config_file, *overrides)
    shown = sdxl_train("plan", config_file, *overrides).stdout
    texts = re.findall(r"tokens: (cup, .*)", shown)
    assert len(texts) == 10 and len(set(texts)) > 5
    assert "0 without text" in sdxl_train("plan", config_file, *overrides, "captions.dropout_rate=0.9").stdout


def test_images_mode(tmp_path: Path, config_file: Path) -> None:
    """The VAE in the loop on two workers, decoded by processes, flipped and cropped; stopped, gone on, evaluated."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    shared = [config_file, f"data.prepared={tmp_path / 'prepared'}", "data.mode=images", "launch.workers=2"]
    shared += ["data.augment.flip_probability=0.5", "data.augment.random_crop=true", "data.workers=1"]
    shared += ["validation.every_steps=6", "samples.every_steps=12", "samples.count=2", "samples.steps=2"]
    done = sdxl_train("prepare", *shared)
    assert "prepared 36 images" in done.stdout
    assert not list((tmp_path / "prepared").rglob("*.log"))  # no worker was started
    sdxl_train(*shared, f"run.dir={straight}", "train.steps=12")
    sdxl_train(*shared, f"run.dir={run_dir}", "train.steps=5")
    sdxl_train(*shared, f"run.dir={run_dir}", "train.steps=12")
    assert losses(run_dir) == losses(straight) and len(losses(straight)) == 12
    assert unet_hash(run_dir, 12) == unet_hash(straight, 12)
    assert (straight / "samples/step-00000012.png").is_file()
    done = sdxl_train("eval", run_dir, "samples.steps=2")
    assert json.loads((run_dir / "eval/step-00000012/validation.json").read_text())["images"] > 0


@pytest.mark.slow
def test_averages_of_four_then_three_workers_that_share_the_weights(
    tmp_path: Path, config_file: Path, model_folder: Path
) -> None:
    """Against float64, from the weights that each step's checkpoint holds; and scored, by those workers and by eval."""
    run_dir, profiles = tmp_path / "run", {"ema": PlainEma(0.9), "long": PowerEma(0.1)}
    shared = [config_file, f"run.dir={run_dir}", "memory.strategy=zero2", "train.global_batch_size=12"]
    shared += ["checkpoint.every_steps=1", "checkpoint.keep=20", "validation.every_steps=8", "ema.score=[live, long]"]
    shared += ["ema.averages=[{decay: 0.9}, {name: long, kind: power}]", "ema.place=host"]
    sdxl_train(*shared, "launch.workers=4", "train.steps=4")
    done = sdxl_train(*shared, "launch.workers=3", "train.steps=8")
    assert "goes on after step 4, 4 steps to go" in done.stderr and "begins at step" not in done.stderr
    file = "diffusion_pytorch_model.safetensors"
    checkpoints = [run_dir / f"checkpoints/step-{step:08d}" for step in range(1, 9)]
    trajectory = [load_file(folder / "unet" / file) for folder in (model_folder, *checkpoints)]
    for name, profile in profiles.items():
        found = load_file(checkpoints[-1] / f"unet_{name}" / file)
        for key, tensor in found.items():
            expected = trajectory[0][key].double()
            for step, weights in enumerate(trajectory[1:], start=1):
                expected.lerp_(weights[key].double(), 1 - profile.decay_at(step))
            assert (tensor.double() - expected).norm() <= 1e-6 * expected.norm(), (name, key)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scored = {record["kind"]: record["loss"] for record in records if record["step"] == 8 and "loss" in record}
    sdxl_train("eval", run_dir, "--weights", "long", "samples.steps=1", "samples.count=1", "launch.workers=1")
    judged = json.loads((run_dir / "eval/step-00000008-long/validation.json").read_text())
    assert judged["average"] == "long" and judged["loss"] == pytest.approx(scored["validation_long"], abs=1e-5)
    assert scored["validation_long"] != scored["validation"]

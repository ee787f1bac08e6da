"""Real runs of three workers that average their weights every few steps: exact over a stop, and with fewer workers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.data.small_set import write_small_set
from tests.wire.averaged_run_script import GOES_ON, RUNS
from tests.wire.exchanged_run_script import STEPS, STOP
from tests.wire.test_exchanged_runs import hashes, run
from trainer.checkpoint.write import OPTIMIZER, WORKERS
from trainer.data.buckets import Bucket

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).with_name("averaged_run_script.py")
STOPPED = [name for name in RUNS if name not in ("alone", "together")]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("data") / "prepared", {Bucket(64, 64): 30, Bucket(128, 64): 26})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, prepared: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("averaged")
    return folder, run(folder, model_folder, prepared, 3, [*RUNS], SCRIPT)


def stored(run_dir: Path, step: int, file: str) -> dict[str, Tensor]:
    return load_file(run_dir / f"checkpoints/step-{step:08d}" / file)


def own_weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """[workers, *shape] by name, without the component's."""
    rows = stored(run_dir, step, WORKERS)
    return {key.removeprefix("weight.unet."): t for key, t in rows.items() if key.startswith("weight.unet.")}


@pytest.mark.parametrize("name", STOPPED)
def test_a_stop_changes_no_bit(three: tuple[Path, str], name: str) -> None:
    """Of common weights and their momentum, each worker's weights and moments, averages of the run."""
    folder, _ = three
    through, stopped = (hashes(folder / f"{name}-{way}", STEPS) for way in ("through", "stopped"))
    assert through == stopped and {WORKERS, OPTIMIZER, UNET} <= through.keys()
    assert hashes(folder / f"{name}-through", STOP) == hashes(folder / f"{name}-at-stop", STOP)
    assert all(through[file] != other for file, other in hashes(folder / f"{name}-at-stop", STOP).items())


@pytest.mark.parametrize("name", STOPPED)
def test_between_averages_each_worker_has_its_own(three: tuple[Path, str], name: str) -> None:
    """And after one they are left out, for they are what all have in common."""
    folder, _ = three
    tensors = stored(folder / f"{name}-at-stop", STOP, WORKERS)
    own = own_weights(folder / f"{name}-at-stop", STOP)
    assert bool(own) == (name != "at_the_stop")
    for weights in own.values():
        assert len(weights) == 3
    if own:
        largest = max(own.values(), key=Tensor.numel)
        assert not torch.equal(largest[0], largest[1]) and not torch.equal(largest[1], largest[2])
    states = {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer.")}
    firsts = stored(folder / f"{name}-at-stop", STOP, OPTIMIZER)
    assert {key.removeprefix("optimizer.") for key in states} == firsts.keys() and firsts
    moment = max((key for key in states if states[key].ndim > 1), key=lambda key: states[key].numel())
    assert len(states[moment]) == 2 and not torch.equal(states[moment][0], states[moment][1])
    assert not torch.equal(states[moment][0], firsts[moment.removeprefix("optimizer.")])
    assert any(key.startswith("pending.") for key in tensors) == name.startswith("streamed")
    assert any(key.startswith("common.") for key in tensors) == (name in ("narrow", "streamed_narrow"))
    # After the last step all have the same.
    assert not own_weights(folder / f"{name}-through", STEPS)


def test_common_weights_stay_until_the_average(three: tuple[Path, str], model_folder: Path) -> None:
    """They are what a checkpoint publishes, and own weights have gone on from them."""
    folder, _ = three
    common = stored(folder / "plain-at-stop", STOP, UNET)
    begun = load_file(model_folder / UNET)
    assert all(torch.equal(tensor, begun[name].to(tensor.dtype)) for name, tensor in common.items())
    own = own_weights(folder / "plain-at-stop", STOP)
    assert own.keys() == common.keys()
    moved = torch.stack([(weights - common[name]).double().square().mean() for name, weights in own.items()])
    assert float(moved.sqrt().max()) > 1e-4
    after = stored(folder / "plain-through", STEPS, UNET)
    assert not any(torch.equal(after[name], tensor) for name, tensor in common.items() if tensor.numel() > 100)


def test_a_workers_gradients_are_its_part_of_all(three: tuple[Path, str]) -> None:
    """Where a step is linear in the gradient, the mean of the workers' first steps is the step that they share."""
    folder, _ = three
    shared = stored(folder / "together-through", 1, UNET)
    before = stored(folder / "alone-through", 1, UNET)  # the common weights are still those of the start
    own = own_weights(folder / "alone-through", 1)
    assert own.keys() == shared.keys()
    longest = max(float((shared[name] - before[name]).abs().max()) for name in shared)
    assert longest > 1e-4
    for name, weights in own.items():
        assert torch.allclose(weights.double().mean(dim=0), shared[name].double(), rtol=1e-6, atol=1e-3 * longest), name


def test_the_run_average_follows_common_weights(three: tuple[Path, str], model_folder: Path) -> None:
    """Once for each average, with the decay of all steps between: in float64, from what the checkpoints publish."""
    folder, _ = three
    run_dir, decay = folder / "at_the_stop-through", 0.9**STOP
    for name, begun in load_file(model_folder / UNET).items():
        expected = begun.double()
        for step in (STOP, STEPS):
            expected = decay * expected + (1 - decay) * stored(run_dir, step, UNET)[name].double()
        found = stored(run_dir, STEPS, UNET.replace("unet/", "unet_ema/"))[name].double()
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), name


def test_one_workers_bad_step_is_skipped_by_all(three: tuple[Path, str]) -> None:
    assert "step 2 is skipped" in three[1].split("run nan")[1].split("run alone")[0]
    steps = {
        float(tensor.max())
        for key, tensor in stored(three[0] / "nan-at-stop", STOP, WORKERS).items()
        if key.endswith(".step")
    }
    assert steps == {STOP - 1.0}


def test_the_log_says_how(three: tuple[Path, str]) -> None:
    log = three[1]
    assert "weights are averaged every 4 steps; differences travel in 32 bits: each worker sends" in log
    told = "each of 2 fragments is averaged every 4 steps, and takes effect 2 later; differences travel in 32 bits: "
    assert told in log


@pytest.mark.parametrize("world", [2, 1])
def test_fewer_workers_go_on_with_the_mean(
    three: tuple[Path, str], model_folder: Path, prepared: Path, world: int
) -> None:
    folder, _ = three
    log = run(folder, model_folder, prepared, world, GOES_ON, SCRIPT)
    assert log.count(f"the weights of 3 workers go on as their mean on each of {world}") == len(GOES_ON)
    assert log.count("exchange.average_every = 4: has no effect, for there is one worker") == len(GOES_ON) * (
        world == 1
    )
    for name in GOES_ON:
        run_dir = folder / f"{name}-fewer-{world}"
        assert (WORKERS in hashes(run_dir, STEPS)) == (world > 1)
        assert stored(run_dir, STEPS, UNET).keys() == stored(folder / f"{name}-through", STEPS, UNET).keys()


@pytest.mark.parametrize("name", GOES_ON)
def test_workers_may_share_each_step_again(three: tuple[Path, str], name: str) -> None:
    """From the mean of their own weights: the first losses are those of a run that is as far, not of its beginning."""
    folder, log = three
    said = log.split(f"run {name} shared")[1].split("run ")[0]
    assert "they share each step now" in said and "go on as their mean" in said
    assert WORKERS not in hashes(folder / f"{name}-shared", STEPS)
    mean = {key: weights.double().mean(dim=0) for key, weights in own_weights(folder / f"{name}-at-stop", STOP).items()}
    common = stored(folder / f"{name}-at-stop", STOP, UNET)
    ended = stored(folder / f"{name}-shared", STEPS, UNET)
    from_mean = sum(float((ended[key].double() - mean[key]).square().sum()) for key in mean)
    from_common = sum(float((ended[key].double() - common[key].double()).square().sum()) for key in mean)
    assert 0 < from_mean < from_common
    lines = (folder / f"{name}-shared" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if record.get("kind") == "train"]
    assert steps == [*range(1, STEPS + 1)]

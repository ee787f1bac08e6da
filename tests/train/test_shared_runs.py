"""However the workers share the model, they take the same steps as one worker alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.worker_group import run_group, worker_environments

SCRIPT = Path(__file__).parent / "shared_run_script.py"
WHOLE = ("ddp:fp32:1", "ddp:fp32:3", "zero2:fp32:3", "zero3:fp32:1")
OF_GROUPS = ("zero2@2:fp32:3", "zero3@2:fp32:1", "zero2@2:bf16:3")  # two workers hold all, two others the same
QUICK = (*WHOLE, *OF_GROUPS)
OF_OBJECTIVES = ("ddp:fp32:1:flow", "ddp:fp32:3:v", "zero2:fp32:3:noises", "ddp:fp32:3:edm", "zero2:fp32:1:masked")
OF_OTHERS = ("ddp:fp32:3:companions", "zero2:fp32:1:importance", "ddp:fp32:3:learned", "zero2:fp32:3:loss_weights")
OF_RATES = ("ddp:fp32:3:rates", "zero2:fp32:1:rates", "zero3:fp32:1:rates")
ALONE = (
    "single:fp32:1",
    "single:bf16:1",
    *(f"single:fp32:1:{name.split(':')[3]}" for name in OF_OBJECTIVES + OF_OTHERS + OF_RATES[:1]),
)
LONG = (*WHOLE, "zero2+:fp32:3", "ddp:bf16:1", "zero2:bf16:3", "zero3:bf16:1")
QUICK_STEPS, STEPS = 3, 50
# Numbers that a step adds up: of the loss, the images and the norm; loss and images of eight parts of the process.
SUMS = 5 + 2 * 8


def run(folder: Path, world: int, steps: int, *names: str) -> Path:
    command = [sys.executable, str(SCRIPT), str(folder), str(steps), *names]
    run_group([command] * world, worker_environments(world), folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("alone"), 1, QUICK_STEPS, *ALONE)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("four"), 4, QUICK_STEPS, *QUICK)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What hangs on how a step is cut, and not on how often: four workers take twice as long on two cores."""
    return run(tmp_path_factory.mktemp("two"), 2, QUICK_STEPS, *OF_OBJECTIVES, *OF_OTHERS, *OF_RATES)


def told_of(folder: Path, name: str, what: str) -> Any:
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()[what])


def losses_of(folder: Path, name: str) -> list[float]:
    return told_of(folder, name, "losses")


def assert_same_steps(alone: Path, shared: Path, name: str) -> None:
    """In fp32 the same losses and weights; in bf16 nearly the same losses."""
    _, precision, _, *objective = name.split(":")
    single = ":".join(["single", precision, "1", *objective])
    assert losses_of(shared, name) == pytest.approx(losses_of(alone, single), abs=1e-6 if precision == "fp32" else 1e-3)
    if precision == "fp32":
        expected, weights = load_file(alone / f"{single}.safetensors"), load_file(shared / f"{name}.safetensors")
        assert weights.keys() == expected.keys()
        assert max(float((weights[name] - expected[name]).abs().max()) for name in weights) < 1e-6


@pytest.mark.e2e
@pytest.mark.parametrize("name", QUICK)
def test_four_workers_take_the_steps_of_one(alone: Path, four: Path, name: str) -> None:
    assert_same_steps(alone, four, name)


@pytest.mark.e2e
@pytest.mark.parametrize("name", OF_OBJECTIVES + OF_OTHERS + OF_RATES)
def test_two_workers_take_the_steps_of_one(alone: Path, two: Path, name: str) -> None:
    assert_same_steps(alone, two, name)


@pytest.fixture(scope="module")
def alone_for_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("alone"), 1, STEPS, "single:fp32:1", "single:bf16:1")


@pytest.fixture(scope="module")
def four_for_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("four"), 4, STEPS, *LONG)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_four_workers_take_fifty_steps_of_one(alone_for_long: Path, four_for_long: Path, name: str) -> None:
    assert_same_steps(alone_for_long, four_for_long, name)


@pytest.mark.parametrize(
    ("name", "gathers", "embedding_gathers", "reductions", "runs"),
    [
        # Weights and gradients once a step; embeddings are freed in each pass.
        pytest.param("zero2:fp32:3", 1, 3, 1, "four", marks=pytest.mark.e2e),
        pytest.param("zero2:bf16:3", 1, 3, 1, "four_for_long", marks=pytest.mark.slow),
        # Gradients in each pass.
        pytest.param("zero2+:fp32:3", 1, 3, 3, "four_for_long", marks=pytest.mark.slow),
        # Forward and backward; backward needs no embeddings.
        pytest.param("zero3:fp32:1", 2, 1, 1, "four", marks=pytest.mark.e2e),
    ],
)
def test_nothing_but_weights_and_gradients_is_sent(
    request: pytest.FixtureRequest, name: str, gathers: int, embedding_gathers: int, reductions: int, runs: str
) -> None:
    """Every weight's rows are padded to a multiple of the workers."""
    four: Path = request.getfixturevalue(runs)
    weights = load_file(four / f"{name}.safetensors")
    padded = {n: -(-len(t) // 4) * 4 * t[0].numel() for n, t in weights.items()}
    unused = ("text_encoder_1.encoder.layers.1.", "text_encoder_1.final_layer_norm.")
    trained = sum(size for n, size in padded.items() if not n.replace("text_model.", "").startswith(unused))
    # The group of a layer that never trains is still gathered for the forward pass, and not for the backward pass.
    idle = sum(padded.values()) - trained
    embedded = sum(size for n, size in padded.items() if ".embeddings." in n)
    expected = gathers * (sum(padded.values()) - embedded) + embedding_gathers * embedded
    sent = told_of(four, name, "traffic")
    assert sent["all_gather"] in (expected, expected - idle)
    assert sent["reduce_scatter"] == reductions * trained
    assert sent["all_reduce"] == SUMS + 1  # and the norm


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["ddp:fp32:1", "ddp:fp32:3"])
def test_ddp_sends_each_gradient_once(four: Path, name: str) -> None:
    weights = load_file(four / f"{name}.safetensors")
    unused = ("text_encoder_1.encoder.layers.1.", "text_encoder_1.final_layer_norm.")
    trained = sum(t.numel() for n, t in weights.items() if not n.replace("text_model.", "").startswith(unused))
    sent = told_of(four, name, "traffic")
    assert sent == {"all_reduce": trained + SUMS, "all_gather": 0, "reduce_scatter": 0}


@pytest.mark.e2e
@pytest.mark.parametrize("name", OF_RATES)
def test_what_is_frozen_is_not_sent(two: Path, name: str) -> None:
    """Neither with a learning rate of 0, nor because a part trains `only` something else."""
    trained, weights = told_of(two, name, "trained"), load_file(two / f"{name}.safetensors")
    frozen = weights.keys() - {*trained}
    assert {"unet.down_blocks.0.resnets.0.conv1.weight", "unet.conv_in.bias"} <= frozen
    assert not any("text_encoder_1" in name and "mlp" not in name for name in trained)
    sent = told_of(two, name, "traffic")
    sizes = {n: -(-len(weights[n]) // 2) * 2 * weights[n][0].numel() for n in trained}  # in whole rows for each worker
    if name.startswith("ddp"):
        assert sent["all_reduce"] == sum(weights[n].numel() for n in trained) + SUMS
    else:
        assert sent["reduce_scatter"] == sum(sizes.values())

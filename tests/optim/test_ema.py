"""Running averages against float64, their state through files and back, and the model with an average in it."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig
from trainer.errors import UserError
from trainer.optim import ema_memory
from trainer.optim.ema import (
    Averages,
    Place,
    kahan_corrections,
    leave_out_step,
    start_averages,
    update_averages,
    update_when_due,
)
from trainer.optim.ema_contents import ema_parts, load_ema_tensors, load_progress
from trainer.optim.ema_memory import host_tensors, memory_of_averages
from trainer.optim.ema_pieces import scratch_buffers
from trainer.optim.ema_profile import PlainEma, PowerEma, Profile
from trainer.optim.ema_swap import averaged_weights
from trainer.optim.optimizers import make_optimizer

PROFILES: dict[str, Profile] = {
    "ema": PlainEma(0.97),
    "constant": PlainEma(0.97, warms_up=False),
    "short": PowerEma(0.05),
    "long": PowerEma(0.10),
}
Parameters = dict[str, nn.Parameter]


def make_parameters(dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (70, 33), "conv": (16, 8, 3, 3), "bias": (77,), "scalar": (), "none": (0, 5)}
    parameters = {
        name: nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype)) for name, shape in shapes.items()
    }
    parameters["conv"].data = parameters["conv"].data.to(memory_format=torch.channels_last)
    return parameters


@torch.no_grad()
def move(parameters: Parameters, step: int) -> None:
    """What an optimizer's step does to them."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.add_((torch.randn(parameter.shape, generator=generator) * 1e-3).to(parameter.dtype))


def in_float64(trajectory: list[dict[str, Tensor]], profile: Profile, every: int = 1) -> dict[str, Tensor]:
    """The definition, from the weights after steps 0, 1, 2, ..."""
    average = dict(trajectory[0])
    for step in range(every, len(trajectory), every):
        decay = 1.0
        for each in range(step - every + 1, step + 1):
            decay *= profile.decay_at(each)
        average = {name: decay * a + (1 - decay) * trajectory[step][name] for name, a in average.items()}
    return average


def wide(parameters: Parameters) -> dict[str, Tensor]:
    return {name: parameter.detach().double().clone() for name, parameter in parameters.items()}


def run(averages: Averages, parameters: Parameters, steps: range) -> list[dict[str, Tensor]]:
    trajectory = [wide(parameters)]
    for step in steps:
        move(parameters, step)
        update_when_due(averages, parameters, step)
        trajectory.append(wide(parameters))
    return trajectory


def tensors_of(averages: Averages, parameters: Parameters) -> dict[str, Tensor]:
    return {
        f"{average}/{name}": held.part.contiguous().clone()
        for average in averages.profiles
        for name, held in ema_parts(averages, average, parameters).items()
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor takes several, and others share one."""
    monkeypatch.setattr(ema_memory, "_CHUNK_ELEMENTS", {"cpu": 500})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_hundred_steps_equal_float64(small_chunks: None, dtype: torch.dtype, place: Place, every: int) -> None:
    parameters = make_parameters(dtype)
    averages = start_averages(parameters, PROFILES, place=place, update_every=every)
    trajectory = run(averages, parameters, range(1, 101))
    for average, profile in PROFILES.items():
        expected = in_float64(trajectory, profile, every)
        for name, (tensor, *_) in ema_parts(averages, average, parameters).items():
            assert tensor.dtype == torch.float32
            error = (tensor.double() - expected[name]).norm()
            assert error <= 1e-6 * expected[name].norm(), name
    # The four are four, and none is the weights.
    kinds = [*({"x": averages.shards[a]["matrix"]} for a in PROFILES), {"x": parameters["matrix"].detach().float()}]
    assert all(not torch.equal(a["x"], b["x"]) for i, a in enumerate(kinds) for b in kinds[:i])


def test_place_and_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        cases: list[tuple[Place, int]] = [("device", 1 << 17), ("host", 1 << 17), ("host", 100), ("device", 100)]
        for place, chunk in cases:
            monkeypatch.setattr(ema_memory, "_CHUNK_ELEMENTS", {"cpu": chunk})
            parameters = make_parameters(dtype)
            averages = start_averages(parameters, PROFILES, place=place)
            run(averages, parameters, range(1, 11))
            found.append(tensors_of(averages, parameters))
        for other in found[1:]:
            assert_same_bits(other, found[0])


def test_kahan_weights_are_averaged_with_what_they_lack(small_chunks: None) -> None:
    """Updates far below bf16's last bit: the sum of weight and compensation moves, and the average with it."""
    parameters = {name: p for name, p in make_parameters(torch.bfloat16).items() if name != "none"}
    optimizer = make_optimizer(parameters, OptimizerConfig(lr=1e-6), rounding="kahan")
    averages = start_averages(parameters, PROFILES)
    trajectory, corrections = [wide(parameters)], dict[str, Tensor]()
    for step in range(1, 51):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        corrections = kahan_corrections(optimizer, parameters)
        update_averages(averages, parameters, step, corrections)
        trajectory.append({name: w + corrections[name].double() for name, w in wide(parameters).items()})
    for average, profile in PROFILES.items():
        expected = in_float64(trajectory, profile)
        for name, (tensor, *_) in ema_parts(averages, average, parameters).items():
            assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=2e-8)
            moved = (tensor.double() - trajectory[0][name]).abs().mean()
            assert moved > 5e-6, "the average did not follow"
    later = start_averages(parameters, PROFILES, step=50, corrections=corrections)
    assert torch.equal(later.shards["ema"]["bias"].double(), trajectory[-1]["bias"])


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("every", [1, 3])
def test_resume_is_exact(tmp_path: Path, place: Place, every: int) -> None:
    """Stopped at step 10, which is no multiple of 3: the first update after it counts for the steps before, too."""
    parameters = make_parameters()
    averages = start_averages(parameters, PROFILES, place=place, update_every=every)
    run(averages, parameters, range(1, 11))
    save_file(tensors_of(averages, parameters), tmp_path / "averages.safetensors")
    record, weights = averages.to_json(), {name: p.detach().clone() for name, p in parameters.items()}
    run(averages, parameters, range(11, 21))

    resumed = make_parameters()
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(weights[name])
    others = start_averages(resumed, PROFILES, step=10, place=place, update_every=every)
    stored = load_file(tmp_path / "averages.safetensors")
    for average in PROFILES:
        prefix = f"{average}/"
        mine = ((name.removeprefix(prefix), t) for name, t in stored.items() if name.startswith(prefix))
        load_ema_tensors(others, average, resumed, mine)
    load_progress(others, record)
    assert others.step == 10 // every * every and others.to_json() == record
    run(others, resumed, range(11, 21))
    assert_same_bits(tensors_of(others, resumed), tensors_of(averages, parameters))


def test_averages_that_begin_within_a_run_count_from_there() -> None:
    parameters = make_parameters()
    for step in range(1, 8):
        move(parameters, step)
    averages = start_averages(parameters, PROFILES, step=7)
    trajectory = run(averages, parameters, range(8, 30))
    for average, profile in PROFILES.items():
        expected = in_float64(trajectory, profile)
        assert torch.allclose(averages.shards[average]["matrix"].double(), expected["matrix"], rtol=0, atol=2e-8)


@pytest.mark.parametrize("every", [1, 3])
def test_a_step_that_changed_nothing_is_no_step_of_the_averages(every: int) -> None:
    """As after gradients that were not finite. Steps 5, 6 and 11 are left out; 6 would have been an update."""
    parameters, idle = make_parameters(), (5, 6, 11)
    averages = start_averages(parameters, PROFILES, update_every=every)
    trajectory, updated_at = [wide(parameters)], [0]
    for step in range(1, 13):
        if step in idle:
            leave_out_step(averages)
            continue
        move(parameters, step)
        trajectory.append(wide(parameters))
        if update_when_due(averages, parameters, step):
            updated_at.append(len(trajectory) - 1)
    assert updated_at == (list(range(10)) if every == 1 else [0, 3, 7, 9])
    assert averages.ages == dict.fromkeys(PROFILES, 9) and averages.step == 12
    for average, profile in PROFILES.items():
        expected = trajectory[0]["matrix"]
        for done, now in itertools.pairwise(updated_at):
            decay = math.prod(profile.decay_at(each) for each in range(done + 1, now + 1))
            expected = decay * expected + (1 - decay) * trajectory[now]["matrix"]
        assert torch.allclose(averages.shards[average]["matrix"].double(), expected, rtol=0, atol=2e-8)
    for done in (12, 11):
        with pytest.raises(ValueError, match="has been averaged already"):
            update_averages(averages, parameters, done)


def test_an_average_may_begin_later_than_the_others() -> None:
    parameters = make_parameters()
    averages = start_averages(parameters, PROFILES)
    run(averages, parameters, range(1, 6))
    record = averages.to_json()
    del record["averages"]["long"]
    others = start_averages(parameters, PROFILES, step=5)
    load_progress(others, record)
    assert others.ages == {"ema": 5, "constant": 5, "short": 5, "long": 0}
    assert others.began_at == {"ema": 0, "constant": 0, "short": 0, "long": 5}
    trajectory = run(others, parameters, range(6, 15))
    expected = in_float64(trajectory, PROFILES["long"])["matrix"]
    assert torch.allclose(others.shards["long"]["matrix"].double(), expected, rtol=0, atol=2e-8)


@pytest.fixture(params=[(d, p) for d in (torch.float32, torch.bfloat16) for p in ("device", "host")], ids=str)
def averaged(request: pytest.FixtureRequest, small_chunks: None) -> Iterator[tuple[Averages, Parameters]]:
    dtype, place = request.param
    parameters = make_parameters(dtype)
    averages = start_averages(parameters, PROFILES, place=place)
    run(averages, parameters, range(1, 11))
    yield averages, parameters


def test_average_goes_into_the_model_and_back(averaged: tuple[Averages, Parameters]) -> None:
    averages, parameters = averaged
    before = {name: p.detach().clone() for name, p in parameters.items()}
    wanted = tensors_of(averages, parameters)
    places = {name: p.data_ptr() for name, p in parameters.items()}
    for average in PROFILES:
        with averaged_weights(averages, average, parameters):
            for name, parameter in parameters.items():
                assert torch.equal(parameter, wanted[f"{average}/{name}"].to(parameter.dtype)), name
            assert not torch.equal(parameters["matrix"], before["matrix"])
        assert_same_bits({name: p.detach() for name, p in parameters.items()}, before)
        assert_same_bits(tensors_of(averages, parameters), wanted)
    assert {name: p.data_ptr() for name, p in parameters.items()} == places


def test_live_weights_come_back_after_a_failure(averaged: tuple[Averages, Parameters]) -> None:
    averages, parameters = averaged
    before, wanted = {name: p.detach().clone() for name, p in parameters.items()}, tensors_of(averages, parameters)
    with pytest.raises(RuntimeError, match="no picture"), averaged_weights(averages, "ema", parameters):
        raise RuntimeError("no picture")
    assert_same_bits({name: p.detach() for name, p in parameters.items()}, before)
    assert_same_bits(tensors_of(averages, parameters), wanted)


def test_nothing_is_averaged_or_written_meanwhile(averaged: tuple[Averages, Parameters]) -> None:
    averages, parameters = averaged
    with averaged_weights(averages, "short", parameters):
        with pytest.raises(ValueError, match="the average short is in the model"):
            update_averages(averages, parameters, 11)
        with pytest.raises(ValueError, match="in the model"):
            ema_parts(averages, "long", parameters)
        with pytest.raises(ValueError, match="in the model"), averaged_weights(averages, "long", parameters):
            pass
    update_averages(averages, parameters, 11)


def test_what_cannot_go_on_is_told() -> None:
    parameters = make_parameters()
    averages = start_averages(parameters, {"ema": PlainEma(0.9), "short": PowerEma(0.05)})
    with pytest.raises(UserError, match=r"^trainable: the checkpoint has averaged gone \(ema\)"):
        load_ema_tensors(averages, "ema", parameters, [("gone", torch.zeros(3))])
    record = averages.to_json()
    load_progress(start_averages(parameters, {"ema": PlainEma(0.99), "short": PowerEma(0.05)}), record)
    for wrong in ({"ema": PowerEma(0.05)}, {"short": PowerEma(0.06)}, {"short": PlainEma(0.9)}):
        with pytest.raises(UserError, match=r"^ema\.averages: the checkpoint's average"):
            load_progress(start_averages(parameters, wrong), record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host"])
def test_planned_bytes_are_those_held(small_chunks: None, dtype: torch.dtype, place: Place) -> None:
    parameters = make_parameters(dtype)
    averages = start_averages(parameters, PROFILES, place=place)
    shapes = [tuple(parameter.shape) for parameter in parameters.values()]
    found = memory_of_averages(shapes, averages=4, shards=1, place=place, weights=dtype, device="cpu")
    held = sum(shard.nbytes for shards in averages.shards.values() for shard in shards.values())
    assert (found.device, found.host) == ((held, 0) if place == "device" else (0, held))
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    scratch, most = scratch_buffers(weights, 1)[0].nbytes, 500 * 4
    assert scratch <= most <= 1.1 * scratch
    assert found.update == (0 if place == "device" and dtype == torch.float32 else 2 * most)
    kept = 0 if dtype == torch.float32 else sum(weight.nbytes for weight in weights.values())
    assert found.swap == most + kept
    # The first of three workers has the most rows: 24 of 70, 6 of 16, 26 of 77.
    third = memory_of_averages(shapes, averages=1, shards=3, place="device", weights=dtype, device="cpu")
    assert third.device == 4 * (24 * 33 + 6 * 72 + 26 + 1)


def test_pinned_memory_wastes_little() -> None:
    """PyTorch pins powers of two. Shapes as in SDXL's UNet; one by one they would take 1.28 times their bytes."""
    shapes = [(10240, 1280), (1280, 5120), (1280, 1280), (1280, 2048), (1280,), (640, 1280, 3, 3)] * 120
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    found = memory_of_averages(shapes, averages=2, shards=1, place="host", weights=torch.float32, device="cuda")
    assert 2 * 4 * elements <= found.host < 1.08 * 2 * 4 * elements
    assert found.device == 0
    tensors = host_tensors({"a": torch.Size((3, 2)), "b": torch.Size(())}, torch.device("cpu"))
    assert [tensor.shape for tensor in tensors.values()] == [(3, 2), ()]

"""Our AdamW: fp32 agrees with torch's, 8-bit moments train alike, and a step is a pure function of what is saved."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig
from trainer.optim.adamw import BlockAdamW, Rounding
from trainer.optim.adamw_chunk import Chunk, compiled_update
from trainer.optim.eight_bit import dynamic_map
from trainer.optim.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
E2E = pytest.mark.e2e
Named = dict[str, nn.Parameter]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def small_network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 192), nn.SiLU(), nn.Linear(192, 64)).to(dtype)


def parameters(dtype: torch.dtype) -> Named:
    """Rows of 160, 36 and 7 elements, a vector and a scalar."""
    torch.manual_seed(0)
    shapes = {"linear": (70, 640), "conv": (130, 4, 3, 3), "odd": (9, 7), "bias": (77,), "scalar": ()}
    return {name: nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for name, shape in shapes.items()}


def give_gradients(named: Mapping[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 1e-3


def ours(named: Mapping[str, nn.Parameter], *, eight_bit: bool, rounding: Rounding | None, **more: Any) -> BlockAdamW:
    return BlockAdamW([{"params": list(named.items()), **SETTINGS}], eight_bit=eight_bit, rounding=rounding, **more)


def run(named: Named, optimizer: torch.optim.Optimizer, steps: range) -> Named:
    for step in steps:
        give_gradients(named, step)
        optimizer.step()
    return named


def everything(named: Named, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**{name: p.detach().clone() for name, p in named.items()}, **optimizer_tensors(optimizer, named)}


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def test_fp32_agrees_with_torch() -> None:
    named, theirs = parameters(torch.float32), parameters(torch.float32)
    run(named, ours(named, eight_bit=False, rounding=None), range(20))
    run(theirs, torch.optim.AdamW(theirs.values(), **SETTINGS), range(20))
    for name in named:
        assert torch.allclose(named[name], theirs[name], rtol=1e-6, atol=2e-8), name


KINDS = [(False, None), (True, None), *product((False, True), ("stochastic", "kahan"))]


@pytest.mark.parametrize(("eight_bit", "rounding"), KINDS)
def test_a_saved_state_goes_on_to_the_bit(eight_bit: bool, rounding: Rounding | None, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if rounding else torch.float32
    kind = "adamw_8bit" if eight_bit else "adamw"
    config = OptimizerConfig(lr=1e-3, kind=kind)
    through = parameters(dtype)
    optimizer = make_optimizer(through, config, rounding=rounding, seed=5)
    run(through, optimizer, range(3))
    save_file({name: p.detach() for name, p in through.items()}, tmp_path / "weights.safetensors")
    save_file(optimizer_tensors(optimizer, through), tmp_path / "state.safetensors")
    run(through, optimizer, range(3, 6))
    resumed = {name: nn.Parameter(p) for name, p in load_file(tmp_path / "weights.safetensors").items()}
    resumed = {name: resumed[name] for name in through}
    again = make_optimizer(resumed, config, rounding=rounding, seed=5)
    load_optimizer_tensors(again, resumed, load_file(tmp_path / "state.safetensors").items())
    run(resumed, again, range(3, 6))
    assert_equal(everything(through, optimizer), everything(resumed, again))


@pytest.mark.parametrize(("eight_bit", "rounding"), KINDS)
def test_neither_chunks_nor_threads_change_a_bit(
    eight_bit: bool, rounding: Rounding | None, threads: Callable[[int], None]
) -> None:
    found = []
    for chunk_elements, count in ((32_000, 1), (1000, 1), (4801, 3), (1 << 20, 2), (1, 2)):
        threads(count)
        named = parameters(torch.bfloat16 if rounding else torch.float32)
        optimizer = ours(named, eight_bit=eight_bit, rounding=rounding, chunk_elements=chunk_elements)
        run(named, optimizer, range(2))
        found.append(everything(named, optimizer))
    for other in found[1:]:
        assert_equal(found[0], other)


def test_seed_step_and_name_draw_the_rounding() -> None:
    def rounded(seed: int, name: str, steps: int) -> Tensor:
        named = {name: parameters(torch.bfloat16)["linear"]}
        run(named, ours(named, eight_bit=False, rounding="stochastic", seed=seed), range(steps))
        return named[name].detach()

    first = rounded(0, "a", 1)
    assert torch.equal(first, rounded(0, "a", 1))
    assert not torch.equal(first, rounded(1, "a", 1))
    assert not torch.equal(first, rounded(0, "b", 1))


def test_channels_last_weights_get_the_same_update() -> None:
    plain = {"conv": nn.Parameter(torch.randn(64, 32, 3, 3).bfloat16())}
    last = {"conv": nn.Parameter(plain["conv"].detach().clone(memory_format=torch.channels_last))}
    assert not last["conv"].is_contiguous()
    one = ours(plain, eight_bit=True, rounding="stochastic")
    two = ours(last, eight_bit=True, rounding="stochastic")
    run(plain, one, range(2))
    run(last, two, range(2))
    assert_equal(everything(plain, one), everything(last, two))
    assert last["conv"].is_contiguous(memory_format=torch.channels_last)


def train(network: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of learning a fixed random function."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(64, 64, generator=generator) / 8
    dtype = network[0].weight.dtype
    losses = []
    for _ in range(steps):
        inputs = torch.randn(128, 64, generator=generator)
        loss = (network(inputs.to(dtype)).float() - torch.tanh(inputs @ target)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rounding", [None, pytest.param("stochastic", marks=E2E), pytest.param("kahan", marks=E2E)])
def test_8_bit_moments_train_as_fp32_ones(rounding: Rounding | None) -> None:
    exact, other = small_network(), small_network(torch.bfloat16 if rounding else torch.float32)
    start = torch.cat([p.detach().float().flatten() for p in other.parameters()])
    reference = train(exact, torch.optim.AdamW(exact.parameters(), **SETTINGS), 200)
    losses = train(other, ours(dict(other.named_parameters()), eight_bit=True, rounding=rounding), 200)
    assert reference[-1] < 0.5 * reference[0]
    for first in range(0, 200, 20):  # the curves, in windows of 20 steps
        assert sum(losses[first : first + 20]) == pytest.approx(sum(reference[first : first + 20]), rel=0.05)
    wanted = torch.cat([p.detach().flatten() for p in exact.parameters()]) - start
    change = torch.cat([p.detach().float().flatten() for p in other.parameters()]) - start
    assert float(torch.cosine_similarity(wanted, change, dim=0)) > 0.97


def test_8_bit_moments_follow_the_papers_algorithm() -> None:
    """Written out over a matrix whose rows are whole blocks of 256."""

    def coded(moments: Tensor, values: Tensor) -> Tensor:
        scales = moments.abs().amax(dim=1, keepdim=True)
        bounds = (values[1:] + values[:-1]) / 2
        return values[torch.bucketize(moments / scales, bounds)] * scales

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 256) * 0.02)
    expected, first, second = weight.detach().clone(), torch.zeros(32, 256), torch.zeros(32, 256)
    optimizer = ours({"w": weight}, eight_bit=True, rounding=None)
    for t in range(1, 11):
        weight.grad = gradient = torch.randn(32, 256)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        update = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        expected = expected - 1e-3 * (update + 0.01 * expected)
        first, second = coded(first, dynamic_map(signed=True)), coded(second, dynamic_map(signed=False))
        # A number on the bound of two codes may fall to either side; few do.
        off = (weight.detach() - expected).abs() > 1e-7
        assert float(off.float().mean()) < 1e-3


def test_8_bit_moments_follow_bitsandbytes() -> None:
    """Its CPU kernel takes a neighbouring code now and then, so directions are compared, not bits."""
    library = pytest.importorskip("bitsandbytes")
    weights = [nn.Parameter(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02) for _ in range(2)]
    theirs = library.optim.AdamW8bit([weights[0]], **SETTINGS)
    optimizer = ours({"w": weights[1]}, eight_bit=True, rounding=None)
    before = weights[0].detach().clone()
    for step in range(50):
        give_gradients({"a": weights[0]}, step)
        give_gradients({"a": weights[1]}, step)
        theirs.step()
        optimizer.step()
    moved = [(weight.detach() - before).flatten() for weight in weights]
    assert float(torch.cosine_similarity(moved[0], moved[1], dim=0)) > 0.99


def test_gradients_leave_one_by_one() -> None:
    named = parameters(torch.bfloat16)
    optimizer = BlockAdamW(
        [{"params": list(named.items()), **SETTINGS}], eight_bit=True, rounding="kahan", free_gradients=True
    )
    run(named, optimizer, range(1))
    assert all(p.grad is None for p in named.values())
    weights = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step()  # without gradients nothing moves
    assert_equal(weights, {name: p.detach() for name, p in named.items()})


@pytest.mark.e2e
def test_a_step_takes_few_megabytes(threads: Callable[[int], None]) -> None:
    """60M weights: 120 MB in bf16, 240 MB in fp32."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("no /proc/self/clear_refs")
    threads(1)
    named = {f"w{i}": nn.Parameter(torch.full((3000, 10000), 0.01, dtype=torch.bfloat16)) for i in range(2)}
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = ours(named, eight_bit=True, rounding="stochastic")
    for parameter in named.values():  # the state exists, its pages are not touched
        for tensor in optimizer.start(parameter).values():
            tensor.fill_(1)
    clear.write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    optimizer.step()
    assert resident_bytes("VmHWM") - before < 45e6  # a chunk at a time: 0.5M weights


def resident_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def test_rounding_to_the_nearest_does_not_exist() -> None:
    with pytest.raises(ValueError, match="bf16 weights need it"):
        ours(parameters(torch.bfloat16), eight_bit=False, rounding=None)
    with pytest.raises(ValueError, match="others have none"):
        ours(parameters(torch.float32), eight_bit=False, rounding="kahan")
    with pytest.raises(ValueError, match="must be fp32 or bf16"):
        ours(parameters(torch.float16), eight_bit=False, rounding=None)


def test_a_nan_gradient_shows() -> None:
    """It is not hidden by the codes: what guards the numbers must see it."""
    named = parameters(torch.bfloat16)
    optimizer = ours(named, eight_bit=True, rounding="stochastic")
    give_gradients(named, 0)
    assert named["linear"].grad is not None
    named["linear"].grad[3, 5] = math.nan
    optimizer.step()
    assert bool(named["linear"][3, 5].isnan()) and int(named["linear"].isnan().sum()) == 1
    run(named, optimizer, range(1, 2))
    assert int(named["linear"].isnan().sum()) == 160  # its block


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # within torch.compile
def test_compiled_arithmetic_differs_in_the_last_bit_only(rounding: Literal["stochastic", "kahan"]) -> None:
    """A minute of compilation, in the first step alone; needs a C++ compiler."""
    plain, fused = parameters(torch.bfloat16), parameters(torch.bfloat16)
    reference = ours(plain, eight_bit=True, rounding=rounding)
    run(plain, reference, range(1))
    reference.param_groups[0]["lr"] *= 0.5
    run(plain, reference, range(1, 4))
    update = compiled_update(True, rounding, torch.device("cpu"))
    assert update is not None
    optimizer = ours(fused, eight_bit=True, rounding=rounding, update=update)
    run(fused, optimizer, range(1))
    with torch.compiler.set_stance("fail_on_recompile"):  # a new step, key and learning rate are the same code
        optimizer.param_groups[0]["lr"] *= 0.5
        run(fused, optimizer, range(1, 4))
    for name in plain:
        assert float((plain[name] != fused[name]).float().mean()) < 1e-2, name


def test_gradients_are_taken_times_a_factor() -> None:
    """Clipping without a pass over the gradients, which stay as they are."""
    one, two = parameters(torch.bfloat16), parameters(torch.bfloat16)
    plain, scaled = (ours(named, eight_bit=True, rounding="kahan") for named in (one, two))
    give_gradients(one, 0)
    give_gradients(two, 0)
    for parameter in two.values():
        assert parameter.grad is not None
        parameter.grad *= 4  # exact in bf16
    before = two["linear"].grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
    plain.step()
    scaled.step(gradient_factor=0.25)
    assert_equal(everything(one, plain), everything(two, scaled))
    assert torch.equal(two["linear"].grad, before)  # pyright: ignore[reportArgumentType]


def test_without_a_compiler_it_goes_on_uncompiled(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def compile_nothing(*_: object, **__: object) -> Any:
        def fail(*_: object) -> None:
            raise RuntimeError("No working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert compiled_update(True, "stochastic", torch.device("cpu")) is None
    assert "AdamW's arithmetic is not compiled, and takes longer: No working C++ compiler found" in caplog.text


@pytest.mark.parametrize(
    ("spoilt", "factor"), [("weight", 3), ("weight", math.nan), ("first", 3), ("second_scale", math.inf)]
)
def test_wrong_compiled_arithmetic_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, spoilt: str, factor: float
) -> None:
    def compile_wrongly(function: Any, **_: object) -> Any:
        def run(chunk: Chunk, *others: Any) -> None:
            function(chunk, *others)
            if (part := getattr(chunk, spoilt)) is not None:
                part.mul_(int(factor) if part.dtype == torch.uint8 else factor)

        return run

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    assert compiled_update(True, "stochastic", torch.device("cpu")) is None
    assert f"the {spoilt} differs" in caplog.text

"""Three real workers average how far their weights have come, against the papers' algorithms in float64."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.wire.average_script import SHAPES, STEPS, WAYS
from tests.worker_group import run_group, worker_environments
from trainer.wire.wire_cost import averaged_together, cut_evenly

SCRIPT = Path(__file__).with_name("average_script.py")
WORLD = 3
FRAGMENTS = {1: [[*SHAPES]], 2: [["one", "two"], ["three", "four"]]}  # of these shapes
EXACT = [way for way, settings in WAYS.items() if "method" not in settings]
ROUNDED = [way for way in WAYS if way not in EXACT and "fragments" not in WAYS[way]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    run_group([[sys.executable, str(SCRIPT), str(folder)]] * WORLD, worker_environments(WORLD), folder)
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


class Reference:
    """The common weights of one way in float64, from the workers' own weights as they were before each average.

    The outer optimizer is PyTorch's SGD. Fragment i of P is averaged after steps i H / P above a multiple of H.
    """

    def __init__(self, way: str, dtype: torch.dtype, start: dict[str, Tensor]) -> None:
        settings = WAYS[way]
        self.every, self.late = settings["average_every"], settings.get("overlap_steps", 0)
        self.fragments = FRAGMENTS[settings.get("fragments", 1)]
        self.kept = settings.get("own_share", 0.5 if self.late else 0.0)
        self.dtype = dtype
        self.common = {name: torch.nn.Parameter(tensor.double()) for name, tensor in start.items()}
        lr, momentum = settings["outer_lr"], settings["outer_momentum"]
        self.optimizers = [
            torch.optim.SGD([self.common[n] for n in names], lr=lr, momentum=momentum, nesterov=momentum > 0)
            for names in self.fragments
        ]
        self.on_their_way: dict[int, dict[str, Tensor]] = {}

    def _begins(self, index: int, step: int) -> bool:
        return step > 0 and (step - (index + 1) * self.every // len(self.fragments)) % self.every == 0

    def _mean_difference(self, name: str, own: list[Tensor], found: Tensor) -> Tensor:
        base = self.common[name].detach()
        if not self.kept:
            # Workers started from what their precision holds of it; of numbers in the middle, last bits decide.
            base = found.to(self.dtype).double()
        return torch.stack([base - weights.double() for weights in own]).mean(dim=0)

    def after(self, step: int, own: dict[str, list[Tensor]], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each worker goes on from: by name, the common weights that are new after this step.

        Args:
            found: the common weights before it in fp32, which have been compared with these.
        """
        new: dict[str, Tensor] = {}
        for index, names in enumerate(self.fragments):
            if self.late and self._begins(index, step - self.late) and index in self.on_their_way:
                new |= self._apply(index, self.on_their_way.pop(index))
            if self._begins(index, step):
                means = {name: self._mean_difference(name, own[name], found[name]) for name in names}
                if self.late:
                    self.on_their_way[index] = means
                else:
                    new |= self._apply(index, means)
        return new

    def _apply(self, index: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, mean in means.items():
            self.common[name].grad = mean
        self.optimizers[index].step()
        return {name: self.common[name].detach().clone() for name in means}

    def momentum(self, name: str) -> Tensor:
        for optimizer in self.optimizers:
            buffer = optimizer.state[self.common[name]].get("momentum_buffer")
            if buffer is not None:
                return buffer
        return torch.zeros_like(self.common[name])


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", EXACT)
def test_it_is_the_papers_algorithm(workers: list[dict[str, Tensor]], way: str, precision: str) -> None:
    """Common weights, momentum and what workers go on from, after each step but the last."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    common = {name: tensor.to(dtype).float() for name, tensor in start().items()}
    reference = Reference(way, dtype, common)
    renewed = 0
    for step in range(1, STEPS):
        at = f"{way}:{precision}:{step}"
        own = {name: [worker[f"{at}:before:{name}"] for worker in workers] for name in SHAPES}
        new = reference.after(step, own, common)
        common = {name: workers[0][f"{at}:common:{name}"] for name in SHAPES}
        renewed += len(new)
        for name in SHAPES:
            assert torch.allclose(common[name].double(), reference.common[name].detach(), rtol=0, atol=3e-6), (
                step,
                name,
            )
            momentum = workers[0][f"{at}:momentum:{name}"].double()
            if WAYS[way]["outer_momentum"]:
                assert torch.allclose(momentum, reference.momentum(name), rtol=0, atol=3e-6), (step, name)
            for worker, before in zip(workers, own[name], strict=True):
                after = worker[f"{at}:after:{name}"].double()
                if name not in new:
                    assert torch.equal(after, before.double()), (step, name)
                    continue
                wanted = reference.kept * before.double() + (1 - reference.kept) * new[name]
                error = 3e-6 if precision == "fp32" else wanted.abs().max() * 2**-7
                assert float((after - wanted).abs().max()) <= error, (step, name)
    assert renewed >= len(SHAPES)  # at least once each


@pytest.mark.e2e
@pytest.mark.parametrize("way", WAYS)
def test_all_have_the_same_in_common(workers: list[dict[str, Tensor]], way: str) -> None:
    """To the bit, after each step; and after the last one it is what all go on from, whatever was under way."""
    for name, tensor in workers[0].items():
        if name.startswith(f"{way}:") and (":common:" in name or ":momentum:" in name or f":{STEPS}:after:" in name):
            assert all(torch.equal(tensor, other[name]) for other in workers[1:]), name
    for precision in ("fp32", "bf16"):
        for name in SHAPES:
            at = f"{way}:{precision}:{STEPS}"
            last = workers[0][f"{at}:after:{name}"]
            assert torch.equal(last, workers[0][f"{at}:common:{name}"].to(last.dtype))
            before = f"{way}:{precision}:{STEPS - 1}:after:{name}"
            assert not torch.equal(workers[0][before], workers[1][before])


@pytest.mark.e2e
@pytest.mark.parametrize("way", WAYS)
def test_the_common_weights_are_in_the_model_for_a_while(workers: list[dict[str, Tensor]], way: str) -> None:
    for worker in workers:
        for precision in ("fp32", "bf16"):
            for step in range(1, STEPS + 1):
                at = f"{way}:{precision}:{step}"
                for name in SHAPES:
                    inside = worker[f"{at}:inside:{name}"]
                    assert torch.equal(inside, worker[f"{at}:common:{name}"].to(inside.dtype))


@pytest.mark.e2e
def test_off_schedule_the_last_step_takes_the_plain_mean(workers: list[dict[str, Tensor]]) -> None:
    assert STEPS % WAYS["plain"]["average_every"]
    for name in SHAPES:
        own = torch.stack([worker[f"plain:fp32:{STEPS}:before:{name}"].double() for worker in workers])
        found = workers[0][f"plain:fp32:{STEPS}:common:{name}"].double()
        assert torch.allclose(found, own.mean(dim=0), rtol=0, atol=2e-6)
        before = workers[0][f"plain:fp32:{STEPS - 1}:momentum:{name}"]
        assert torch.equal(before, workers[0][f"plain:fp32:{STEPS}:momentum:{name}"])


@pytest.mark.e2e
@pytest.mark.parametrize("way", ROUNDED)
def test_differences_may_be_rounded(workers: list[dict[str, Tensor]], way: str) -> None:
    """What comes of it lies nearer to the exact average than all differences are long."""
    share = {"bf16": 0.02, "int8": 0.05, "int4 at random": 0.6, "powersgd": 1.0}[way]
    for name in SHAPES:
        for step in (4, 8) if way != "powersgd" else (4,):
            exact, found = (worker[f"{kind}:fp32:{step}:common:{name}"].double() for kind, worker in
                            (("plain", workers[0]), (way, workers[0])))  # fmt: skip
            moved = exact - workers[0][f"plain:fp32:{step - 1}:common:{name}"].double()
            assert float((found - exact).norm()) < share * float(moved.norm()), (step, name)
            assert not torch.equal(found, exact) or name == "four"


@pytest.mark.e2e
def test_bytes_are_as_planned(folder: Path) -> None:
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    for way, (sent, planned, _) in seen.items():
        assert planned <= sent <= planned * (1.001 if way in EXACT or way == "powersgd" else 1.15) + 1, way
    whole = 8 * sum(torch.Size(shape).numel() for shape in SHAPES.values()) * (WORLD - 1) / WORLD
    assert seen["plain"][0] == pytest.approx(whole / 4) and seen["plain"][2] == pytest.approx(whole)
    assert seen["streamed"][0] == pytest.approx(whole / 4) and seen["streamed"][2] < 0.7 * whole
    assert seen["int8"][0] < 0.32 * seen["plain"][0]


def test_fragments_are_runs_of_about_one_size() -> None:
    sizes = {f"layer {index}": 100 + 37 * (index % 5) for index in range(50)}
    runs = cut_evenly(sizes, 4)
    assert [name for run in runs for name in run] == [*sizes] and len(runs) == 4
    filled = [sum(sizes[name] for name in run) for run in runs]
    assert max(filled) - min(filled) < 2 * max(sizes.values())
    assert cut_evenly({"only": 5}, 3) == [["only"]] and cut_evenly({}, 3) == []


def test_groups_are_bounded() -> None:
    million = 1 << 20
    sizes = {"a": 10 * million, "b": 5 * million, "c": 2 * million, "huge": 40 * million, "d": 1}
    assert [*averaged_together(sizes)] == [["a", "b"], ["c"], ["huge"], ["d"]]

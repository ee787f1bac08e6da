"""Three real workers average gradients: the same bits on all, the right mean, and what is left out comes later."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.worker_group import run_group, worker_environments

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).with_name("exchange_script.py")
STEPS, WORLD = 200, 3
SIZES = {"wide": 1.0, "conv": 1e-3, "bias": 1e-6, "small": 10.0}
SHAPES = {"wide": (40, 48), "conv": (16, 8, 3, 3), "bias": (70,), "small": (8, 8)}
AT_RANDOM = ("bf16", "int8 at random", "int4 at random")
WITH_FEEDBACK = ("int8", "int4", "powersgd")
DTYPES = ("fp32", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exchange")
    run_group([[sys.executable, str(SCRIPT), str(folder)]] * WORLD, worker_environments(WORLD), folder)
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "seen.json").read_text())


def true_means(dtype: str) -> dict[str, Tensor]:
    """In float64, of the gradients that the script makes."""
    each = []
    for rank in range(WORLD):
        generator = torch.Generator().manual_seed(rank)
        made = {name: torch.randn(SHAPES[name], generator=generator) * size for name, size in SIZES.items()}
        each.append({n: t.bfloat16().double() if dtype == "bf16" else t.double() for n, t in made.items()})
    return {name: sum(gradients[name] for gradients in each) / WORLD for name in SIZES}  # pyright: ignore


def test_all_workers_get_the_same_bits(workers: list[dict[str, Tensor]]) -> None:
    for name, tensor in workers[0].items():
        if ":error:" not in name:
            assert all(torch.equal(tensor, other[name]) or ":infinite:" in name for other in workers[1:]), name


@pytest.mark.parametrize(
    ("way", "dtype", "error"),
    [
        ("plain", "fp32", 1e-6),
        ("plain", "bf16", 2**-7),
        ("bf16", "fp32", 2**-6),  # rounded twice, by up to 2^-7 of the larger worker's
        ("bf16", "bf16", 2**-7),
        ("int8", "fp32", 0.03),
        ("int4", "fp32", 0.5),
        ("int8 at random", "bf16", 0.05),
        ("int4 at random", "fp32", 0.9),
    ],
)
def test_one_exchange_is_near_the_mean(workers: list[dict[str, Tensor]], way: str, dtype: str, error: float) -> None:
    """Errors as a share of a usual number; of integers, the farthest of a row is up to four times that."""
    for name, mean in true_means(dtype).items():
        miss = (workers[0][f"{way}:{dtype}:first:{name}"].double() - mean).abs().max() / SIZES[name]
        assert float(miss) < 4 * error, name
        small = name in ("bias", "small")
        if small and way.startswith("int") and dtype == "fp32":
            assert float(miss) < 1e-6, name  # as they are


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", AT_RANDOM)
def test_means_of_random_rounding_are_right(workers: list[dict[str, Tensor]], way: str, dtype: str) -> None:
    """Of 200 exchanges: within five standard errors, of what one exchange is off by at most."""
    for name, mean in true_means(dtype).items():
        found = workers[0][f"{way}:{dtype}:mean:{name}"].double()
        most = {"bf16": 2**-6, "int8 at random": 4 / 127, "int4 at random": 4 / 7}[way] * 3 * SIZES[name]
        off = float((found - mean).abs().max())
        assert off < 5 * most / 2 / STEPS**0.5, name
        assert abs(float((found - mean).mean())) < 5 * most / 2 / (STEPS * found.numel()) ** 0.5, name


@pytest.mark.parametrize("way", WITH_FEEDBACK)
def test_nothing_is_lost_with_error_feedback(workers: list[dict[str, Tensor]], way: str) -> None:
    """What all have got and what is still kept is the sum of all gradients."""
    for name, mean in true_means("fp32").items():
        found = workers[0][f"{way}:fp32:mean:{name}"].double()
        errors = [worker.get(f"{way}:fp32:error:{name}") for worker in workers]
        if name in ("bias", "small"):
            assert errors == [None] * WORLD
            continue
        owed = sum(error.double() for error in errors if error is not None) / WORLD / STEPS
        off = (found + owed - mean).abs().max() / SIZES[name]
        # Errors are kept in bf16, rounded at random; those of products are many times a gradient.
        assert float(off) < (2e-2 if way == "powersgd" else 2e-3), name
        assert float((found - mean).abs().max()) < {"int8": 2e-3, "int4": 2e-2, "powersgd": 1.0}[way] * SIZES[name]


def test_errors_of_products_do_not_grow(workers: list[dict[str, Tensor]]) -> None:
    """Workers differ for good, and what one keeps is what all products lack, not how it differs from the mean."""
    for name in ("wide", "conv"):
        for worker in workers:
            assert float(worker[f"powersgd:fp32:error:{name}"].abs().max()) < 200 * SIZES[name]


def test_one_workers_infinity_is_seen_by_all_and_forgotten(
    workers: list[dict[str, Tensor]], seen: dict[str, Any]
) -> None:
    names = [name for name in workers[0] if ":infinite:" in name]
    assert len(names) == 7 * 4
    for worker in workers:
        assert not any(bool(worker[name].isfinite().all()) for name in names)
    assert all(value for name, value in seen.items() if name.endswith(":finite again"))


def test_the_loss_scale_may_change(seen: dict[str, Any]) -> None:
    assert seen["int4:scaled"] == 0.0 and seen["powersgd:scaled"] < 1e-5


def test_first_steps_may_be_plain(workers: list[dict[str, Tensor]]) -> None:
    for name, mean in true_means("fp32").items():
        assert torch.allclose(workers[0][f"plain step:{name}"].double(), mean, rtol=1e-5, atol=1e-6 * SIZES[name])
    mean = true_means("fp32")["wide"]
    assert 1e-3 < float((workers[0]["step after it:wide"].double() - mean).abs().max()) < 2.0


def test_bytes_on_the_wire_are_as_planned(seen: dict[str, Any]) -> None:
    """But for the rows that make shares equal: two of some thirty at most. What is frozen is not sent."""
    for way, (sent, planned) in seen["traffic"].items():
        assert planned <= sent <= planned * (1.001 if way in ("plain", "powersgd") else 1.15), way
    sent = {way: pair[1] for way, pair in seen["traffic"].items()}
    assert sent["int4"] < 0.6 * sent["int8"] < 0.6 * 0.6 * sent["bf16"] and sent["bf16"] < 0.65 * sent["plain"]

"""Averages of any length from stored ones, against averages that were tracked at that length."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import UserError
from trainer.optim.ema_profile import PowerEma
from trainer.publish import reconstruct_ema
from trainer.publish.reconstruct_ema import StoredAverage, combined_tensors, plan_reconstruction, write_reconstruction

STEPS = 2000
TRACKED = (0.03, 0.07, 0.15, 0.2)
STORED = (0.05, 0.10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[StoredAverage]], dict[float, Tensor]]:
    """A run whose weights drift and shake: averages stored 16 times in two dtypes, and others tracked to its end."""
    folder = tmp_path_factory.mktemp("averages")
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(600, generator=generator, dtype=torch.float64) * 0.05
    goal = weights + torch.randn(600, generator=generator, dtype=torch.float64) * 0.05
    profiles = {sigma_rel: PowerEma(sigma_rel) for sigma_rel in (*STORED, *TRACKED)}
    averages = {sigma_rel: weights.clone() for sigma_rel in profiles}
    stored: dict[str, list[StoredAverage]] = {"float32": [], "float16": []}
    for step in range(1, STEPS + 1):
        weights += 2e-3 * (goal - weights) + 1e-3 * torch.randn(600, generator=generator, dtype=torch.float64)
        for sigma_rel, profile in profiles.items():
            averages[sigma_rel].lerp_(weights, 1 - profile.decay_at(step))
        if step % (STEPS // 16) == 0:
            for sigma_rel in STORED:
                for dtype in stored:
                    path = folder / f"{step}-{sigma_rel}-{dtype}.safetensors"
                    value = averages[sigma_rel].to(getattr(torch, dtype))
                    save_file({"matrix": value.view(30, 20), "scalar": value[7].clone(), "none": value[:0]}, path)
                    stored[dtype].append(StoredAverage(path, step, sigma_rel))
    return stored, {sigma_rel: averages[sigma_rel] for sigma_rel in TRACKED}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("sigma_rel", "most"), [(0.03, 1.5e-3), (0.07, 1e-4), (0.15, 2e-4), (0.2, 1.6e-3)])
def test_other_lengths_are_those_tracked(
    run: tuple[dict[str, list[StoredAverage]], dict[float, Tensor]],
    tmp_path: Path,
    dtype: str,
    sigma_rel: float,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Error as a share of the weights' norm; fp16 adds its rounding times the combination's amplification."""
    stored, tracked = run
    monkeypatch.setattr(reconstruct_ema, "_PIECE_ELEMENTS", 77)
    found = write_reconstruction(stored[dtype], sigma_rel, tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors["matrix"].dtype == torch.float32
    value, expected = tensors["matrix"].double().view(-1), tracked[sigma_rel]
    error = float((value - expected).norm() / expected.norm())
    rounding = 2**-11 / 3**0.5 * found.amplification if dtype == "float16" else 0.0
    assert error < most + rounding
    assert tensors["scalar"] == tensors["matrix"].view(-1)[7]
    # The stored ones are no such average themselves.
    nearest = load_file(stored[dtype][-2 if sigma_rel < 0.075 else -1].path)["matrix"].double().view(-1)
    assert error < 0.2 * (nearest - expected).norm() / expected.norm() + rounding


def test_a_length_as_it_was_at_an_earlier_step(
    run: tuple[dict[str, list[StoredAverage]], dict[float, Tensor]], tmp_path: Path
) -> None:
    stored = run[0]["float32"]
    earlier = STEPS // 2
    used, found = plan_reconstruction(stored, 0.05, earlier)
    assert max(each.step for each in used) == earlier and len(used) == 16
    assert found.relative_error < 1e-6
    write_reconstruction(stored, 0.05, tmp_path / "out.safetensors", step=earlier, dtype="F16", metadata={"a": "b"})
    (same,) = (each for each in stored if (each.step, each.sigma_rel) == (earlier, 0.05))
    value = load_file(tmp_path / "out.safetensors")["matrix"]
    assert value.dtype == torch.float16
    assert torch.allclose(value.float(), load_file(same.path)["matrix"], rtol=1e-3)


def test_mistakes_are_told(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file({"w": torch.ones(3), "v": torch.ones(2)}, one)
    save_file({"w": torch.ones(4), "v": torch.ones(2)}, other)
    with pytest.raises(UserError, match=r"other\.safetensors: w is not as in .*one\.safetensors"):
        combined_tensors([one, other], [0.5, 0.5])
    other.write_bytes(one.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"other\.safetensors: is "):
        combined_tensors([one, other], [0.5, 0.5])
    with pytest.raises(UserError, match=r"^length = 0\.5: must be above 0 and below 0\.289$"):
        plan_reconstruction([StoredAverage(one, 10, 0.05)], 0.5)
    for stored, step in (([], None), ([StoredAverage(one, 10, 0.05)], 9)):
        with pytest.raises(UserError, match="no power-function average is stored"):
            plan_reconstruction(stored, 0.1, step)


_MEASURE = """
import sys
from pathlib import Path
from trainer.optim.ema_profile import ProfileAt, reconstruction_weights
from trainer.publish.reconstruct_ema import StoredAverage, write_reconstruction

def peak_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

reconstruction_weights([ProfileAt(1, 0.05)], ProfileAt(1, 0.07))
before, folder = peak_kb(), Path(sys.argv[1])
stored = [StoredAverage(file, 10 * (n + 1), 0.05) for n, file in enumerate(sorted(folder.glob("*.safetensors")))]
write_reconstruction(stored, 0.07, folder / "out")
print(peak_kb() - before)
"""


@pytest.mark.e2e
def test_memory_does_not_grow_with_files_and_tensors(tmp_path: Path) -> None:
    """Tensors of 4 MB in fp16: three times the files with four times the tensors, 9 times 32 MB more."""
    peaks = []
    for files, tensors in ((2, 2), (6, 8)):
        folder = tmp_path / str(files)
        folder.mkdir()
        for n in range(files):
            values = {f"w{k}": torch.full((1 << 21,), float(n + k), dtype=torch.float16) for k in range(tensors)}
            save_file(values, folder / f"{n}.safetensors")
        command = [sys.executable, "-c", _MEASURE, str(folder)]
        peaks.append(int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) * 1024)
    assert peaks[1] < peaks[0] + (16 << 20)

"""What only a GPU can show; skipped where there is none. `benchmarks/gpu.sh` runs it."""

import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.optim.test_hosted_blocks import BLOCKS, WAYS, Trained, require_same
from tests.train.real_run import model_of, run_config
from trainer.data.buckets import Bucket
from trainer.measure.step_clock import StepClock
from trainer.memory.run_choice import MemoryChoice
from trainer.model.compiled import compile_blocks
from trainer.model_files.run_model import open_model
from trainer.optim.adamw import Rounding
from trainer.optim.ema import Place, start_averages, update_averages
from trainer.optim.ema_contents import ema_parts
from trainer.optim.ema_profile import PlainEma, PowerEma
from trainer.optim.ema_swap import averaged_weights
from trainer.optim.precision import set_fp32_arithmetic
from trainer.parallel.comm import Comm
from trainer.train.build import build_parts
from trainer.train.step import train_step
from trainer.train.workers.bench_worker import SyntheticData, synthetic_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DATA = SyntheticData(Bucket(64, 64), 0.13025, (77, 40, 24), holds_images=False, chunks=1, words=49408)


def losses_on(device: str, model: Path, folder: Path, precision: str) -> list[float]:
    """Of four steps on one batch."""
    config = run_config(model, folder / "prepared", folder / "run", data={"cache_text": True})
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    set_fp32_arithmetic(precision)
    comm = Comm(rank=0, world=1, local_rank=0, device=torch.device(device))
    parts = build_parts(config, model_of(config), comm, DATA, MemoryChoice("single"))
    batch = synthetic_batch(DATA, 4, 4, seed=0, pin_memory=device != "cpu")
    assert batch.weights.is_pinned() == (device != "cpu")
    return [train_step(parts, [batch], 1, 4.0, 1.0, False).loss for _ in range(4)]


def test_fp32_takes_the_steps_of_the_cpu(model_folder: Path, tmp_path: Path) -> None:
    on_gpu, on_cpu = (losses_on(device, model_folder, tmp_path, "fp32") for device in ("cuda:0", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "bf16_stochastic", "bf16_kahan", "fp16"])
def test_other_precisions_learn(model_folder: Path, tmp_path: Path, precision: str) -> None:
    if precision.startswith("bf16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a card with bf16")
    losses = losses_on("cuda:0", model_folder, tmp_path, precision)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_blocks_compute_the_same(model_folder: Path) -> None:
    from trainer.model.load_weights import load_unet

    set_fp32_arithmetic("fp32")
    sizes = {"text_embeds": torch.randn(2, 24, device="cuda"), "time_ids": torch.randn(2, 6, device="cuda")}
    text = torch.randn(2, 77, 40, device="cuda")
    plain, unet = (load_unet(open_model(model_folder), torch.float32, "cuda") for _ in range(2))
    compile_blocks(unet)
    for side in (8, 16):
        latents, times = torch.randn(2, 4, side, 8, device="cuda"), torch.tensor([3, 500], device="cuda")
        found, expected = (m(latents, times, text, added_cond_kwargs=sizes)[0] for m in (unet, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_in_host_memory_are_those_on_the_card(dtype: torch.dtype) -> None:
    """To the bit; an average of the host's goes into the model, and the live weights come back."""
    found: list[dict[str, torch.Tensor]] = []
    places: tuple[Place, ...] = ("device", "host")
    for place in places:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(300, 401), torch.nn.Conv2d(8, 9, 3)).to("cuda", dtype)
        parameters = dict(layers.named_parameters())
        averages = start_averages(parameters, {"ema": PlainEma(0.9), "long": PowerEma(0.1)}, place=place)
        assert averages.shards["ema"]["0.weight"].is_pinned() == (place == "host")
        for step in range(1, 6):
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.add_(torch.randn_like(parameter) * 1e-2)
            update_averages(averages, parameters, step)
        found.append({name: held.part.cpu().clone() for name, held in ema_parts(averages, "ema", parameters).items()})
        live = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with averaged_weights(averages, "ema", parameters):
            for name, parameter in parameters.items():
                assert torch.equal(parameter.cpu(), found[-1][name].to(dtype))
        assert all(torch.equal(parameter, live[name]) for name, parameter in parameters.items())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_state_in_host_memory_is_that_on_the_card(way: tuple[str, Rounding | None]) -> None:
    """To the bit, also with updates that take longer than the copies, and blocks in another order."""
    usual, ours = (Trained(*way, hosted, torch.device("cuda:0")) for hosted in (False, True))
    for number, order in enumerate([BLOCKS, BLOCKS, BLOCKS[::-1], ("first", "third"), BLOCKS, BLOCKS]):
        for each in (usual, ours):
            each.step(number, order)
    require_same(usual, ours)
    assert ours.hosted is not None and ours.hosted.device_bytes > 0
    tensors = [value for state in ours.optimizer.state.values() for value in state.values() if value.ndim]
    assert all(tensor.is_pinned() for tensor in tensors)


def test_a_steady_step_waits_for_the_card_once(model_folder: Path, tmp_path: Path) -> None:
    """With its phases timed: CUDA itself says who synchronizes."""
    config = run_config(model_folder, tmp_path / "prepared", tmp_path / "run", data={"cache_text": True})
    comm = Comm(rank=0, world=1, local_rank=0, device=torch.device("cuda:0"))
    parts = build_parts(config, model_of(config), comm, DATA, MemoryChoice("single"))
    batch = synthetic_batch(DATA, 4, 4, seed=0, pin_memory=True)
    parts.clock.start()
    taken: list[dict[str, float]] = []

    def step() -> None:
        train_step(parts, [batch] * 2, 2, 8.0, 1.0, False, tell=lambda: taken.append(parts.clock.take()) or ())

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            for _ in range(3):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [str(each.message) for each in waits if "synchroniz" in str(each.message)]
    assert len(told) == 3, told
    for phases in taken[1:]:
        assert min(phases["forward"], phases["backward"], phases["optimizer"]) > 0 and phases["data"] == 0


def test_the_clock_tells_what_the_card_has_spent() -> None:
    """Kernels where they run, not where they are launched; what the card idles for, where the host makes it wait."""
    clock, one = StepClock(torch.device("cuda:0")), torch.randn(4096, 4096, device="cuda")

    def products(count: int) -> None:
        for _ in range(count):
            one @ one

    products(3)
    torch.cuda.synchronize()
    clock.start()
    clock.mark("forward")
    products(20)
    clock.mark("backward")
    products(60)
    clock.mark("data")
    torch.cuda.synchronize()
    time.sleep(0.2)
    clock.mark("other")
    torch.cuda.synchronize()
    taken = clock.take()
    assert taken["backward"] == pytest.approx(3 * taken["forward"], rel=0.5) and taken["data"] > 0.19
    assert taken["other"] == 0.0

"""From what a model says and the configuration asks for to an objective; and 30 steps of each as they were."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_files.single_files import rewrite, write_single_file
from tests.train.real_run import ALONE, model_of, run_config
from trainer.config.schema import Config, SamplesConfig
from trainer.config.sections.objective_config import ObjectiveConfig
from trainer.data.buckets import Bucket
from trainer.data.loader import Batch
from trainer.errors import UserError
from trainer.memory.run_choice import MemoryChoice
from trainer.model_files.run_model import open_model
from trainer.train.arithmetic import arithmetic_of
from trainer.train.build import build_parts
from trainer.train.memory_inputs import planned_run
from trainer.train.run_objective import chosen_prediction, describe_objective, guidance_warning, make_objective
from trainer.train.step import train_step
from trainer.train.workers.bench_worker import SyntheticData, synthetic_batch

GOLDEN = Path(__file__).with_name("golden_losses.json")
DATA = SyntheticData(Bucket(64, 64), 0.13025, (77, 40, 24), holds_images=False, chunks=1, words=518)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "epsilon, min-SNR, offset": {"weighting": {"kind": "min_snr"}, "noise": {"offset": 0.0357}},
    "epsilon, P2, pyramid, beta": {
        "weighting": {"kind": "p2"},
        "noise": {"pyramid_levels": 4},
        "timesteps": {"distribution": "beta", "a": 2.0},
    },
    "epsilon, debiased, Laplace, perturbed": {
        "weighting": {"kind": "debiased"},
        "noise": {"perturbation": 0.1},
        "timesteps": {"distribution": "laplace"},
    },
    "epsilon as aligned flow": {"flow": {"aligned": True, "shift": 2.0}},
    "v": {"prediction": "v_prediction"},
    "v, zero terminal SNR, min-SNR, Huber": {
        "prediction": "v_prediction",
        "zero_terminal_snr": True,
        "weighting": {"kind": "min_snr"},
        "loss": {"kind": "huber"},
    },
    "v, soft min-SNR, smooth L1, strata": {
        "prediction": "v_prediction",
        "weighting": {"kind": "soft_min_snr"},
        "loss": {"kind": "smooth_l1", "delta_schedule": "exponential"},
        "timesteps": {"stratified": True},
    },
    "flow, logit-normal, nearest noise": {
        "prediction": "flow",
        "flow": {"shift": 3.0},
        "timesteps": {"distribution": "logit_normal"},
        "noise": {"candidates": 4},
    },
    "flow, L1, strata of a range": {
        "prediction": "flow",
        "loss": {"kind": "l1"},
        "timesteps": {"min": 100, "max": 900, "stratified": True},
    },
    "EDM": {"prediction": "edm"},
    "v, learned weights": {"prediction": "v_prediction", "weighting": {"kind": "learned", "lr": 0.05}},
    "flow, contrast, optimal transport": {
        "prediction": "flow",
        "loss": {"contrast": 0.05},
        "noise": {"pairing": "optimal_transport"},
    },
}


def config_of(model: Path, folder: Path, objective: dict[str, Any], **train: Any) -> Config:
    config = run_config(model, folder / "prepared", folder / "run", data={"cache_text": True}, **train)
    return config.model_copy(update={"objective": ObjectiveConfig.model_validate(objective)})


def parted(batch: Batch, size: int) -> list[Batch]:
    """The batch in micro-batches, as accumulation cuts it."""
    names = ("latents", "text_hidden", "pooled", "time_ids", "weights", "draw_seeds")
    parts = []
    for begin in range(0, len(batch.weights), size):
        fields = {name: getattr(batch, name)[begin : begin + size] for name in names}
        parts.append(Batch(**{**vars(batch), **fields, "keys": batch.keys[begin : begin + size]}))
    return parts


def losses_of(config: Config, steps: int, micro_batch: int = 4) -> list[float]:
    parts = build_parts(config, model_of(config), ALONE, DATA, MemoryChoice("single"))
    losses = []
    for step in range(steps):
        batches = parted(synthetic_batch(DATA, 4, 4, seed=step), micro_batch)
        losses.append(train_step(parts, batches, len(batches), 4.0, 1.0, False).loss)
    return losses


@pytest.mark.parametrize("name", OBJECTIVES)
def test_thirty_steps_are_as_they_were(name: str, model_folder: Path, tmp_path: Path) -> None:
    """At full precision, on any machine; and in passes of one image the same."""
    config = config_of(model_folder, tmp_path, OBJECTIVES[name])
    losses = losses_of(config, 30)
    assert losses == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))[name], rel=1e-5)
    assert losses_of(config, 4, micro_batch=1) == pytest.approx(losses[:4], rel=1e-5)


def test_the_golden_losses_are_of_these_objectives() -> None:
    """What is not listed was never recorded."""
    assert list(json.loads(GOLDEN.read_text(encoding="utf-8"))) == list(OBJECTIVES)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_thousand_steps_without_a_nan(precision: str, model_folder: Path, tmp_path: Path) -> None:
    """v-prediction, zero terminal SNR and min-SNR 5 on 64 images: the loss falls, and all of it is finite."""
    objective = {"prediction": "v_prediction", "zero_terminal_snr": True, "weighting": {"kind": "min_snr"}}
    config = config_of(model_folder, tmp_path, objective, precision=precision)  # type: ignore[arg-type]
    parts = build_parts(config, model_of(config), ALONE, DATA, MemoryChoice("single"))
    pool = [synthetic_batch(DATA, 4, 4, seed=seed) for seed in range(16)]
    losses, norms = [], []
    for step in range(2000):
        seeds = torch.arange(4) + 4 * step
        batch = Batch(**{**vars(pool[step % 16]), "draw_seeds": seeds})
        result = train_step(parts, [batch], 1, 4.0, 1.0, False)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    assert torch.tensor([losses, norms]).isfinite().all()
    assert sum(losses[-200:]) < 0.95 * sum(losses[:200])


def test_latents_of_another_vae_are_scaled_and_shifted(model_folder: Path, tmp_path: Path) -> None:
    """As the UNet would see them if they had been stored so, with SDXL's own scale."""
    usual = config_of(model_folder, tmp_path, {})
    place = usual.model.model_copy(update={"latent_scale": 0.1406, "latent_shift": -0.4743})
    other = usual.model_copy(update={"model": place})
    batch = synthetic_batch(DATA, 4, 4, seed=0)
    assert batch.latents is not None
    seen = (batch.latents.float() + 0.4743) * 0.1406
    found, expected = (
        build_parts(config, model_of(config), ALONE, DATA, MemoryChoice("single")) for config in (other, usual)
    )
    as_stored = Batch(**{**vars(batch), "latents": seen / 0.13025})
    losses = [
        train_step(found, [batch], 1, 4.0, 1.0, False).loss,
        train_step(expected, [as_stored], 1, 4.0, 1.0, False).loss,
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def told(folder: Path, **keys: Any) -> Path:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


def test_the_model_says_what_it_predicts(model_folder: Path, tmp_path: Path) -> None:
    import shutil

    file = write_single_file(model_folder, tmp_path / "a.safetensors")
    marked = rewrite(file, tmp_path / "v.safetensors", lambda ts: {**ts, "v_pred": torch.zeros(0)})
    both = rewrite(marked, tmp_path / "z.safetensors", lambda ts: {**ts, "ztsnr": torch.zeros(0)})
    spec = rewrite(file, tmp_path / "f.safetensors", dict, {"modelspec.prediction_type": "flow"})
    folder = told(shutil.copytree(model_folder, tmp_path / "m"), prediction_type="v_prediction")
    found = {}
    for path in (file, marked, both, spec, folder):
        chosen = chosen_prediction(config_of(path, tmp_path, {}).objective, open_model(path))
        found[path.name] = (chosen.kind, chosen.zero_terminal_snr)
    assert found == {
        "a.safetensors": ("epsilon", False),
        "v.safetensors": ("v_prediction", False),
        "z.safetensors": ("v_prediction", True),
        "f.safetensors": ("flow", False),
        "m": ("v_prediction", False),
    }
    told(folder, rescale_betas_zero_snr=True)
    assert chosen_prediction(config_of(folder, tmp_path, {}).objective, open_model(folder)).zero_terminal_snr
    edm = rewrite(file, tmp_path / "e.safetensors", lambda ts: {**ts, "edm_vpred.sigma_max": torch.zeros(1)})
    with pytest.raises(UserError, match=r"predicts edm_v_prediction, by its marker.*objective\.prediction"):
        chosen_prediction(config_of(edm, tmp_path, {}).objective, open_model(edm))
    converted = config_of(edm, tmp_path, {"prediction": "flow", "flow": {"shift": 2.5}})
    assert make_objective(converted, open_model(edm)).prediction.shift == 2.5


def test_conversion_is_said_and_what_does_not_fit_the_model_refused(model_folder: Path, tmp_path: Path) -> None:
    model = open_model(model_folder)

    def chosen(objective: dict[str, Any]) -> str:
        return describe_objective(config_of(model_folder, tmp_path, objective), model)[0]

    assert chosen({}).startswith("objective: epsilon, as the model does (")
    converted = chosen({"prediction": "v_prediction", "zero_terminal_snr": True})
    assert (
        "v-prediction with zero terminal SNR; the model predicts epsilon" in converted and "is converted" in converted
    )
    for objective, words in (
        (
            {"zero_terminal_snr": True},
            r"zero_terminal_snr = true: this run predicts epsilon .*use objective.prediction=",
        ),
        ({"flow": {"shift": 3.0}}, r"objective\.flow\.shift = 3\.0: has no effect; this run predicts epsilon"),
    ):
        with pytest.raises(UserError, match=words):
            chosen(objective)


def test_what_options_cost_is_told_and_planned(model_folder: Path, tmp_path: Path) -> None:
    model, wish = (
        open_model(model_folder),
        {"prediction": "flow", "noise": {"candidates": 8}, "loss": {"contrast": 0.05}},
    )
    config = config_of(model_folder, tmp_path, wish)  # batches of 4 at 1024 px: 128 x 128 x 4 numbers of 4 bytes each
    lines = describe_objective(config, model)
    assert "  costs: 10.5 MB on each card for noise beside the usual" in lines  # 10 x 4 x 262,144 bytes
    assert any("0.13 MB an image, over the wire" in line for line in lines)
    assert not any("costs" in line for line in describe_objective(config_of(model_folder, tmp_path, {}), model))
    assert planned_run(config, model).extra_noises == 10


@pytest.mark.parametrize("wish", [{"timesteps": {"stratified": True}}, {"noise": {"pairing": "optimal_transport"}}])
def test_steps_of_one_image_have_nothing_to_share(wish: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    config = config_of(model_folder, tmp_path, wish, batch_size_per_gpu=1, steps=1)
    assert arithmetic_of(config, 2, [Bucket(64, 64)], [8]).images_per_step == 2
    with pytest.raises(UserError, match=r"has no effect on steps of one image; raise train\.batch_size_per_gpu"):
        arithmetic_of(config, 1, [Bucket(64, 64)], [8])


def test_guidance_of_a_model_that_sees_no_empty_caption_is_warned_of(model_folder: Path, tmp_path: Path) -> None:
    config = config_of(model_folder, tmp_path, {})
    drawing = config.model_copy(update={"samples": SamplesConfig(every_steps=10)})
    assert guidance_warning(config) is None
    assert "captions.dropout_rate = 0" in (guidance_warning(drawing) or "")
    dropping = drawing.model_copy(update={"captions": drawing.captions.model_copy(update={"dropout_rate": 0.1})})
    assert guidance_warning(dropping) is None


@pytest.mark.skipif("RECORD_GOLDEN" not in os.environ, reason="writes the golden losses anew")
def test_record(model_folder: Path, tmp_path: Path) -> None:
    golden = {name: losses_of(config_of(model_folder, tmp_path, wish), 30) for name, wish in OBJECTIVES.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")

"""OneTrainer's settings become configurations that `plan` accepts, and nothing is lost without a word."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.importing.given import Draft
from trainer.importing.recognised import import_any

XL = {"model_type": "STABLE_DIFFUSION_XL_10_BASE", "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0"}
HALF = {"train": False, "weight_dtype": "BFLOAT_16"}
CONCEPTS = [
    {"name": "foxes", "path": "/data/foxes", "balancing": 3.0, "loss_weight": 0.5, "text": {
        "prompt_source": "sample", "enable_tag_shuffling": True, "keep_tags_count": 2, "tag_dropout_enable": True,
        "tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.1}},
    {"name": "all", "path": "/data/all", "balancing": 200, "balancing_strategy": "SAMPLES", "text": {}},
    {"name": "off", "path": "/data/off", "enabled": False},
    {"name": "held", "path": "/data/held", "type": "VALIDATION"},
]  # fmt: skip
FINE_TUNE: dict[str, Any] = {
    **XL, "training_method": "FINE_TUNE", "__version": 11, "resolution": "1024", "learning_rate": 1e-5,
    "learning_rate_warmup_steps": 200.0, "learning_rate_scheduler": "COSINE", "epochs": 10, "batch_size": 2,
    "gradient_accumulation_steps": 4, "train_dtype": "BFLOAT_16", "workspace_dir": "workspace/fox",
    "output_model_destination": "models/fox.safetensors", "output_dtype": "FLOAT_16",
    "unet": {"train": True, "weight_dtype": "BFLOAT_16", "learning_rate": None},
    "text_encoder": {"train": True, "learning_rate": 2e-6, "stop_training_after": 3,
                     "stop_training_after_unit": "EPOCH", "weight_dtype": "BFLOAT_16", "dropout_probability": 0.05},
    "text_encoder_2": {**HALF, "dropout_probability": 0.05}, "vae": {"weight_dtype": "FLOAT_32"},
    "prior": {"train": False},
    "optimizer": {"optimizer": "ADAFACTOR", "relative_step": False, "scale_parameter": False, "eps": 1e-30,
                  "eps2": 1e-3, "decay_rate": -0.8, "clip_threshold": 1.0, "weight_decay": 0.01,
                  "stochastic_rounding": True,
                  "fused_back_pass": True, "warmup_init": False},
    "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0, "offset_noise_weight": 0.03, "ema": "CPU",
    "ema_decay": 0.999, "ema_update_step_interval": 5, "backup_after": 10, "backup_after_unit": "MINUTE",
    "rolling_backup": True, "rolling_backup_count": 5, "save_every": 500, "save_every_unit": "STEP",
    "sample_after": 250, "sample_after_unit": "STEP", "tensorboard": True, "concepts": CONCEPTS,
    "samples": [{"prompt": "a fox", "width": 1024, "height": 832, "seed": 42, "diffusion_steps": 20, "cfg_scale": 7.0}],
    "secrets": {"huggingface_token": "hf_secret"}, "some_new_setting": 3,
}  # fmt: skip
LORA: dict[str, Any] = {
    **XL, "training_method": "LORA", "learning_rate": 3e-4, "layer_filter_preset": "attn-mlp", "lora_rank": 32,
    "lora_alpha": 16.0, "batch_size": 4, "resolution": "1024", "unet": {"weight_dtype": "NFLOAT_4"},
    "text_encoder": {"train": False, "weight_dtype": "FLOAT_16"}, "output_model_format": "KOHYA_LORA",
    "text_encoder_2": {"train": False, "weight_dtype": "FLOAT_16"}, "backup_after": 10, "epochs": 20,
    "optimizer": {"optimizer": "PRODIGY", "d_coef": 2.0, "growth_rate": "inf", "use_bias_correction": True},
    "masked_training": True, "unmasked_weight": 0.2, "unmasked_probability": 0.0, "concepts": CONCEPTS[:1],
    "additional_embeddings": [{"placeholder": "<fox>", "token_count": 4, "initial_embedding_text": "fox"}],
    "timestep_distribution": "LOGIT_NORMAL", "noising_weight": 0.5, "noising_bias": -0.25, "min_noising_strength": 0.1,
    "train_dtype": "BFLOAT_16",
}  # fmt: skip
EMBEDDING: dict[str, Any] = {
    **XL, "training_method": "EMBEDDING", "learning_rate": 3e-4, "learning_rate_warmup_steps": 20,
    "resolution": "512,1024",
    "latent_caching": False, "embedding": {"placeholder": "<fox>", "token_count": 2, "initial_embedding_text": "fox"},
    "concepts": CONCEPTS[:1], "multi_gpu": True, "device_indexes": "0,1", "optimizer": {"optimizer": "ADAMW_ADV"},
    "mse_strength": 0.0, "huber_strength": 1.0, "huber_delta": 0.5, "force_v_prediction": True,
    "rescale_noise_scheduler_to_zero_terminal_snr": True, "learning_rate_scaler": "GLOBAL_BOTH", "batch_size": 2,
}  # fmt: skip
RUNS = {"fine-tune": FINE_TUNE, "LoRA": LORA, "embedding": EMBEDDING}


def imported(tmp_path: Path, settings: dict[str, Any]) -> Draft:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return import_any(tmp_path / "config.json")


def config_of(draft: Draft) -> Config:
    return Config.model_validate(draft.sections)


@pytest.mark.parametrize("name", RUNS)
def test_every_setting_of_a_run_is_told(tmp_path: Path, name: str) -> None:
    draft = imported(tmp_path, RUNS[name])
    config_of(draft)
    assert draft.became.keys() == draft.given.keys()
    assert all(draft.became.values())


def test_a_fine_tuning(tmp_path: Path) -> None:
    draft = imported(tmp_path, FINE_TUNE)
    config = config_of(draft)
    assert str(config.run.dir) == "workspace/fox" and config.launch.workers == 1
    assert config.train.precision == "bf16_stochastic" and config.train.epochs == 10
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.weight_decay) == ("adafactor", 1e-5, 0.01)
    assert config.optimizer.scale_by_weights is False and config.lr_schedule.warmup_steps == 200 // 4
    text = config.trainable.text_encoder_1
    assert text.train and text.lr == 2e-6 and text.stop_at == 0.3 and not config.trainable.text_encoder_2.train
    assert config.objective.weighting.kind == "min_snr" and config.objective.noise.offset == 0.03
    average = config.ema.averages[0]
    assert average.decay == pytest.approx(0.999 ** (1 / 5)) and config.ema.place == "host"
    assert config.checkpoint.every == "10min" and config.checkpoint.keep == 5
    assert config.checkpoint.keep_every_steps == 500 and config.checkpoint.export.when == "checkpoints"
    assert str(config.checkpoint.export.dir) == "models"
    assert config.samples.every_steps == 250 and config.samples.prompts == ["a fox"]
    assert (config.samples.width_px, config.samples.height_px, config.samples.seed) == (1024, 832, 42)
    foxes, everything = config.data.sources
    assert (foxes.name, foxes.repeats, foxes.loss_weight, everything.per_epoch) == ("foxes", 3, 0.5, 200)
    assert config.captions.shuffle_tags and config.captions.keep_tokens == 2 and config.captions.tag_dropout_rate == 0.1
    assert config.captions.dropout_rate == 0.05
    assert any("concept held: validation" in note for note in draft.notes)
    assert draft.became["prior"] == "- belongs to other models than SDXL"
    assert draft.became["secrets"] == "- keys belong into the environment"
    assert draft.became["some_new_setting"].startswith("- nothing like it here")
    assert draft.became["optimizer.fused_back_pass"].startswith("- memory.release_gradients is the like")


def test_a_lora_with_an_embedding(tmp_path: Path) -> None:
    config = config_of(imported(tmp_path, LORA))
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 32, 16.0)
    assert config.model.frozen_weights == "nf4"
    assert config.optimizer.kind == "prodigy" and config.optimizer.lr == 1.0 and config.optimizer.d_coef == 2.0
    assert config.optimizer.growth_rate is None and config.optimizer.bias_correction is True
    token = config.new_tokens.tokens[0]
    assert (token.token, token.vectors, token.initial) == ("<fox>", 4, "fox")
    assert config.objective.loss.masked and config.objective.loss.unmasked_weight == 0.2
    source = config.data.sources[0]
    assert source.type == "folder" and source.masks == "files" and source.mask_suffix == "-masklabel.png"
    times = config.objective.timesteps
    assert (times.distribution, times.std, times.mean, times.min) == ("logit_normal", 1.5, -0.25, 100)


def test_an_embedding(tmp_path: Path) -> None:
    draft = imported(tmp_path, EMBEDDING)
    config = config_of(draft)
    assert not config.trainable.unet.train and config.new_tokens.tokens[0].vectors == 2
    assert config.optimizer.lr == pytest.approx(3e-4 * 2 * 2) and config.launch.workers == 2
    assert config.data.mode == "images" and config.data.buckets.resolution == 1024
    assert config.data.buckets.also_at[0].resolution == 512 and config.data.buckets.also_at[0].share == 0.5
    assert config.objective.loss.kind == "huber" and config.objective.loss.delta == 0.5
    assert config.objective.zero_terminal_snr is True and config.optimizer.kind == "adamw"
    assert any("ADAMW_ADV: is not here" in note for note in draft.notes)


def test_presets_with_little_in_them_and_concepts_beside_them(tmp_path: Path) -> None:
    (tmp_path / "training_concepts").mkdir()
    (tmp_path / "training_presets").mkdir()
    (tmp_path / "training_concepts/concepts.json").write_text(json.dumps([{"path": "/data/a"}]))
    file = tmp_path / "training_presets/mine.json"
    file.write_text(json.dumps({**XL, "training_method": "FINE_TUNE", "text_encoder": HALF, "text_encoder_2": HALF}))
    config = config_of(import_any(file))
    assert config.optimizer.lr == 3e-6 and config.data.buckets.resolution == 512 and config.train.precision == "fp16"
    assert config.lr_schedule.warmup_steps == 200 and str(config.run.dir) == "workspace/run"


def test_layers_by_name_and_other_adapters(tmp_path: Path) -> None:
    text_off = {"text_encoder": HALF, "text_encoder_2": HALF, "concepts": CONCEPTS[:1], **XL}
    some = config_of(imported(tmp_path, {**text_off, "layer_filter_preset": "attn-mlp"}))
    assert some.trainable.unet.only == ["*attentions*"]
    custom = {"layer_filter_preset": "custom", "layer_filter": "down_blocks.1, attn2"}
    assert config_of(imported(tmp_path, text_off | custom)).trainable.unet.only == ["*down_blocks.1*", "*attn2*"]
    for peft, kind in (("LOHA", "loha"), ("LOKR", "lokr"), ("OFT_2", "oft"), ("LORA", "locon")):
        settings = {**text_off, "training_method": "LORA", "peft_type": peft, "lokr_decompose_factor": 8}
        adapter = config_of(imported(tmp_path, settings)).adapter
        assert adapter.kind == kind and adapter.lokr_factor == (8 if kind == "lokr" else None)
    dora = {**text_off, "training_method": "LORA", "lora_decompose": True, "layer_filter_preset": "attn-only"}
    config = config_of(imported(tmp_path, dora))
    assert config.adapter.kind == "dora" and config.adapter.targets == ["*attn*"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "FLUX_DEV_1"}, "model_type = FLUX_DEV_1: must be STABLE_DIFFUSION_XL_10_BASE"),
        ({"training_method": "FINE_TUNE_VAE"}, "training_method = FINE_TUNE_VAE: must be FINE_TUNE, LORA or EMBEDDING"),
        ({"concepts": []}, "concepts: none is enabled for training"),
        ({"concepts": None, "concept_file_name": "no/such.json"}, "concept_file_name = no/such.json: no such file"),
        ({"learning_rate": "fast"}, "learning_rate = fast: must be a number"),
        ({"resolution": "big"}, "resolution = big: must be a size in px"),
        ({"epochs": 1.5}, "epochs = 1.5: must be a whole number"),
        ({"train_dtype": "INT_4"}, "train_dtype = INT_4: must be FLOAT_16"),
        ({"batch_size": 0}, "batch_size: train.batch_size_per_gpu"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        imported(tmp_path, FINE_TUNE | changed)


def test_the_command_knows_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "config.json", tmp_path / "mine.yaml"
    file.write_text(json.dumps(FINE_TUNE).replace('"prior"', '"growth": Infinity, "prior"'))
    assert main(["import", str(file), "-o", str(out)]) == 0
    told = capsys.readouterr().out
    assert "\nunet.weight_dtype " in told and "train.precision: bf16_stochastic" in told and "hf_secret" not in told
    load_config(out, check_paths=False)
    assert "hf_secret" not in out.read_text()
    file.write_text('{"some": "other"}')
    assert main(["import", str(file)]) == 2
    assert "JSON, but not OneTrainer's settings" in capsys.readouterr().err
    file.write_text('{"training_method": ')
    assert main(["import", str(file)]) == 2
    assert "not valid JSON" in capsys.readouterr().err


def test_concepts_of_one_name_become_sources_of_two(tmp_path: Path) -> None:
    again = [{**CONCEPTS[0], "path": "/data/more"}, {**CONCEPTS[0], "path": "/data/most", "name": "foxes~2"}]
    config = config_of(imported(tmp_path, FINE_TUNE | {"concepts": [*CONCEPTS, *again]}))
    assert [source.name for source in config.data.sources] == ["foxes", "all", "foxes~2", "foxes~2~2"]


def test_settings_of_optimizers_that_are_off_or_without_a_like(tmp_path: Path) -> None:
    optimizer = {**FINE_TUNE["optimizer"], "cautious": True, "amsgrad": False}
    draft = imported(tmp_path, FINE_TUNE | {"optimizer": optimizer})
    assert draft.became["optimizer.amsgrad"] == "- is off, as here"
    assert draft.became["optimizer.cautious"].startswith("- this program's optimizer has nothing like it")


@pytest.mark.parametrize(
    ("changed", "left_out", "said"),
    [
        ({"offset_noise_weight": 0.1}, "offset_noise_weight", "it makes up for what zero terminal SNR mends"),
        ({"max_noising_strength": 0.9}, "max_noising_strength", "the last timestep, which zero terminal SNR is for"),
    ],
)
def test_what_clashes_with_zero_terminal_snr_is_left_out_and_told_first(
    tmp_path: Path, changed: dict[str, Any], left_out: str, said: str
) -> None:
    settings = FINE_TUNE | {"rescale_noise_scheduler_to_zero_terminal_snr": True, "offset_noise_weight": 0.0}
    draft = imported(tmp_path, settings | changed)
    assert config_of(draft).objective.zero_terminal_snr is True
    assert draft.notes[0].startswith(f"{left_out}: ") and said in draft.notes[0]


def test_a_reason_is_not_cut_where_a_value_holds_a_colon(tmp_path: Path) -> None:
    """New tokens hold both text encoders in the precision of the passes, so that their own has no effect."""
    text = {"text_encoder": HALF, "text_encoder_2": HALF}
    draft = imported(tmp_path, EMBEDDING | text)
    config_of(draft)
    assert draft.became["text_encoder.weight_dtype"].startswith("- has no effect; with new tokens, both are held in")

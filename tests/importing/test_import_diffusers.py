"""Commands of diffusers' SDXL scripts become configurations that `plan` accepts, and nothing is lost without a word."""

import shlex
from collections import Counter
from pathlib import Path

import pytest

from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.captions import compose
from trainer.data.sources.folder import list_folder
from trainer.errors import UserError
from trainer.importing.command_text import command_of_words
from trainer.importing.diffusers_options import ADVANCED_TABLE, DREAMBOOTH_TABLE, NOTHING_HERE, READ, TABLE
from trainer.importing.given import Draft
from trainer.importing.kohya_options import FLAG, WHOLE
from trainer.importing.recognised import import_of
from trainer.train.caption_rules import caption_rules

FULL, LORA = "train_text_to_image_sdxl.py", "train_text_to_image_lora_sdxl.py"
RUNS = {
    "full": f"{FULL} --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 "
    "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --dataset_name=lambdalabs/naruto-blip-captions "
    "--enable_xformers_memory_efficient_attention --resolution=512 --center_crop --random_flip "
    "--proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing "
    '--max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06 --lr_scheduler="constant" --lr_warmup_steps=0 '
    '--mixed_precision="fp16" --report_to="wandb" --validation_prompt="a cute creature" --validation_epochs 5 '
    '--checkpointing_steps=5000 --output_dir="sdxl-naruto-model" --push_to_hub',
    "lora": f"{LORA} --pretrained_model_name_or_path=base.safetensors --dataset_name=some/set --caption_column=text "
    "--resolution=1024 --random_flip --train_batch_size=1 --num_train_epochs=2 --checkpointing_steps=500 "
    "--learning_rate=1e-04 --lr_scheduler=constant --lr_warmup_steps=0 --mixed_precision=fp16 --seed=42 "
    "--output_dir=out --validation_prompt='cute dragon' --report_to=tensorboard --rank=8 --train_text_encoder",
    "full with EMA": f"{FULL} --pretrained_model_name_or_path=m --train_data_dir=images --use_ema --snr_gamma=5.0 "
    "--prediction_type v_prediction --lr_scheduler=cosine --lr_warmup_steps=100 --max_train_steps=5000 "
    "--mixed_precision=bf16 --noise_offset=0.05 --adam_weight_decay=1e-2 --adam_beta2=0.99 --scale_lr "
    "--gradient_accumulation_steps=2 --train_batch_size=2 --checkpoints_total_limit=1 --timestep_bias_strategy=later",
    "little said": f"{LORA} --pretrained_model_name_or_path=m --dataset_name=d",
}


DREAMBOOTH = {
    "dreambooth": "train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path=base --instance_data_dir=dog "
    "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --output_dir=lora-trained-xl "
    '--mixed_precision=fp16 --instance_prompt="a photo of sks dog" --resolution=1024 --train_batch_size=1 '
    "--gradient_accumulation_steps=4 --learning_rate=1e-4 --report_to=wandb --lr_scheduler=constant "
    '--lr_warmup_steps=0 --max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket" '
    "--validation_epochs=25 --seed=0 --push_to_hub",
    "dreambooth with prior": "train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path=base "
    "--instance_data_dir=dog --instance_prompt='a sks dog' --with_prior_preservation --class_data_dir=dogs "
    "--class_prompt='a dog' --num_class_images=200 --prior_loss_weight=0.5 --train_text_encoder --use_dora --rank 32 "
    "--text_encoder_lr=1e-6 --lora_dropout=0.1 --repeats 3 --center_crop --snr_gamma 5 --max_train_steps=900",
    "dreambooth with Prodigy": "train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path=base --dataset_name=set "
    "--caption_column=prompt --instance_prompt=x --optimizer=prodigy --learning_rate=1.0 --use_8bit_adam "
    "--prodigy_safeguard_warmup=True --prodigy_beta3=0.9 --adam_beta2=0.99 --train_text_encoder "
    "--do_edm_style_training --output_kohya_format --lr_scheduler=cosine --lr_warmup_steps=10 --max_train_steps=500",
}
_ADVANCED = "train_dreambooth_lora_sdxl_advanced.py --pretrained_model_name_or_path=base --output_dir=out "
ADVANCED = {
    "advanced, pivotal tuning": f"{_ADVANCED} --dataset_name=some/icons --caption_column=prompt --repeats=1 "
    "--instance_prompt='a TOK icon' --validation_prompt='a TOK icon of a llama' --mixed_precision=bf16 "
    "--resolution=1024 --train_batch_size=3 --gradient_accumulation_steps=1 --gradient_checkpointing "
    "--learning_rate=1e-4 --text_encoder_lr=1e-4 --optimizer=adamw --train_text_encoder_ti "
    "--train_text_encoder_ti_frac=0.5 --snr_gamma=5.0 --lr_scheduler=constant --lr_warmup_steps=0 --rank=32 "
    "--max_train_steps=1000 --checkpointing_steps=2000 --seed=0 --cache_latents",
    "advanced, B-LoRA": f"{_ADVANCED} --instance_data_dir=one --instance_prompt='A [v]' --use_blora --rank=64 "
    "--lora_unet_blocks=unet.mid_block --learning_rate=5e-5 --max_train_steps=1000 --clip_skip=1",
    "advanced, blocks": f"{_ADVANCED} --instance_data_dir=dog --instance_prompt='a TOK dog' --train_text_encoder "
    "--train_text_encoder_frac=0.5 --optimizer=prodigy --learning_rate=1 --noise_offset=0.03 --max_train_steps=900 "
    "'--lora_unet_blocks=unet.up_blocks.0.attentions.1, unet.down_blocks.2'",
    "advanced, words by Prodigy": f"{_ADVANCED} --instance_data_dir=dog --instance_prompt='a TOK,TOK2 dog' "
    "--train_text_encoder_ti '--token_abstraction=TOK, TOK2' --num_new_tokens_per_abstraction=3 --optimizer=prodigy "
    "--learning_rate=1 --text_encoder_lr=1 --adam_weight_decay_text_encoder=0.01 --train_text_encoder_ti_frac=1.0 "
    "--lora_unet_blocks=mid_block.attentions.0 --max_train_steps=900",
}
RUNS |= DREAMBOOTH | ADVANCED


def imported(words: str, launch: str = "") -> Draft:
    command = command_of_words(shlex.split(f"accelerate launch {launch} {words}"))
    assert command is not None
    return import_of(command, "the command")


def config_of(draft: Draft) -> Config:
    return Config.model_validate(draft.sections)


@pytest.mark.parametrize("name", RUNS)
def test_every_option_of_a_run_is_told(name: str) -> None:
    draft = imported(RUNS[name])
    assert draft.became.keys() == draft.given.keys()
    assert config_of(draft).checkpoint.export.when == "end"


def test_a_full_training() -> None:
    draft = imported(RUNS["full"], "--num_processes 4")
    config = config_of(draft)
    assert config.launch.workers == 4 and config.train.steps == 10000 and config.train.precision == "fp16"
    assert (config.optimizer.kind, config.optimizer.lr) == ("adamw_8bit", 1e-6)
    source = config.data.sources[0]
    assert source.type == "hf" and source.path == "lambdalabs/naruto-blip-captions" and source.caption_column == "text"
    assert config.data.buckets.min_px == config.data.buckets.max_px == 512 and config.data.mode == "latents"
    assert config.captions.dropout_rate == 0.2 and config.log.trackers == ["tensorboard", "wandb"]
    assert config.samples.prompts == ["a cute creature"] * 4 and config.samples.every_steps == 5000
    assert config.model.vae is None and any("is on the hub" in note for note in draft.notes)
    assert draft.became["random_flip"].startswith("- their script mirrors half of the images once")
    assert draft.became["push_to_hub"].startswith("- nothing is uploaded")


def test_a_lora() -> None:
    config = config_of(imported(RUNS["lora"]))
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 8, None)
    assert "*to_q" in config.adapter.targets and "*q_proj" in config.adapter.targets and config.adapter.text_encoders
    assert config.data.mode == "images" and config.data.augment.random_crop
    assert config.data.augment.flip_probability == 0.5 and config.train.epochs == 2 and config.run.seed == 42
    little = config_of(imported(RUNS["little said"]))
    assert (little.train.batch_size_per_gpu, little.train.epochs, little.adapter.rank) == (16, 100, 4)
    assert little.train.precision == "fp32" and little.optimizer.lr == 1e-4


def test_the_rest_of_the_numbers() -> None:
    draft = imported(RUNS["full with EMA"], "--num_processes=2 --mixed_precision=no")
    config = config_of(draft)
    assert config.optimizer.lr == 1e-4 * 2 * 2 * 2 and config.optimizer.betas == [0.9, 0.99]
    assert config.ema.averages[0].decay == 0.9999 and config.checkpoint.export.weights == "ema"
    assert config.objective.prediction == "v_prediction" and config.objective.weighting.gamma == 5
    assert config.objective.noise.offset == 0.05 and config.train.precision == "bf16" and config.checkpoint.keep == 2
    assert config.lr_schedule.kind == "cosine" and config.lr_schedule.warmup_steps == 100
    assert config.data.sources[0].type == "hf" and config.data.sources[0].path == "images"
    assert "objective.timesteps" in draft.became["timestep_bias_strategy"]
    assert any("ticks once per process" in note for note in draft.notes)


def test_dreambooth(tmp_path: Path) -> None:
    draft = imported(RUNS["dreambooth"])
    config = config_of(draft)
    source = config.data.sources[0]
    assert source.type == "folder" and str(source.path) == "dog" and config.captions.prefix == "a photo of sks dog"
    # Images without any file beside them are used, with the prompt as their caption.
    (tmp_path / "a.png").write_bytes(b"")
    (item,) = list_folder(source.model_copy(update={"path": tmp_path}), "dog", Counter())
    assert item.caption is not None and not item.problem
    assert compose(item.caption, caption_rules(config), seed=0, epoch=0) == "a photo of sks dog"
    assert (config.adapter.rank, config.adapter.text_encoders, config.optimizer.weight_decay) == (4, False, 1e-4)
    assert config.train.steps == 500 and config.train.gradient_accumulation_steps == 4

    draft = imported(RUNS["dreambooth with prior"])
    config = config_of(draft)
    assert [source.prior for source in config.data.sources] == [False, True] and config.data.sources[0].repeats == 3
    assert config.objective.loss_weights.prior == 0.5 and config.captions.prefix == ""
    assert "write `a sks dog` into a .txt file beside each image of dog, and `a dog` beside each" in draft.notes[0]
    adapter = config.adapter
    assert (adapter.kind, adapter.rank, adapter.dropout, adapter.text_encoder_lr) == ("dora", 32, 0.1, 1e-6)
    assert config.train.batch_size_per_gpu == 4
    assert draft.became["num_class_images"].startswith("- class images are not drawn")

    draft = imported(RUNS["dreambooth with Prodigy"])
    config = config_of(draft)
    source = config.data.sources[0]
    assert source.type == "hf" and source.caption_column == "prompt"
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.beta3) == ("prodigy", 1.0, 0.9)
    assert config.optimizer.safeguard_warmup and config.optimizer.bias_correction
    assert config.adapter.text_encoder_lr is None and draft.became["use_8bit_adam"] == "- is of AdamW"


def test_advanced_dreambooth() -> None:
    draft = imported(RUNS["advanced, pivotal tuning"])
    config = config_of(draft)
    assert [(each.token, each.vectors, each.initial) for each in config.new_tokens.tokens] == [("TOK", 2, None)]
    assert (config.new_tokens.lr, config.new_tokens.weight_decay, config.optimizer.weight_decay) == (1e-4, 1e-4, 1e-4)
    assert (config.adapter.rank, config.adapter.text_encoders, config.data.mode) == (32, False, "latents")
    assert config.samples.prompts[0] == "a TOK icon of a llama" and config.objective.weighting.gamma == 5
    assert any(note.startswith("train_text_encoder_ti_frac 0.5: their script stops") for note in draft.notes)
    assert draft.became["train_text_encoder_ti_frac"] == "- new tokens train to the end of the run"

    draft = imported(RUNS["advanced, words by Prodigy"])
    config = config_of(draft)
    assert [(each.token, each.vectors) for each in config.new_tokens.tokens] == [("TOK", 3), ("TOK2", 3)]
    assert (config.new_tokens.lr, config.new_tokens.weight_decay, config.optimizer.kind) == (None, 0.01, "prodigy")
    assert not any(note.startswith("train_text_encoder_ti_frac") for note in draft.notes)
    assert any(note.endswith("write unet.mid_block.attentions.0") for note in draft.notes)

    draft = imported(RUNS["advanced, blocks"])
    config = config_of(draft)
    assert config.adapter.text_encoders and config.objective.noise.offset == 0.03 and not config.new_tokens.tokens
    assert draft.became["train_text_encoder_frac"].startswith("- an adapter's text encoders train to the end")
    draft = imported(RUNS["advanced, B-LoRA"])
    assert draft.became["lora_unet_blocks"].startswith("- use_blora counts")
    with pytest.raises(UserError, match="--train_text_encoder, --train_text_encoder_ti: give one of them"):
        imported(RUNS["advanced, blocks"] + " --train_text_encoder_ti")
    with pytest.raises(UserError, match=r"--use_blorra: is no option of .*_advanced\.py; did you mean --use_blora"):
        imported(f"{_ADVANCED} --use_blorra")


@pytest.mark.e2e
def test_blocks_of_the_advanced_script_are_its_own() -> None:
    """By its rule: matrices of attentions whose names hold a block's, without what stands before its first dot."""
    import torch
    from diffusers import UNet2DConditionModel

    from trainer.adapters.targets import find_targets
    from trainer.model_files.presets import preset

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(preset("unet"))
    style, content = "up_blocks.0.attentions.1", "up_blocks.0.attentions.0"
    for name, blocks in {
        "advanced, B-LoRA": (content, style),
        "advanced, blocks": (style, "down_blocks.2"),
        "advanced, words by Prodigy": ("attentions.0",),
        "advanced, pivotal tuning": ("",),
    }.items():
        attentions = [each.removesuffix(".processor") for each in unet.attn_processors]
        chosen = [each for each in attentions if any(block in each for block in blocks)]
        expected = {f"{each}.{matrix}" for each in chosen for matrix in ("to_q", "to_k", "to_v", "to_out.0")}
        config = config_of(imported(RUNS[name])).adapter
        config = config.model_copy(update={"targets": [each for each in config.targets if "to_" in each]})
        found = [each.place.module for each in find_targets({"unet": unet}, config, {}, frozenset())]
        assert sorted(found) == sorted(expected) and found


def test_every_option_alone_is_known_and_told() -> None:
    assert not READ.keys() & NOTHING_HERE.keys()
    own = {"resolution": "512", "mixed_precision": "bf16", "prediction_type": "epsilon", "report_to": "all",
           "num_validation_images": "2", "lr_scheduler": "linear", "validation_prompt": "'a fox'"}  # fmt: skip
    values = {"text": "words", "number": "0.5", WHOLE: "8"}
    for name, kind in TABLE.types.items():
        value = "" if kind == FLAG else own.get(name, values[kind])
        for script in (FULL, LORA):
            rest = " ".join(f"--{n} x" for n in ("pretrained_model_name_or_path", "dataset_name") if n != name)
            draft = imported(f"{script} {rest} --max_train_steps 100 --{name} {value}")
            config_of(draft)
            assert draft.became.get(name), name
    own |= {"optimizer": "AdamW", "with_prior_preservation": "--class_data_dir c"}
    needful = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt")
    for name, kind in DREAMBOOTH_TABLE.types.items():
        value = own.get(name, "" if kind == FLAG else values[kind])
        others = [n for n in needful if n != name and not (n == "instance_data_dir" and name == "dataset_name")]
        rest = " ".join(f"--{n} x" for n in others)
        draft = imported(f"train_dreambooth_lora_sdxl.py {rest} --max_train_steps 100 --{name} {value}")
        config_of(draft)
        assert draft.became.get(name), name
    own |= {"lora_unet_blocks": "unet.mid_block"}
    for name, kind in ADVANCED_TABLE.types.items():
        value = own.get(name, "" if kind == FLAG else values[kind])
        others = [n for n in needful if n != name and not (n == "instance_data_dir" and name == "dataset_name")]
        rest = " ".join(f"--{n} x" for n in others)
        draft = imported(f"train_dreambooth_lora_sdxl_advanced.py {rest} --max_train_steps 100 --{name} {value}")
        config_of(draft)
        assert draft.became.get(name), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rankk 3", r"--rankk: is no option of train_text_to_image_sdxl.py or .*did you mean --rank\?"),
        ("--resolution 500", r"--resolution 500: must be a multiple of 8"),
        ("--mixed_precision fp8", r"--mixed_precision fp8: must be no, fp16 or bf16"),
        ("--prediction_type sample", r"--prediction_type sample: must be epsilon or v_prediction"),
        ("--max_train_steps x", r"--max_train_steps x: must be a whole number"),
        ("--train_batch_size 0", r"--train_batch_size: train.batch_size_per_gpu"),
    ],
)
def test_mistakes_are_one_line(options: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        imported(f"{LORA} {options} --pretrained_model_name_or_path m --dataset_name d")
    with pytest.raises(UserError, match="--dataset_name: missing"):
        imported(f"{LORA} --pretrained_model_name_or_path m")
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: missing"):
        imported(f"{LORA} --dataset_name m")


def test_the_command_knows_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = tmp_path / "train.sh", tmp_path / "mine.yaml"
    lines = RUNS["lora"].replace(" --", " \\\n  --").replace("base.safetensors", "$MODEL_NAME")
    script.write_text(f'export MODEL_NAME="base.safetensors"\naccelerate launch {lines}\n')
    for word in ("import", "import-kohya"):
        assert main([word, str(script), "-o", str(out), "--overwrite"]) == 0
        told = capsys.readouterr().out
        assert "--rank " in told and "adapter.rank: 8" in told
        assert str(load_config(out, check_paths=False).model.path) == "base.safetensors"

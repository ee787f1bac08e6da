"""Commands as people type them become configurations that `plan` accepts, and nothing is lost without a word."""

import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.importing.command_text import command_of_words, read_command
from trainer.importing.given import Draft
from trainer.importing.kohya_config import import_command, import_file
from trainer.importing.kohya_options import FLAG, NOTHING_HERE, READ, TYPES, WHOLE
from trainer.importing.recognised import import_any

COMMON = (
    "--pretrained_model_name_or_path=base.safetensors --in_json meta.json --train_data_dir=images --output_dir=out "
    "--log_with=tensorboard --logging_dir=tb --log_prefix=run_ --seed=7 --save_model_as=safetensors "
    '--caption_extension=".txt" --train_batch_size=1 --full_bf16 --mixed_precision=bf16 --save_precision=fp16 '
    "--enable_bucket --cache_latents --gradient_checkpointing --xformers"
)
RUNS = {
    "first": "--use_8bit_adam --learning_rate=1e-5 --max_train_epochs=10 --train_text_encoder --diffusers_xformers "
    "--save_every_n_epochs=1",
    "text encoders only": "--use_8bit_adam --learning_rate=0 --train_text_encoder --learning_rate_te1=3e-6 "
    "--learning_rate_te2=3e-6 --max_train_epochs=10",
    "ZeRO-2": "--enable_wildcard --use_8bit_adam --learning_rate=2e-6 --train_text_encoder --learning_rate_te1=2e-5 "
    "--learning_rate_te2=2e-5 --max_train_epochs=10 --mem_eff_attn --torch_compile --dynamo_backend=inductor "
    "--deepspeed --gradient_accumulation_steps=4 --max_grad_norm=0",
    "production": '--enable_wildcard --use_8bit_adam --learning_rate="1.5e-6" --train_text_encoder '
    '--learning_rate_te1="1.2e-5" --learning_rate_te2="1.2e-5" --max_train_epochs=1 --pin_memory '
    "--gradient_accumulation_steps=4 --max_grad_norm=0 --max_data_loader_n_workers=6 "
    "--persistent_data_loader_workers --skip_cache_check --save_every_n_steps=10000",
    "continued": "--use_8bit_adam --learning_rate=1.5e-6 --max_train_epochs=1 --max_data_loader_n_workers=8 "
    "--skip_until_initial_step --initial_step=320000",
    "Lion": '--optimizer_type="pytorch_optimizer.Lion" --optimizer_args "cautious=True" "weight_decay=1e-2" '
    '--learning_rate="1.5e-7" --max_train_steps=1000 --max_data_loader_n_workers=32',
    "Adafactor": '--optimizer_type="AdaFactor" --optimizer_args "relative_step=True" "warmup_init=True" '
    '"weight_decay=1e-2" --learning_rate=1e-5 --max_train_epochs=1',
    "v-prediction": "--v_parameterization --min_snr_gamma=5 --zero_terminal_snr --use_8bit_adam "
    '--learning_rate="1e-5" --max_train_epochs=1 --save_every_n_steps=5637',
}


def imported(options: str, script: str = "sdxl_train.py", launch: str = "") -> Draft:
    command = command_of_words(shlex.split(f"accelerate launch {launch} {script} {options}"))
    assert command is not None
    return import_command(command, "the command")


def config_of(draft: Draft) -> Config:
    return Config.model_validate(draft.sections)


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_the_rig(name: str) -> None:
    draft = imported(f"{COMMON} {RUNS[name]}")
    config = config_of(draft)
    assert draft.became.keys() == draft.given.keys()
    assert config.train.precision == "bf16_stochastic" and any("full_bf16 rounds" in note for note in draft.notes)
    assert str(config.run.dir) == "out/last" and config.run.seed == 7
    assert config.data.sources[0].type == "kohya_json" and config.captions.use == "both"
    assert config.checkpoint.export.dtype == "fp16"
    assert draft.became["xformers"].startswith("- attention is always")


def test_what_becomes_of_the_numbers() -> None:
    production = config_of(imported(f"{COMMON} {RUNS['production']}", launch="--num_processes 4"))
    assert (production.optimizer.kind, production.optimizer.lr) == ("adamw_8bit", 1.5e-6)
    assert production.trainable.text_encoder_1.lr == production.trainable.text_encoder_2.lr == 1.2e-5
    assert production.launch.workers == 4 and production.train.gradient_accumulation_steps == 4
    assert production.train.epochs == 1 and production.train.max_grad_norm == 0 and production.captions.wildcards
    assert production.checkpoint.every_steps == 10000 and production.checkpoint.export.when == "checkpoints"
    texts = config_of(imported(f"{COMMON} {RUNS['text encoders only']}"))
    assert not texts.trainable.unet.train and texts.optimizer.lr == 3e-6
    v = config_of(imported(f"{COMMON} {RUNS['v-prediction']}"))
    assert v.objective.prediction == "v_prediction" and v.objective.zero_terminal_snr is True
    assert v.objective.weighting.kind == "min_snr" and v.objective.weighting.gamma == 5
    zero2 = imported(f"{COMMON} {RUNS['ZeRO-2']}")
    assert config_of(zero2).memory.strategy == "zero2" and config_of(zero2).train.compile == "blocks"
    lion = imported(f"{COMMON} {RUNS['Lion']}")
    assert (config_of(lion).optimizer.kind, config_of(lion).optimizer.weight_decay) == ("lion", 0.01)
    assert any(note.startswith("optimizer_args cautious=True: nothing like it") for note in lion.notes)
    adafactor = imported(f"{COMMON} {RUNS['Adafactor']}")
    assert any("relative steps ignored the learning rates" in note for note in adafactor.notes)


def test_an_adapters_command() -> None:
    options = (
        "--pretrained_model_name_or_path base.safetensors --train_data_dir photos --output_dir out --output_name fox "
        "--network_module lycoris.kohya --network_dim 32 --network_alpha 16 --network_args algo=lokr factor=8 "
        "conv_dim=8 --unet_lr 1e-4 --text_encoder_lr 5e-5 --max_train_steps 2000 --mixed_precision bf16 "
        "--optimizer_type Prodigy --optimizer_args d_coef=2 use_bias_correction=True --lr_scheduler cosine "
        "--lr_warmup_steps 0.05 --resolution 1024,1024 --enable_bucket --shuffle_caption --keep_tokens 1 "
        "--caption_extension .txt --noise_offset 0.05 --max_token_length 225 --cache_latents_to_disk"
    )
    draft = imported(options, "sdxl_train_network.py", "--num_processes=2")
    config = config_of(draft)
    adapter = config.adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.lokr_factor, adapter.conv_rank) == ("lokr", 32, 16, 8, 8)
    assert adapter.text_encoders and config.train.precision == "bf16"
    assert adapter.text_encoder_lr is None and "one learning rate for all" in draft.became["text_encoder_lr"]
    assert config.optimizer.kind == "prodigy" and config.optimizer.lr == 1.0 and config.optimizer.d_coef == 2
    assert config.lr_schedule.kind == "cosine" and config.lr_schedule.warmup_steps == 100
    assert any("the warm-up was over after 100 / N steps" in note for note in draft.notes)
    folder = config.data.sources[0]
    assert folder.type == "folder" and folder.kohya_repeats and folder.caption_files_hold == "tags"
    assert config.captions.shuffle_tags and config.captions.keep_tokens == 1
    assert config.captions.max_tokens == 225 and config.captions.chunks == "kohya"
    assert config.objective.noise.offset == 0.05


def test_every_option_is_known_and_told() -> None:
    """Each alone beside the needful ones: a configuration, or a line that names it."""
    assert not READ.keys() & NOTHING_HERE.keys()
    values = {"text": "words", "number": "0.5", "words": "", WHOLE: "2"}
    own = {
        "resolution": "512", "mixed_precision": "fp16", "lr_scheduler": "linear", "optimizer_type": "Lion",
        "loss_type": "huber", "save_precision": "bf16", "text_encoder_lr": "1e-5", "network_args": "algo=loha",
        "optimizer_args": "weight_decay=0.1", "base_weights": "a.safetensors", "base_weights_multiplier": "1",
        "huber_schedule": "snr", "max_timestep": "900", "bucket_reso_steps": "32", "max_token_length": "150",
        "save_every_n_steps": "100", "lr_warmup_steps": "10", "validation_split": "0.1", "zero_stage": "3",
        "block_lr": ",".join(["1e-6"] * 23), "caption_extension": ".txt", "network_module": "networks.lora",
        "caption_extention": ".txt",
    }  # fmt: skip
    for name, kind in TYPES.items():
        if name in ("config_file", "dataset_config", "network_train_text_encoder_only", "train_data_dir",
                    "pretrained_model_name_or_path"):  # fmt: skip
            continue
        value = "" if kind == FLAG else own.get(name, values[kind])
        for script in ("sdxl_train.py", "sdxl_train_network.py"):
            draft = imported(
                f"--pretrained_model_name_or_path m --train_data_dir d --max_train_steps 100 --{name} {value}", script
            )
            config_of(draft)
            assert draft.became.get(name), name


def test_latents_that_are_there_are_flipped_where_both_sides_are_stored(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    options = f"{COMMON.replace('images', str(tmp_path))} --flip_aug --random_crop --max_train_steps 10"
    draft = imported(options)
    config = config_of(draft)
    assert config.data.mode == "latents" and config.data.augment.flip_probability == 0.5
    assert "not cropped anew" in draft.became["random_crop"]


def test_scripts_as_people_keep_them(tmp_path: Path) -> None:
    text = """#!/bin/bash
export OMP_NUM_THREADS=4
MODEL="/models/my base.safetensors"   # a path with spaces
RATE=1e-5

accelerate launch --num_cpu_threads_per_process=8 "sdxl_train.py"
  --pretrained_model_name_or_path="$MODEL"
  --train_data_dir '/data/my images' \\
  --learning_rate=${RATE}
  --max_train_steps 100
#  --learning_rate=5e-6
  --use_8bit_adam
echo done
"""
    command = read_command(text, "train.sh")
    assert command.script == "sdxl_train" and command.launch[-1] == "--num_cpu_threads_per_process=8"
    file = tmp_path / "train.sh"
    file.write_text(text)
    draft = import_file(file)
    assert draft.sections["model"]["path"] == "/models/my base.safetensors"
    assert draft.sections["optimizer"] == {"lr": 1e-5, "kind": "adamw_8bit"}
    assert draft.sections["data"]["sources"][0]["path"] == "/data/my images"
    draft = imported("--pretrained_model_name_or_path=$MODEL --train_data_dir=d")
    assert draft.notes[0].startswith("--pretrained_model_name_or_path $MODEL: $MODEL is set nowhere in the script")


def test_toml_of_arguments_and_of_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text("""
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 2
enable_bucket = true
[[datasets]]
resolution = [1024, 1024]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "/data/a"
  num_repeats = 3
  [[datasets.subsets]]
  image_dir = "/data/reg"
  is_reg = true
  class_tokens = "cat"
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "/data/b"
  metadata_file = "/data/b.json"
""")
    (tmp_path / "arguments.toml").write_text(f"""
[model]
pretrained_model_name_or_path = "base.safetensors"
full_bf16 = false
[rest]
dataset_config = "{tmp_path / "data.toml"}"
max_train_epochs = 3
optimizer_args = ["weight_decay=0.05"]
prior_loss_weight = 0.5
mixed_precision = "bf16"
""")
    draft = import_file(tmp_path / "arguments.toml")
    config = config_of(draft)
    kinds: list[Any] = [(source.type, source.repeats, source.prior) for source in config.data.sources]
    assert kinds == [("folder", 3, False), ("folder", 1, True), ("kohya_json", 1, False)]
    assert config.data.buckets.resolution == 1024 and config.train.batch_size_per_gpu == 2
    assert config.captions.shuffle_tags and config.captions.keep_tokens == 2
    assert config.objective.loss_weights.prior == 0.5 and config.optimizer.weight_decay == 0.05
    assert config.train.precision == "bf16"
    assert any("several resolutions" in note for note in draft.notes)
    assert any("class_tokens `cat`" in note for note in draft.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--max_train_stepz 3",
            r"--max_train_stepz: is no option of .* did you mean --max_train_steps\?",
        ),
        ("--max_train_steps many", r"--max_train_steps many: must be a whole number"),
        ("--max_train_steps 1 2", r"--max_train_steps: takes one value, and 2 are given"),
        ("--full_bf16=yes", r"--full_bf16 yes: takes no value"),
        ("loose", r"`loose` stands alone"),
        ("--learning_rate 0", r"--learning_rate 0: nothing would train"),
        ("--block_lr 1,2", r"--block_lr 1,2: must be 23 numbers"),
        ("--resolution big", r"--resolution big: must be a size in px"),
        ("--mixed_precision int4", r"--mixed_precision int4: must be no, fp16 or bf16"),
        ("--train_batch_size 0", r"--train_batch_size: train.batch_size_per_gpu"),
    ],
)
def test_mistakes_are_one_line(options: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        imported(f"{options} --pretrained_model_name_or_path m --train_data_dir d")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, out = tmp_path / "train.sh", tmp_path / "mine.yaml"
    file.write_text(f"accelerate launch sdxl_train.py {COMMON} {RUNS['v-prediction']}\n")
    assert main(["import-kohya", str(file), "-o", str(out)]) == 0
    told = capsys.readouterr().out
    assert "--min_snr_gamma" in told and "objective.weighting.kind: min_snr" in told
    assert f"wrote {out}; next: sdxl-train plan {out}" in told
    config = load_config(out, check_paths=False)
    assert config.objective.prediction == "v_prediction"
    assert out.read_text().startswith(f"# Imported from {file}.")
    assert main(["import-kohya", str(file), "-o", str(out)]) == 2
    assert "exists; give another name, or --overwrite" in capsys.readouterr().err
    assert (
        main(["import-kohya", "-o", str(out), "--overwrite", "--", "python", "sdxl_train.py", *shlex.split(COMMON)])
        == 0
    )
    assert main(["import-kohya", "--", "python", "train_db.py"]) == 2
    assert (
        "sdxl_train_network.py, train_text_to_image_(lora_)sdxl.py or train_dreambooth_lora_sdxl(_advanced).py in it"
        in capsys.readouterr().err
    )
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text("num_processes: 4\ndeepspeed_config:\n  zero_stage: 2\nuse_cpu: false\n")
    assert main(["import-kohya", str(file), "--accelerate-config", str(accelerate)]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    config = load_config(tmp_path / "printed.yaml", check_paths=False)
    assert config.launch.workers == 4 and config.memory.strategy == "zero2"


def test_prompt_files_come_over_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --w 832 --n blurry\n")
    options = f"{COMMON} {RUNS['first']} --sample_every_n_steps=100 --sample_prompts={file}"
    samples = config_of(imported(f"{options} --sample_sampler=k_euler_a")).samples
    assert (samples.every_steps, samples.prompt_file, samples.sampler) == (100, file, "euler_a")
    draft = imported(f"{options} --sample_sampler=pndm")
    assert config_of(draft).samples.sampler == "euler" and "must be one of" in draft.became["sample_sampler"]
    for name, text in (("p.json", '["a cat --w 832"]'), ("p.toml", "[[prompt.subset]]\nprompt = 'a cat'\n")):
        (tmp_path / name).write_text(text)
        words = f"{COMMON} {RUNS['first']} --sample_every_n_steps=100 --sample_prompts={name}"
        (tmp_path / "train.sh").write_text(f"accelerate launch sdxl_train.py {words}\n")
        assert config_of(import_file(tmp_path / "train.sh")).samples.prompt_file == tmp_path / name  # beside the script
    with pytest.raises(UserError, match=r"p.toml: is a file of prompts, for samples\.prompt_file"):
        import_file(tmp_path / "p.toml")
    (tmp_path / "p.json").write_text('[{"prompt": "a cat", "widht": 832}]')
    draft = imported(f"{COMMON} {RUNS['first']} --sample_every_n_steps=100 --sample_prompts={tmp_path / 'p.json'}")
    assert any("p.json: prompt 1: widht: unknown key; did you mean `width`?; once that" in note for note in draft.notes)
    assert draft.became["in_json"] == "data.sources: kohya_json, meta.json"
    file.write_text("a cat --cn pose.png\n")
    draft = imported(options)
    assert config_of(draft).samples.prompt_file is None
    assert any(f"{file}:1: --cn" in note for note in draft.notes)


def test_a_toml_file_of_a_window_holds_what_is_no_option(tmp_path: Path) -> None:
    """sd-scripts passes over such names; and files that a script names lie beside it."""
    (tmp_path / "arguments.toml").write_text("""
sdxl = true
epoch = 8
lora_rank = 3
vae = ""
max_train_steps = 100.0
learing_rate = 1e-4
pretrained_model_name_or_path = "base.safetensors"
dataset_config = "data.toml"
console_log_level = "INFO"
""")
    (tmp_path / "data.toml").write_text("""
[general]
color_aug = true
[[datasets]]
  [[datasets.subsets]]
  image_dir = "cats"
  token_warmup_step = 3
""")
    (tmp_path / "train.sh").write_text("accelerate launch sdxl_train.py --config_file arguments.toml\n")
    draft = import_any(tmp_path / "train.sh")
    config = config_of(draft)
    assert config.train.steps == 100 and config.optimizer.lr == 2e-6 and "vae" not in draft.given
    assert draft.became["sdxl"].startswith("- is no option of sd-scripts")
    assert draft.became["learing_rate"].endswith("; learning_rate is")
    assert draft.became["console_log_level"].startswith("- metrics.jsonl")
    assert any(note.endswith("color_aug: colours are not changed: it trains wrong ones") for note in draft.notes)
    assert any("token_warmup_step: captions do not grow" in note for note in draft.notes)
    (tmp_path / "data.toml").write_text("[general]\nshufle_caption = true\n[[datasets]]\n")
    with pytest.raises(UserError, match=r"data.toml: shufle_caption: is no key .*did you mean shuffle_caption\?"):
        import_any(tmp_path / "train.sh")


def test_settings_of_a_window_are_not_guessed_at(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"LoRA_type": "Standard", "pretrained_model_name_or_path": "base.safetensors"}')
    with pytest.raises(UserError, match=r"settings of a window for kohya's scripts; give the \.toml that it writes"):
        import_any(file)


def test_accelerates_file_that_the_command_names(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    options = f"{COMMON} {RUNS['first']}"
    draft = imported(options, launch=f"--config_file {file}")
    said = f"accelerate's {file} is not here: give it by --accelerate-config"
    assert any(note.startswith(said) for note in draft.notes)
    assert config_of(draft).launch.workers is None
    file.write_text("num_processes: 4\ndeepspeed_config:\n  zero_stage: 3\n")
    config = config_of(imported(options, launch=f"--config_file={file}"))
    assert config.launch.workers == 4 and config.memory.strategy == "zero3"
    assert config_of(imported(options, launch=f"--config_file {file} --num_processes 2")).launch.workers == 2


@pytest.mark.parametrize(
    ("options", "left_out", "said"),
    [
        (
            "--v_parameterization --zero_terminal_snr --noise_offset 0.03",
            "noise_offset",
            "what zero terminal SNR mends",
        ),
        ("--cache_text_encoder_outputs --shuffle_caption", "cache_text_encoder_outputs", "the same at each draw"),
    ],
)
def test_what_clashes_here_and_not_there_is_left_out_and_told_first(options: str, left_out: str, said: str) -> None:
    draft = imported(f"--pretrained_model_name_or_path m --train_data_dir d --max_train_steps 100 {options}")
    config_of(draft)
    assert draft.notes[0].startswith(f"--{left_out}: ") and said in draft.notes[0]
    assert draft.notes[0].endswith(" is left out") and draft.became[left_out].startswith("- must not go together")


def test_one_of_two_offsets_and_no_word_of_what_holds_anyway() -> None:
    noise = "--noise_offset 0.1 --adaptive_noise_scale 0.01 --multires_noise_iterations 6 --multires_noise_discount 0.3"
    arguments = (
        "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False"
    )
    draft = imported(f"--pretrained_model_name_or_path m --train_data_dir d --max_train_steps 9 {noise} {arguments}")
    config = config_of(draft)
    assert (config.objective.noise.pyramid_levels, config.objective.noise.offset) == (6, 0)
    assert "coarsest level" in draft.became["noise_offset"] and "coarsest level" in draft.became["adaptive_noise_scale"]
    assert not [note for note in draft.notes if "optimizer_args" in note]


def test_any_choice_of_options_becomes_a_configuration() -> None:
    """Two to twenty at once, drawn by seeds: what this program refuses to combine is left out, not handed on."""
    values = {
        "resolution": "1024,1536", "bucket_reso_steps": "32", "caption_dropout_rate": "0.1", "keep_tokens": "1",
        "max_token_length": "225", "gradient_accumulation_steps": "4", "max_train_epochs": "3", "learning_rate": "1e-4",
        "mixed_precision": "fp16", "learning_rate_te1": "0", "unet_lr": "1e-4", "text_encoder_lr": "1e-5 2e-5",
        "network_module": "lycoris.kohya", "network_args": "algo=lokr factor=4 conv_dim=8 dropout=0.1",
        "network_dropout": "0.1", "optimizer_type": "Prodigy", "lr_scheduler": "cosine_with_restarts",
        "lr_warmup_steps": "0.05", "lr_scheduler_min_lr_ratio": "0.1", "min_snr_gamma": "5", "loss_type": "huber",
        "noise_offset": "0.03", "adaptive_noise_scale": "0.003", "multires_noise_iterations": "6",
        "ip_noise_gamma": "0.05", "save_every_n_steps": "500", "save_last_n_steps": "1000", "save_precision": "fp16",
        "sample_every_n_steps": "100", "validation_split": "0.1", "in_json": "meta.json", "reg_data_dir": "reg",
        "conditioning_data_dir": "masks", "block_lr": ",".join(["1e-6"] * 23), "network_weights": "w.safetensors",
        "secondary_separator": "';;;'", "caption_separator": "';'", "min_timestep": "100", "prior_loss_weight": "0.5",
    }  # fmt: skip
    flags = [name for name, kind in READ.items() if kind == FLAG and name != "network_train_text_encoder_only"]
    for seed in range(150):
        draw = random.Random(seed)
        names = draw.sample([*values, *flags], draw.choice([2, 5, 12, 20]))
        words = " ".join(f"--{name} {values.get(name, '')}" for name in names)
        draft = imported(
            f"--pretrained_model_name_or_path m --train_data_dir d {words}",
            draw.choice(["sdxl_train.py", "sdxl_train_network.py"]),
            draw.choice(["", "--num_processes 1", "--num_processes 4"]),
        )
        config_of(draft)
        assert draft.became.keys() == draft.given.keys(), words

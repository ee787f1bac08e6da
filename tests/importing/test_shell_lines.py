"""Commands as people keep and paste them, in any shell, come out as the words that the shell would have made."""

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.importing.command_text import read_command
from trainer.importing.recognised import import_any

POWERSHELL = r"""
# what to train
$base = "C:\models\sdxl base.safetensors" # with the VAE in it
$env:HF_HOME = "cache"
$steps = 2000
.\venv\Scripts\activate
accelerate launch --num_processes=2 "D:\tools\sd-scripts\sdxl_train_network.py" `
  --pretrained_model_name_or_path=$base `
  --train_data_dir="D:\my images\cats" `
  --output_dir=D:\out\cats `
  --network_module=networks.lora --max_train_steps=$steps
"""
BATCH = r"""
@REM small cards
call venv\Scripts\activate
set NAME=cats-2
set BASE=E:\models\sdxl.safetensors
accelerate launch --num_processes=1 ^
  E:\sd-scripts\sdxl_train_network.py ^
  --pretrained_model_name_or_path=%BASE% ^
  --train_data_dir="E:\data\cats" --network_module=networks.lora^
  --output_name=%NAME% --max_train_steps="500"
pause
"""
BASH = r"""
#!/usr/bin/env bash
set -euo pipefail
ROOT=/data
DATA=${DATA:-$ROOT/cats}
MODEL="$ROOT/models/my base.safetensors"
MORE="--xformers --cache_latents"
options=(
  --pretrained_model_name_or_path="$MODEL"
  # --vae=other.safetensors
  --train_data_dir "${ROOT}/cats"   # it was dogs
)
options+=(--max_train_steps 100)
if [ -d "$ROOT" ]; then
  CUDA_VISIBLE_DEVICES=0,1 accelerate launch --num_processes 2 sdxl_train.py "${options[@]}" $MORE \
    --learning_rate 1e-5 \
    # --learning_rate 2e-5 \
    --output_dir="out # 1" >> train.log 2>&1 | tee more.log
fi
"""
LOG = r"""
03:40:03-105812 INFO     accelerate launch --num_processes=1 "./sdxl_train_network.py"         common.py:123
                         --enable_bucket --pretrained_model_name_or_path="F:/some models/sdxl.safetensors"
                         --train_data_dir="F:/photos of
                         cats\img" --network_module=networks.lora --optimizer_type="Adafactor" --optimizer_args
                         scale_parameter=False relative_step=False warmup_init=False --max_train_steps="5200"
03:40:04-000000 INFO     done
"""
PASTED = """
 accelerate launch\x20
 --num_processes=4\x20
 "./sdxl_train.py"\x20
 --pretrained_model_name_or_path=“base.safetensors”   # the published one
 –-train_data_dir=cats
 —max_train_steps=7\xa0

 --optimizer_args "weight_decay=0.1" "betas=(0.9, 0.95)"
 --xformers; echo done
"""


def test_powershell() -> None:
    command = read_command("\ufeff" + POWERSHELL.replace("\n", "\r\n"), "train.ps1")
    assert command.script == "sdxl_train_network"
    assert [*command.launch] == ["accelerate", "launch", "--num_processes=2"]
    assert [*command.words] == [
        r"--pretrained_model_name_or_path=C:\models\sdxl base.safetensors",
        r"--train_data_dir=D:\my images\cats",
        r"--output_dir=D:\out\cats",
        "--network_module=networks.lora",
        "--max_train_steps=2000",
    ]


def test_windows_command_prompt() -> None:
    command = read_command(BATCH, "train.bat")
    assert command.script == "sdxl_train_network"
    assert [*command.words] == [
        r"--pretrained_model_name_or_path=E:\models\sdxl.safetensors",
        r"--train_data_dir=E:\data\cats",
        "--network_module=networks.lora",
        "--output_name=cats-2",
        "--max_train_steps=500",
    ]


def test_bash_with_arrays_comments_pipes_and_an_environment() -> None:
    command = read_command(BASH, "train.sh")
    assert [*command.launch] == ["CUDA_VISIBLE_DEVICES=0,1", "accelerate", "launch", "--num_processes", "2"]
    assert [*command.words] == [
        "--pretrained_model_name_or_path=/data/models/my base.safetensors",
        "--train_data_dir",
        "/data/cats",
        "--max_train_steps",
        "100",
        "--xformers",
        "--cache_latents",
        "--learning_rate",
        "1e-5",
        "--output_dir=out # 1",
    ]


def test_the_log_of_a_window_with_its_lines_broken() -> None:
    command = read_command(LOG, "log.txt")
    assert [*command.launch][-1] == "--num_processes=1"
    assert [*command.words] == [
        "--enable_bucket",
        "--pretrained_model_name_or_path=F:/some models/sdxl.safetensors",
        r"--train_data_dir=F:/photos of cats\img",
        "--network_module=networks.lora",
        "--optimizer_type=Adafactor",
        "--optimizer_args",
        "scale_parameter=False",
        "relative_step=False",
        "warmup_init=False",
        "--max_train_steps=5200",
    ]


def test_text_of_a_web_page() -> None:
    command = read_command(PASTED, "pasted")
    assert [*command.launch] == ["accelerate", "launch", "--num_processes=4"]
    assert [*command.words] == [
        "--pretrained_model_name_or_path=base.safetensors",
        "--train_data_dir=cats",
        "--max_train_steps=7",
        "--optimizer_args",
        "weight_decay=0.1",
        "betas=(0.9, 0.95)",
        "--xformers",
    ]


def test_an_option_behind_a_comment_is_not_lost() -> None:
    """A line's comment ends with the line, also where no backslash stands."""
    text = 'python sdxl_train.py\n --learning_rate 1e-5  # was 1e-4, "too" much\n --max_train_steps 3 # it\'s few\n'
    assert [*read_command(text, "x").words] == ["--learning_rate", "1e-5", "--max_train_steps", "3"]


def test_what_is_not_ours() -> None:
    for other in ("sdxl_train_textual_inversion.py", "sdxl_train_control_net.py", "sdxl_train_control_net_lllite.py"):
        with pytest.raises(UserError, match="holds no command with"):
            read_command(f"accelerate launch {other} --x", "train.sh")
    with pytest.raises(UserError, match="holds 2 commands"):
        read_command("python sdxl_train.py --a 1\npython sdxl_train.py --a 2\n", "train.sh")
    with pytest.raises(UserError, match="cannot be split into words: No closing quotation"):
        read_command('python sdxl_train.py --a "1\n\necho x\n', "train.sh")


def test_paths_of_windows_and_unset_variables_are_told(tmp_path: Path) -> None:
    file = tmp_path / "train.ps1"
    file.write_text(POWERSHELL, encoding="utf-16")
    notes = import_any(file).notes
    places = "run.dir, model.path, data.prepared, data.sources.0.path"
    assert notes[0] == f"{places}: paths of Windows; put in where these lie on this machine"
    file.write_text(BATCH.replace("set BASE", "@REM set BASE"))
    assert any("%BASE% is set nowhere in the script" in note for note in import_any(file).notes)
    file.write_text("accelerate launch sdxl_train.py $options --xformers")
    with pytest.raises(UserError, match=r"`\$options` is set nowhere in the script; put in what it stands for"):
        import_any(file)


def test_variables_that_double_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    command = "accelerate launch sdxl_train.py --train_data_dir=/data --output_dir=$A"
    for doubled in ("A=$A$A\n" * 60, "A+=$A\n" * 60, f"A={'x' * 1000}\nB={'$A' * 1000}\nC={'$B' * 1000}\n"):
        script.write_text(f"A=aa\n{doubled}{command}\n")
        with pytest.raises(UserError, match=r"train\.sh: .*its variables put in more than 1,048,576 characters"):
            import_any(script)
    script.write_text("A=aa\n" + "A=$A$A\n" * 4 + command)
    assert read_command(script.read_text(), "here").words[-1] == "--output_dir=" + "a" * 32

"""What an import writes, `plan` takes: each command and file of the other tests, through both commands."""

import json
from pathlib import Path

import pytest

from tests.importing import test_import_diffusers as diffusers
from tests.importing import test_import_kohya as kohya
from tests.importing import test_import_onetrainer as onetrainer
from tests.importing.test_shell_lines import BASH, BATCH, LOG, PASTED, POWERSHELL
from trainer.cli.main import main

_BASE = "--pretrained_model_name_or_path=base.safetensors --train_data_dir=photos --output_dir=out"
ADAPTERS = {
    "LoRA": "--network_module=networks.lora --network_dim=32 --network_alpha=16 --unet_lr=1e-4 --text_encoder_lr=5e-5 "
    "--optimizer_type=AdamW8bit --lr_scheduler=cosine_with_restarts --max_train_epochs=10 --mixed_precision=bf16 "
    "--enable_bucket --cache_latents_to_disk --shuffle_caption --keep_tokens=1 --noise_offset=0.0357 --min_snr_gamma=5",
    "LoRA without text encoders": "--network_module=networks.lora --network_dim=8 --network_train_unet_only "
    "--cache_text_encoder_outputs --learning_rate=1e-4 --optimizer_type=Adafactor --optimizer_args relative_step=False "
    "scale_parameter=False warmup_init=False --max_train_steps=1600 --mixed_precision=fp16 --full_fp16",
    "LoKr by Prodigy": "--network_module=lycoris.kohya --network_dim=16 --network_args algo=lokr factor=8 conv_dim=8 "
    "--optimizer_type=prodigy --optimizer_args d_coef=2 decouple=True --max_train_steps=2000 --mixed_precision=bf16",
}  # fmt: skip
SCRIPTS = {
    **{f"kohya, {name}": f"accelerate launch --num_processes=4 sdxl_train.py {kohya.COMMON} {rest}"
       for name, rest in kohya.RUNS.items()},
    **{f"kohya, {name}": f"accelerate launch --num_processes=1 sdxl_train_network.py {_BASE} {rest}"
       for name, rest in ADAPTERS.items()},
    **{f"diffusers, {name}": f"accelerate launch {rest}" for name, rest in diffusers.RUNS.items()},
    "PowerShell": POWERSHELL, "command prompt": BATCH, "bash": BASH, "log": LOG, "web page": PASTED,
}  # fmt: skip
FILES = {name: (text, "sh") for name, text in SCRIPTS.items()} | {
    f"OneTrainer, {name}": (json.dumps(settings), "json") for name, settings in onetrainer.RUNS.items()
}
SOME = ("kohya, ZeRO-2", "diffusers, dreambooth", "OneTrainer, embedding")  # one of each; the rest takes minutes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.e2e if name in SOME else pytest.mark.slow) for name in FILES]
)
def test_an_import_passes_plan(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of SDXL at its size, on cards where all fits: what is told hangs on no machine, and takes seconds."""
    text, ending = FILES[name]
    file, out = tmp_path / f"train.{ending}", tmp_path / "mine.yaml"
    file.write_text(text)
    assert main(["import-kohya", str(file), "-o", str(out)]) == 0, capsys.readouterr().err
    assert main(["plan", str(out), "--sdxl", "memory.budget=80GiB", "launch.workers=4"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "\ntrains: " in told and "\nchosen: " in told and " of 80.00 GiB" in told


def test_there_are_enough_of_each() -> None:
    """More than the twelve command lines that were asked for, of each program and kind of shell."""
    assert len([name for name in FILES if name.startswith("kohya")]) >= 11
    assert len(FILES) >= 24 and {*SOME} <= FILES.keys()

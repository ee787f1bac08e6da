"""`sdxl-train plan CONFIG.yaml`: what a run would do, before it does anything. Imports no torch."""

import argparse
from collections.abc import Sequence

from trainer.cli.arguments import add_config_arguments, read_config
from trainer.cli.start import worker_count
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.data.prepare import is_current
from trainer.data.snapshot import PreparedSet
from trainer.model.folder import count_weights
from trainer.train.arithmetic import arithmetic_of
from trainer.train.preparation import prepare_settings
from trainer.train.run_dir import list_checkpoints


def main(argv: Sequence[str]) -> int:
    """Print the resolved config, what trains, the arithmetic of steps and epochs, and a summary of the data."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train plan",
        description=main.__doc__,
        epilog="example: sdxl-train plan configs/4x3090.yaml train.epochs=2",
    )
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    config = read_config(arguments.config, arguments.overrides)
    print(to_yaml(config))
    _print_model(config)
    _print_data(config)
    existing = list_checkpoints(config.run.dir)
    print(f"run directory {config.run.dir}: {f'goes on from {existing[-1].name}' if existing else 'starts fresh'}")
    return 0


def _print_model(config: Config) -> None:
    count = count_weights(config.model.path / "unet")
    precision = config.train.precision
    print(f"trains: the UNet, {count:,} weights (all of it); fp32 weights and AdamW state, {precision} arithmetic")
    print("frozen: both text encoders and the VAE")


def _print_data(config: Config) -> None:
    if not is_current(prepare_settings(config)):
        print(f"data: {config.data.prepared} is not prepared yet; `sdxl-train prepare` does it, or the first start")
        return
    prepared = PreparedSet.open(config.data.prepared)
    rows = prepared.rows_per_bucket("train")
    print(f"data: {prepared.images('train'):,} images to train on, {prepared.images('validation'):,} held out")
    print("  bucket (width x height)   images per epoch")
    for bucket, count in zip(prepared.buckets("train"), rows, strict=True):
        print(f"  {bucket.width_px:>12} x {bucket.height_px:<8} {count:>12,}")
    arithmetic = arithmetic_of(config, worker_count(config), rows)
    for line in arithmetic.describe():
        print(line)

"""`sdxl-train plan CONFIG.yaml`: what a run would do, before it does anything. Imports no torch."""

import argparse
from collections.abc import Sequence

from trainer.cli.arguments import add_config_arguments, read_config
from trainer.cli.start import worker_count
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.data.caption_survey import CaptionSurvey, sampled_records
from trainer.data.prepare import is_current
from trainer.data.snapshot import PreparedSet
from trainer.model.source import count_weights, find_source
from trainer.train.arithmetic import arithmetic_of
from trainer.train.captions import describe_captions, require_captions, survey_of
from trainer.train.preparation import prepare_settings
from trainer.train.run_dir import list_checkpoints


def main(argv: Sequence[str]) -> int:
    """Print the resolved config, what trains, the arithmetic of steps and epochs, the data and some captions."""
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
    captions = _print_data(config)
    existing = list_checkpoints(config.run.dir)
    print(f"run directory {config.run.dir}: {f'goes on from {existing[-1].name}' if existing else 'starts fresh'}")
    if captions:
        require_captions(config, captions)
    return 0


def _print_model(config: Config) -> None:
    count = count_weights(find_source(config.model.path), "unet")
    precision = config.train.precision
    print(f"trains: the UNet, {count:,} weights (all of it); fp32 weights and AdamW state, {precision} arithmetic")
    print("frozen: both text encoders and the VAE")


def _print_data(config: Config) -> CaptionSurvey | None:
    """Returns what was found of the captions, where the data are prepared."""
    if not is_current(prepare_settings(config)):
        print(f"data: {config.data.prepared} is not prepared yet; `sdxl-train prepare` does it, or the first start")
        return None
    prepared = PreparedSet.open(config.data.prepared)
    rows = prepared.rows_per_bucket("train")
    print(f"data: {prepared.images('train'):,} images to train on, {prepared.images('validation'):,} held out")
    print("  bucket (width x height)   images per epoch")
    for bucket, count in zip(prepared.buckets("train"), rows, strict=True):
        print(f"  {bucket.width_px:>12} x {bucket.height_px:<8} {count:>12,}")
    arithmetic = arithmetic_of(config, worker_count(config), prepared.buckets("train"), rows)
    captions = survey_of(config, sampled_records(prepared))
    for line in (*arithmetic.describe(), *describe_captions(config, captions)):
        print(line)
    return captions

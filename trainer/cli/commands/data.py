"""`sdxl-train data ACTION CONFIG.yaml|PREPARED_DIR ...`: look at a prepared data set. `stats` is told here."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trainer.cli.data_browse import browse
from trainer.cli.data_show import show
from trainer.cli.run_target import add_prepared_target, find_prepared
from trainer.cli.start_workers import count_run_tags
from trainer.cli.text_lengths import text_measure
from trainer.config.load import load_config
from trainer.config.spelling import nearest
from trainer.data.captions import PLAIN, CaptionRules
from trainer.data.loss_weights import LossWeights
from trainer.data.prepare.working_folder import LEFT_OUT
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.left_out_list import left_out_by_reason
from trainer.data.survey.stats import BAD_FILE, BucketCounts, Sample, bucket_counts, mask_counts, sample
from trainer.errors import UserError
from trainer.evaluate.data_chart import DataChart, data_chart_png
from trainer.model_files.model_source import ModelPath
from trainer.train.caption_rules import caption_rules, run_loss_weights

_SHOWN_REASONS = 12
USAGE = """\
usage: sdxl-train data stats  CONFIG.yaml|PREPARED_DIR [--out PNG] [--sample N]
       sdxl-train data browse CONFIG.yaml|PREPARED_DIR [--out HTML] [--images N]
       sdxl-train data show   CONFIG.yaml KEY [--epochs N]

Look at a prepared data set; each action has its own --help.

  stats   print buckets and what was left out, draw histograms
  browse  write one page with all of it and a gallery, as the model sees the images
  show    say of one image: file, crop, latents, captions and tokens in the next epochs

examples:
  sdxl-train data stats configs/4x3090.yaml
  sdxl-train data browse configs/4x3090.yaml --images 1000
"""


def main(argv: Sequence[str]) -> int:
    """Look at a prepared data set: numbers and histograms, a page, or one image."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] not in ACTIONS:
        near = nearest(argv[0], ACTIONS)
        hint = f"did you mean `data {near}`?" if near else f"write one of {', '.join(f'`data {a}`' for a in ACTIONS)}"
        raise UserError(f"data {argv[0]}: there is no such action; {hint}")
    return ACTIONS[argv[0]](argv[1:])


def stats(argv: Sequence[str]) -> int:
    """Print the buckets of a prepared data set and what was left out, and draw histograms of aspect ratios, image
    sizes, caption lengths and, of a config with loss weights, of these."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train data stats",
        description=stats.__doc__,
        epilog="example: sdxl-train data stats configs/4x3090.yaml",
    )
    add_prepared_target(parser)
    parser.add_argument("--out", type=Path, metavar="PNG", help="the histograms (default: PREPARED_DIR/stats.png)")
    parser.add_argument(
        "--sample", type=int, default=20_000, metavar="N", help="images to look at for the histograms (default: 20000)"
    )
    parser.add_argument("--model", type=Path, help="model folder with the tokenizers (default: the config's)")
    arguments = parser.parse_intermixed_args(argv)
    prepared = PreparedSet.open(find_prepared(arguments))
    masks = mask_counts(prepared)
    for line in [*_table(bucket_counts(prepared)), *([str(masks)] if masks else []), *_left_out(prepared.path)]:
        print(line)
    rules, weights, model, tokenizer = _read_with(arguments, prepared)
    measure = text_measure(model, tokenizer)
    found = _sample(prepared, max(1, arguments.sample), rules, weights)
    out = arguments.out or prepared.path / "stats.png"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    shown = len(found.texts)
    of = f"all {shown:,}" if shown == found.rows else f"a sample of {shown:,} of {found.rows:,}"
    chart = DataChart(
        title=str(prepared.path),
        subtitle=f"{of} training images (repeats counted), snapshot {prepared.snapshot_name.removesuffix('.json')}",
        original_hw=found.original_hw,
        target_hw=found.target_hw,
        text_lengths=measure.of(found.texts),
        length_unit=measure.unit,
        used_length=measure.used,
        loss_weights=found.loss_weights,
    )
    data_chart_png(chart, out)
    if weights is not None and len(found.loss_weights):
        print(_told(found.loss_weights))
    if found.unreadable:
        print(f"{found.unreadable:,} of the sampled images cannot be read; `sdxl-train verify` lists all of them")
    print(f"histograms of {of} training images: {out}")
    return 0


def _read_with(
    arguments: argparse.Namespace, prepared: PreparedSet
) -> tuple[CaptionRules, LossWeights | None, ModelPath | None, Path | None]:
    """How captions become texts and images count, and `model.path` and `model.tokenizer` if they are known."""
    if arguments.target.is_dir():
        return PLAIN, None, arguments.model, None
    config = load_config(arguments.target, arguments.overrides, check_paths=False)
    count_run_tags(config)
    rules, weights = caption_rules(config), run_loss_weights(config, prepared)
    if arguments.model:
        return rules, weights, arguments.model, None
    return rules, weights, config.model.path, config.model.tokenizer


def _told(weights: np.ndarray) -> str:
    """The distribution of loss weights in a line."""
    least, low, middle, high, most = np.quantile(weights, (0, 0.05, 0.5, 0.95, 1)).tolist()
    return (
        f"loss weights: mean {weights.mean():.3g}, median {middle:.3g}; nine in ten from {low:.3g} to {high:.3g}, all "
        f"from {least:.3g} to {most:.3g}"
    )


def _sample(prepared: PreparedSet, count: int, rules: CaptionRules, weights: LossWeights | None) -> Sample:
    total = min(count, sum(prepared.rows_per_bucket("train")))
    with tqdm(desc="reading a sample", total=total, unit="img", disable=None, leave=False) as bar:
        for step in sample(prepared, count, rules, weights):
            if step is not None:
                return step
            bar.update()
    raise AssertionError("unreachable")


def _table(counts: Sequence[BucketCounts]) -> list[str]:
    """Buckets of both splits with their counts, as lines."""
    lines = [f"{'bucket (width x height)':<26}{'images':>12}{'with repeats':>14}{'share':>9}{'shards':>8}"]
    for split, resolution in dict.fromkeys((count.split, count.resolution) for count in counts):
        ours = [count for count in counts if (count.split, count.resolution) == (split, resolution)]
        total = sum(count.per_epoch for count in ours)
        lines.append(f"{split}, the same images at {resolution} px:" if resolution else f"{split}:")
        for count in ours:
            name = f"  {count.bucket.width_px} x {count.bucket.height_px}"
            lines.append(_row(name, count.images, count.per_epoch, count.per_epoch / total, count.shards))
        sums = [sum(getattr(count, name) for count in ours) for name in ("images", "per_epoch", "shards")]
        lines.append(_row(f"  all {len(ours)}", sums[0], sums[1], 1.0, sums[2]))
    return lines


def _row(name: str, images: int, per_epoch: int, share: float, shards: int) -> str:
    return f"{name:<26}{images:>12,}{per_epoch:>14,}{100 * share:>7.2f} %{shards:>8,}"


def _left_out(prepared: Path) -> list[str]:
    """What cannot be used, and what filters leave out: how many images for which reasons."""
    lines, found = list[str](), left_out_by_reason(prepared)
    for file, why in ((BAD_FILE, "left out"), (LEFT_OUT, "left out by filters")):
        reasons = [each for each in found if each.file == file]
        if reasons:
            lines.append(f"{why}: {sum(each.images for each in reasons):,} images, listed in {prepared / file}")
            lines += [f"  {each.images:>12,}  {each.reason}" for each in reasons[:_SHOWN_REASONS]]
        if len(reasons) > _SHOWN_REASONS:
            lines.append(f"  and {len(reasons) - _SHOWN_REASONS} more reasons")
    return lines or ["left out: none"]


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"stats": stats, "browse": browse, "show": show}

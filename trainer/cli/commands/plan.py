"""`sdxl-train plan CONFIG.yaml`: what a run would do, before it does anything.

Torch is imported where the memory plan has to be worked out, and no plan of before can be taken.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.checkpoint.run_dir import list_checkpoints
from trainer.cli.arguments import add_config_arguments, read_run
from trainer.cli.start_workers import worker_count
from trainer.config.load import load_config, to_yaml
from trainer.config.schema import Config
from trainer.config.sections.adapter_config import trains_adapter
from trainer.config.sections.trainable_config import TextEncoderPart, UnetPart
from trainer.data.mixture import Mixture
from trainer.data.prepare.stages import is_current
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.caption_survey import CaptionSurvey, sampled_records
from trainer.measure.card_memory import card_bytes
from trainer.measure.optimizer_bench import measured_optimizers
from trainer.memory.report import MemoryPlan, measured_speed, run_time
from trainer.memory.run_plan import memory_plan, require_fit
from trainer.model.selection.block_table import table_of_blocks
from trainer.model.selection.part_names import COMPONENT_OF
from trainer.model_files.run_model import RunModel
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.train.arithmetic import arithmetic_of
from trainer.train.caption_rules import describe_captions, require_captions, survey_of
from trainer.train.memory_inputs import make_setting, planned_run
from trainer.train.run_objective import describe_objective, guidance_warning
from trainer.train.saved.part_times import told_times
from trainer.train.trained_parts import packed_parts, what_trains
from trainer.train.workers.prepare_worker import prepare_settings

_EXAMPLES = """\
examples:
  sdxl-train plan configs/4x3090.yaml                             the run as it is: what trains, whether it fits, data
  sdxl-train plan configs/4x3090.yaml train.epochs=2              with a value changed
  sdxl-train plan configs/4x3090.yaml --sdxl launch.workers=4     before there is a model, data, or a card
"""


def main(argv: Sequence[str]) -> int:
    """Print the resolved config, what trains, steps, data and some captions, and whether the memory suffices."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train plan",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the memory plan alone, as JSON")
    parser.add_argument(
        "--sdxl", action="store_true", help="of SDXL as it was published, without any files of it or data"
    )
    arguments = parser.parse_intermixed_args(argv)
    with ExitStack() as stack:
        if arguments.sdxl:
            config = load_config(arguments.config, arguments.overrides, check_paths=False)
            model = stack.enter_context(_published_model())
        else:
            config, model = read_run(arguments.config, arguments.overrides)
        return _plan(config, model, as_json=arguments.json, with_data=not arguments.sdxl)


@contextmanager
def _published_model() -> Iterator[RunModel]:
    """SDXL 1.0 without its weights."""
    from trainer.model.outline import published_outline

    with tempfile.TemporaryDirectory(prefix="sdxl-train-plan-") as folder:
        yield published_outline(Path(folder))


def _plan(config: Config, model: RunModel, *, as_json: bool, with_data: bool) -> int:
    if as_json:
        plan = _memory_plan(config, model, with_data=with_data)
        print(json.dumps(plan.to_json(), indent=2))
        require_fit(plan)
        return 0
    print(to_yaml(config))
    _print_model(config, model)
    captions = None
    if with_data:
        captions = _print_data(config, model)
        existing = list_checkpoints(config.run.dir)
        print(f"run directory {config.run.dir}: {f'goes on from {existing[-1].name}' if existing else 'starts fresh'}")
    plan = _memory_plan(config, model, with_data=with_data)
    _print_memory(config, model, plan, with_data=with_data)
    if captions:
        require_captions(config, captions)
    require_fit(plan)
    return 0


def _memory_plan(config: Config, model: RunModel, *, with_data: bool) -> MemoryPlan:
    """Of a run on this host's cards; on the CPU, of a run on cards where `memory.budget` says how large they are."""
    gpus = detect_gpus()
    kernels = "cuda" if gpus or config.memory.budget != "auto" else "cpu"
    joined = joined_environment(os.environ)
    here = int(joined["LOCAL_WORLD_SIZE"]) if joined else choose_workers(config.launch.workers, gpus)[0]
    buckets = []
    if with_data and is_current(prepare_settings(config, model)):
        buckets = PreparedSet.open(config.data.prepared).buckets("train")
    cards = card_bytes(gpus) if gpus else None
    setting = make_setting(config, kernels, cards, worker_count(config), here, buckets)
    return memory_plan(planned_run(config, model), setting)


def _print_memory(config: Config, model: RunModel, plan: MemoryPlan, *, with_data: bool) -> None:
    precision, strategy = config.train.precision, config.memory.strategy
    measured = measured_optimizers(config.run.dir, precision, strategy, plan.workers, plan.num_trained)
    for line in [*plan.describe(), *plan.describe_optimizers(config.optimizer.kind, measured)]:
        print(line)
    if not with_data or plan.kernels == "cpu" or not is_current(prepare_settings(config, model)):
        return
    prepared = PreparedSet.open(config.data.prepared)
    buckets, rows = prepared.buckets("train"), Mixture.of(prepared, config.run.seed).rows(0)
    arithmetic = arithmetic_of(config, worker_count(config), buckets, rows)
    speed = None
    if plan.chosen:
        speed = measured_speed(
            config.run.dir,
            plan.chosen.strategy,
            config.train.batch_size_per_gpu,
            config.train.compile == "blocks",
            config.exchange.wished_bucket_mib,
        )
    print(f"the run takes {run_time(plan, arithmetic.total_images, speed)}")


def _print_model(config: Config, model: RunModel) -> None:
    trained, frozen, trains = list[str](), list[str](), what_trains(config)
    on = f"{config.adapter.kind} of rank {config.adapter.rank} on " if trains_adapter(config.adapter) else ""
    for key, component in COMPONENT_OF.items():
        part, count = getattr(trains, key), model.count_weights(component)
        if part.train:
            trained.append(f"{on}{key} ({count:,} {'frozen ' if on else ''}weights{_but(part)})")
        else:
            frozen.append(key)
    trained += [f"{each.token} ({each.vectors} new vectors)" for each in config.new_tokens.tokens]
    print(f"trains: {', '.join(trained)}; precision {config.train.precision}, optimizer {config.optimizer.kind}")
    print(f"frozen: {', '.join([*frozen, 'vae'])}")
    if (held := config.model.frozen_weights) != "compute":
        print(f"weights of {', '.join(packed_parts(config))} are held in {held}, unpacked layer by layer")
    table = () if on else table_of_blocks(config.trainable, model)
    for line in (*table, *told_times(config)):
        print(line)
    for line in describe_objective(config, model):
        print(line)
    if warning := guidance_warning(config):
        print(f"warning: {warning}")
    if config.ema.averages:
        print(config.ema.told())


def _but(part: TextEncoderPart) -> str:
    """What is said of a part of which not all trains."""
    words = []
    if isinstance(part, UnetPart) and part.preset != "all":
        words.append(f", preset {part.preset}")
    if part.only:
        words.append(f", only {', '.join(part.only)}")
    if part.freeze:
        words.append(f" but for {', '.join(part.freeze)}")
    return "".join(words)


def _print_data(config: Config, model: RunModel) -> CaptionSurvey | None:
    """Returns what was found of the captions, where the data are prepared."""
    if not is_current(prepare_settings(config, model)):
        print(f"data: {config.data.prepared} is not prepared yet; `sdxl-train prepare` does it, or the first start")
        return None
    prepared = PreparedSet.open(config.data.prepared)
    mixture = Mixture.of(prepared, config.run.seed)
    rows = mixture.rows(0)
    print(f"data: {prepared.images('train'):,} images to train on, {prepared.images('validation'):,} held out")
    print("  bucket (width x height)   images per epoch")
    for bucket, count in zip(prepared.buckets("train"), rows, strict=True):
        print(f"  {bucket.width_px:>12} x {bucket.height_px:<8} {count:>12,}")
    for source, count in mixture.rows_of_sources(0).items():
        print(f"  {source}: {count:,} images per epoch, {count / max(1, sum(rows)):.1%}")
    for resolution, count in mixture.rows_of_resolutions(0).items():
        at = f"{resolution or config.data.buckets.resolution} px"
        print(f"  at {at}: {count:,} images per epoch, {count / max(1, sum(rows)):.1%}")
    arithmetic = arithmetic_of(config, worker_count(config), prepared.buckets("train"), rows)
    captions = survey_of(config, sampled_records(prepared))
    for line in (*arithmetic.describe(), *describe_captions(config, model, captions)):
        print(line)
    return captions

"""`sdxl-train doctor [CONFIG.yaml]`: is this machine fit to train, and what slows it down."""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trainer.cli.benches.way_workers import count
from trainer.config.load import load_config
from trainer.doctor.doctor_page import as_json, page_lines, share_lines
from trainer.doctor.examine import Workers, judge, measure, read_facts, ticks
from trainer.doctor.exchange import ExchangeFacts, measure_exchange
from trainer.doctor.findings import exit_code
from trainer.doctor.tune_exchange import ROUNDS, SIZES, Settings, tune, tuned_lines
from trainer.doctor.tune_exchange import ticks as ticks_of_tuning
from trainer.errors import UserError, json_text
from trainer.host.cores import placements_of
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment

_EXAMPLES = """\
examples:
  sdxl-train doctor                                this machine; the disk is that of the current directory
  sdxl-train doctor configs/4x3090.yaml            data and run directories, and workers, of a configuration
  sdxl-train doctor --quick --json                 nothing that takes long, for a program to read
  sdxl-train doctor --share                        the all-reduce table to paste, without names and paths
  sdxl-train doctor --tune-nccl                    which of NCCL's settings make it faster on these cards (some minutes)

returns 0 where nothing fails, 1 where something does, 2 for a mistake
"""
_UUID = re.compile(r"\(UUID: (GPU-[^)]+)\)")
_WORKERS_WITHOUT_CARDS = 2  # the fewest that exchange anything


@dataclass(frozen=True)
class _Wish:
    """What arguments and configuration say; without one, the current directory and what is there.

    Attributes:
        asked: the workers of `--workers`.
        workers: these, or those of the configuration.
    """

    asked: int | None
    workers: int | None
    cores: str | Sequence[str]
    data: Path
    run: Path


def main(argv: Sequence[str]) -> int:
    """Look at the machine and measure it; each line says how good a property is, why it matters, and what to do."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train doctor",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="whose directories to measure")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace those of it")
    parser.add_argument("--workers", type=count, metavar="N", help="that exchange (default: a run's; without cards 2)")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long: reading, memory, exchange")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--share", action="store_true", help="print the all-reduce table alone, as markdown")
    output.add_argument("--tune-nccl", action="store_true", help="measure the exchange alone, with settings of NCCL")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.share or arguments.tune_nccl) and arguments.quick:
        raise UserError(
            f"--{'share' if arguments.share else 'tune-nccl'}: the table has to be measured; leave out --quick"
        )
    if joined_environment(os.environ):
        raise UserError("doctor starts its own workers: run it without torchrun or srun")
    wish = _wish(arguments)
    workers = _workers(wish)
    if arguments.tune_nccl:
        return _tune(workers)
    facts = read_facts(workers.count, wish.data, wish.run)
    with _progress(ticks(quick=arguments.quick)) as tick:
        facts = measure(facts, workers, quick=arguments.quick, tick=tick)
    findings = judge(facts)
    if arguments.json:
        print(json_text(as_json(facts, findings)))
    else:
        for line in share_lines(facts) if arguments.share else page_lines(findings):
            print(line)
    return exit_code(findings)


def _wish(arguments: argparse.Namespace) -> _Wish:
    if arguments.config is None:
        return _Wish(arguments.workers, arguments.workers, "auto", Path(), Path())
    config = load_config(arguments.config, arguments.overrides, check_paths=False)
    launch = config.launch
    return _Wish(
        arguments.workers, arguments.workers or launch.workers, launch.cores, config.data.prepared, config.run.dir
    )


def _workers(wish: _Wish) -> Workers:
    """As a run would have them; two without cards, or there is nothing to exchange.

    Raises:
        UserError: more workers than cards, or `launch.cores` does not fit.
    """
    gpus = detect_gpus()
    if wish.asked is not None and gpus and wish.asked > len(gpus):
        raise UserError(f"--workers {wish.asked}: this host has {len(gpus)} cards, and each worker needs one")
    workers, gpu = choose_workers(wish.workers or (None if gpus else _WORKERS_WITHOUT_CARDS), gpus)
    if wish.cores == "auto" and not gpu:
        return Workers(workers, gpu)
    uuids = [match.group(1) if (match := _UUID.search(line)) else "" for line in gpus] or [""] * workers
    return Workers(workers, gpu, [each.cpus for each in placements_of(wish.cores, uuids[:workers])])


def _tune(workers: Workers) -> int:
    """Measure the exchange under settings of NCCL, and print what is worth keeping."""
    if not workers.gpu or workers.count < 2:
        raise UserError(f"--tune-nccl: needs two cards or more, and {workers.count if workers.gpu else 'none'} is here")

    said = [name for name, _ in ROUNDS if name in os.environ]
    if said:
        raise UserError(f"--tune-nccl: {', '.join(said)} would overrule what is found, in runs too: `unset` it first")

    def measured(settings: Settings) -> ExchangeFacts:
        env = {**os.environ, **settings}
        return measure_exchange(workers.count, gpu=True, env=env, cpus=workers.cpus, sizes=SIZES, copies=False)

    with _progress(ticks_of_tuning()) as tick:
        tuned = tune(measured, tick=tick)
    for line in tuned_lines(tuned):
        print(line)
    return 0 if tuned.tried[0].total_s is not None else 1


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar of what is being measured."""
    with tqdm(total=total, unit="", disable=None, leave=False, bar_format="{desc:<32} {bar:30} {elapsed}") as bar:

        def tick(told: str) -> None:
            bar.set_description_str(told, refresh=False)
            bar.update()

        yield tick

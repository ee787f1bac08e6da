"""What it costs to know where the time of a step goes.

    python benchmarks/telemetry_cost.py configs/tiny.yaml [--workers 2] [section.key=value ...]

Steps with and without it in turns, within one run: the clock of phases, what workers tell each other of it, shares, the
line on the bar, records to metrics.jsonl and TensorBoard. Prints CPU seconds of rank 0 (they are steady where wall time
is not), the ratio of each pair of turns, and the share of a step that the same calls take when they are made by
themselves a thousand times. The data set must be prepared (`sdxl-train prepare CONFIG`).
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS, STEPS, REPLAYS = 24, 2, 1000


def main() -> None:
    """Start the workers and print what rank 0 has found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", choices=["worker"], help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.part:
        found = measured(arguments.config, arguments.overrides)
        if found:
            print(json.dumps(found), flush=True)
        os._exit(0)
    folder = Path(tempfile.mkdtemp(prefix="telemetry-cost-"))
    try:
        found = run_workers(arguments.config, [*arguments.overrides, f"run.dir={folder / 'run'}"], arguments.workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    low, middle, high = statistics.quantiles(found["ratios"], n=4)
    print(f"{found['kind']}, {arguments.workers} workers; CPU seconds of rank 0 for a step, {ROUNDS} pairs of turns")
    print(f"  without             {found['off']:.4f}")
    print(f"  with                {found['on']:.4f}")
    print(f"  ratio of a pair     {middle:.4f}, quartiles {low:.4f} to {high:.4f}")
    alone = found["replayed"]
    print(f"  the calls alone     {1e3 * alone:.3f} ms, {found['marks']} marks: {100 * alone / found['off']:.3f} %")


def run_workers(config: Path, overrides: list[str], workers: int) -> dict[str, Any]:
    """Of processes of their own, what the first one prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SDXL_TRAIN_DEVICE": "cpu"}
    command = [sys.executable, __file__, str(config), "--part", "worker", *overrides]
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)]
    processes = [subprocess.Popen(command, env=each, stdout=subprocess.PIPE, text=True) for each in ranks]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a worker has failed")
    return json.loads(printed[0].splitlines()[-1])


def measured(config_path: Path, overrides: list[str]) -> dict[str, Any] | None:
    """In one worker; None but on rank 0."""
    from trainer.config.load import load_config
    from trainer.measure.step_clock import arriving
    from trainer.measure.telemetry import MetricsWriter
    from trainer.model_files.run_model import open_model
    from trainer.parallel.comm import close, init_comm
    from trainer.train.arithmetic import arithmetic_of
    from trainer.train.build import build_run
    from trainer.train.loop import open_training_loader
    from trainer.train.pace import Pace
    from trainer.train.placement import starting_state
    from trainer.train.step import train_step
    from trainer.train.told.run_outputs import TimesTold

    config = load_config(config_path, [*overrides, "run.resume=false"])
    comm, model = init_comm(), open_model(config.model.path, config.model.vae, config.model.tokenizer)
    run = build_run(config, model, comm)
    parts, clock = run.parts, run.parts.clock
    arithmetic = arithmetic_of(config, comm.world, run.prepared.buckets("train"), run.prepared.rows_per_bucket("train"))
    state = starting_state(config, run, arithmetic.images_per_step)
    pace, step = Pace(parts, 0), 0
    told = TimesTold.of(config, run, pace.stragglers)
    metrics = MetricsWriter(config.run.dir, None) if comm.rank == 0 else None

    def after(rows_told: tuple[float, ...]) -> None:
        """As the loop does it."""
        clock.mark("other")
        rows = pace.after_step(rows_told, step)
        if metrics:
            told.after_step(rows, 4.0, 128.0 * 128.0, step, metrics, done=False)
        for phase in ("save", "other", None, "other"):
            clock.mark(phase)

    with open_training_loader(config, model, comm, run, state, arithmetic.accumulation) as loader:

        def steps(*, on: bool) -> float:
            """CPU seconds of some steps."""
            nonlocal step
            if on:
                clock.start()
            else:
                clock.stop()
            begin = time.process_time()
            for _ in range(STEPS):
                batches = next(loader)
                tell = pace.tell if on else tuple
                arrived = arriving(clock, batches.batches) if on else batches.batches
                result = train_step(parts, arrived, arithmetic.accumulation, batches.weight, 1.0, False, tell=tell)
                step += 1
                if on:
                    after(result.told)
            return time.process_time() - begin

        for warm_up in (True, False, True, False):
            steps(on=warm_up)
        pairs = []
        for number in range(ROUNDS):  # who is first takes turns too
            first = steps(on=number % 2 == 0)
            second = steps(on=number % 2 == 1)
            pairs.append((first, second) if number % 2 == 0 else (second, first))
        marks: list[str | None] = []
        plain = clock.mark
        clock.mark = lambda phase: (marks.append(phase), plain(phase))[1]  # type: ignore[method-assign]
        steps(on=True)
        clock.mark = plain  # type: ignore[method-assign]
    of_a_step = marks[: len(marks) // STEPS]
    begin = time.process_time()
    for _ in range(REPLAYS):
        for phase in of_a_step:
            clock.mark(phase)
        after(tuple(pace.tell()))
    replayed = (time.process_time() - begin) / REPLAYS
    if metrics:
        metrics.close()
    close(comm)
    if comm.rank:
        return None
    return {
        "kind": parts.strategy.sharing.kind,
        "on": statistics.median(on for on, _ in pairs) / STEPS,
        "off": statistics.median(off for _, off in pairs) / STEPS,
        "ratios": [on / off for on, off in pairs],
        "replayed": replayed,
        "marks": len(of_a_step),
    }


if __name__ == "__main__":
    main()

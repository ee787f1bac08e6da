"""The workers' life: started, watched, and started again until their task is done or another start would not help."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from trainer.checkpoint.roll_back import checkpoint_places
from trainer.checkpoint.run_dir import RESOLVED_CONFIG, list_checkpoints
from trainer.cli.crew import Crew, config_of, note_crew
from trainer.cli.run_messages import messenger_of, tell_end, tell_restart, tell_start
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.errors import UserError, printable_lines
from trainer.host.bundle import write_bundle
from trainer.host.card_choice import choose_cards, suspected_rank
from trainer.host.cards import read_cards
from trainer.host.disk_room import shared_memory_warning
from trainer.host.memory_growth import SETTLED_AFTER_STEPS, RecycleRule
from trainer.host.watch import HostWatch, WatchSettings
from trainer.memory.choice import parse_size
from trainer.notify.messenger import Messenger
from trainer.notify.ways import secret_environment
from trainer.parallel.launch import FLIGHT_RECORDS, Wish, WorkersResult, run_workers
from trainer.parallel.supervise import Attempts, Verdict, judge
from trainer.parallel.worker import CORES, MEMORY_ATTEMPT, RESTARTS
from trainer.parallel.worker_template import WorkerTemplate

EVENTS = "events.txt"
_TASKS_WITH_A_PLAN = ("train", "bench", "bench_optimizer")  # which plan with less when they are started again
# Not `-m`: each reader process of a worker would import that module once more, as its main module. The first place of
# the path is the current directory's, where a folder of somebody else's may be called `trainer`.
_OURS = str(Path(__file__).parents[2])
_WORKER = f"import sys; sys.path[0] = {_OURS!r}; from trainer.cli.tasks import main; main()"
# What takes long to import, of each task.
_MODEL = ("torch.utils.checkpoint", "transformers.models.clip.modeling_clip", "trainer.measure.progress")
_IMPORTS = {
    "train": (*_MODEL, "trainer.train.loop"),
    "prepare": (*_MODEL, "diffusers.models.autoencoders.autoencoder_kl", "trainer.train.workers.prepare_worker"),
    "bench": (*_MODEL, "trainer.train.workers.bench_worker"),
    "bench_optimizer": (*_MODEL, "trainer.train.workers.optimizer_worker"),
    "evaluate": (*_MODEL, "trainer.train.workers.eval_worker"),
    "sample": (*_MODEL, "trainer.train.workers.eval_worker"),
}
_GIB = 1 << 30
_MEMORY_BACK_S = 50.0  # for the driver to take back what dead workers held
_LITTLE_MIB = 512


def keep_running(
    task: str,
    config: Config,
    crew: Crew,
    out_dir: Path,
    options: Mapping[str, object],
    on_end: Callable[[WorkersResult], None] | None = None,
    **launch: str,
) -> int:
    """Run a task of `trainer.cli.tasks` on these workers; returns the command's exit code.

    Args:
        out_dir: where the resolved configuration and the workers' logs go.
        options: JSON-able arguments of the task.
        on_end: is told how the last attempt ended; `train` has messages of its own.
        launch: passed on to `run_workers`.
    """
    if not crew.workers:
        _tell(out_dir, "the run began on cards, and there is none now; CUDA_VISIBLE_DEVICES= goes on without")
        return 1
    with messenger_of(config, lambda line: _tell(out_dir, line)) as messenger:
        trains = messenger if task == "train" else None
        return _keep_running(task, config, crew, out_dir, options, trains, on_end, **launch)


def _keep_running(
    task: str,
    config: Config,
    crew: Crew,
    out_dir: Path,
    options: Mapping[str, object],
    messenger: Messenger | None,
    on_end: Callable[[WorkersResult], None] | None,
    **launch: str,
) -> int:
    trains = task == "train"
    attempts, started_ns = Attempts(checkpoint=_newest_name(config)), None
    if trains:
        _tell_at_start(config, crew, out_dir)
        note_crew(config, crew)
        _forget_flight_records(out_dir / "logs")
    if messenger:
        tell_start(messenger, crew.workers, attempts.checkpoint)
    used_before_mib = _used_mib(crew) if trains else {}
    with (
        WorkerTemplate(_IMPORTS[task], _OURS) as template,
        HostWatch(_watch_settings(config, out_dir, crew, trains), lambda line: _tell(out_dir, line)) as watch,
    ):
        while True:
            resolved = write_resolved(config_of(config, crew), out_dir, started_ns)
            started_ns = resolved.stat().st_mtime_ns
            result = _attempt(task, config, crew, attempts, watch, template, resolved, options, **launch)
            fewer = False
            if trains:
                crew, fewer = _choose_crew(config, crew, result, watch, out_dir)
            verdict = _verdict(task, config, crew, result, attempts, fewer)
            if verdict.attempts is None:
                break
            _tell(out_dir, verdict.line)
            if messenger:
                tell_restart(messenger, result, verdict.line)
            time.sleep(verdict.pause_s)
            attempts = verdict.attempts
            _await_card_memory(crew, used_before_mib)
    _tell_end(result, verdict, attempts, crew, out_dir, trains)
    if messenger:
        tell_end(messenger, result, _newest_name(config))
    if on_end:
        on_end(result)
    return result.exit_code


def _forget_flight_records(log_dir: Path) -> None:
    """Of an earlier command, which say nothing of this one."""
    for record in log_dir.glob(f"{FLIGHT_RECORDS}*"):
        with suppress(OSError):
            record.unlink()


def _attempt(
    task: str,
    config: Config,
    crew: Crew,
    attempts: Attempts,
    watch: HostWatch,
    template: WorkerTemplate,
    resolved: Path,
    options: Mapping[str, object],
    **launch: str,
) -> WorkersResult:
    """Start the workers once, and wait for their end."""
    watch.begin(crew.in_use)
    restarts = attempts.restarts + attempts.recycles

    def look(process_ids: Sequence[int], steps_taken: int) -> Wish | None:
        wish = watch.look(process_ids, steps_taken)
        return wish and Wish(wish.text, crew.in_use.rank_of(wish.uuid) if wish.uuid else None)

    return run_workers(
        [sys.executable, "-c", _WORKER, task, str(resolved), json.dumps(options)],
        workers=crew.workers,
        log_dir=resolved.parent / "logs",
        env={
            **os.environ,
            **secret_environment(config.notify),
            MEMORY_ATTEMPT: str(attempts.memory),
            RESTARTS: str(restarts),
            **crew.environment(),
        },
        threads=config.launch.threads_per_worker,
        gpu=crew.gpu,
        look=look,
        own_env=_own_env(config, crew),
        template=template,
        **launch,
    )


def _own_env(config: Config, crew: Crew) -> list[dict[str, str]]:
    """What places each worker on cores of its own."""
    threads = config.launch.threads_per_worker is None and not os.environ.get("OMP_NUM_THREADS")
    return [
        {CORES: ",".join(map(str, each.cpus))} | ({"OMP_NUM_THREADS": str(each.cores)} if threads else {})
        for each in crew.placed(config)
    ]


def _watch_settings(config: Config, out_dir: Path, crew: Crew, trains: bool) -> WatchSettings:
    launch = config.launch

    def newest() -> Path | None:
        found = list_checkpoints(config.run.dir)
        return found[-1] if found else None

    return WatchSettings(
        folder=out_dir,
        every_s=launch.watch_every_s if trains else 3600.0,
        hot_c=launch.hot_c,
        rule=RecycleRule(int(launch.recycle_at_growth_gib * _GIB), int(launch.recycle_at_free_gib * _GIB)),
        newest_checkpoint=newest,
        fewer_cards=launch.fewer_cards,
        reads_cards=trains and bool(crew.in_use.cards),
        settled_after_steps=SETTLED_AFTER_STEPS,
        staging_bytes=None if config.checkpoint.staging == "auto" else parse_size(config.checkpoint.staging),
    )


def _tell_at_start(config: Config, crew: Crew, out_dir: Path) -> None:
    if crew.workers < crew.began_with:
        images = config_of(config, crew).train.global_batch_size
        _tell(out_dir, f"the run began with {crew.began_with} cards and goes on with {crew.workers}; "
                       f"each step has {images} images as before")  # fmt: skip
    if placed := crew.placed(config):
        _tell(out_dir, f"cores: {'; '.join(f'worker {rank} on {each.text}' for rank, each in enumerate(placed))}")
    if crew.gpu and (line := shared_memory_warning(crew.workers)):
        _tell(out_dir, line)


def _choose_crew(
    config: Config, crew: Crew, result: WorkersResult, watch: HostWatch, out_dir: Path
) -> tuple[Crew, bool]:
    """The crew of the next start, and whether it has fewer cards, after an attempt that may have failed for a card."""
    failure = result.failure
    if failure is None or result.stopped_by is not None or not crew.in_use.cards or not config.launch.fewer_cards:
        return crew, False
    if failure.kind not in ("card", "user", "memory"):
        time.sleep(1.2 * config.launch.watch_every_s)  # for the watch to see what the kernel has to say of it
    xids, noisy = watch.since_last_choice()
    suspected = suspected_rank(failure.kind, failure.rank, failure.text, failure.alone)
    in_use, lines = choose_cards(crew.in_use, read_cards(), xids, suspected, noisy)
    for line in lines:
        if line not in failure.text:
            _tell(out_dir, line)
    return crew.on(in_use), bool(lines)


def _verdict(task: str, config: Config, crew: Crew, result: WorkersResult, attempts: Attempts, fewer: bool) -> Verdict:
    restarts = config.launch.restarts if task == "train" else 0
    if fewer and not crew.in_use.cards:
        return Verdict(None, 0.0, "no card is left")
    if result.failure is not None and result.failure.kind == "card" and not config.launch.fewer_cards:
        return Verdict(None, 0.0, "launch.fewer_cards is false: not going on with fewer")
    newest, plans = _newest_name(config), task in _TASKS_WITH_A_PLAN
    verdict = judge(result, attempts, newest, most_fruitless=restarts, plans=plans, fewer_cards=fewer)
    if fewer and verdict.attempts is not None:
        images = config_of(config, crew).train.global_batch_size
        count = f"going on with {crew.workers} of {crew.began_with} cards, {images} images a step as before"
        return Verdict(verdict.attempts, verdict.pause_s, f"{verdict.line}; {count}")
    return verdict


def _used_mib(crew: Crew) -> dict[str, int]:
    """Memory in use on each card of the crew, by whomever; empty where nobody tells."""
    reading = read_cards() if crew.in_use.cards else None
    in_use = {card.uuid for card in crew.in_use.cards}
    return {
        c.uuid: c.used_mib for c in (reading and reading.cards) or () if c.uuid in in_use and c.used_mib is not None
    }


def _await_card_memory(crew: Crew, before_mib: Mapping[str, int]) -> None:
    """Wait until the driver has taken back what the dead workers held on the cards."""
    deadline = time.monotonic() + _MEMORY_BACK_S
    while time.monotonic() < deadline:
        used = _used_mib(crew)
        if all(mib <= max(_LITTLE_MIB, before_mib.get(uuid, 0)) for uuid, mib in used.items()):
            return
        time.sleep(1.0)


def _tell_end(
    result: WorkersResult, verdict: Verdict, attempts: Attempts, crew: Crew, out_dir: Path, trains: bool
) -> None:
    """Why the workers are not started again, and where what is known of it lies."""
    failure = result.failure
    if verdict.line:
        _tell(out_dir, verdict.line)
    if failure is None:
        return
    if trains and failure.kind != "user":
        summary = {"failure": asdict(failure), "attempts": asdict(attempts), "worker_codes": result.worker_codes}
        summary |= {"cards": [asdict(card) for card in crew.in_use.cards], "steps_taken": result.steps_taken}
        if folder := write_bundle(out_dir, out_dir / "logs", summary):
            _tell(out_dir, f"logs, stacks, configuration and facts of the host are in {folder}")
    known = failure.is_told
    with suppress(OSError):  # the exit code is to say why it ended, not that nobody could be told
        for line in printable_lines(failure.message()).split("\n"):
            print(f"sdxl-train: {line}" if known else line, file=sys.stderr)


def _newest_name(config: Config) -> str | None:
    places = checkpoint_places(config.run.dir, config.checkpoint.fallback_dir)
    return max((path.name for place in places for path in list_checkpoints(place)), default=None)


def _tell(out_dir: Path, line: str) -> None:
    """On the screen and in `events.txt`, which says what happened to a run in one line each."""
    with suppress(OSError):  # the terminal may be gone, or a file on a full disk, and the run goes on
        print(f"sdxl-train: {line}", file=sys.stderr, flush=True)
    with suppress(OSError), (out_dir / EVENTS).open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def write_resolved(config: Config, out_dir: Path, started_ns: int | None = None) -> Path:
    """The configuration with every key written out and absolute paths, as `config.resolved.yaml`.

    Args:
        started_ns: when the command first wrote it. Workers that are started again go on from checkpoints that are
            younger than this file.

    Raises:
        UserError: the disk is full, or nobody may write there.
    """
    path = out_dir / RESOLVED_CONFIG
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        partial.write_text(to_yaml(config), encoding="utf-8")
        if started_ns is not None:
            os.utime(partial, ns=(started_ns, started_ns))
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{out_dir}: cannot be written to: {error.strerror}") from None
    return path

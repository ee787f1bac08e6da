"""What the launcher has to say of a run to whoever is away."""

from collections.abc import Callable

from trainer.config.schema import Config
from trainer.config.sections.notify_config import Event
from trainer.notify.messenger import Messenger
from trainer.parallel.failure import Failure
from trainer.parallel.launch import WorkersResult

_KINDS: dict[str, tuple[Event, ...]] = {"hang": ("stall", "fault"), "numerics": ("nan", "fault")}


def messenger_of(config: Config, warn: Callable[[str], None]) -> Messenger:
    """Of the run; silent unless `notify` says otherwise."""
    return Messenger(config.notify, run_name(config), warn)


def run_name(config: Config) -> str:
    """What it is called, in messages and at trackers."""
    return config.log.name or config.run.dir.absolute().name


def tell_start(messenger: Messenger, workers: int, newest: str | None) -> None:
    """The command has begun to train."""
    many = f"{workers} worker{'s' if workers > 1 else ''}"
    messenger.tell(("start",), f"training {f'goes on from {newest}' if newest else 'begins'} with {many}")


def tell_restart(messenger: Messenger, result: WorkersResult, line: str) -> None:
    """The workers are started again, for what `line` says."""
    messenger.tell((*_events(result.failure), "restart"), line)


def tell_end(messenger: Messenger, result: WorkersResult, newest: str | None) -> None:
    """They are not."""
    failure, at = result.failure, f"; newest checkpoint: {newest or 'none'}"
    if failure is not None:
        cause = failure.message().splitlines()[0].removesuffix(":")
        messenger.tell((*_events(failure), "finish"), f"given up: {cause}{at}")
    elif result.stopped_by is not None:
        messenger.tell(("finish",), f"stopped by {result.stopped_by.name}{at}")
    elif result.exit_code == 0:
        messenger.tell(("finish",), f"done{at}")
    else:
        messenger.tell(("fault", "finish"), f"ended with exit code {result.exit_code}{at}")


def _events(failure: Failure | None) -> tuple[Event, ...]:
    return () if failure is None else _KINDS.get(failure.kind, ("fault",))

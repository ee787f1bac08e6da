"""After an attempt has ended: what to do, in plain words. Pure functions of what happened; no torch."""

from dataclasses import dataclass, replace

from trainer.parallel.failure import Failure
from trainer.parallel.launch import WorkersResult

MOST_MEMORY_ATTEMPTS = 8
_GOES_BACK = ("numerics", "corrupt")  # failures whose words name the checkpoint from which the next start goes on
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0


@dataclass(frozen=True)
class Attempts:
    """What has been tried.

    Attributes:
        restarts: starts after a fault, all in all; `recycles`: starts because the host's memory ran short.
        fruitless: of these, since a checkpoint was written.
        memory: starts with less memory than the one before.
        checkpoint: name of the newest checkpoint when the last attempt began.
    """

    restarts: int = 0
    recycles: int = 0
    fruitless: int = 0
    memory: int = 0
    checkpoint: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What follows.

    Attributes:
        attempts: for the next start; None: there is none.
        pause_s: before it.
        line: for the person; empty where the failure's own words say it all.
    """

    attempts: Attempts | None
    pause_s: float = 0.0
    line: str = ""


def judge(
    result: WorkersResult,
    attempts: Attempts,
    newest: str | None,
    *,
    most_fruitless: int,
    plans: bool,
    fewer_cards: bool = False,
) -> Verdict:
    """Whether, when and how the workers are started again.

    Args:
        newest: name of the newest checkpoint now.
        most_fruitless: starts in a row that may bring no new checkpoint; 0: no restart after a fault.
        plans: a start after a lack of memory plans with less.
        fewer_cards: a card has just been left out, so that what its worker said counts no more.
    """
    failure = result.failure
    if result.stopped_by is not None:
        return Verdict(None)
    if failure is None and result.recycled:
        return _recycled(result.recycled, attempts, newest)
    if failure is not None and fewer_cards and most_fruitless:
        following = replace(attempts, restarts=attempts.restarts + 1, checkpoint=newest)
        return Verdict(following, _FIRST_PAUSE_S, f"{_words(failure)}; {_place(newest)} with the others")
    if failure is None or failure.kind == "user":
        return Verdict(None)
    if failure.kind == "memory":
        less = attempts.memory + 1
        if not plans or (less >= MOST_MEMORY_ATTEMPTS and newest == attempts.checkpoint):
            return Verdict(None)
        # In a run of weeks such faults may come by chance: with the least of all plans it goes on as long as it saves.
        following = replace(attempts, memory=min(less, MOST_MEMORY_ATTEMPTS - 1), checkpoint=newest)
        return Verdict(following, 0.0, f"{failure.text}; trying again with less")
    if not most_fruitless:
        return Verdict(None)
    if not result.steps_taken and failure.kind not in ("signal", "hang", *_GOES_BACK):
        return Verdict(None, 0.0, "no step was taken before that, so that another start would end alike")
    fruitless = 1 if newest != attempts.checkpoint else attempts.fruitless + 1
    if fruitless > most_fruitless:
        return Verdict(None, 0.0, f"{most_fruitless} starts in a row brought no new checkpoint; giving up")
    following = replace(attempts, restarts=attempts.restarts + 1, fruitless=fruitless, checkpoint=newest)
    pause_s = min(_FIRST_PAUSE_S * 2 ** (fruitless - 1), _LONGEST_PAUSE_S)
    place = "starting again there" if failure.kind in _GOES_BACK else _place(newest)
    count = f"{fruitless} of {most_fruitless} without a new checkpoint"
    return Verdict(following, pause_s, f"{_words(failure)}; {place} in {pause_s:.0f} s ({count})")


def _recycled(why: str, attempts: Attempts, newest: str | None) -> Verdict:
    """No fault: they have saved, and nothing is lost."""
    following = replace(attempts, recycles=attempts.recycles + 1, checkpoint=newest)
    return Verdict(following, 0.0, f"{why}: the workers have ended, {_place(newest)} with fresh ones")


def _words(failure: Failure) -> str:
    return failure.message().splitlines()[0].removesuffix(":")


def _place(newest: str | None) -> str:
    return f"starting again from {newest}" if newest else "starting again from the start"

"""After an attempt has ended: what to do, in plain words. Pure functions of what happened; no torch."""

from dataclasses import dataclass, replace

from trainer.parallel.launch import WorkersResult

MOST_MEMORY_ATTEMPTS = 8
_GOES_BACK = ("numerics", "corrupt")  # failures whose words name the checkpoint from which the next start goes on
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0


@dataclass(frozen=True)
class Attempts:
    """What has been tried.

    Attributes:
        restarts: starts after a fault, all in all.
        fruitless: of these, since a checkpoint was written.
        memory: starts with less memory than the one before.
        checkpoint: name of the newest checkpoint when the last attempt began.
    """

    restarts: int = 0
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
    result: WorkersResult, attempts: Attempts, newest: str | None, *, most_fruitless: int, plans: bool
) -> Verdict:
    """Whether, when and how the workers are started again.

    Args:
        newest: name of the newest checkpoint now.
        most_fruitless: starts in a row that may bring no new checkpoint; 0: no restart after a fault.
        plans: a start after a lack of memory plans with less.
    """
    failure = result.failure
    if failure is None or result.stopped_by is not None or failure.kind == "user":
        return Verdict(None)
    if failure.kind == "memory":
        if not plans or attempts.memory + 1 >= MOST_MEMORY_ATTEMPTS:
            return Verdict(None)
        return Verdict(replace(attempts, memory=attempts.memory + 1), 0.0, f"{failure.text}; trying again with less")
    if not most_fruitless:
        return Verdict(None)
    if not result.steps_taken and failure.kind not in ("signal", "hang", *_GOES_BACK):
        return Verdict(None, 0.0, "no step was taken before that, so that another start would end alike")
    fruitless = 1 if newest != attempts.checkpoint else attempts.fruitless + 1
    if fruitless > most_fruitless:
        return Verdict(None, 0.0, f"{most_fruitless} starts in a row brought no new checkpoint; giving up")
    following = replace(attempts, restarts=attempts.restarts + 1, fruitless=fruitless, checkpoint=newest)
    words = failure.message().splitlines()[0].removesuffix(":")
    if failure.kind in _GOES_BACK:
        return _again(following, words, most_fruitless, "there")
    return _again(following, words, most_fruitless, f"from {newest}" if newest else "from the start")


def _again(attempts: Attempts, words: str, most_fruitless: int, place: str) -> Verdict:
    pause_s = min(_FIRST_PAUSE_S * 2 ** (attempts.fruitless - 1), _LONGEST_PAUSE_S)
    count = f"{attempts.fruitless} of {most_fruitless} without a new checkpoint"
    return Verdict(attempts, pause_s, f"{words}; starting again {place} in {pause_s:.0f} s ({count})")

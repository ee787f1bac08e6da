"""Faults made on purpose, to try what a run does about them: `FAULT=kind@rank:step[:argument]` in the environment.

    FAULT=nan_gradient@1:7                worker 1 has a NaN among its gradients in step 7
    FAULT=nan_gradient@1:7-9              in steps 7, 8 and 9
    FAULT=loss_spike@*:20:1e3             every worker's, with an argument
    FAULT=kill@0:5,flip_bit@3:10:always   several; the second one at every start of the workers

Steps count from 1, as the run's records do: step 7 is the one after which the run says 7. A fault happens in the first
start of the workers alone, so that a run that goes on from before it does not meet it again; in each one, if its
argument is `always`, or begins with `always:`. Without the variable nothing is looked at. Standard library only.
"""

import functools
import os
import re
from dataclasses import dataclass

from trainer.errors import UserError

FAULT = "FAULT"
ALWAYS = "always"
# Of `trainer.parallel.worker`, which this module stands beside: how often the workers were started again.
_STARTED_AGAIN = ("SDXL_TRAIN_RESTARTS", "SDXL_TRAIN_MEMORY_ATTEMPT")
_FAULT = re.compile(r"(?P<kind>[a-z][a-z0-9_]*)@(?P<rank>\d+|\*):(?P<first>\d+)(-(?P<last>\d+))?(:(?P<argument>.+))?")


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    Attributes:
        rank: of the worker; None: of each.
        first, last: steps in which it happens.
        argument: what its place in the program makes of it, without `always`.
        always: in every start of the workers.
    """

    kind: str
    rank: int | None
    first: int
    last: int
    argument: str
    always: bool


def planned(kind: str, rank: int, step: int) -> str | None:
    """The argument of a fault that is to happen here and now, empty where it has none; None: all is well.

    Args:
        step: that is being taken or, of a checkpoint, was taken last; from 1 on.

    Raises:
        UserError: the variable says nothing that can be read.
    """
    text = os.environ.get(FAULT)
    if not text:
        return None
    first_start = all(os.environ.get(name, "0") == "0" for name in _STARTED_AGAIN)
    for fault in parse_faults(text):
        here = fault.kind == kind and fault.rank in (None, rank) and fault.first <= step <= fault.last
        if here and (fault.always or first_start):
            return fault.argument
    return None


@functools.cache
def parse_faults(text: str) -> tuple[Fault, ...]:
    """What the variable says.

    Raises:
        UserError: an entry cannot be read.
    """
    faults = []
    for entry in text.split(","):
        match = _FAULT.fullmatch(entry.strip())
        if match is None:
            raise UserError(
                f"{FAULT} = {text}: {entry.strip()!r} is none of kind@rank:step or kind@rank:step:argument, "
                "such as nan_gradient@1:7; the rank may be *, the step 7-9"
            )
        head, _, rest = (match["argument"] or "").partition(":")
        always = head == ALWAYS
        faults.append(
            Fault(
                kind=match["kind"],
                rank=None if match["rank"] == "*" else int(match["rank"]),
                first=int(match["first"]),
                last=int(match["last"] or match["first"]),
                argument=rest if always else match["argument"] or "",
                always=always,
            )
        )
    return tuple(faults)

"""What `trainer.faults` can have a worker do in the middle of a run: die, hang, fill its card, leak memory."""

import os
import signal
import time

from trainer.faults import planned

_leaked: list[bytes] = []


def act_out(rank: int, step: int) -> None:
    """Do what is planned for this worker in this step, if anything is.

        kill            end by SIGKILL
        hang            do nothing any more
        card_full       fail as a step does that does not fit the card
        leak, leak:N    hold one, or N, MiB more for ever

    Raises:
        RuntimeError: `card_full`, in the words of PyTorch.
    """
    if planned("kill", rank, step) is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    while planned("hang", rank, step) is not None:
        time.sleep(1.0)
    if planned("card_full", rank, step) is not None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (a fault that was planned)")
    if (mib := planned("leak", rank, step)) is not None:
        _leaked.append(b"\1" * (int(mib or 1) << 20))

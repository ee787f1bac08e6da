"""Whether workers that hold the same weights still do: each hashes its own, and all compare.

With `ddp` every worker takes the same optimizer step on a copy of its own (with `exchange.average_every`, it is the
common weights that are the same), with `memory.shard_within` on a share that others have as well; copies that are not
the same to the bit come from a card, or a host's memory, that has computed or stored something wrong. All gradients
since then carry it, so the run goes back to a checkpoint that was written while all agreed. Averages of the weights are
not compared: they are only read from the weights.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.roll_back import checkpoint_places, newest_up_to, order_roll_back, write_record
from trainer.config.schema import Config
from trainer.errors import NumbersGoneWrong, UserError, WeightsDiffer
from trainer.optim.optimizers import optimizer_tensors
from trainer.parallel.comm import Comm, broadcast_object, gather_objects
from trainer.parallel.sharding import local_tensor
from trainer.parallel.worker import PARENT_PID
from trainer.train.step import StepParts

CARD_FAULTS = "card_faults.json"  # in the run directory: whose weights were others, and when
_log = logging.getLogger(__name__)
_CHUNK = 1 << 20  # words that are hashed at once: 8 MiB for each step of the arithmetic
_STEP = 0x2545F4914F6CDD1D  # odd


@torch.no_grad()
def tensors_hash(tensors: Iterable[Tensor], device: torch.device) -> int:
    """64 bits that hang on every bit of all tensors, computed where they lie and waited for once.

    Each word of 32 bits times an odd number of its own, summed modulo 2^64: one flipped bit always changes the sum, and
    several cancel out by chance alone; the order in which a device adds changes nothing, as it would in floats.

    Args:
        device: where most of them are.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        words = _words(tensor.detach().contiguous().view(-1).view(torch.uint8))
        for begin in range(0, len(words), _CHUNK):
            part = words[begin : begin + _CHUNK].to(torch.int64)
            part = part * _odd_numbers(part.device)[: len(part)]
            total = total * _STEP + part.sum().to(device)
    return int(total)


def _words(content: Tensor) -> Tensor:
    """Bytes as int32 [n], or as they are where there is a rest."""
    if content.numel() % 4:
        return content
    return (content.clone() if content.storage_offset() % 4 else content).view(torch.int32)


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    """[chunk] int64, the same on all workers."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), dtype=torch.int64, generator=generator)
    return (drawn | 1).to(device)


@dataclass(frozen=True)
class Odd:
    """Who does not hold what the others do.

    Attributes:
        ranks: the fewer; or all of whom nobody can say which of them.
        is_certain: more than half of all agree against them.
    """

    ranks: tuple[int, ...]
    is_certain: bool


def find_odd(hashes: Sequence[int], shares: int = 1) -> Odd | None:
    """By majority; None where all agree.

    Args:
        hashes: by rank.
        shares: over which the weights are spread: every so many-th worker has the same one.
    """
    found: list[int] = []
    is_certain = True
    for share in range(shares):
        odd = _odd_among(hashes[share::shares])
        if odd is not None:
            found += [share + shares * replica for replica in odd.ranks]
            is_certain = is_certain and odd.is_certain
    return Odd(tuple(sorted(found)), is_certain) if found else None


def _odd_among(hashes: Sequence[int]) -> Odd | None:
    counts = Counter(hashes)
    if len(counts) == 1:
        return None
    usual, number = counts.most_common(1)[0]
    if 2 * number <= len(hashes):
        return Odd(tuple(range(len(hashes))), False)
    return Odd(tuple(rank for rank, found in enumerate(hashes) if found != usual), True)


@dataclass
class Replicas:
    """One worker's side.

    Attributes:
        places: where checkpoints are, the run directory first.
        every: optimizer steps between comparisons; 0 where there is nothing to compare.
        agreed_step: the latest step of the run after which all were the same.
        cards: of the workers, by rank.
        chances: times that a card may differ before the run ends: one, and one more where the command leaves a card out
            at the second.
    """

    parts: StepParts
    places: Sequence[Path]
    every: int
    agreed_step: int
    cards: Sequence[str] = ()
    chances: int = 1

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.places[0]

    @staticmethod
    def of(config: Config, parts: StepParts, step: int) -> "Replicas":
        """The run's, which begins at a step; all workers call it."""
        every = config.guard.replica_check_every
        places = checkpoint_places(config.run.dir, config.checkpoint.fallback_dir)
        if parts.strategy.sharing.replicas(parts.comm.world) == 1 or not every:
            return Replicas(parts, places, 0, step)
        kinds, cards = zip(*gather_objects(parts.comm, _card_of(parts.comm)), strict=True)
        if len(set(kinds)) > 1:
            if parts.comm.rank == 0:
                _log.info("cards of several kinds: their weights may differ in last bits, and are not compared")
            every = 0
        leaves_out = config.launch.fewer_cards and parts.comm.device.type == "cuda" and PARENT_PID in os.environ
        return Replicas(parts, places, every, step, cards, chances=1 + leaves_out)

    def due(self, step: int) -> bool:
        """Whether the weights are to be compared after this step, checkpoints aside."""
        return bool(self.every) and step % self.every == 0

    def compare(self, step: int, settle: Callable[[], None] = lambda: None) -> None:
        """After a step, on all workers; before a checkpoint is written, so that each is of weights that agreed.

        Args:
            settle: waits for a save that is under way, before the run ends.

        Raises:
            WeightsDiffer: of one worker; the next start goes back.
            NumbersGoneWrong: of whom, nobody can say; it goes back as well.
            UserError: it was the same card too often.
        """
        if not self.every or step == self.agreed_step:
            return
        hashes = gather_objects(self.parts.comm, tensors_hash(_alike(self.parts), self.parts.comm.device))
        odd = find_odd(hashes, self.parts.strategy.sharing.shares(self.parts.comm.world))
        if odd is None:
            self.agreed_step = step
            return
        settle()
        told = self._tell(step, odd) if self.parts.comm.rank == 0 else None
        goes_back, text = broadcast_object(self.parts.comm, told)
        if not goes_back:
            raise UserError(text)
        raise WeightsDiffer(text, odd.ranks[0]) if odd.is_certain else NumbersGoneWrong(text)

    def _tell(self, step: int, odd: Odd) -> tuple[bool, str]:
        """Write it down, order the roll-back, and find words; rank 0."""
        cards = [self.cards[rank] for rank in odd.ranks]
        each = [
            f"worker {rank}" + f" ({card})" * (card != f"worker {rank}")
            for rank, card in zip(odd.ranks, cards, strict=True)
        ]
        who = " and ".join(each) if odd.is_certain else f"one of {', '.join(each)}"
        what = (
            f"the weights of {who} are not those of the other workers after step {step}; they were the same after "
            f"step {self.agreed_step}"
        )
        checkpoint = newest_up_to(self.places, self.agreed_step)
        try:
            before = read_card_faults(self.run_dir)
            write_record(self.run_dir / CARD_FAULTS, [*before, _fault(step, cards)])
            order_roll_back(self.run_dir, self.agreed_step)
        except OSError as error:
            return False, f"{what}, and {error.filename or self.run_dir} cannot be written: {error.strerror}"
        again = [card for card in cards if sum(card in fault["cards"] for fault in before) >= self.chances]
        if again:
            return False, (
                f"{what}; it is not the first time for {' and '.join(again)}: test the card and the host's memory, or "
                f"start without it; the same command goes on from before that once {self.run_dir / CARD_FAULTS} is "
                "deleted"
            )
        return True, f"{what}; the next start goes on from {checkpoint.name if checkpoint else 'where this one began'}"


def _alike(parts: StepParts) -> list[Tensor]:
    """What is to be the same on all workers. Of those that take steps each by itself: what they have in common."""
    parameters, outer = parts.strategy.parameters, parts.strategy.outer
    if outer is None:
        state = optimizer_tensors(parts.optimizer, parameters)
        return [local_tensor(tensor) for tensor in (*parameters.values(), *state.values())]
    own = parameters.values() if outer.is_common else ()
    return [*own, *outer.common.values(), *outer.momentum.values()]


def _fault(step: int, cards: Sequence[str]) -> dict[str, Any]:
    return {"step": step, "cards": list(cards), "time": round(time.time(), 3)}


def _card_of(comm: Comm) -> tuple[str, str]:
    """Its kind, and the name by which it is known again."""
    if comm.device.type != "cuda":
        return "cpu", f"worker {comm.rank}"
    properties = torch.cuda.get_device_properties(comm.device)
    uuid = getattr(properties, "uuid", None)
    kind = f"{properties.name} {properties.major}.{properties.minor}"
    return kind, f"GPU-{uuid}" if uuid else f"worker {comm.rank}"


def read_card_faults(run_dir: Path) -> list[dict[str, Any]]:
    """What is recorded, each with `step`, `cards` by name, and `time`; empty where there is no file.

    Raises:
        UserError: it cannot be read.
    """
    file = run_dir / CARD_FAULTS
    if not file.exists():
        return []
    try:
        faults = json.loads(file.read_text())
        if all(isinstance(fault["cards"], list) for fault in faults):
            return faults
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file}: not what was written; delete it")

"""The workers of a command and the cards that they run on, and what stays the same when they become fewer."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint.run_dir import list_checkpoints
from trainer.config.schema import Config
from trainer.host.card_choice import CardsInUse
from trainer.host.card_process import uses_fake_cards
from trainer.host.card_readings import Card
from trainer.host.cards import has_cards, read_cards
from trainer.host.cores import Placement, placements_of
from trainer.parallel.environment import choose_workers, detect_gpus

RECORD = "cards.json"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LISTED = re.compile(r"GPU \d+: (?P<name>.*) \(UUID: (?P<uuid>GPU-[^)]+)\)")


@dataclass(frozen=True)
class Crew:
    """Who works.

    Attributes:
        workers: processes, one a card where `gpu`; 0 where a run that began on cards finds none.
        in_use: the cards, bound by UUID: numbers change when one falls off the bus. Without any, workers take the cards
            as CUDA numbers them.
        began_with: workers that the run began with, whose images a step goes on to have.
    """

    workers: int
    gpu: bool
    in_use: CardsInUse
    began_with: int

    def environment(self) -> dict[str, str]:
        """What binds the workers to their cards."""
        if not self.gpu or not self.in_use.cards:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(card.uuid for card in self.in_use.cards)}

    def placed(self, config: Config) -> list[Placement]:
        """Where the workers run; [] where they are left to the kernel.

        Raises:
            UserError: `launch.cores` does not fit them, or this host.
        """
        wish = config.launch.cores
        if wish == "auto" and not self.gpu:
            return []  # some workers on the CPU, as in tests, are for few cores
        if not isinstance(wish, str) and self.workers < self.began_with:
            wish = wish[: self.workers]  # a card is gone, which is no mistake of the list
        uuids = [card.uuid for card in self.in_use.cards] or [""] * self.workers
        return placements_of(wish, uuids)

    def on(self, in_use: CardsInUse) -> "Crew":
        """The crew of the cards that are left."""
        return replace(self, workers=len(in_use.cards), in_use=in_use)


def first_crew(config: Config, task: str) -> Crew:
    """One worker for each card that is there, or as many as `launch.workers` says.

    A run that began on cards does not go on without any, unless `CUDA_VISIBLE_DEVICES` hides them: a driver that is not
    there yet, or not any more, would turn it into a run on the CPU.

    Raises:
        UserError: more workers than cards; but a run that began with more goes on with what is left of them.
    """
    trains, gpus = task == "train", detect_gpus()
    cards = _cards(gpus)
    if trains and not gpus and has_cards() and _VISIBLE not in os.environ:
        reading = read_cards()
        cards = tuple(card for card in (reading and reading.cards) or () if not card.lost)
        gpus = [] if uses_fake_cards() else [card.uuid for card in cards]
    if trains and not cards and not gpus and _VISIBLE not in os.environ and _has_begun_on_cards(config):
        return Crew(0, False, CardsInUse(()), 0)
    before = _began_with(config) if trains and cards else None
    wanted = config.launch.workers
    if before is not None and wanted == before and len(cards) < before:
        wanted = None
    workers, gpu = choose_workers(wanted, gpus)
    if cards and not gpus:
        workers = min(wanted or len(cards), len(cards))
    in_use = CardsInUse(cards[:workers])
    return Crew(workers, gpu, in_use, before if before is not None and before > workers else workers)


def _cards(gpus: list[str]) -> tuple[Card, ...]:
    """Of `nvidia-smi`'s lines; none where one of them does not name a whole card."""
    found = [_LISTED.fullmatch(line.strip()) for line in gpus]
    return tuple(Card(match["uuid"], match["name"]) for match in found if match) if all(found) else ()


def config_of(config: Config, crew: Crew) -> Config:
    """The configuration with which fewer workers than at the beginning still take as many images a step.

    Groups of workers that do not come out even any more become one.
    """
    train, within = config.train, config.memory.shard_within
    if crew.workers != crew.began_with and isinstance(within, int) and crew.workers % within:
        config = config.model_copy(update={"memory": config.memory.model_copy(update={"shard_within": "all"})})
    if crew.workers == crew.began_with or train.global_batch_size is not None:
        return config
    images = crew.began_with * train.batch_size_per_gpu * (train.gradient_accumulation_steps or 1)
    changes = {"global_batch_size": images, "gradient_accumulation_steps": None}
    return config.model_copy(update={"train": train.model_copy(update=changes)})


def note_crew(config: Config, crew: Crew) -> None:
    """Write down what the run began with, for starts that find fewer cards."""
    if crew.in_use.cards:
        with suppress(OSError):
            config.run.dir.mkdir(parents=True, exist_ok=True)
            (config.run.dir / RECORD).write_text(json.dumps({"workers": crew.began_with, **_settings(config)}) + "\n")


def _began_with(config: Config) -> int | None:
    """Workers that the run began with, where it is the same run in what makes up a step."""
    record = _read(config.run.dir / RECORD)
    if not config.launch.fewer_cards or not list_checkpoints(config.run.dir):
        return None
    workers = record.get("workers")
    same = all(record.get(name, "") == value for name, value in _settings(config).items())
    return workers if isinstance(workers, int) and same else None


def _has_begun_on_cards(config: Config) -> bool:
    return bool(_read(config.run.dir / RECORD)) and bool(list_checkpoints(config.run.dir))


def _settings(config: Config) -> dict[str, object]:
    """What somebody has changed who wants another batch."""
    train = config.train
    return {
        "launch.workers": config.launch.workers,
        "batch_size_per_gpu": train.batch_size_per_gpu,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
    }


def _read(path: Path) -> Mapping[str, object]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}

"""The watch over the host while workers train: a thread that looks at cards, memory and disk every few seconds.

It tells each condition once, writes a line of `host.jsonl` a minute, and says when the workers should start anew or
have lost a card. Whatever hangs, hangs in this thread or in the process that reads the cards, never in the command.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.host.alarms import CardAlarms
from trainer.host.card_choice import CardsInUse
from trainer.host.card_readings import Reading, Xid
from trainer.host.cards import SILENT_AFTER_S, CardReader, has_cards
from trainer.host.disk_room import DiskAlarm, folder_bytes, free_bytes
from trainer.host.memory_growth import MemoryGrowth, RecycleRule
from trainer.host.process_memory import HostMemory, read_memory

RECORD = "host.jsonl"
_RECORD_EVERY_S = 60.0
_MIB = 1 << 20


@dataclass(frozen=True)
class WatchSettings:
    """What is watched.

    Attributes:
        folder: the run's directory.
        newest_checkpoint: the folder of the newest checkpoint, None before there is one.
        fewer_cards: whether a card that is damaged, but there, is a reason to start without it.
        reads_cards: whether the workers run on cards.
    """

    folder: Path
    every_s: float
    hot_c: int
    rule: RecycleRule
    newest_checkpoint: Callable[[], Path | None]
    fewer_cards: bool
    reads_cards: bool
    settled_after_steps: int
    staging_bytes: int | None = None


@dataclass(frozen=True)
class HostWish:
    """What is to be done with the workers; `uuid` is the card that is gone, empty where they are to save and end."""

    text: str
    uuid: str = ""


class HostWatch:
    """Watches from `__enter__` to `__exit__`, over all starts of the workers."""

    def __init__(self, settings: WatchSettings, tell: Callable[[str], None]) -> None:
        self._settings, self._tell = settings, tell
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._cards = CardsInUse(())
        self._alarms: dict[str, CardAlarms] = {}
        self._disk = DiskAlarm(settings.folder)
        self._xids: list[Xid] = []
        self._begin_attempt()
        self._reader: CardReader | None = None
        self._told_silent = self._told_growth = False
        self._record_at_s = 0.0

    def _begin_attempt(self) -> None:
        self._growth = MemoryGrowth(self._settings.rule, self._settings.settled_after_steps)
        self._process_ids: tuple[int, ...] = ()
        self._steps_taken = 0
        self._wish: HostWish | None = None

    def __enter__(self) -> "HostWatch":
        if self._settings.reads_cards and has_cards():
            self._reader = self._stack.enter_context(CardReader(self._settings.every_s))
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._stack.close()

    def begin(self, cards: CardsInUse) -> None:
        """The workers are about to start, on these cards."""
        with self._lock:
            self._begin_attempt()
            self._cards = cards
            known = self._alarms
            self._alarms = {
                card.uuid: known.get(card.uuid) or CardAlarms("", self._settings.hot_c) for card in cards.cards
            }
            for uuid, alarms in self._alarms.items():
                alarms.label = cards.label(uuid)

    def look(self, process_ids: Sequence[int], steps_taken: int) -> HostWish | None:
        """What the watch wants of these workers; returns at once."""
        with self._lock:
            self._process_ids, self._steps_taken = tuple(process_ids), steps_taken
            return self._wish

    def since_last_choice(self) -> tuple[list[Xid], list[str]]:
        """XIDs since the last call; UUIDs of the cards whose PCIe link is noisy."""
        with self._lock:
            xids, self._xids = self._xids, []
            return xids, [uuid for uuid, alarms in self._alarms.items() if alarms.link_is_noisy]

    def _run(self) -> None:
        while not self._end.is_set():
            with self._lock:
                process_ids, steps, growth = self._process_ids, self._steps_taken, self._growth
            now = time.monotonic()
            memory = read_memory(process_ids) if process_ids else None
            lines, reading = self._look_at_cards(now)
            lines += self._look_at_memory(now, memory, steps, growth)
            free = self._look_at_disk(lines)
            for line in lines:
                self._tell(line)
            if process_ids and now >= self._record_at_s:
                self._record_at_s = now + _RECORD_EVERY_S
                self._record(reading, memory, free, steps, growth)
            self._end.wait(self._settings.every_s)

    def _look_at_cards(self, now: float) -> tuple[list[str], Reading | None]:
        if self._reader is None:
            return [], None
        reading, silent_s, lines = self._reader.latest(), self._reader.silent_s(), []
        is_silent = silent_s > max(SILENT_AFTER_S, 3 * self._settings.every_s)
        if is_silent and not self._told_silent:
            lines.append(f"the cards' driver has not answered for {silent_s:.0f} s")
        self._told_silent = is_silent
        with self._lock:
            in_use, alarms = self._cards, self._alarms
            self._xids += reading.xids
        for xid in reading.xids:
            if xid.uuid in alarms:
                lines.append(f"{in_use.label(xid.uuid)} has reported {xid.told()}")
                if xid.action == "leave out":
                    self._want_card(xid.uuid, lines[-1], must=xid.number == 79)
        for card in reading.cards or ():
            if card.uuid in alarms and not self._told_silent:
                lines += alarms[card.uuid].add(now, card)
        for uuid in in_use.gone(reading if reading.cards else None):
            self._want_card(uuid, f"{in_use.label(uuid)} is gone from the bus", must=True)
        return lines, reading

    def _want_card(self, uuid: str, text: str, *, must: bool) -> None:
        """Have the workers ended, if the card cannot go on, or need not."""
        if must or self._settings.fewer_cards:
            with self._lock:
                self._wish = self._wish or HostWish(text, uuid)

    def _look_at_memory(self, now: float, memory: HostMemory | None, steps: int, growth: MemoryGrowth) -> list[str]:
        if memory is None:
            return []
        why = growth.add(now, steps, memory, self._copies(memory))
        if why:
            with self._lock:
                if growth is self._growth:
                    self._wish = self._wish or HostWish(why)
        warning = None if self._told_growth else growth.warning()
        self._told_growth = self._told_growth or warning is not None
        return [warning] if warning else []

    def _copies(self, memory: HostMemory) -> int:
        """What a worker may hold in copies for a checkpoint."""
        workers, most = max(1, len(memory.by_worker)), self._settings.staging_bytes
        try:
            newest = self._settings.newest_checkpoint()
            share = folder_bytes(newest) // workers if newest else 0
        except OSError:
            return 0
        return min(share, memory.total // 4 // workers if most is None else most)  # as `checkpoint.staging: auto` does

    def _look_at_disk(self, lines: list[str]) -> int | None:
        try:
            free, newest = free_bytes(self._settings.folder), self._settings.newest_checkpoint()
            line = self._disk.add(free, folder_bytes(newest)) if newest else None
        except OSError:  # the disk is gone, which whoever writes on it says; or a checkpoint has just been deleted
            return None
        lines += [line] if line else []
        return free

    def _record(
        self, reading: Reading | None, memory: HostMemory | None, free: int | None, steps: int, growth: MemoryGrowth
    ) -> None:
        """One line for reports; without a place to write it, nothing is lost."""
        record: dict[str, object] = {"time": round(time.time(), 1), "steps_taken": steps}
        if memory is not None:
            record["memory_available_mib"] = memory.available // _MIB
            record["workers_mib"] = [held // _MIB for held in memory.by_worker]
            record["growth_mib_per_1000_steps"] = [round(each / _MIB, 2) for each in growth.per_thousand_steps()]
        if free is not None:
            record["disk_free_mib"] = free // _MIB
        if reading is not None:
            used = {card.uuid for card in self._cards.cards}
            told = [asdict(card) for card in reading.cards or () if card.uuid in used]
            record["cards"] = [{name: value for name, value in card.items() if value or value == 0} for card in told]
        with suppress(OSError), (self._settings.folder / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

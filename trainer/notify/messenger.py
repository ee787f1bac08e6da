"""Sends messages beside all else: never waited for but at the end, never an error."""

import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

from trainer.config.sections.notify_config import Event, NotifyConfig
from trainer.errors import printable
from trainer.notify.message import Message
from trainer.notify.ways import NotSent, post, run_command

_MOST_WAITING = 32
_AGAIN_AFTER_S = 1.0


class Messenger:
    """Messages of one process about one run.

    Args:
        run: what it is called.
        warn: is told in a line when a message could not be sent; may be called from another thread.
    """

    END_S = 25.0
    """How long the end waits for messages that are under way."""

    def __init__(self, config: NotifyConfig, run: str, warn: Callable[[str], None]) -> None:
        self._on, self._run, self._warn = config.on, run, warn
        self._ways: dict[str, Callable[[Message], None]] = {}
        if config.webhook is not None:
            self._ways["webhook"] = partial(post, webhook=config.webhook, kind=config.format)
        if config.command:
            self._ways["command"] = partial(run_command, command=config.command)
        self._waiting: queue.Queue[Message | None] = queue.Queue(_MOST_WAITING)
        self._lost = Counter[str]()
        self._thread: threading.Thread | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything can be sent."""
        return bool(self._ways and self._on)

    def tell(self, events: Sequence[Event], text: str, step: int | None = None) -> None:
        """Send a message if one of these events is wished; under the first of them that is. Returns at once."""
        event = next((each for each in events if each in self._on), None)
        if event is None or not self._ways:
            return
        message = Message(event, self._run, socket.gethostname(), printable(text, 1500), round(time.time(), 3), step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="messages", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._note("on", f"{_MOST_WAITING} others wait")

    def close(self) -> None:
        """Wait for what is under way, for a while."""
        if self._thread is not None:
            end_s = time.monotonic() + self.END_S
            try:
                self._waiting.put(None, timeout=self.END_S)
            except queue.Full:
                return
            self._thread.join(max(end_s - time.monotonic(), 0))
            if self._thread.is_alive():
                self._warn(f"notify: a message was not sent within {self.END_S:.0f} s")

    def __enter__(self) -> "Messenger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send_all(self) -> None:
        while (message := self._waiting.get()) is not None:
            for name, send in self._ways.items():
                self._send(name, partial(send, message))

    def _send(self, name: str, send: Callable[[], None]) -> None:
        """Twice at most."""
        try:
            send()
        except NotSent:
            time.sleep(_AGAIN_AFTER_S)
            try:
                send()
            except NotSent as error:
                self._note(name, str(error))

    def _note(self, name: str, reason: str) -> None:
        self._lost[name] += 1
        self._warn(f"notify.{name}: a message was not sent ({reason}), {self._lost[name]} by now; the run goes on")

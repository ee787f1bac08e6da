"""One message, and the JSON that each service reads."""

from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_LONGEST = 1800  # characters; Discord takes 2,000
_SIGNS = {"start": "▶", "finish": "■", "restart": "↻", "samples": "▦"}
_URGENT = ("fault", "stall", "nan")


@dataclass(frozen=True)
class Message:
    """What happened.

    Attributes:
        event: one of `notify.on`.
        run: what the run is called; `host`: where it runs.
        text: in a line.
        step: of the run, where it is known.
        time_s: seconds since 1970.
    """

    event: str
    run: str
    host: str
    text: str
    time_s: float
    step: int | None = None

    def fields(self) -> dict[str, Any]:
        """All of it, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def line(self) -> str:
        """For people."""
        return f"{_SIGNS.get(self.event, '!')} {self.run} on {self.host}: {self.text}"[:_LONGEST]


def posted(message: Message, kind: str, url: str) -> tuple[str, dict[str, Any]]:
    """(address, JSON) of a post in the way of `notify.format`.

    Slack: `text`, with its three marks escaped. Discord: `content`, and nobody is called by it. ntfy: posted to the
    server, with the last part of the address as the topic.
    """
    if kind == "slack":
        text = message.line().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return url, {"text": text}
    if kind == "discord":
        return url, {"content": message.line(), "allowed_mentions": {"parse": []}}
    if kind == "ntfy":
        parts = urlsplit(url)
        folder, _, topic = parts.path.rstrip("/").rpartition("/")
        fields = {"topic": topic, "title": f"{message.run}: {message.event}", "message": message.line()}
        return urlunsplit(parts._replace(path=f"{folder}/")), fields | {
            "priority": 4 if message.event in _URGENT else 3
        }
    return url, message.fields()

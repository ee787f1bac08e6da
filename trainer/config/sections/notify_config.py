"""The section `notify`: messages to whoever is away; documented as those of `schema.py` are."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Section, Webhook

Event = Literal["start", "finish", "fault", "restart", "stall", "nan", "bad_data", "samples"]


class NotifyConfig(Section):
    webhook: Webhook | None = None
    """Where messages are posted: an address, `env:NAME` (a variable that holds it) or `file:PATH` (a file that does).
    The address is a secret: it stands in no log, and not in `config.resolved.yaml` or in published files."""
    format: Literal["json", "slack", "discord", "ntfy"] = "json"
    """What is posted: all that is known as plain JSON, or what Slack (and Mattermost), Discord or ntfy read."""
    command: list[Annotated[str, Field(min_length=1)]] = []
    """A program of your own with its arguments, such as `[notify-send, sdxl-train]`; not through a shell. It gets the
    message as JSON at its input, and as `SDXL_TRAIN_EVENT`, `SDXL_TRAIN_RUN`, `SDXL_TRAIN_TEXT` in its environment."""
    on: list[Event] = ["finish", "fault", "restart", "stall", "nan", "bad_data"]
    """What messages are sent for: `start`; `finish` (done, stopped, or given up); `fault` (a worker died, a card is
    gone, ...); `restart`; `stall` (a worker does not move); `nan` (skipped steps, and going back); `bad_data` (images
    that could not be read); `samples` (they are drawn). `prepare` sends `start`, `finish`, `fault`, and `bad_data`
    (more than `data.max_bad_fraction` cannot be used)."""

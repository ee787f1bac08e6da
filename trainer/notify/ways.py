"""The ways that a message goes: a post to an address, a command of the user's. Each takes its time, and may fail."""

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from trainer.config.sections.notify_config import NotifyConfig
from trainer.config.values import WEBHOOK_VARIABLE, SecretText
from trainer.errors import printable, without_secrets
from trainer.guards import read_bytes
from trainer.notify.message import Message, posted

TIMEOUT_S = 10.0
_LONGEST_ADDRESS = 4096  # bytes of a file that holds one


class NotSent(Exception):
    """A message did not go; says why, without the address."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A post that is sent elsewhere arrives without its text."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Nowhere: the answer is an error."""


def secret_environment(config: NotifyConfig) -> dict[str, str]:
    """What workers need to find the address that their configuration does not hold."""
    return {WEBHOOK_VARIABLE: str(config.webhook)} if isinstance(config.webhook, SecretText) else {}


def address_of(webhook: str) -> str:
    """The address itself.

    Raises:
        NotSent: the variable or file is not there.
    """
    if webhook.startswith("env:"):
        name = webhook.removeprefix("env:")
        if not os.environ.get(name):
            raise NotSent(f"the variable {name} is not set")
        return os.environ[name].strip()
    if webhook.startswith("file:"):
        try:
            return read_bytes(webhook.removeprefix("file:"), _LONGEST_ADDRESS).decode("utf-8").strip()
        except Exception as error:
            raise NotSent(
                f"its file cannot be read: {getattr(error, 'strerror', '') or type(error).__name__}"
            ) from None
    return str(webhook)


def post(message: Message, webhook: str, kind: str, timeout_s: float = TIMEOUT_S) -> None:
    """Post a message.

    Raises:
        NotSent: nobody took it.
    """
    url = address_of(webhook)
    try:
        if not url.startswith(("http://", "https://")):
            raise NotSent("the address does not begin with https://")
        place, fields = posted(message, kind, url)
        headers = {"Content-Type": "application/json", "User-Agent": "sdxl-train"}
        request = urllib.request.Request(place, json.dumps(fields).encode(), headers)
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        with error:
            raise NotSent(f"the answer is {error.code} {printable(str(error.reason), 60)}") from None
    except NotSent:
        raise
    except Exception as error:  # of the name, the connection, the answer, or the address itself
        reason = getattr(error, "reason", error)
        text = without_secrets(" ".join(str(reason).split()), url, *url.split("/")[3:])
        raise NotSent(printable(text, 120) or type(error).__name__) from None


def run_command(message: Message, command: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
    """Run the user's command with a message; what it starts ends with it, or at the time-out.

    Raises:
        NotSent: it failed.
    """
    told = {"SDXL_TRAIN_EVENT": message.event, "SDXL_TRAIN_RUN": message.run, "SDXL_TRAIN_TEXT": message.text}
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **told},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise NotSent(f"{printable(command[0], 60)}: {error.strerror}") from None
    with process:
        try:
            process.communicate(json.dumps(message.fields()).encode() + b"\n", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise NotSent(f"takes longer than {timeout_s:.0f} s") from None
    if process.returncode:
        raise NotSent(f"its exit code is {process.returncode}")

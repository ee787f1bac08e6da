"""Exceptions that a user may see or another start may get round, and outside text so shown that it steers nothing."""

import json
import os
import re
import unicodedata

MOST_OF_A_LINE = 2000
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|WEBHOOK")
_SHORTEST_SECRET = 8
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_STEERS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, marks of direction, half characters (bad file names), line breaks


def printable(text: str, most: int = 200) -> str:
    r"""Text of unknown origin for the screen or a log, on one line: what steers is shown as `\x1b`, `\u202e`, `\n`.

    Args:
        most: characters of `text` that are shown; what is cut off is told by an ellipsis.
    """
    cut = text[:most]
    if not cut.isprintable():
        cut = "".join(_escape(character) for character in cut)
    return cut if len(text) <= most else cut + "..."


def printable_lines(text: str) -> str:
    """Text with line breaks of its own, each line of it as by `printable`, of any length."""
    return text if text.isprintable() else "\n".join(printable(line, len(line)) for line in text.split("\n"))


def json_text(value: object) -> str:
    """JSON for a person or a program, indented; texts in it steer no terminal, and are the same once it is read."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    steering = {c for c in set(text) if c != "\n" and unicodedata.category(c) in _STEERS}
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in steering})


def without_secrets(text: str, *secrets: str) -> str:
    """Text without these, without the values of environment variables that are called keys, tokens or passwords, and
    without users and passwords of URLs."""
    own = [value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())]
    for secret in sorted((s for s in (*secrets, *own) if len(s) >= _SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _IN_URL.sub("***@", text)


def _escape(character: str) -> str:
    steers = unicodedata.category(character) in _STEERS
    return ascii(character)[1:-1] if steers else character


class UserError(Exception):
    """A mistake in what the user gave; the command prints each line as it is and exits with code 2.

    Args:
        lines: one problem per line, each naming the place, the value, the rule and, where there is
            one, the mend. Never a traceback. What they quote may come from outside, so they are made printable here.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(printable(line, MOST_OF_A_LINE) for line in lines)
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        """Between processes the lines stay what they are; one text of them would be one line."""
        return type(self), self.lines


class OutOfMemory(Exception):
    """A run does not fit as it was planned; the command tries again with less, or says what would fit."""


class NumbersGoneWrong(Exception):
    """Steps in a row could not be taken, or weights are wrong, nobody can say whose; the next start goes back."""


class WeightsDiffer(Exception):
    """Workers that hold the same weights hold them no more; the next start goes back to when they did.

    Args:
        rank: of the one whose weights are not those of most.
    """

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank

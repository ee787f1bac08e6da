"""Scripts of bash, PowerShell and Windows' command prompt, and logs of a window, as whole commands and variables.

Not a shell: enough of each that a training command comes out as it would have been run. A command may go on by `\\`,
`^` or a backtick at a line's end, by lines that begin with an option, as people paste them, or by a quote that is open;
a comment may stand after or between its lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_WINDOWS = re.compile(r"""(?:^|[\s='"])[A-Za-z]:\\|\s`\s*$|\^\s*$""", re.M)
_COMMENT = re.compile(r"#|@?rem\b|::", re.I)
_GOES_ON = re.compile(r"\\$|(?:^|\s)`$|\^$")
_STARTS = re.compile(r"\baccelerate\S*\s+launch\b|\btorchrun\b|\baccelerate\.commands\.launch\b")
_ASSIGNED = (
    re.compile(r"(?:export\s+|local\s+|readonly\s+|declare\s+(?:-\w+\s+)*)?([A-Za-z_]\w*)\+?=(.*)"),
    re.compile(r"\$(?:env:)?([A-Za-z_]\w*)\s*=\s*(.*)", re.I),
    re.compile(r'@?set\s+"?([A-Za-z_]\w*)=(.*?)"?', re.I),
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?:\[[@*]\]|:?-([^}]*))?\}|\$(?:env:)?([A-Za-z_]\w*)|%([A-Za-z_]\w*)%", re.I)
_TYPOGRAPHIC = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\xa0": " ", "\ufeff": ""})
_DASH = re.compile(r"(?<!\S)[–—]-?(?=[A-Za-z])")
_LOG_BEGINS = re.compile(r"\s*(?:\[?\d[\d:.\-/ T]*\]?\s+)?(?:INFO|DEBUG|WARNING)\s")
_LOG_PLACE = re.compile(r"\s+\w+\.py:\d+\s*$")
_MOST_FILLED = 1 << 20  # characters that variables put into one script; some that double would fill the memory
_ENDS = {"|", "||", "&&", ";", "&", "|&"}
_REDIRECTED = re.compile(r"(?:\d|&)?(?:>>?|<)(&\d|.*)")


@dataclass
class Script:
    """What was found.

    Attributes:
        commands: each on one line, without comments.
        windows: a backslash is a part of a path, and no escape.
    """

    commands: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    windows: bool = False
    _left: int = _MOST_FILLED

    def words(self, command: str) -> list[str]:
        """A command's words, with what the script's variables stand for.

        A word that is nothing but a variable becomes several if options are in it.

        Raises:
            ValueError: a quote is not closed, or as `filled`.
        """
        found: list[str] = []
        for word in _words(command, windows=self.windows):
            filled = self.filled(word)
            if _VARIABLE.fullmatch(word) and filled.lstrip().startswith("-"):
                found += _words(filled, windows=self.windows)
            else:
                found.append(filled)
        return found

    def filled(self, text: str) -> str:
        """With variables that are set, or have a default, put in.

        Raises:
            ValueError: they have become too long in this script.
        """

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[3] or found[4]
            told = self.variables.get(name, found[0] if found[2] is None else found[2])
            self._left -= len(told)
            if self._left < 0:
                raise ValueError(f"its variables put in more than {_MOST_FILLED:,} characters")
            return told

        return _VARIABLE.sub(value, text)


def read_script(text: str, is_ours: Callable[[str], bool]) -> Script:
    """The commands and variables of a text.

    Args:
        is_ours: whether a command names a script that is looked for; only to such are lines joined that merely look as
            if they went on.

    Raises:
        ValueError: as `Script.filled`.
    """
    script = Script(variables={"HOME": str(Path.home())}, windows=bool(_WINDOWS.search(text)))
    lines = [_DASH.sub("--", line) for line in text.translate(_TYPOGRAPHIC).splitlines()]
    goes_on, array, log_column = False, "", 0
    for raw in lines:
        if _COMMENT.match(raw.strip()):
            continue
        line = _without_comment(_LOG_PLACE.sub("", raw), windows=script.windows).strip()
        if array:
            script.variables[array] += f" {script.filled(line.removesuffix(')'))}"
            array = "" if line.endswith(")") else array
            continue
        continues = bool(_GOES_ON.search(line)) and (line[-1:] != "\\" or not re.search(r"[A-Za-z]:\\$", line))
        body = line[:-1].strip() if continues else line
        pending = bool(script.commands) and (is_ours(script.commands[-1]) or bool(_STARTS.search(script.commands[-1])))
        if goes_on or (pending and _looks_on(script, raw, body, log_column, is_ours)):
            script.commands[-1] += f" {body}"
        elif assigned := None if continues or is_ours(body) else _assigned(body):
            array = _assign(script, *assigned)
        elif body:
            script.commands.append(body)
            begins = _LOG_BEGINS.match(raw)
            log_column = begins.end() - 1 if begins else 0
        goes_on = continues
    return script


def until_operator(words: list[str]) -> list[str]:
    """Words before a pipe or the next command, without what is redirected."""
    kept: list[str] = []
    skips = False
    for word in words:
        if skips:
            skips = False
        elif word in _ENDS:
            return kept
        elif found := _REDIRECTED.fullmatch(word):
            skips = not found[1]
        elif word.endswith(";"):
            return [*kept, word[:-1]]
        else:
            kept.append(word)
    return kept


def _looks_on(script: Script, raw: str, body: str, log_column: int, is_ours: Callable[[str], bool]) -> bool:
    """Whether a line goes on with the command before it, though nothing at that one's end says so."""
    command = script.commands[-1]
    if body.startswith("-") or (is_ours(body) and not is_ours(command) and not _STARTS.search(body)):
        return True
    indent = len(raw) - len(raw.lstrip())
    return bool(body) and (0 < log_column <= indent or _is_open(command, windows=script.windows))


def _assigned(line: str) -> tuple[str, str, bool] | None:
    """(name, value, whether it is added to what is there)."""
    for pattern in _ASSIGNED:
        if found := pattern.fullmatch(line):
            return found[1], found[2], f"{found[1]}+=" in line
    return None


def _assign(script: Script, name: str, value: str, adds: bool) -> str:
    """The name of an array that goes on in the next lines, or ""."""
    before = f"{script.variables.get(name, '')} " if adds else ""
    if value.startswith("(") and not value.startswith("(("):
        script.variables[name] = before + script.filled(value[1:].removesuffix(")"))
        return "" if value.endswith(")") else name
    script.variables[name] = before + script.filled(_unquoted(value, windows=script.windows))
    return ""


def _words(text: str, *, windows: bool) -> list[str]:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    if windows:
        lexer.escape = ""
    return list(lexer)


def _unquoted(text: str, *, windows: bool) -> str:
    """A value of which all is in quotes, without them; any other as it stands."""
    try:
        words = _words(text, windows=windows)
    except ValueError:
        return text
    return words[0] if len(words) == 1 else text


def _is_open(text: str, *, windows: bool) -> bool:
    try:
        _words(text, windows=windows)
    except ValueError:
        return True
    return False


def _without_comment(line: str, *, windows: bool) -> str:
    """Up to a `#` after a blank that is in no quotes."""
    quote, escaped = "", False
    for i, character in enumerate(line):
        if escaped:
            escaped = False
        elif character == "\\" and not windows and quote != "'":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line

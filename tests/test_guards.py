"""The guards: what is refused is told in one line, in bounded time and memory; what is sound passes."""

import os
import socket
import time
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.guards import (
    Limits,
    Refused,
    deadline,
    open_regular,
    parse_json,
    parse_toml,
    printable,
    read_json,
    read_text,
)


def test_what_steers_a_terminal_is_shown_and_does_not_work() -> None:
    assert printable("a\x1b[31mred\u202e\n\r\t\udcff") == r"a\x1b[31mred\u202e\n\r\t\udcff"
    assert printable("猫　é 🙂") == "猫　é 🙂"
    assert printable("x" * 300) == "x" * 200 + "..."
    assert UserError("one\x1b[2J", "two\n").lines == (r"one\x1b[2J", r"two\n")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO without a writer would wait for ever: this test ends at all."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        (tmp_path / "device").symlink_to("/dev/zero")
        for name, kind in (("fifo", "a FIFO"), ("socket", "a socket"), ("device", "a device"), ("", "a folder")):
            with pytest.raises(Refused, match=f"is {kind}, not a regular file"):
                open_regular(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link", 5) as stream:
        assert stream.read() == b"12345"
    with pytest.raises(Refused, match="has 5 bytes; at most 4 are read"):
        open_regular(tmp_path / "link", 4)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_texts_are_in_their_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xff")
    with pytest.raises(Refused, match=r"a.txt:2: not UTF-8 text \(byte 0xff\)"):
        read_text(tmp_path / "a.txt", 100)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"[" * 10**6, "nested more than 64 levels deep"),
        (b'{"\\"[":' * 65 + b"1" + b"}" * 65, "nested more than 64 levels deep"),
        (b"[" + b"0," * 2000 + b"0]", "holds more than 1,000 values"),
        (b'""' * 10_000, "holds more than 1,000 values"),
        (b" " * 200_000, "has 200,000 bytes; at most 100,000"),
        (b'{"a": 1, "a\\u0062": 2, "a": 3}', "the name a stands twice"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5,000 digits"),
        (b"[1e400]", "1e400 is not a finite number"),
        (b"[NaN]", "NaN is not a finite number"),
        (b'"\xff"', "not UTF-8"),
        (b'{"a": }', "not valid JSON"),
    ],
)
def test_json_is_bounded_before_it_is_parsed(data: bytes, rule: str) -> None:
    most = 100_000 if data.startswith(b" ") else 10_000_000
    with pytest.raises(Refused, match=rf"^here.*{rule}"):
        parse_json(data, "here", most_bytes=most, most_items=1000)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a=" + "[" * 10**6, "nested more than 32 levels deep"),
        ("a=" + "{b=" * 10**5, "nested more than 32 levels deep"),
        (".".join("a" * 10**5) + "=1", "nested more than 32 levels deep"),
        (".".join(['"a"'] * 10**5) + "=1", "nested more than 32 levels deep"),
        ("[" + ".".join("a" * 10**5) + "]", "nested more than 32 levels deep"),
        # Quotes that belong to a text, after which brackets begin.
        ('a = ["""x"""", ' + "[" * 10**5, "nested more than 32 levels deep"),
        ("a = ['''x''''', \"\\\"#\", " + "[" * 10**5, "nested more than 32 levels deep"),
        ("[[a]]\n" * 60_000, "holds more than 100,000 values"),
        ("a=" + "9" * 10**6, "holds a number of more than 40 digits"),
        ('a="""' + '\\"""' * 10**5, "not TOML: "),
        ("a=1\na=2\n", "not TOML: .*line 2"),
        ("[a\n", "not TOML: .*line 1"),
        ('a="\x1b[2J"', r"not TOML: .*\\x1b"),
    ],
)
def test_toml_is_bounded_before_it_is_parsed(text: str, rule: str) -> None:
    before = time.process_time()
    with pytest.raises(Refused, match=rf"^here: (its TOML )?(is )?{rule}"):
        parse_toml(text, "here")
    assert time.process_time() - before < 5


def test_sound_toml_passes() -> None:
    """What looks deep or long within texts and comments is not, nor are lists of many numbers."""
    text = '''a = "wow.such.prompt" # [[[[ """
b.c = ["""x"""", '[', "\\"[", 0.25]
[t]
d = """
[[ \\""" "" """
'''
    text += f"s = '{'.' * 100}{'[' * 100}{'1' * 100}'\nf = [{'0.5, ' * 1000}]\n"
    assert parse_toml(text, "here") == {
        "a": "wow.such.prompt",
        "b": {"c": ['x"', "[", '"[', 0.25]},
        "t": {"d": '[[ """ "" ', "s": "." * 100 + "[" * 100 + "1" * 100, "f": [0.5] * 1000},
    }


def test_sound_json_passes(tmp_path: Path) -> None:
    text = '\ufeff{"a\\\\\\"[[[": ["]}", {"b": -1.5e3}], "c": "' + "[" * 1000 + '\\\\"}'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {'a\\"[[[': ["]}", {"b": -1500.0}], "c": "[" * 1000 + "\\"}
    nested = b"[" * 64 + b"]" * 64
    assert parse_json(nested, "here", most_bytes=200) is not None
    with pytest.raises(Refused, match="more than 3 levels"):
        (tmp_path / "b.json").write_bytes(b"[" * 4 + b"]" * 4)
        read_json(tmp_path / "b.json", Limits(json_depth=3))


def test_work_on_one_file_ends() -> None:
    deadline(60, "file")()
    with pytest.raises(Refused, match="file: takes longer than -1 s"):
        deadline(-1, "file")()

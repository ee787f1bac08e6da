"""The grammar of wildcards: choices, escapes, nesting, and text that only looks like a wildcard."""

from itertools import product

import pytest

from trainer.data.wildcards import count_groups, expand

_SPREAD = tuple(2**32 * i // 6 for i in range(6))
"""Draws that take each of up to three choices."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no wildcard", {"no wildcard"}),
        ("", {""}),
        ("{red|green} apple", {"red apple", "green apple"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{one}", {"one"}),
        ("a{| very} red", {"a red", "a very red"}),
        ("{a||b}", {"a", "", "b"}),
        ("{|}", {""}),
        # Escapes
        ("{{retro style}}", {"{retro style}"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a}}|b}", {"a}", "b"}),
        ("{{{a|b} }}", {"{a }", "{b }"}),
        ("{{{a|b}}}", {"{a", "{b}"}),  # as in sd-scripts: `}}` comes first
        ("}} {{", {"} {"}),
        # Nested
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a|{b|c} d}", {"a", "b d", "c d"}),
        ("{{a|b} c|d}", {"{a|b} c|d}"}),  # `{{` is one brace, always
        ("{ {a|b}|c}", {" a", " b", "c"}),
        ("{a {b {c|d}}}", {"a b c", "a b d"}),  # three groups end: two by `}}`, one by `}`
        # Not wildcards
        ("a|b", {"a|b"}),
        ("{}", {"{}"}),
        (">:{, solo", {">:{, solo"}),
        (">:{, {a|b}", {">:{, a", ">:{, b"}),
        ("}:), {a|b}", {"}:), a", "}:), b"}),
        ("{a|b", {"{a|b"}),
        ("{a|{b|c}", {"{a|b", "{a|c"}),
        ("|||", {"|||"}),
    ],
)
def test_every_choice_and_no_other(text: str, expected: set[str]) -> None:
    found = {expand(text, draws) for draws in product(_SPREAD, repeat=count_groups(text))}
    assert found == expected


def test_zeros_take_the_first_choices() -> None:
    text = "{a|b} {{x}} {c|{d|e}}"
    assert expand(text, (0,) * count_groups(text)) == "a {x} c"


def test_hostile_depth_is_no_recursion() -> None:
    assert expand("{" * 9999 + "a" + "}" * 9999, (0,) * 9999).count("a") == 1

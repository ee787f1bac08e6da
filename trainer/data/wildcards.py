"""Wildcards in captions: `{red|green} apple` is one or the other.

`{{` and `}}` stand for one brace. Groups may be nested; `}}` ends two of them where as many are open. What opens a
group that does not end, ends one that did not begin, or holds nothing (`{}`), stays as it is.
"""

import re
from collections.abc import Sequence

_BRACES = re.compile(r"(\{\{|\}\}|[{}|])")
_ESCAPED = {"{{": "{", "}}": "}"}


def count_groups(text: str) -> int:
    """At least the number of groups in the text."""
    return text.count("{")


def expand(text: str, draws: Sequence[int]) -> str:
    """The text with one choice of each group.

    Args:
        draws: `count_groups(text)` random numbers below 2^32; zeros take the first choice of each group.
    """
    if "{" not in text and "}" not in text:
        return text
    numbers = iter(draws)
    # The choices of each open group, each a list of pieces; the outermost group is the text itself.
    open_groups: list[list[list[str]]] = [[[]]]
    for piece in _BRACES.split(text):
        depth = len(open_groups) - 1
        if piece == "{":
            open_groups.append([[]])
        elif piece == "|" and depth:
            open_groups[-1].append([])
        elif (piece == "}" and depth) or (piece == "}}" and depth > 1):
            for _ in piece:
                choices = open_groups.pop()
                chosen = ["{}"] if choices == [[""]] else choices[next(numbers) * len(choices) >> 32]
                open_groups[-1][-1] += chosen
        else:
            open_groups[-1][-1].append(_ESCAPED.get(piece, piece))
    return "{".join("|".join("".join(choice) for choice in choices) for choices in open_groups)

"""Words of the user's own in captions: each stands for some tokens that CLIP's vocabulary does not have.

A word is spelled with one character for each of its tokens, from a plane of Unicode that no text uses; to the
tokenizers these are words of their own. Their ids are negative: SDXL's encoders find the end of a text by its greatest
id, which one behind the vocabulary's would pass for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import AddedToken, Tokenizer

from trainer.config.sections.new_tokens_config import NewTokenConfig

_FIRST_CHARACTER = 0xF0000  # supplementary private use area A


@dataclass(frozen=True)
class TokenWords:
    """The words, each with the number of its tokens; where a text holds one matters no more than upper or lower case.

    A word that begins or ends with a letter or digit is none within a longer one: `sks` is not in `masks`.
    """

    words: tuple[tuple[str, int], ...] = ()

    @property
    def count(self) -> int:
        """Tokens of all words."""
        return sum(vectors for _, vectors in self.words)

    @cached_property
    def spellings(self) -> dict[str, str]:
        """By word, its characters."""
        return {word: "".join(map(_character, rows)) for word, rows in rows_of_words(self.words)}

    @cached_property
    def _pattern(self) -> tuple[re.Pattern[str], list[str]]:
        longest_first = sorted(self.spellings, key=len, reverse=True)
        return re.compile("|".join(f"({_bounded(word)})" for word in longest_first), re.IGNORECASE), longest_first

    def spelled(self, text: str) -> str:
        """A text with the characters of its words in their places."""
        if not self.words:
            return text
        pattern, words = self._pattern
        return pattern.sub(lambda found: f" {self.spellings[words[(found.lastindex or 1) - 1]]} ", text)

    def shown(self, token: str) -> str:
        """A token as a person reads it: `<my-cat>:2` is the second of a word's."""
        character = token.strip()  # a token of a tokenizer's own takes the spaces around it along
        number = ord(character) - _FIRST_CHARACTER if len(character) == 1 else -1
        for word, rows in rows_of_words(self.words):
            if number in rows:
                return word if len(rows) == 1 else f"{word}:{number - rows[0] + 1}"
        return token

    def added_to(self, tokenizer: Tokenizer) -> int:
        """Teach a tokenizer the characters; the id of the first one, of which the others are the next."""
        first = tokenizer.get_vocab_size(with_added_tokens=True)
        characters = map(_character, range(self.count))
        tokenizer.add_tokens([AddedToken(each, normalized=False, lstrip=True, rstrip=True) for each in characters])
        assert [tokenizer.token_to_id(_character(row)) for row in range(self.count)] == [
            first + row for row in range(self.count)
        ]
        return first


NO_WORDS = TokenWords()


def words_of(tokens: Iterable[NewTokenConfig]) -> TokenWords:
    """The words of the configuration's `new_tokens.tokens`."""
    return TokenWords(tuple((each.token, each.vectors) for each in tokens))


def rows_of_words(words: Sequence[tuple[str, int]]) -> Iterator[tuple[str, range]]:
    """Each word with the rows that its vectors have among those of all."""
    begin = 0
    for word, vectors in words:
        yield word, range(begin, begin + vectors)
        begin += vectors


def as_negative(ids: np.ndarray, first: int) -> np.ndarray:
    """Ids from `first` on as -1, -2, ...: those of new tokens."""
    return np.where(ids >= first, first - 1 - ids, ids)


def _character(row: int) -> str:
    return chr(_FIRST_CHARACTER + row)


def _bounded(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", word[-1]) else ""
    return f"{before}{re.escape(word)}{after}"

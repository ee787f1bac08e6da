"""The section `captions`: what text an image is trained with; documented as those of `schema.py` are."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Count, Flag, Fraction, PositiveInt, Section, Separator


class TagGroupConfig(Section):
    name: Annotated[str, Field(min_length=1)]
    """What the group is called; its draws go by it."""
    tags: Annotated[list[str], Field(min_length=1)]
    """The tags, as they stand in the data; an image may have any of them."""
    keep: Literal["first", "last"] = "first"
    """Where those that an image has stand: before its other tags, behind `keep_tokens`, or after them; of several
    groups in their order. Within a group they stay in the order of the image."""
    dropout: Fraction = 0.0
    """Chance of all of them to be left out together; `tag_dropout_rate` is not for them."""
    take: PositiveInt | None = None
    """Use at most so many of its tags, others at each draw. Default: all."""


class CaptionsConfig(Section):
    use: Literal["caption", "tags", "both", "mix"] = "caption"
    """What the text is made of: the `caption` (natural language), the `tags`, `both`, or at each draw the one or the
    other (`mix`). Where an image lacks one of them, the other stands in. A field of several lines gives one of them:
    the first, or with `several` or `wildcards` a random one."""
    caption_probability: Fraction = 0.5
    """`mix`: how often the caption is taken, and not the tags."""
    both_order: Literal["caption_first", "tags_first"] = "caption_first"
    """`both`: which comes first."""
    both_separator: str = ", "
    """`both`: what stands between caption and tags."""
    prefix: str = ""
    """Put before every text, with a space between; may hold wildcards, and is cut with the tags beside it."""
    suffix: str = ""
    """Put after every text, in the same way."""
    several: Literal["first", "random"] = "first"
    """Of several captions of an image, by weight where they have weights, or of several lines of a field: take the
    `first`, or at each draw a `random` one."""
    wildcards: Flag = False
    """Read `{red|green}` as one of the two, at random, and `{{`, `}}` as a brace; groups may be nested."""
    shuffle_tags: Flag = False
    """Put the tags in another order at each draw."""
    keep_tokens: Count = 0
    """Tags at the start of the text that are neither shuffled nor dropped; a caption before them does not count."""
    keep_tokens_separator: Separator | None = None
    """What stands before it in the text is neither shuffled nor dropped, nor what stands after the second one;
    `|||` by convention. In texts that hold it, `keep_tokens` does not count."""
    tag_separator: Separator = ","
    """What stands between tags in the data. Texts whose tags are shuffled or dropped get `, `."""
    secondary_separator: Separator | None = None
    """Joins tags that are shuffled and dropped as one, such as `;;;`; afterwards `tag_separator` takes its place."""
    tag_dropout_rate: Fraction = 0.0
    """Chance of each tag to be left out."""
    tag_groups: list[TagGroupConfig] = []
    """Tags with a place and a chance of their own, such as
    `tag_groups: [{name: quality, tags: [masterpiece, best quality], dropout: 0.3}]`."""
    dropout_rate: Fraction = 0.0
    """Chance of a whole text to be left out (the empty text; sizes and crop are kept), for classifier-free guidance."""
    dropout_every_n_epochs: Count = 0
    """Leave out all texts of every n-th epoch; 0 for never."""
    max_tokens: Literal[75, 150, 225] = 75
    """Tokens of a text that are used, in chunks of 75; every text gets all chunks, the rest being padding."""
    chunks: Literal["a1111", "kohya"] = "a1111"
    """How chunks are joined. `a1111`: as A1111 and ComfyUI do, all 77 positions of each (77, 154, 231). `kohya`: as
    kohya's scripts do, start and end tokens between chunks left out (77, 152, 227)."""
    max_empty_fraction: Fraction = 0.05
    """Refuse to train when more than this share of the images has an empty text, before any dropout."""

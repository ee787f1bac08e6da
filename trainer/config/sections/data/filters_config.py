"""The section `data.filters`: which images of the sources are left out; documented as those of `schema.py` are."""

from typing import Annotated

from pydantic import Field

from trainer.config.values import Count, PositiveInt, Section

MOST_DISTANCE = 10

Ratio = Annotated[float, Field(ge=0.01, le=100)]
Tag = Annotated[str, Field(min_length=1)]


class FiltersConfig(Section):
    min_side_px: PositiveInt | None = None
    """Least length of the shorter side, of the image as it is displayed; of latents, as their metadata has it."""
    min_aspect: Ratio | None = None
    """Least width divided by height; 0.5 leaves out what is more than twice as high as wide."""
    max_aspect: Ratio | None = None
    """Largest width divided by height."""
    min_caption_chars: Count | None = None
    """Least length of the caption, in characters; of an image without one, of its tags."""
    max_caption_chars: Count | None = None
    """Largest length of the same."""
    tags_include: list[Tag] = []
    """Only images that have one or more of these tags."""
    tags_exclude: list[Tag] = []
    """No image that has one of these tags."""
    min_score: float | None = None
    """Least score, of the sources that have a `score_field` or `score_column`; their images without one go as well."""
    max_score: float | None = None
    """Largest score of the same."""
    near_duplicates: Annotated[int, Field(ge=0, le=MOST_DISTANCE)] | None = None
    """Of images that look the same, keep one: the largest in pixels. They are those whose perceptual hashes (64 bits)
    differ in at most so many bits; copies that were resized or compressed anew mostly differ in 0 to 4. Of
    millions, more than 8 leave out others by chance."""

    @property
    def is_on(self) -> bool:
        """Whether any image may be left out."""
        return bool(self.model_dump(exclude_defaults=True))

    @property
    def reads_records(self) -> bool:
        """Whether a caption, tags or a score decide."""
        names = ("min_caption_chars", "max_caption_chars", "min_score", "max_score")
        return any(getattr(self, name) is not None for name in names) or bool(self.tags_include or self.tags_exclude)

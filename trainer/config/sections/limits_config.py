"""The section `limits`: what is read of files from outside; documented as those of `schema.py` are."""

from typing import Annotated

from pydantic import Field

from trainer.config.values import PositiveInt, Section
from trainer.guards import Limits

_Bytes = Annotated[int, Field(ge=1, le=1 << 40)]


class LimitsConfig(Section):
    image_bytes: _Bytes = Limits.image_bytes
    """Bytes of an image file."""
    image_pixels: PositiveInt = Limits.image_pixels
    """Pixels of an image, by its header, of a WebP half as many; one at a time is decoded, in up to 1 GB of memory."""
    caption_bytes: _Bytes = Limits.caption_bytes
    """Bytes of a caption or of a file of tags."""
    json_bytes: _Bytes = Limits.json_bytes
    """Bytes of a JSON or JSON-lines file of captions; it is held in memory, several times its size."""
    json_depth: Annotated[int, Field(ge=1, le=500)] = Limits.json_depth
    """Levels of lists and objects inside one another in any JSON."""
    json_items: PositiveInt = Limits.json_items
    """Entries of all lists and objects of a JSON file together; each takes up to 100 bytes of memory."""
    header_bytes: _Bytes = Limits.header_bytes
    """Bytes of the header of a safetensors file, its metadata included; SDXL's has 0.3 MB."""
    config_bytes: _Bytes = Limits.config_bytes
    """Bytes of a `config.json` or of another small file of a model folder."""
    tokenizer_bytes: _Bytes = Limits.tokenizer_bytes
    """Bytes of a file of a tokenizer; CLIP's `vocab.json` has 1 MB."""
    vocabulary: PositiveInt = Limits.vocabulary
    """Entries of a tokenizer's vocabulary; CLIP's has 49,408."""
    pickle_bytes: _Bytes = Limits.pickle_bytes
    """Bytes of the program in a `.ckpt`, unpacked; SDXL's has 0.4 MB. The tensors beside it are not counted."""
    archive_members: PositiveInt = Limits.archive_members
    """Members of a zip archive, such as a `.npz` or a `.ckpt`."""
    folder_depth: Annotated[int, Field(ge=1, le=500)] = Limits.folder_depth
    """Folders inside one another in a source of images."""
    seconds_per_file: Annotated[float, Field(gt=0)] = Limits.seconds_per_file
    """Seconds that reading one file of a source may take, between its members; a slower one is left out."""

    def plain(self) -> Limits:
        """As the parsers take it."""
        return Limits(**self.model_dump())

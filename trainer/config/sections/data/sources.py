"""The entries of `data.sources`, one section for each type; documented as those of `schema.py` are."""

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from trainer.config.values import (
    Flag,
    LossWeight,
    MaskSuffix,
    OpenFraction,
    PathField,
    PositiveInt,
    Section,
    SourceName,
    SourceWeight,
)


class AnySource(Section):
    """What all types of sources have."""

    name: SourceName | None = None
    """By which the prepared set knows this source and its images, whatever its place; default: the last part of its
    path, and of a second one of that name `NAME~2`. With another name, its images are others."""
    repeats: PositiveInt = 1
    """How many times each image of this source is seen per epoch."""
    weight: SourceWeight | None = None
    """Multiplies that; 0.5 is every other image, in the next epoch the others."""
    per_epoch: PositiveInt | None = None
    """Images of this source per epoch, in place of `weight`: all in turn, over epochs."""
    share: OpenFraction | None = None
    """Part of an epoch that is of this source, in place of `weight`; see [data.md](data.md#weigh-sources)."""
    loss_weight: LossWeight = 1.0
    """How much each image of this source counts in the loss."""
    prior: Flag = False
    """Regularization images (prior preservation): each counts `objective.loss_weights.prior`."""


class FolderSource(AnySource):
    type: Literal["folder"] = "folder"
    """A folder of images, searched recursively, each with a caption file beside it."""
    path: PathField
    """The folder."""
    caption_extension: str = ".txt"
    """Ending of the caption file that lies beside each image. `.json`: each is a JSON object, and not the text."""
    caption_files_hold: Literal["caption", "tags"] = "caption"
    """What is in the caption files: natural language, or tags, which `captions` can shuffle and drop one by one."""
    caption_field: str = "caption"
    """Of caption files that are `.json`: the field with the caption; text, or a list of several."""
    captions_field: str = "captions"
    """The field with several captions, which counts before that of one: a list of texts, or of objects
    `{text: a cat, weight: 2}`; see `captions.several`."""
    tags_field: str = "tags"
    """The field with the tags: text, or a list."""
    weight_field: str | None = None
    """The field with the image's own loss weight, such as `loss_weight`; images without it count 1."""
    tags_extension: str | None = None
    """Ending of a file beside each image that holds nothing but its tags, such as `.tags`: separated as
    `captions.tag_separator` says, or one a line."""
    weight_extension: str | None = None
    """Ending of a file beside each image that holds nothing but its own loss weight, such as `.weight`; images without
    one count 1."""
    kohya_repeats: Flag = False
    """Read kohya's layout: only sub-folders named `<repeats>_<words>` count, their images are seen `<repeats>` times,
    and the words are the caption of images that have no caption file."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Where the masks of `objective.loss.masked` are: nowhere, in the images' `alpha` channels, or in `files` of their
    own. White is trained, black is not; an image without a mask is trained in full."""
    mask_suffix: MaskSuffix = "-masklabel.png"
    """`files`: the mask of `photo.jpg` lies beside it, `photo-masklabel.png`. Files that end so are not trained on."""
    mask_folder: PathField | None = None
    """`files`: take the masks from this folder, under the images' names with the ending of any kind of image."""

    @property
    def holds_json(self) -> bool:
        """Whether the caption files are JSON objects."""
        return self.caption_extension.lower() == ".json"

    @property
    def holds(self) -> frozenset[str]:
        """What of `caption` and `tags` may lie beside an image."""
        if self.holds_json:
            return frozenset({"caption", "tags"})
        return frozenset({self.caption_files_hold, *(["tags"] if self.tags_extension is not None else [])})


class KohyaJsonSource(AnySource):
    type: Literal["kohya_json"]
    """kohya's metadata file, with latents (`.npz`, used where they lie) or images beside it."""
    path: PathField
    """The metadata: one JSON object (`meta_lat.json`), or `.jsonl` with an object per line. Read as a stream."""
    latents: PathField | None = None
    """Folder of the `.npz` files, `<key>.npz` or `<key>_<W>x<H>_sdxl.npz`. Give this or `images`."""
    images: PathField | None = None
    """Folder of the images that the keys name, which `prepare` encodes. Give this or `latents`."""
    weight_field: str | None = None
    """Field of an entry with the image's own loss weight, such as `loss_weight`; images without it count 1."""
    score_field: str | None = None
    """Field of an entry with the image's score, a number, for `data.filters.min_score` and `max_score`."""
    masks: Literal["none", "alpha"] = "none"
    """Where the masks of `objective.loss.masked` are: nowhere, or in the `alpha_mask` of the `.npz`, with `images` in
    their `alpha` channels."""


class LatentTarsSource(AnySource):
    type: Literal["latent_tars"]
    """Tars with members `<id>.npz`, read in place, and kohya's metadata file with their captions."""
    metadata: PathField
    """The metadata, as in `kohya_json`; a member belongs to the key whose last part is its name."""
    tars: PathField
    """A folder of `.tar` files, or a pattern such as `/data/tars/*.tar`."""
    weight_field: str | None = None
    """Field of an entry with the image's own loss weight, such as `loss_weight`; images without it count 1."""
    score_field: str | None = None
    """Field of an entry with the image's score, a number, for `data.filters.min_score` and `max_score`."""
    masks: Literal["none", "alpha"] = "none"
    """Where the masks of `objective.loss.masked` are: nowhere, or in the `alpha_mask` of the `.npz`."""


class WebdatasetSource(AnySource):
    type: Literal["webdataset"]
    """Tars in which the files of one image share a name: `0001.jpg`, `0001.txt`, `0001.json`. Read in place."""
    tars: PathField
    """A folder of `.tar` files, or a pattern such as `/data/tars/*.tar`."""
    caption_field: str = "caption"
    """Field of the `.json` files that holds the caption, where there is no `.txt` or `.caption`."""
    captions_field: str | None = None
    """Field of the `.json` files with several captions, such as `captions`, which counts before all others: a list of
    texts, or of objects `{text: a cat, weight: 2}`; see `captions.several`."""
    tags_field: str = "tags"
    """Field of the `.json` files that holds the tags: text, or a list."""
    weight_field: str | None = None
    """Field of the `.json` files with the image's own loss weight, such as `loss_weight`; without it, 1."""
    score_field: str | None = None
    """Field of the `.json` files with the image's score, a number, for `data.filters.min_score` and `max_score`."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Where the masks of `objective.loss.masked` are: nowhere, in the images' `alpha` channels, or in `files` beside
    them in the tar. White is trained, black is not; an image without a mask is trained in full."""
    mask_suffix: MaskSuffix = ".mask.png"
    """`files`: `0001.jpg` has its mask in `0001.mask.png`. Files that end so are not trained on."""


class ParquetSource(AnySource):
    type: Literal["parquet"]
    """Parquet files with an image (or its path) and a caption in each row. Row groups of some 100 rows, as `datasets`
    writes them, are best: a whole page of images is held in memory. `prepare` reads the files once for each bucket."""
    files: PathField
    """A `.parquet` file, a folder of them, or a pattern."""
    image_column: str = "image"
    """Column of the images: bytes, `datasets`' struct of bytes and path, or paths."""
    caption_column: str = "caption"
    """Column of the captions: text, or a list of texts, which become lines."""
    tags_column: str | None = None
    """Column of the tags: text, or a list."""
    weight_column: str | None = None
    """Column of the images' own loss weights: numbers, null for 1."""
    score_column: str | None = None
    """Column of the images' scores, numbers, for `data.filters.min_score` and `max_score`."""
    key_column: str | None = None
    """Column with a name for each image, which messages then show beside file and row."""
    images: PathField | None = None
    """Folder that paths start from; default: that of the parquet file."""
    masks: Literal["none", "alpha", "column"] = "none"
    """Where the masks of `objective.loss.masked` are: nowhere, in the images' `alpha` channels, or in a `column`. White
    is trained, black is not; an image without a mask is trained in full."""
    mask_column: str = "mask"
    """`column`: its name; it holds what the column of the images may hold."""


class HfSource(AnySource):
    type: Literal["hf"]
    """A data set of Hugging Face's `datasets`, on disk or from the hub; one from the hub is downloaded first."""
    path: str
    """Name on the hub, or a folder, such as one that `save_to_disk` wrote."""
    subset: str | None = None
    """The data set's configuration, where it has several."""
    split: str = "train"
    """The split that is trained on, as a whole."""
    image_column: str = "image"
    """Column of the images."""
    caption_column: str = "text"
    """Column of the captions: text, or a list of texts, which become lines."""
    tags_column: str | None = None
    """Column of the tags: text, or a list."""
    weight_column: str | None = None
    """Column of the images' own loss weights: numbers, null for 1."""
    score_column: str | None = None
    """Column of the images' scores, numbers, for `data.filters.min_score` and `max_score`."""
    key_column: str | None = None
    """Column with a name for each image, which messages then show beside the row."""
    masks: Literal["none", "alpha", "column"] = "none"
    """Where the masks of `objective.loss.masked` are: nowhere, in the images' `alpha` channels, or in a `column`. White
    is trained, black is not; an image without a mask is trained in full."""
    mask_column: str = "mask"
    """`column`: its name; it holds what the column of the images may hold."""


def source_type(entry: object) -> object:
    """The `type` of an entry of `data.sources`; one that names none is a folder."""
    return entry.get("type", "folder") if isinstance(entry, dict) else getattr(entry, "type", "folder")


Source = Annotated[
    Annotated[FolderSource, Tag("folder")]
    | Annotated[KohyaJsonSource, Tag("kohya_json")]
    | Annotated[LatentTarsSource, Tag("latent_tars")]
    | Annotated[WebdatasetSource, Tag("webdataset")]
    | Annotated[ParquetSource, Tag("parquet")]
    | Annotated[HfSource, Tag("hf")],
    Discriminator(source_type),
]

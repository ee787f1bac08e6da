"""What `sdxl-train inspect` prints of one model."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from trainer.model_files.examine.float_bits import FORMATS
from trainer.model_files.examine.inspection import FileReport, Group, Inspection, Numbers, hash_agrees
from trainer.model_files.examine.markers import readable_metadata

COMPONENT_NAMES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder 1",
    "text_encoder_2": "text encoder 2",
    "other": "other tensors",
}
_MOST_NAMES = 8


def inspection_lines(found: Inspection) -> Iterator[str]:
    """The report as lines of at most some 120 characters."""
    yield f"{found.path.name or found.path}: {found.identity.description}"
    yield ""
    for file in found.files:
        yield from _file_lines(file, alone=len(found.files) == 1)
    yield from _told_lines(found)
    yield ""
    yield from _table("component", found.components, COMPONENT_NAMES)
    yield ""
    yield from _numbers_lines(found.numbers) if found.numbers else ["weights       not read (--quick)"]
    if found.missing is not None:
        yield _names_line("missing", found.missing, "of SDXL's tensors")
        yield _names_line("unknown", found.unknown, "tensors that SDXL has not")
    if found.text_projection.verdict != "missing":
        yield f"{'projection':<14}{found.text_projection.verdict}: {found.text_projection.reason}"
    yield ""
    yield from _block_lines(found.blocks)
    metadata = readable_metadata(found.metadata)
    if metadata:
        yield ""
        yield "metadata"
        width = max(map(len, metadata))
        yield from (f"  {key:<{width}}  {text}" for key, text in metadata.items())


def _file_lines(file: FileReport, alone: bool) -> Iterator[str]:
    name = "" if alone else f"{file.path.parent.name}/{file.path.name}, "
    yield f"{'file':<14}{name}{file.num_bytes:,} bytes, {file.tensors:,} tensors"
    if file.sha256 is not None:
        short = f"  (A1111 and Civitai: {file.sha256[:10]})" if alone else ""
        yield f"{'sha256':<14}{file.sha256}{short}"
    if file.data_sha256 is not None and alone:
        yield f"{'  of the data':<14}{file.data_sha256}"


def _told_lines(found: Inspection) -> Iterator[str]:
    told = found.prediction
    if found.identity.kind.startswith(("sd", "unet")):
        zero = ", zero terminal SNR" if told.zero_terminal_snr else ""
        yield f"{'prediction':<14}{told.type}{zero} ({told.source})"
        if told.warning:
            yield f"{'':<14}warning: {told.warning}"
    agrees = hash_agrees(found)
    if agrees is not None:
        yield f"{'hash':<14}{'the data are' if agrees else 'warning: the data are not'} what the metadata's hash says"


def _table(label: str, groups: Sequence[Group], names: dict[str, str]) -> Iterator[str]:
    yield f"{label:<24}{'tensors':>9}{'parameters':>16}{'MB':>10}  dtypes"
    for group in groups:
        yield _row(names.get(group.name, group.name), group)
    if len(groups) > 1:
        total = [sum(getattr(group, name) for group in groups) for name in ("tensors", "parameters", "num_bytes")]
        yield f"{'all':<24}{total[0]:>9,}{total[1]:>16,}{total[2] / 1e6:>10,.1f}"


def _row(name: str, group: Group) -> str:
    return f"{name:<24}{group.tensors:>9,}{group.parameters:>16,}{group.num_bytes / 1e6:>10,.1f}  {_dtypes(group)}"


def _dtypes(group: Group) -> str:
    """The dtype, or all of them with their shares, the most frequent first."""
    floats = {dtype: count for dtype, count in group.dtypes.items() if count and dtype in FORMATS}
    counts = floats or group.dtypes
    if len(counts) < 2:
        return ", ".join(counts)
    total = sum(counts.values())
    return ", ".join(
        f"{dtype} {100 * n / total:.3g} %" for dtype, n in sorted(counts.items(), key=lambda item: -item[1])
    )


def _block_lines(blocks: Iterable[Group]) -> Iterator[str]:
    """A row for each block; equal layers that follow each other share one."""
    yield f"{'block':<34}{'tensors':>9}{'parameters':>16}  dtypes"
    for _, run in groupby(blocks, key=_likeness):
        groups = list(run)
        first, last = groups[0], groups[-1]
        name = first.name if first is last else f"{first.name} to {last.name.rsplit('.', 1)[1]}, each"
        yield f"{name:<34}{first.tensors:>9,}{first.parameters:>16,}  {_dtypes(first)}"


def _likeness(group: Group) -> tuple[object, ...]:
    """What layers have in common that share a row; of other blocks, themselves."""
    before, _, number = group.name.rpartition(".")
    layer = before if number.isdecimal() and before.endswith("layers") else group.name
    return layer, group.tensors, group.parameters, tuple(group.dtypes.items())


def _numbers_lines(numbers: Numbers) -> Iterator[str]:
    total = numbers.total
    largest = f"largest |w| {total.largest:.4g} in {numbers.largest_in}" if numbers.largest_in else "no weights"
    faults = f"NaN {total.nan:,}, infinite {total.infinite:,}, beyond fp16 (|w| > 65504) {total.beyond_fp16:,}"
    yield f"{'weights':<14}{faults}; {largest}"
    for name, found in list(numbers.faulty.items())[:_MOST_NAMES]:
        counts = (("NaN", found.nan), ("infinite", found.infinite), ("beyond fp16", found.beyond_fp16))
        told = ", ".join(f"{count:,} {kind}" for kind, count in counts if count)
        yield f"{'':<14}{name}: {told}"
    if len(numbers.faulty) > _MOST_NAMES:
        yield f"{'':<14}and {len(numbers.faulty) - _MOST_NAMES:,} tensors more (--json has all)"
    if numbers.largest_in and not total.largest and not numbers.faulty:
        yield f"{'':<14}warning: every weight is zero: the file was made and never filled"
    elif numbers.all_zero:
        yield _names_line("all zero", numbers.all_zero, "tensors")
    if numbers.not_read:
        yield _names_line("not looked at", numbers.not_read, "tensors of rare dtypes")


def _names_line(label: str, names: Sequence[str], of: str) -> str:
    shown = "" if not names else names[0] if len(names) == 1 else f"{names[0]} ..."
    return f"{label:<14}{len(names):,} {of}{f': {shown}' if shown else ''}"

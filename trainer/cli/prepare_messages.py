"""What `prepare` says of what it has found."""

from pathlib import Path

from trainer.data.prepare.prune import Pruned
from trainer.data.prepare.stages import PrepareCounts
from trainer.data.prepare.working_folder import LEFT_OUT
from trainer.data.survey.stats import BAD_FILE
from trainer.measure.run_arithmetic import format_duration


def describe_pruned(pruned: Pruned) -> str:
    """What a pruning has given back."""
    text = f"pruned: {pruned.files:,} files deleted, {pruned.num_bytes / 1e9:,.2f} GB given back"
    if pruned.snapshots:
        text += "; a run that stopped within an epoch goes on with the next one, for older snapshots are deleted too"
    return text


def describe_work(rows: int, encodes: bool, speed: tuple[float, int] | None) -> str:
    """What is left to be done of a plan, and how long that takes.

    Args:
        encodes: images are encoded, or latents written anew; else only listed.
        speed: images per second of all workers together when that was last done, and how many they were.
    """
    if not rows:
        return "no image is to be encoded; nothing was written"
    if not encodes:
        return f"{rows:,} images would be listed, none encoded; nothing was written"
    if speed is None:
        return f"{rows:,} would be encoded; how fast that goes is known once some have been; nothing was written"
    took = format_duration(rows / speed[0])
    how = f"{speed[0]:,.1f} img/s of the last time, with {speed[1]} worker{'s' * (speed[1] > 1)}"
    return f"{rows:,} would be encoded, in about {took} at the {how}; nothing was written"


def describe_plan(counts: PrepareCounts, prepared: Path | None) -> list[str]:
    """What a scan of the sources found; None: no list of it was written."""
    scan = counts.scan

    def listed_in(name: str) -> str:
        return "" if prepared is None else f"; all in {prepared / name}"

    lines = [f"{scan.listed:,} images found: {scan.new:,} new, {scan.known:,} prepared before, {scan.bad:,} unusable"]
    changes = {
        "captions changed" if scan.captions != 1 else "caption changed": scan.captions,
        "seen more or less often": scan.repeats,
        "renamed": scan.renamed,
        "moved": scan.moved,
        "back": scan.back,
        "images changed" if scan.changed != 1 else "image changed": scan.changed,
        "removed": scan.removed,
        "not there any more, but kept": scan.kept,
    }
    if counts.reasons.total:
        lines.append(f"{counts.reasons.total:,} unusable: {counts.reasons.describe()}{listed_in(BAD_FILE)}")
    if scan.filtered:
        kinds = ", ".join(f"{number:,} {what}" for what, number in scan.filtered.most_common())
        lines.append(f"filters leave out {scan.filtered.total():,}: {kinds}{listed_in(LEFT_OUT)}")
    if any(changes.values()):
        lines.append("changes: " + ", ".join(f"{number:,} {what}" for what, number in changes.items() if number))
    if counts.empty_captions:
        lines.append(f"{counts.empty_captions:,} of {counts.new_rows:,} new images have no caption")
    for encoding, (number, example) in sorted(scan.foreign.items()):
        are = "captions are" if number > 1 else "caption is"
        lines.append(f"{number:,} {are} not UTF-8, read as {encoding}, such as {example}")
    number, example = scan.lossy
    if number:
        hold = "captions hold" if number > 1 else "caption holds"
        lines.append(f"{number:,} {hold} U+FFFD, in place of characters that were lost before, such as {example}'s")
    if counts.masks is not None and counts.new_rows:
        lines.append(f"{counts.masks:,} of {counts.new_rows:,} new images have a mask, the others are trained in full")
    if any(counts.pending_at.values()):
        at = ", ".join(f"{number:,} at {resolution} px" for resolution, number in counts.pending_at.items() if number)
        main = counts.pending_rows - sum(counts.pending_at.values())
        lines.append(f"to be encoded: {main:,} at the main resolution, {at}")
    if scan.ignored:
        kinds = ", ".join(f"{number:,} x {ending}" for ending, number in scan.ignored.most_common(5))
        lines.append(f"ignored other files: {kinds}")
    return lines

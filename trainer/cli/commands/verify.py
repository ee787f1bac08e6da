"""`sdxl-train verify CONFIG.yaml|PREPARED_DIR`: is the prepared data set still what was written?"""

import argparse
import os
import time
from collections.abc import Sequence

from tqdm import tqdm

from trainer.cli.run_target import add_prepared_target, find_prepared
from trainer.data.prepare.verification import VERIFY_BAD, Verified, verify
from trainer.data.store.snapshot import SPLITS, PreparedSet

_MOST_PROCESSES = 8  # an NVMe drive gives no more to more of them


def main(argv: Sequence[str]) -> int:
    """Re-read every row of a prepared data set and compare it with its checksums. Damaged rows are listed in
    verify-bad.jsonl in the prepared folder; training leaves them out."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train verify",
        description=main.__doc__,
        epilog="exit code: 0 all is well, 1 something is damaged; example: sdxl-train verify /nvme/prepared",
    )
    add_prepared_target(parser)
    default = min(_MOST_PROCESSES, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=default, metavar="N", help=f"default: {default}")
    arguments = parser.parse_intermixed_args(argv)
    prepared = PreparedSet.open(find_prepared(arguments))
    begin = time.perf_counter()
    images = sum(shard.rows for split in SPLITS for shard in prepared.shards(split, at_all_resolutions=True))
    with tqdm(desc="verifying", total=images, unit="img", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def report(images_read: int, bytes_read: int, damaged: int) -> None:
            seconds = time.perf_counter() - begin
            told = f"{bytes_read / 1e6 / max(seconds, 1e-9):,.0f} MB/s"
            bar.set_postfix_str(f"{told}, {damaged:,} damaged" if damaged else told, refresh=False)
            bar.update(images_read - bar.n)

        found = verify(prepared, max(1, arguments.processes), report)
        seconds = time.perf_counter() - begin
    print(f"read {found.images:,} images, {found.num_bytes / 1e9:,.2f} GB of {prepared.path} in {seconds:,.1f} s")
    if not found.damages:
        print("all checksums agree")
        return 0
    _print_damages(prepared, found)
    return 1


def _print_damages(prepared: PreparedSet, found: Verified) -> None:
    for damage in found.first:
        print(damage)
    if found.damages > len(found.first):
        print(f"... and {found.damages - len(found.first):,} more")
    print(
        f"{found.damaged_images:,} of {found.images:,} images cannot be read; "
        f"listed in {prepared.path / VERIFY_BAD}, left out by training"
    )

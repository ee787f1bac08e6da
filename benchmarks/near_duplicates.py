"""What it takes to find which of many images look the same: CPU time and memory, by the number of images and of bits.

    python benchmarks/near_duplicates.py                          # 100,000 and 1,000,000 images
    python benchmarks/near_duplicates.py --rows 12.4e6 --bits 4

The perceptual hashes are made up: 96 % at random (`--skew` makes each bit 1 more or less often than 0, as those of
photographs of one kind), 2 % are others with some bits turned, 2 % a crowd within 4 bits of one hash, as nearly white
images are. Reading images and computing their hashes is not in it. Of those at random, how many go by chance is told:
such are lost for nothing.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from trainer.data.prepare.near_pairs import first_of_near

FIFTY = 50
AT_ONCE = 1000 * FIFTY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 6, 8, 10])
    parser.add_argument("--skew", type=float, default=0.0, help="0.2: a bit is 1 in 30 to 70 %% of the hashes")
    parser.add_argument("--one", action="store_true", help="in this process, which is measured as a whole")
    arguments = parser.parse_args()
    if arguments.one:
        measure(int(arguments.rows[0]), arguments.bits[0], arguments.skew)
        return
    print("| images | bits | CPU s | peak memory beyond the imports | left out | of it by chance |")
    print("|---|---|---|---|---|---|")
    for rows in arguments.rows:
        for bits in arguments.bits:
            command = [
                sys.executable,
                __file__,
                "--one",
                f"--rows={rows}",
                f"--bits={bits}",
                f"--skew={arguments.skew}",
            ]
            subprocess.run(command, check=True)


def measure(rows: int, bits: int, skew: float) -> None:
    """One line of the table."""
    imports_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hashes = made_up(rows, skew)
    before = time.process_time()
    stays = first_of_near(hashes, bits)
    seconds = time.process_time() - before
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imports_kb) / 1000
    (goes,) = np.nonzero(stays != np.arange(rows))
    chance = np.count_nonzero((goes % FIFTY > 1) & (stays[goes] % FIFTY > 1))
    print(f"| {rows:,} | {bits} | {seconds:.1f} | {megabytes:,.0f} MB | {len(goes):,} | {chance:,} |", flush=True)


def made_up(rows: int, skew: float) -> NDArray[np.uint64]:
    """Of each fifty the first has been made of the third, the second is of the crowd, the others are random."""
    rng = np.random.default_rng(0)
    hashes = np.empty(rows, dtype=np.uint64)
    shares = rng.uniform(0.5 - skew, 0.5 + skew, 64)
    for begin in range(0, rows, AT_ONCE):
        part = hashes[begin : begin + AT_ONCE]
        if skew:
            part[:] = np.packbits(rng.random((len(part), 64)) < shares, axis=1).view(">u8")[:, 0]
        else:
            part[:] = rng.integers(0, 2**64, len(part), dtype=np.uint64)
    for begin in range(0, rows, AT_ONCE):
        part = hashes[begin : begin + AT_ONCE]
        copies = part[2::FIFTY]
        part[::FIFTY][: len(copies)] = turned(rng, copies, 8)
    hashes[1::FIFTY] = turned(rng, np.full(len(hashes[1::FIFTY]), rng.integers(0, 2**64, dtype=np.uint64)), 4)
    return hashes


def turned(rng: np.random.Generator, hashes: NDArray[np.uint64], most: int) -> NDArray[np.uint64]:
    """With 1 to `most` bits turned."""
    bits = np.uint64(1) << rng.integers(0, 64, (len(hashes), most), dtype=np.uint64)
    bits[np.arange(most) >= rng.integers(1, most + 1, (len(hashes), 1))] = 0
    return hashes ^ np.bitwise_or.reduce(bits, axis=1)


if __name__ == "__main__":
    main()

"""Opens a loader with a reader process, tells the reader's id, and then ends as it is told to."""

import multiprocessing
import sys
import time
from pathlib import Path

from tests.data.small_set import byte_tokens
from trainer.data.loader import BatchReader, open_loader
from trainer.data.sampler import Position
from trainer.data.store.snapshot import PreparedSet


def main() -> None:
    prepared = PreparedSet.open(Path(sys.argv[1]))
    reader = BatchReader(prepared, "train", 0, byte_tokens)
    position = Position.start(len(prepared.buckets("train")), 2)
    cut = {"rank": 0, "world": 1, "micro_batch": 2, "accumulation": 1}
    loader = open_loader(reader, position, **cut, workers=1, prefetch_batches=4, pin_memory=False)
    batch = next(next(loader).batches)
    print(len(batch.keys), *(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "fail":
        raise ArithmeticError("while batches are under way")
    time.sleep(600)


if __name__ == "__main__":
    main()

"""From the planned order to micro-batches in memory, read ahead by processes or threads, always in order.

A micro-batch is the unit of work: a reader gets one request (a few integers and row ids) and gives back one
buffer. Readers hold paths and integers, never an object per image.
"""

import math
import mmap
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.augment import NOT_AUGMENTED, Augmentation, ChooseView, View, centred_view, draw_view
from trainer.data.buckets import Placement
from trainer.data.captions import PLAIN, CaptionRules, compose
from trainer.data.left_out import Stretch, remaining_steps
from trainer.data.loss_weights import LossWeights
from trainer.data.masks import FULL
from trainer.data.mixture import Mixture
from trainer.data.reader_processes import ReaderProcesses
from trainer.data.sampler import Position, StepRows, same_each_epoch, share
from trainer.data.store.rows import RowProblem, Rows
from trainer.data.store.snapshot import PreparedSet
from trainer.keyed import draw_seed, draw_uniform

_THREADS = 2
_ALIGN = 64
_TOKEN_BYTES = 2 * 3 * 77 * 8  # of a row, at most: two tokenizers, three chunks, int64
_OTHER_BYTES = 6 * 4 + 4 + 4 + 8 + 8  # time_ids, weights, loss_weights, draw_seeds, vae_seeds

Tokenize = Callable[[Sequence[str]], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank; m rows of one bucket."""

    latents: Tensor | None
    """[m, 4, h, w] float16, unscaled; None in a batch of images that are still to be encoded."""
    pixels: Tensor | None
    """[m, 3, 8h, 8w] uint8; None where there are latents."""
    vae_seeds: Tensor | None
    """[m] int64, beside pixels: the seed of the noise in the VAE's posterior, the same as for stored latents."""
    input_ids: Tensor | None
    """[m, 2, chunks, 77] int64 for the two text encoders; None where their outputs are cached."""
    text_hidden: Tensor | None
    """[m, positions, D] float16, cached; or None."""
    pooled: Tensor | None
    """[m, P] float16, cached; or None."""
    time_ids: Tensor
    """[m, 6] float32: original height, width, crop top, left, target height, width."""
    weights: Tensor
    """[m] float32; 0 for padding and for rows that could not be read."""
    draw_seeds: Tensor
    """[m] int64: the seed of each row's noise and timestep."""
    keys: tuple[str, ...]
    """[m] the images' keys; empty for padding."""
    problems: tuple[RowProblem, ...]
    """The rows that could not be read: where they lie and why."""
    masks: Tensor | None = None
    """[m, h, w] uint8, at the size of latents: 255 counts in full, 0 is outside; None where the loss is not masked."""
    loss_weights: Tensor | None = None
    """[m] float32, above 0: how much each image counts beside others; None where all count the same."""

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`; the copy runs beside the caller where the memory is page-locked."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in _tensors(self).items()}
        return replace(self, **moved)


class Request(NamedTuple):
    """What a reader is asked for: rows of one bucket."""

    epoch: int
    bucket: int
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


class PackedBatch(NamedTuple):
    """What a batch in a buffer consists of."""

    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    """Field name, dtype, shape and first byte of each tensor."""
    num_bytes: int
    keys: tuple[str, ...]
    problems: tuple[RowProblem, ...]


@dataclass(frozen=True)
class BatchReader:
    """Turns requests into batches. A reader process gets it as a path, two names, the seed and the tokenizers."""

    prepared: PreparedSet
    split: str
    seed: int
    tokenize: Tokenize | None
    """None where the prepared set holds the text encoders' outputs."""
    augmentation: Augmentation = NOT_AUGMENTED
    """Of images; stored latents are as they are, but for those in `.npz` files that hold mirrored ones as well."""
    captions: CaptionRules = PLAIN
    """How captions and tags become the text of each draw."""
    loss_weights: LossWeights | None = None
    """How much each image counts; None: all the same, and nothing is looked up."""
    with_masks: bool = False
    """Whether batches have masks."""
    unmasked_probability: float = 0.0
    """Share of the draws whose mask is full."""
    mixture: Mixture | None = None
    """Which stored rows an epoch's rows are; None: they are the same."""

    def read(self, request: Request, payload: NDArray[Any] | None = None) -> Batch:
        """The batch of a request; rows that cannot be read keep their place, with weight 0.

        `payload` is filled with the latents or pixels, in place of new memory.
        """

        def choose_view(key: str, repeat: int, centred: Placement) -> View:
            return draw_view(centred, self.augmentation, draw_seed(self.seed, "augment", request.epoch, key, repeat))

        choose = centred_view if self.augmentation == NOT_AUGMENTED else choose_view
        rows = self._read(request, payload, choose)
        input_ids = loss_weights = None
        if self.loss_weights is not None:
            loss_weights = torch.from_numpy(self.loss_weights.of(rows.keys, rows.captions))
        if self.tokenize is not None:
            input_ids = torch.from_numpy(self.tokenize(self._texts(rows, request.epoch)))
        cached = self.tokenize is None
        draws = zip(rows.keys, rows.repeat.tolist(), strict=True)
        seeds = [draw_seed(self.seed, "draw", request.epoch, key, repeat) for key, repeat in draws]
        return Batch(
            latents=None if rows.latents is None else torch.from_numpy(rows.latents),
            pixels=None if rows.pixels is None else torch.from_numpy(rows.pixels),
            vae_seeds=None if rows.pixels is None else _seeds([draw_seed("vae", key) for key in rows.keys]),
            input_ids=input_ids,
            text_hidden=_cached(rows.text_hidden) if cached else None,
            pooled=_cached(rows.text_pooled) if cached else None,
            time_ids=torch.from_numpy(rows.sizes.astype(np.float32)),
            weights=torch.from_numpy(request.weights * rows.ok),
            draw_seeds=_seeds(seeds),
            keys=tuple(rows.keys),
            problems=tuple(rows.problems),
            masks=None if rows.masks is None else torch.from_numpy(self._masks(rows, rows.masks, request.epoch)),
            loss_weights=loss_weights,
        )

    def _read(self, request: Request, payload: NDArray[Any] | None, choose: ChooseView) -> Rows:
        if self.mixture is None:
            return self.prepared.read(self.split, request.bucket, request.ids, payload, choose, self.with_masks)
        ids, further = self.mixture.stored(request.epoch, request.bucket, request.ids)
        rows = self.prepared.read(self.split, request.bucket, ids, payload, choose, self.with_masks)
        return replace(rows, repeat=rows.repeat + further)

    def _masks(self, rows: Rows, masks: NDArray[np.uint8], epoch: int) -> NDArray[np.uint8]:
        """Those of the rows, full where the draw goes without."""
        if self.unmasked_probability > 0:
            for i, (key, repeat) in enumerate(zip(rows.keys, rows.repeat.tolist(), strict=True)):
                if key and draw_uniform(self.seed, "unmasked", epoch, key, repeat) < self.unmasked_probability:
                    masks[i] = FULL
        return masks

    def _texts(self, rows: Rows, epoch: int) -> list[str]:
        """One text per row, empty where the row has no record because it could not be read."""
        rules, is_random, texts = self.captions, self.captions.is_random, []
        for record, key, repeat in zip(rows.captions, rows.keys, rows.repeat.tolist(), strict=True):
            seed = draw_seed(self.seed, "caption", epoch, key, repeat) if is_random else 0
            texts.append(compose(record, rules, seed, epoch) if record else "")
        return texts

    def fill(self, buffer: Tensor, request: Request) -> PackedBatch:
        """Read a request's batch into a buffer [bytes] uint8."""
        shape, dtype = self.prepared.payload_shape(self.split, request.bucket)
        num_bytes = len(request.ids) * dtype.itemsize * math.prod(shape)
        room = buffer[:num_bytes].numpy().view(dtype).reshape(len(request.ids), *shape)
        return pack(self.read(request, room), buffer)

    def batch_bytes(self, rows_of_bucket: Sequence[int]) -> int:
        """Most bytes that a batch fills, which holds so many rows where it is of this bucket."""
        buckets = range(len(self.prepared.buckets(self.split)))
        payloads = [self.prepared.payload_shape(self.split, bucket) for bucket in buckets]
        positions, hidden_width, pooled_width = self.prepared.text_shape or (0, 0, 0)
        other_bytes = max(_TOKEN_BYTES, 2 * (positions * hidden_width + pooled_width)) + _OTHER_BYTES
        masks = [math.prod(self.prepared.mask_shape(self.split, b)) if self.with_masks else 0 for b in buckets]
        row_bytes = [
            dtype.itemsize * math.prod(shape) + mask_bytes + other_bytes
            for (shape, dtype), mask_bytes in zip(payloads, masks, strict=True)
        ]
        most = max(rows * size for rows, size in zip(rows_of_bucket, row_bytes, strict=True))
        return most + len(fields(Batch)) * _ALIGN


def _seeds(seeds: Sequence[int]) -> Tensor:
    return torch.tensor(seeds, dtype=torch.int64)


def _cached(outputs: NDArray[np.float16] | None) -> Tensor:
    if outputs is None:
        raise ValueError("the prepared set holds no text encoder outputs, so the reader needs tokenizers")
    return torch.from_numpy(outputs)


@dataclass(frozen=True, eq=False)
class StepBatches:
    """One rank's part of one optimizer step."""

    epoch: int
    bucket: int
    batches: Iterator[Batch]
    """The step's micro-batches; all must be taken before the next step. A generator, so that the first can be
    trained on while the last is read."""
    weight: float
    """Sum of the step's weights over all ranks, as planned: rows that turn out to be unreadable still count."""
    position_after: Position
    """What to save once the step is taken: what was read ahead does not count."""


class Loader:
    """Iterates over optimizer steps without end; close it, or use it in a `with`, to end its readers."""

    def __init__(
        self,
        batches: Iterator[Batch],
        steps: deque[tuple[StepRows, Position]],
        size: int,
        end_readers: Callable[[], None],
    ) -> None:
        """`steps` holds at least the next step when one is taken; each has `size` of the `batches`."""
        self.wait_s = 0.0
        """Seconds that the caller has waited for batches since the loader was opened."""
        self._batches, self._steps, self._size, self._end_readers = batches, steps, size, end_readers
        self._left = 0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> StepBatches:
        if self._left:
            raise RuntimeError(f"{self._left} micro-batches of the step before were not taken")
        rows, after = self._steps.popleft()
        self._left = self._size
        return StepBatches(rows.epoch, rows.bucket, self._micro_batches(), float(rows.weights.sum()), after)

    def _micro_batches(self) -> Iterator[Batch]:
        while self._left:
            begin = time.perf_counter()
            batch = next(self._batches)
            self.wait_s += time.perf_counter() - begin
            self._left -= 1
            yield batch

    def close(self) -> None:
        """End the readers; what they had read ahead is dropped."""
        self._end_readers()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_loader(
    reader: BatchReader,
    position: Position,
    *,
    rank: int,
    world: int,
    micro_batch: int,
    accumulation: int,
    workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    left_out: Sequence[Stretch] = (),
) -> Loader:
    """Start reading one rank's micro-batches from `position` on.

    Args:
        position: the same on all ranks; its global batch is at most world * micro_batch * accumulation.
        micro_batch: rows of a batch; times the position's factor of the bucket.
        workers: reader processes; 0 reads in two threads of this process.
        prefetch_batches: micro-batches to keep ready.
        pin_memory: put batches into page-locked memory; needs CUDA.
        left_out: of this data's order.
    """
    steps: deque[tuple[StepRows, Position]] = deque()
    stored_rows = reader.prepared.rows_per_bucket(reader.split)
    rows_of = reader.mixture.rows if reader.mixture else same_each_epoch(stored_rows)
    batch_rows = [micro_batch * factor for factor in position.batch_factors]

    def requests() -> Iterator[Request]:
        for rows, after in remaining_steps(rows_of, reader.seed, position, left_out):
            steps.append((rows, after))
            for ids, weights in share(rows, rank, world, batch_rows[rows.bucket], accumulation):
                yield Request(rows.epoch, rows.bucket, ids, weights)

    most_bytes = reader.batch_bytes(batch_rows)
    if workers:
        readers = ReaderProcesses(reader.fill, requests(), most_bytes, workers, prefetch_batches)
        # Copied out of the slot in one piece, because the slot is filled again.
        copy = Tensor.pin_memory if pin_memory else Tensor.clone
        batches = (unpack(copy(buffer[: packed.num_bytes]), packed) for buffer, packed in readers)
        return Loader(batches, steps, accumulation, readers.close)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="data-reader")
    batches = _read_in_threads(pool, reader, requests(), most_bytes, prefetch_batches, pin_memory)
    return Loader(batches, steps, accumulation, partial(pool.shutdown, cancel_futures=True))


def _read_in_threads(
    pool: ThreadPoolExecutor,
    reader: BatchReader,
    requests: Iterator[Request],
    most_bytes: int,
    prefetch_batches: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    buffers = _Buffers(most_bytes)

    def read(request: Request) -> Batch:
        shape, dtype = reader.prepared.payload_shape(reader.split, request.bucket)
        batch = reader.read(request, buffers.take((len(request.ids), *shape), dtype))
        return replace(batch, **{n: t.pin_memory() for n, t in _tensors(batch).items()}) if pin_memory else batch

    ahead = deque(pool.submit(read, next(requests)) for _ in range(prefetch_batches))

    def batches() -> Iterator[Batch]:
        for request in requests:
            ahead.append(pool.submit(read, request))
            yield ahead.popleft().result()

    return batches()


class _Buffers:
    """Memory for payloads, used again once nobody holds what was read into it. Safe to use from several threads.

    In the heaps that the C library gives to threads, buffers of ever other sizes leave gaps between what is still in
    use, and the process grows by ten megabytes in the course of an epoch; and pages that are new for every batch take
    half as long again as reading it.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._free: deque[mmap.mmap] = deque()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[Any]:
        """An array of at most `num_bytes`; what lies in it is left over from earlier ones."""
        try:
            pages = self._free.pop()
        except IndexError:
            pages = mmap.mmap(-1, self._num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(pages, dtype, math.prod(shape))
        # Every view of it, and every tensor, keeps this array alive, because it is the last one above the pages.
        weakref.finalize(array, self._free.append, pages).atexit = False
        return array.reshape(shape)


def pack(batch: Batch, buffer: Tensor) -> PackedBatch:
    """Put a batch's tensors into a buffer [bytes] uint8, the latents or pixels first; what lies there already stays."""
    layout, end = [], 0
    for name, tensor in _tensors(batch).items():
        layout.append((name, tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // _ALIGN) * _ALIGN
    packed = PackedBatch(tuple(layout), end, batch.keys, batch.problems)
    for name, view in _views(buffer, packed).items():
        tensor = getattr(batch, name)
        if tensor.data_ptr() != view.data_ptr():
            view.copy_(tensor)
    return packed


def unpack(buffer: Tensor, packed: PackedBatch) -> Batch:
    """The batch whose tensors lie in the buffer; nothing is copied."""
    absent = {field.name: None for field in fields(Batch)}
    return Batch(**{**absent, **_views(buffer, packed), "keys": packed.keys, "problems": packed.problems})


def _views(buffer: Tensor, packed: PackedBatch) -> dict[str, Tensor]:
    views = {}
    for name, dtype, shape, begin in packed.layout:
        end = begin + dtype.itemsize * math.prod(shape)
        views[name] = buffer[begin:end].view(dtype).view(shape)
    return views


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}

"""From a prepared set to micro-batches: the same by threads and by processes, and what happens when a reader ends."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.data.records import caption_text
from tests.data.small_set import byte_tokens, failing_tokens, write_small_set
from trainer.data.buckets import Bucket
from trainer.data.captions import CaptionRules, caption_record, compose
from trainer.data.loader import Batch, BatchReader, Loader, Request, open_loader, pack, unpack
from trainer.data.sampler import Position, planned_steps, same_each_epoch, share, with_global_batch
from trainer.data.store.rows import RowProblem
from trainer.data.store.snapshot import PreparedSet
from trainer.keyed import draw_seed, draw_uniform

TALL, SQUARE, WIDE = Bucket(128, 64), Bucket(64, 64), Bucket(64, 128)
SEED = 7
LONG_S = 120  # for what takes a moment, on a machine that has other work
ONE_READER = pytest.param(1, marks=pytest.mark.e2e)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    root = tmp_path_factory.mktemp("prepared")
    return PreparedSet.open(write_small_set(root, {TALL: 7, SQUARE: 1, WIDE: 12}, repeats=2))


def _open(
    reader: BatchReader, position: Position, workers: int, rank: int = 0, world: int = 1, accumulation: int = 1
) -> Loader:
    return open_loader(
        reader,
        position,
        rank=rank,
        world=world,
        micro_batch=3,
        accumulation=accumulation,
        workers=workers,
        prefetch_batches=3,
        pin_memory=False,
    )


def _assert_equal(batch: Batch, expected: Batch) -> None:
    for name, value in vars(expected).items():
        other = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        else:
            assert value == other, name


@pytest.mark.parametrize("workers", [0, ONE_READER, pytest.param(2, marks=pytest.mark.e2e)])
def test_batches_come_as_planned(prepared: PreparedSet, workers: int) -> None:
    """Rank 1 of 2, two micro-batches of 3 a step, over the end of an epoch; every field is what was stored."""
    reader = BatchReader(prepared, "train", SEED, byte_tokens)
    start = Position.start(3, 10)
    rng_before = torch.get_rng_state()
    with _open(reader, start, workers, rank=1, world=2, accumulation=2) as loader:
        for (rows, after), step, _ in zip(
            planned_steps(same_each_epoch(prepared.rows_per_bucket("train")), SEED, start),
            loader,
            range(9),
            strict=False,
        ):
            assert (step.epoch, step.bucket, step.position_after) == (rows.epoch, rows.bucket, after)
            assert step.weight == rows.weights.sum()
            batches = list(step.batches)
            for batch, (ids, weights) in zip(batches, share(rows, 1, 2, 3, 2), strict=True):
                assert np.array_equal(batch.weights.numpy(), weights)
                _check_rows(batch, prepared.buckets("train")[rows.bucket], ids // 2, ids % 2, rows.epoch)
        assert after.epoch == 1
        assert loader.wait_s > 0
    assert torch.equal(torch.get_rng_state(), rng_before)


def _check_rows(batch: Batch, bucket: Bucket, images: np.ndarray, repeats: np.ndarray, epoch: int) -> None:
    """`images` are the images' numbers, negative for padding."""
    height, width = bucket.height_px, bucket.width_px
    assert batch.latents.shape == (len(images), 4, height // 8, width // 8) and batch.latents.dtype == torch.float16
    assert batch.input_ids is not None and batch.text_hidden is None and batch.pooled is None
    for i, (image, repeat) in enumerate(zip(images.tolist(), repeats.tolist(), strict=True)):
        if image < 0:
            assert batch.keys[i] == "" and not batch.latents[i].any() and not batch.input_ids[i, 0].any()
            continue
        key = f"{height}x{width}/{image}"
        assert batch.keys[i] == key
        assert (batch.latents[i] == image).all()
        assert batch.time_ids[i].tolist() == [image, 1, 2, 3, height, width] and batch.time_ids.dtype == torch.float32
        assert bytes(batch.input_ids[i, 0, : len(f"photo {image}")].tolist()).decode() == f"photo {image}"
        assert batch.draw_seeds[i] == draw_seed(SEED, "draw", epoch, key, repeat)
    assert batch.problems == ()


def test_ranks_together_take_an_epoch_once(prepared: PreparedSet) -> None:
    reader = BatchReader(prepared, "train", SEED, byte_tokens)
    seen: Counter[str] = Counter()
    for rank in range(3):
        with _open(reader, Position.start(3, 9), workers=0, rank=rank, world=3) as loader:
            for step in loader:
                for batch in step.batches:
                    seen.update(key for key, weight in zip(batch.keys, batch.weights, strict=True) if weight)
                if step.position_after.epoch == 1:
                    break
    assert len(seen) == 20 and set(seen.values()) == {2}


def test_the_number_of_workers_may_change_within_an_epoch(tmp_path: Path) -> None:
    """4 -> 3 -> 8 workers of 2 images, 30 steps in all: every row of the epoch once, one shape in all ranks' steps."""
    root = write_small_set(tmp_path / "prepared", {TALL: 61, SQUARE: 1, WIDE: 70, Bucket(128, 128): 3}, repeats=2)
    reader = BatchReader(PreparedSet.open(root), "train", SEED, byte_tokens)
    rows_per_bucket = reader.prepared.rows_per_bucket("train")
    position, seen = Position.start(4, 0), Counter()
    for world, steps in ((4, 10), (3, 9), (8, 100)):
        position = (
            with_global_batch(position, rows_per_bucket, SEED, 2 * world) if seen else Position.start(4, 2 * world)
        )
        ends, shapes = set(), [[] for _ in range(world)]
        for rank in range(world):
            with _open(reader, position, workers=0, rank=rank, world=world) as loader:
                for _, step in zip(range(steps), loader, strict=False):
                    for batch in step.batches:
                        shapes[rank].append(batch.latents.shape)
                        pairs = zip(batch.draw_seeds.tolist(), batch.weights, strict=True)
                        seen.update(seed for seed, weight in pairs if weight)
                    if step.position_after.starts_epoch:
                        break
                ends.add(step.position_after)
        (position,) = ends
        assert all(rank_shapes == shapes[0] for rank_shapes in shapes)
    assert position == Position.start(4, 16, epoch=1)
    assert len(seen) == 2 * 135 and set(seen.values()) == {1}


@pytest.mark.parametrize("workers", [0, ONE_READER])
def test_what_was_read_ahead_is_not_lost_at_a_resume(prepared: PreparedSet, workers: int) -> None:
    reader = BatchReader(prepared, "train", SEED, byte_tokens)
    with _open(reader, Position.start(3, 3), workers=0) as loader:
        uninterrupted = [[batch.keys for batch in next(loader).batches] for _ in range(12)]
    position, resumed = Position.start(3, 3), []
    for _ in range(4):
        with _open(reader, position, workers) as loader:
            for _ in range(3):
                step = next(loader)
                resumed.append([batch.keys for batch in step.batches])
                position = step.position_after
    assert resumed == uninterrupted


@pytest.mark.parametrize("workers", [0, ONE_READER])
def test_a_damaged_row_costs_that_row_alone(tmp_path: Path, workers: int) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 5})
    shard = root / "64x64-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[4096 + 2 * 512 + 100] ^= 1  # row 2: latents of 4 x 8 x 8 values of two bytes lie at 4096
    shard.write_bytes(content)
    reader = BatchReader(PreparedSet.open(root), "train", SEED, byte_tokens)
    weights, problems = {}, []
    with _open(reader, Position.start(1, 3), workers) as loader:
        for _ in range(2):
            for batch in next(loader).batches:
                problems += batch.problems
                for key, weight, latents in zip(batch.keys, batch.weights.tolist(), batch.latents, strict=True):
                    weights[key] = weight
                    assert weight or not latents.any()
    assert weights == {"64x64/0": 1, "64x64/1": 1, "": 0, "64x64/3": 1, "64x64/4": 1}
    assert problems == [RowProblem("64x64-0.safetensors", 2, 4096 + 2 * 512, "checksum mismatch in the latents")]


@pytest.mark.parametrize("workers", [0, ONE_READER])
def test_cached_text_takes_the_place_of_tokens(tmp_path: Path, workers: int) -> None:
    def encode_text(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array([int(caption_text(caption).split()[1]) for caption in captions], dtype=np.float32)
        return np.full((len(captions), 77, 6), numbers[:, None, None]), np.full((len(captions), 5), -numbers[:, None])

    root = write_small_set(tmp_path / "prepared", {SQUARE: 4}, encode_text=encode_text)
    with _open(BatchReader(PreparedSet.open(root), "train", SEED, None), Position.start(1, 3), workers) as loader:
        for _ in range(2):
            (batch,) = next(loader).batches
            assert batch.input_ids is None and batch.text_hidden is not None and batch.pooled is not None
            assert batch.text_hidden.shape == (3, 77, 6) and batch.pooled.shape == (3, 5)
            numbers = batch.latents[:, 0, 0, 0]
            assert torch.equal(batch.text_hidden[:, 76, 5], numbers) and torch.equal(batch.pooled[:, 4], -numbers)


def test_no_tokenizer_needs_cached_text(prepared: PreparedSet) -> None:
    request = Request(0, 0, np.array([0]), np.ones(1, dtype=np.float32))
    with pytest.raises(ValueError, match="needs tokenizers"):
        BatchReader(prepared, "train", SEED, None).read(request)


def test_texts_follow_from_seed_epoch_key_and_repeat(tmp_path: Path) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 4}, repeats=2)
    prepared, rules = PreparedSet.open(root), CaptionRules(wildcards=True, prefix="{a|b|c|d|e|f|g|h}" * 4)
    reader = BatchReader(prepared, "train", SEED, byte_tokens, captions=rules)

    def texts(reader: BatchReader, epoch: int, ids: list[int]) -> list[str]:
        batch = reader.read(Request(epoch, 0, np.array(ids), np.ones(len(ids), dtype=np.float32)))
        assert batch.input_ids is not None
        return [bytes(row[row > 0].tolist()).decode() for row in batch.input_ids[:, 0]]

    found = texts(reader, 3, [0, 1, 2, 5, -1])
    for text, number, repeat in zip(found, (0, 0, 1, 2), (0, 1, 0, 1), strict=False):
        seed = draw_seed(SEED, "caption", 3, f"64x64/{number}", repeat)
        assert text == compose(caption_record(f"photo {number}"), rules, seed, 3)
    assert found[4] == "" and found[0] != found[1]
    assert texts(reader, 3, [5, 0]) == [found[3], found[0]] and texts(reader, 4, [0, 1, 2, 5]) != found[:4]
    settled = replace(reader, captions=rules.as_settled())
    assert texts(settled, 3, [0]) == texts(settled, 4, [1]) == ["aaaa photo 0"]


def test_a_batch_survives_its_buffer(prepared: PreparedSet) -> None:
    reader = BatchReader(prepared, "train", SEED, byte_tokens)
    request = Request(3, 2, np.array([0, 5, -1]), np.array([1, 1, 0], dtype=np.float32))
    expected = reader.read(request)
    buffer = torch.full((reader.batch_bytes([3, 3, 3]),), 255, dtype=torch.uint8)
    _assert_equal(unpack(buffer, pack(expected, buffer)), expected)
    _assert_equal(unpack(buffer, reader.fill(buffer, request)), expected)


def test_memory_is_used_again_only_when_nobody_holds_it(prepared: PreparedSet) -> None:
    with _open(BatchReader(prepared, "train", SEED, byte_tokens), Position.start(3, 3), workers=0) as loader:
        held, addresses = [], []
        for number, step in zip(range(60), loader, strict=False):
            (batch,) = step.batches
            assert batch.latents is not None
            addresses.append(batch.latents.data_ptr())
            if number < 5:
                view = batch.latents[1:, :, 0]
                held.append((view, view.clone()))
        assert all(torch.equal(view, copy) for view, copy in held)
        assert not set(addresses[:5]) & set(addresses[5:]) and len(set(addresses)) < 20


def test_a_reader_travels_light(prepared: PreparedSet) -> None:
    assert len(pickle.dumps(BatchReader(prepared, "train", SEED, byte_tokens))) < 10_000


@pytest.mark.parametrize("workers", [0, ONE_READER])
def test_an_error_while_reading_reaches_the_caller(prepared: PreparedSet, workers: int) -> None:
    reader = BatchReader(prepared, "train", SEED, failing_tokens)
    with _open(reader, Position.start(3, 3), workers) as loader, pytest.raises(ArithmeticError, match="for 3 captions"):
        list(next(loader).batches)
    _wait_until(lambda: len(_readers_and_server()) <= 1)


def test_micro_batches_cannot_be_left_out(prepared: PreparedSet) -> None:
    with _open(BatchReader(prepared, "train", SEED, byte_tokens), Position.start(3, 6), 0, accumulation=2) as loader:
        next(next(loader).batches)
        with pytest.raises(RuntimeError, match="1 micro-batches of the step before"):
            next(loader)


def _readers_and_server() -> list[psutil.Process]:
    """Processes under this one that run forks of the server, the server itself first."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if any("forkserver" in part for part in _command_line(process))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has ended since it was listed
        return []


@pytest.mark.e2e
def test_signals_to_the_group_leave_the_readers_at_work(prepared: PreparedSet) -> None:
    with _open(BatchReader(prepared, "train", SEED, byte_tokens), Position.start(3, 3), workers=2) as loader:
        list(next(loader).batches)
        processes = _readers_and_server()
        assert len(processes) == 3
        for number in (signal.SIGINT, signal.SIGTERM):
            # Sent by another process, as a terminal or a job scheduler does.
            subprocess.run(["kill", f"-{number}", *(str(process.pid) for process in processes)], check=True)
        for _ in range(20):
            list(next(loader).batches)
        assert [process.pid for process in _readers_and_server()] == [process.pid for process in processes]
    _wait_until(lambda: [process.pid for process in _readers_and_server()] == [processes[0].pid])


@pytest.mark.e2e
def test_a_killed_reader_is_an_error_that_names_it(prepared: PreparedSet) -> None:
    with _open(BatchReader(prepared, "train", SEED, byte_tokens), Position.start(3, 3), workers=2) as loader:
        list(next(loader).batches)
        victim = _readers_and_server()[-1]
        victim.kill()
        with pytest.raises(RuntimeError, match=rf"reader process {victim.pid} \(signal SIGKILL\) died"):
            for step in loader:
                list(step.batches)


@pytest.mark.e2e
def test_readers_end_with_their_parent(prepared: PreparedSet) -> None:
    script = Path(__file__).with_name("loader_script.py")
    parents = {
        ending: subprocess.Popen(
            [sys.executable, script, prepared.path, ending],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for ending in ("kill", "fail")
    }
    readers = {}
    for ending, parent in parents.items():
        assert parent.stdout is not None
        rows, reader = parent.stdout.readline().split()
        assert rows == "2"
        readers[ending] = int(reader)
    parents["kill"].kill()
    for parent in parents.values():
        error = parent.communicate(timeout=LONG_S)[1]
    assert "ArithmeticError: while batches are under way" in error
    assert [parent.returncode for parent in parents.values()] == [-signal.SIGKILL, 1]
    _wait_until(lambda: not any(psutil.pid_exists(reader) for reader in readers.values()))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """Eleven images of which each has a mask of one number, its own."""
    root = tmp_path_factory.mktemp("masked")
    return PreparedSet.open(write_small_set(root, {SQUARE: 11, WIDE: 6}, repeats=2, with_masks=True))


@pytest.mark.parametrize("workers", [0, ONE_READER, pytest.param(2, marks=pytest.mark.e2e)])
def test_masks_come_with_their_images(masked: PreparedSet, workers: int) -> None:
    """The same by threads and processes; some draws go without, which follows from seed, epoch, image and repeat."""
    plain = BatchReader(masked, "train", SEED, byte_tokens)
    reader = replace(plain, with_masks=True, unmasked_probability=0.4)
    drawn: list[bool] = []
    with _open(plain, Position.start(2, 3), 0) as usual, _open(reader, Position.start(2, 3), workers) as loader:
        for step, without, _ in zip(loader, usual, range(36), strict=False):
            (batch,), (other,) = step.batches, without.batches
            assert batch.masks is not None and batch.masks.dtype == torch.uint8
            _assert_equal(replace(batch, masks=None), other)
            for i, key in enumerate(batch.keys):
                if not key:
                    assert not batch.masks[i].any() and batch.weights[i] == 0
                    continue
                seen = {
                    repeat
                    for repeat in range(2)
                    if draw_seed(SEED, "draw", step.epoch, key, repeat) == int(batch.draw_seeds[i])
                }
                goes_without = draw_uniform(SEED, "unmasked", step.epoch, key, *seen) < 0.4
                drawn.append(goes_without)
                assert (batch.masks[i] == (255 if goes_without else int(key.rpartition("/")[2]))).all()
    assert len(drawn) > 60 and 0.25 < sum(drawn) / len(drawn) < 0.55


def test_masks_have_room_in_the_readers_buffers(masked: PreparedSet) -> None:
    plain = BatchReader(masked, "train", SEED, byte_tokens)
    reader = replace(plain, with_masks=True)
    assert reader.batch_bytes([3, 3]) == plain.batch_bytes([3, 3]) + 3 * 8 * 16
    buffer = torch.zeros(reader.batch_bytes([3, 3]), dtype=torch.uint8)
    for bucket in range(2):
        request = Request(0, bucket, np.array([0, 5, 9]), np.ones(3, dtype=np.float32))
        expected = reader.read(request)
        _assert_equal(unpack(buffer, reader.fill(buffer, request)), expected)

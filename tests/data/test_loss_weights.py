"""What an image counts: by its source, by itself, by its tags; computed by hand, and as it arrives in batches."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.small_set import byte_tokens, write_small_set
from trainer.config.values import MOST_LOSS_WEIGHT as MOST_OF_CONFIG
from trainer.data.buckets import Bucket
from trainer.data.captions import MOST_LOSS_WEIGHT, caption_record, compose, has_no_text
from trainer.data.captions import PLAIN as AS_IT_IS
from trainer.data.loader import BatchReader, Request, open_loader
from trainer.data.loss_weights import LossWeights, TagBalance, TagSeparators
from trainer.data.sampler import Position
from trainer.data.store.snapshot import PreparedSet

TALL, SQUARE = Bucket(128, 64), Bucket(64, 64)
COMMAS = TagSeparators()


def weighed(i: int) -> bytes:
    return caption_record(f"photo {i}", "solo, blurry" if i % 3 == 0 else "", 0.5 + i / 4 if i % 2 else 1.0)


WEIGHTS = LossWeights({"64x64": 0.3}, per_image=True, listed={"blurry": 0.2})


def by_hand(key: str) -> float:
    source, _, number = key.partition("/")
    i = int(number)
    own = 0.5 + i / 4 if i % 2 else 1.0
    return (0.3 if source == "64x64" else 1.0) * own * (0.2 if i % 3 == 0 else 1.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    root = tmp_path_factory.mktemp("prepared")
    return PreparedSet.open(write_small_set(root, {TALL: 7, SQUARE: 12}, repeats=2, record=weighed))


def test_a_record_keeps_a_weight_that_is_not_1() -> None:
    assert caption_record("a", "b", 0.1) == b'{"caption":"a","tags":"b","loss_weight":0.1}'
    assert caption_record("a", "b", 1.0) == caption_record("a", "b") == b'{"caption":"a","tags":"b"}'
    assert compose(caption_record("a", "", 0.1), AS_IT_IS, 0, 0) == "a"
    said = caption_record('x","loss_weight":7,"y":"')
    assert json.loads(said) == {"caption": 'x","loss_weight":7,"y":"'}
    empty = [caption_record().decode(), caption_record("", "", 0.5).decode()]
    filled = [
        caption_record("a", "", 0.5).decode(),
        caption_record("", "a").decode(),
        caption_record("", "a", 2).decode(),
    ]
    assert [has_no_text(record) for record in empty + filled] == [True, True, False, False, False]
    assert MOST_LOSS_WEIGHT == MOST_OF_CONFIG


@pytest.mark.parametrize(
    ("tags", "separators", "expected"),
    [
        (" solo,1girl , ,solo", COMMAS, ["solo", "1girl"]),
        ("a, b|||c;;;d", TagSeparators(",", ("|||", ";;;")), ["a", "b", "c", "d"]),
        ("a, b;c, d", TagSeparators(";"), ["a, b", "c, d"]),
        ("\n\nfirst, line\nsecond", COMMAS, ["first", "line"]),
        ("", COMMAS, []),
        (None, COMMAS, []),
    ],
)
def test_tags_are_those_that_are_trained(tags: str | None, separators: TagSeparators, expected: list[str]) -> None:
    assert separators.split({"caption": "c, d", "tags": tags}) == expected


def test_factors_multiply_up_to_a_limit() -> None:
    balance = TagBalance({"solo": 0.4, "1girl": 0.5}, 2.0)
    weights = LossWeights({"regs": 0.5}, True, {"rare": 8.0, "blurry": 0.25}, balance, TagSeparators(",", ("|||",)))
    assert LossWeights.from_json(json.loads(json.dumps(weights.to_json()))) == weights
    assert LossWeights.from_json(json.loads(json.dumps(WEIGHTS.to_json()))) == WEIGHTS

    def of(key: str, tags: str, own: float = 1.0) -> float:
        return float(weights.of([key], [caption_record("c", tags, own).decode()])[0])

    assert of("photos/a", "") == 1.0
    assert of("regs/a", "", 3.0) == np.float32(1.5)
    assert of("photos/a", "solo, 1girl") == np.float32(0.45)
    assert of("photos/regs", "solo, rare, blurry") == np.float32(8.0 * 0.25 * (0.4 + 2.0 + 2.0) / 3)
    assert of("photos/a", "rare", 80.0) == MOST_LOSS_WEIGHT
    assert weights.of(["", "regs/lost"], ["", ""]).tolist() == [1.0, 1.0]  # padding, and a row that was not read
    assert LossWeights({"regs": 0.5}).of(["regs/a", "new/a"], ["no JSON is read", "{}"]).tolist() == [0.5, 1.0]


def test_nothing_is_carried_where_all_count_the_same(prepared: PreparedSet) -> None:
    request = Request(0, 0, np.arange(4), np.ones(4, dtype=np.float32))
    assert BatchReader(prepared, "train", 0, byte_tokens).read(request).loss_weights is None
    weighted = BatchReader(prepared, "train", 0, byte_tokens, loss_weights=WEIGHTS)
    plain = vars(BatchReader(prepared, "train", 0, byte_tokens).read(request))
    for name, value in vars(weighted.read(request)).items():
        if name != "loss_weights":
            assert torch.equal(value, plain[name]) if isinstance(value, torch.Tensor) else value == plain[name]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.e2e)])
def test_weights_arrive_with_their_images_however_they_are_dealt_out(prepared: PreparedSet, workers: int) -> None:
    reader = BatchReader(prepared, "train", 3, byte_tokens, loss_weights=WEIGHTS)
    assert len(pickle.dumps(reader)) < 10_000
    steps: dict[tuple[int, int], list[dict[str, float]]] = {}
    for world, accumulation in ((1, 4), (4, 1), (2, 2)) if not workers else ((1, 2),):
        steps[world, accumulation] = [{} for _ in range(6)]
        for rank in range(world):
            start = Position.start(2, 8)
            cut = {"rank": rank, "world": world, "micro_batch": 8 // world // accumulation}
            cut |= {"accumulation": accumulation, "workers": workers, "prefetch_batches": 2, "pin_memory": False}
            with open_loader(reader, start, **cut) as loader:
                for step in steps[world, accumulation]:
                    for batch in next(loader).batches:
                        assert batch.loss_weights is not None and batch.loss_weights.dtype == torch.float32
                        for key, weight in zip(batch.keys, batch.loss_weights.tolist(), strict=True):
                            if key:
                                step[key] = weight
    first, *others = steps.values()
    assert all(other == first for other in others)
    seen = {key: weight for step in first for key, weight in step.items()}
    assert len(seen) == 19
    assert seen == {key: pytest.approx(by_hand(key), rel=1e-7) for key in seen}


def test_a_damaged_row_weighs_1_and_counts_nothing(tmp_path: Path) -> None:
    root = write_small_set(tmp_path, {SQUARE: 5}, record=weighed)
    shard = next(root.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[data.rindex(b"photo 3")] ^= 1
    shard.write_bytes(data)
    reader = BatchReader(PreparedSet.open(root), "train", 0, byte_tokens, loss_weights=WEIGHTS)
    batch = reader.read(Request(0, 0, np.arange(5), np.ones(5, dtype=np.float32)))
    assert batch.weights.tolist() == [1, 1, 1, 0, 1] and len(batch.problems) == 1
    assert batch.loss_weights is not None
    expected = [1.0 if i == 3 else by_hand(f"64x64/{i}") for i in range(5)]
    np.testing.assert_allclose(batch.loss_weights.numpy(), expected, rtol=1e-7)

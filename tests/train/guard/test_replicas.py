"""Whose weights are others than the workers': found for every flipped bit, and by majority."""

import numpy as np
import pytest
import torch

from trainer.train.guard.replicas import Odd, find_odd, tensors_hash

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("hashes", "odd"),
    [
        ([7, 7, 7, 7], None),
        ([7, 7, 7, 8], Odd((3,), True)),
        ([8, 7, 7], Odd((0,), True)),
        ([7, 8, 7, 9, 7], Odd((1, 3), True)),
        ([7, 8], Odd((0, 1), False)),
        ([7, 7, 8, 8], Odd((0, 1, 2, 3), False)),
        ([7, 8, 9], Odd((0, 1, 2), False)),
        ([7, 7, 8, 9], Odd((0, 1, 2, 3), False)),  # half of them are no majority
    ],
)
def test_the_fewer_are_odd(hashes: list[int], odd: Odd | None) -> None:
    assert find_odd(hashes) == odd


def test_replicas_of_shares_are_compared_with_each_other() -> None:
    """Of two groups of two, workers 0 and 2 have the same, and 1 and 3."""
    assert find_odd([7, 8, 7, 8], 2) is None
    assert find_odd([7, 8, 7, 9], 2) == Odd((1, 3), False)
    assert find_odd([7, 8, 7, 9, 7, 8], 2) == Odd((3,), True)
    assert find_odd([1, 2, 3, 1, 2, 4, 1, 2, 3], 3) == Odd((5,), True)
    assert find_odd([7, 8, 9, 8, 7, 9], 2) == Odd((2, 5), True)


def tensors() -> dict[str, torch.Tensor]:
    """Of all dtypes that a run holds, one longer than a chunk, one not contiguous, one a scalar."""
    torch.manual_seed(0)
    wide = torch.randn(3, 5, 7, 4).to(memory_format=torch.channels_last)
    return {
        "fp32": torch.randn((1 << 20) + 13),
        "bf16": torch.randn(999).bfloat16(),
        "fp16": torch.randn(50).half(),
        "8-bit": torch.randint(256, (77,), dtype=torch.uint8),
        "fp64": torch.randn(9, dtype=torch.float64),
        "int64": torch.arange(5),
        "wide": wide,
        "scalar": torch.tensor(3.0),
    }


def test_every_flipped_bit_changes_the_hash() -> None:
    random, held = np.random.default_rng(0), tensors()
    sound = tensors_hash(held.values(), CPU)
    for name, tensor in held.items():
        content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()  # type: ignore[call-overload]
        for _ in range(5):
            place, bit = random.integers(len(content)), 1 << random.integers(8)
            content[place] ^= bit
            assert tensors_hash(held.values(), CPU) != sound, name
            content[place] ^= bit
    assert tensors_hash(held.values(), CPU) == sound


def test_places_count() -> None:
    one = torch.tensor([1.0, 2.0])
    assert tensors_hash([one], CPU) != tensors_hash([one.flip(0)], CPU)
    assert tensors_hash([one, one + 1], CPU) != tensors_hash([one + 1, one], CPU)


def test_hashing_changes_nothing() -> None:
    held = tensors()
    tensors_hash(held.values(), CPU)
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors().items())

"""The keyed shuffles: bijections, even, and the same stream forever."""

import hashlib

import numpy as np
import pytest

from trainer.data.permutation import SORT_BELOW, permuted, shuffled_range

KEY = 0x5EED_5EED_5EED_5EED


@pytest.mark.parametrize("size", [1, 2, 5, 257, 65_535, 65_536, 65_537, 65_551, 99_991, 1_000_003])
@pytest.mark.parametrize("key", [0, KEY, (1 << 63) - 1])
def test_every_value_once(size: int, key: int) -> None:
    values = permuted(np.arange(size), size, key)
    assert values.dtype == np.int64
    assert np.array_equal(np.bincount(values, minlength=size), np.ones(size))


@pytest.mark.parametrize("size", [1000, 200_003])
def test_a_position_does_not_depend_on_what_is_asked_with_it(size: int) -> None:
    places = np.arange(size)
    whole = permuted(places, size, KEY)
    picked = np.random.default_rng(0).integers(0, size, 300)
    assert np.array_equal(permuted(picked, size, KEY), whole[picked])
    assert permuted(np.array([size - 1]), size, KEY)[0] == whole[-1]
    assert len(permuted(np.empty(0, dtype=np.int64), size, KEY)) == 0


def test_all_orders_of_five_are_equally_likely() -> None:
    draws = 12_000
    orders = [tuple(shuffled_range(5, key).tolist()) for key in range(draws)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 120
    expected = draws / 120
    chi2_per_df = ((counts - expected) ** 2 / expected).sum() / 119
    assert 0.7 < chi2_per_df < 1.35  # 2.5 standard deviations


def test_a_large_shuffle_looks_random() -> None:
    size, cells = 300_007, 64
    for key in (1, 2, 3):
        values = permuted(np.arange(size), size, key)
        cell = (np.arange(size) * cells // size) * cells + values * cells // size
        counts = np.bincount(cell, minlength=cells * cells)
        chi2_per_df = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / (cells - 1) ** 2
        assert abs(chi2_per_df - 1) < 4 * np.sqrt(2 / (cells - 1) ** 2)
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / np.sqrt(size)
        assert np.count_nonzero(np.abs(np.diff(values)) == 1) < 12  # neighbours kept together: 2 expected


def test_keys_give_unrelated_orders() -> None:
    size = 70_001
    orders = [permuted(np.arange(size), size, key) for key in (4, 5, 5 + (1 << 40))]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert np.count_nonzero(orders[first] == orders[second]) < 10  # 1 expected
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 4 / np.sqrt(size)


def test_the_stream_has_not_changed() -> None:
    """A changed stream would reorder the epoch of every run that is resumed after the upgrade."""
    assert shuffled_range(8, KEY).tolist() == GOLDEN_SMALL
    assert permuted(np.arange(8), 1_000_003, KEY).tolist() == GOLDEN_LARGE
    whole = permuted(np.arange(SORT_BELOW), SORT_BELOW, KEY)
    assert hashlib.sha256(whole.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_DIGEST


GOLDEN_SMALL = [1, 0, 7, 5, 6, 2, 4, 3]
GOLDEN_LARGE = [658661, 276693, 813361, 995122, 490288, 401179, 882576, 824912]
GOLDEN_DIGEST = "ea628fccfa093d4f"

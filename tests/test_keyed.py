"""Seeds by name: fixed forever, apart from each other, evenly spread."""

import numpy as np

from trainer.keyed import draw_seed, draw_uniform, draw_words


def test_seeds_never_change() -> None:
    assert draw_seed(0, "draw", 3, "photos/a", 0) == 3_038_283_012_328_360_059
    assert draw_seed("vae", "photos/ü") == 3_583_221_966_786_423_114


def test_parts_do_not_run_into_each_other() -> None:
    parts = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("a", "b", "c"),
        (1,),
        ("1",),
        (11,),
        (1, 1),
        (-1,),
        (),
        ("",),
        ("", ""),
    ]
    assert len({draw_seed(*p) for p in parts}) == len(parts)


def test_uniform_numbers_are_even() -> None:
    values = np.array([draw_uniform("split", f"key-{i}") for i in range(20_000)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 90  # chi2 of 49 degrees of freedom, p = 3e-4
    assert 0 <= draw_seed("x") < 2**63


def test_words_never_change_and_are_even() -> None:
    assert draw_words(7, b"shuffle", 3) == (2570424526, 2209404469, 1333447471)
    values = np.array(draw_words(2**63 - 1, b"x", 20_000))
    counts = np.histogram(values, bins=50, range=(0, 2**32))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 90
    assert not set(draw_words(7, b"shuffle", 9)) & set(draw_words(7, b"mix", 9) + draw_words(8, b"shuffle", 9))
    assert draw_words(1, b"x", 0) == ()

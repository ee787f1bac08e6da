"""Settings of NCCL: which are kept, with exchanges of known length, and real ones over gloo."""

import itertools
import os
from pathlib import Path

import pytest

from trainer.cli import main as cli
from trainer.config.load import load_config
from trainer.doctor.exchange import MIB, ExchangeFacts, SizeFacts, measure_exchange
from trainer.doctor.tune_exchange import ROUNDS, SIZES, Settings, ticks, tune, tuned_lines
from trainer.parallel.environment import set_nccl

RIGHT = Path(__file__).parents[1] / "config" / "right.yaml"
# How much longer an exchange takes under each value; what is not named is NCCL's own choice.
FACTORS = {
    ("NCCL_MAX_NCHANNELS", "1"): 1.5,
    ("NCCL_MAX_NCHANNELS", "2"): 0.8,
    ("NCCL_MAX_NCHANNELS", "4"): 0.7,
    ("NCCL_BUFFSIZE", str(2 * MIB)): 1.1,
    ("NCCL_BUFFSIZE", str(16 * MIB)): 0.9,
    ("NCCL_PROTO", "Simple"): 0.99,  # within what two measurements differ by
    ("NCCL_ALGO", "Ring"): 1.3,
}


def facts_of(seconds: float) -> ExchangeFacts:
    sizes = tuple(SizeFacts(size, 50, seconds * size / sum(SIZES), seconds, 0, 4) for size in SIZES)
    return ExchangeFacts(4, "nccl", sizes)


def seconds_of(settings: Settings) -> float:
    factors = [FACTORS.get(item, 1.0) for item in settings.items()]
    seconds = 0.02
    for factor in factors:
        seconds *= factor
    return seconds


def test_the_fastest_combination_is_kept_and_told() -> None:
    said: list[str] = []
    tuned = tune(lambda settings: facts_of(seconds_of(settings)), tick=said.append)
    choices = [[*((name, value) for value in values), None] for name, values in ROUNDS]
    best = min(seconds_of(dict(filter(None, each))) for each in itertools.product(*choices))
    assert tuned.best == {"NCCL_MAX_NCHANNELS": "4", "NCCL_BUFFSIZE": str(16 * MIB)}
    assert seconds_of(tuned.best) == pytest.approx(best, rel=0.02)
    assert tuned.gain == pytest.approx(1 - 0.7 * 0.9)
    assert len(said) == len(tuned.tried) == ticks()
    lines = tuned_lines(tuned)
    assert lines[-1] == f"  nccl: {{NCCL_MAX_NCHANNELS: 4, NCCL_BUFFSIZE: {16 * MIB}}}"
    assert sum("<- kept" in line for line in lines) == 3  # 2 channels, then 4, then the buffer


def test_what_differs_as_much_without_settings_is_not_kept() -> None:
    times = iter([0.020, 0.025])
    tuned = tune(lambda settings: facts_of(seconds_of(settings) if settings else next(times)))
    # The two starts differ by a fifth, so 0.7 counts, and nine tenths of that do not.
    assert tuned.best == {"NCCL_MAX_NCHANNELS": "4"}
    assert tuned.least_gain == pytest.approx(0.2)


def test_nothing_faster_leaves_nccl_as_it_is() -> None:
    tuned = tune(lambda settings: facts_of(0.02 if not settings else 0.0199))
    assert tuned.best == {} and tuned.gain == 0
    assert "leave NCCL as it is" in tuned_lines(tuned)[-1]


@pytest.mark.e2e
def test_settings_reach_workers_and_one_that_breaks_them_costs_its_row() -> None:
    """Over gloo, which has one variable of its own that can be seen to work: an interface that is not there."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def measured(settings: Settings) -> ExchangeFacts:
        return measure_exchange(2, gpu=False, env={**env, **settings}, sizes=(MIB,), copies=False, limit_s=60)

    tuned = tune(measured, rounds=[("GLOO_SOCKET_IFNAME", ("lo", "nothing0"))])
    whole, second, loopback, broken = tuned.tried
    assert whole.total_s and second.total_s and loopback.total_s
    assert broken.total_s is None and broken.error and not broken.kept
    assert any("GLOO_SOCKET_IFNAME=nothing0: " in line for line in tuned_lines(tuned))


def test_the_shell_goes_before_the_configuration() -> None:
    environ = {"NCCL_BUFFSIZE": "1", "HOME": "/"}
    told = set_nccl({"NCCL_BUFFSIZE": str(8 * MIB), "NCCL_MAX_NCHANNELS": "4"}, environ)
    assert told == ["NCCL_BUFFSIZE=1", "NCCL_MAX_NCHANNELS=4"]
    assert environ == {"NCCL_BUFFSIZE": "1", "NCCL_MAX_NCHANNELS": "4", "HOME": "/"}


def test_a_configuration_with_settings() -> None:
    config = load_config(RIGHT, ["launch.nccl={NCCL_MAX_NCHANNELS: 4, NCCL_PROTO: Simple}"], check_paths=False)
    assert config.launch.nccl == {"NCCL_MAX_NCHANNELS": "4", "NCCL_PROTO": "Simple"}


def test_tuning_without_cards_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["doctor", "--tune-nccl"]) == 2
    assert "needs two cards or more" in capsys.readouterr().err

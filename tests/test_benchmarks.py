"""The benchmarks run, on a set that is small enough for a test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_data_engine(tmp_path: Path) -> None:
    """Every line of the table, with what must hold at any size."""
    command = [sys.executable, "-W", "error", "benchmarks/data_engine.py", "--dir", str(tmp_path), "--rows", "20000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    table = {row.split(" | ")[0]: row.split(" | ")[2] for row in done.stdout.splitlines() if row.startswith("| ")}
    assert len(table) == 19
    measured = "\n".join(table.values())
    assert "0 lost, 0 repeated" in measured and "100 of 100 found" in measured
    assert "BAD ROWS" not in measured
    assert re.search(r"\| (\d+) of \1 finished sets identical, 4 kills", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_loss_weights() -> None:
    """Every line of the table."""
    command = [sys.executable, "-W", "error", "benchmarks/loss_weights.py", "--rows", "3000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    rows = [row.strip("| ").split(" | ")[0] for row in done.stdout.splitlines()[2:]]
    assert len(rows) == 8 and rows[0].startswith("counting the tags of 3,000 images") and rows[-1].endswith("of tags")


@pytest.mark.slow
def test_browse_page() -> None:
    """Two rows, pages of the size that a gallery takes."""
    command = [sys.executable, "-W", "error", "benchmarks/browse_page.py", "--rows", "3000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["3,000 images, tags counted", "3,000 images, tags kept"]
    assert all(0.5 < float(row[3]) < 5 for row in rows)


@pytest.mark.slow
def test_optimizer_speed() -> None:
    """A row for each kind and rounding, with the bytes that each promises."""
    command = [sys.executable, "-W", "error", "benchmarks/optimizer_speed.py", "--weights", "3e6"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()[2:]]
    assert [float(row[4]) for row in rows] == pytest.approx([12.0, 10.0, 12.0, 6.03, 4.03, 6.03], abs=0.02)


@pytest.mark.slow
def test_hosts_saves() -> None:
    """With ddp nothing but a few messages leaves a host; with zero2 the half that the other lacks, and headers."""
    command = [sys.executable, "-W", "error", "benchmarks/hosts_saves.py", "--megabytes", "8"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    if "CannotHaveHosts" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ddp", "zero2"]
    assert float(rows[0][2]) < 0.1 and 4.0 <= float(rows[1][2]) < 4.8


@pytest.mark.slow
def test_hosts_exchange() -> None:
    """Both ways over one link, neither faster than the link: 1.5 and 1.75 MB at 25 MB/s."""
    command = [sys.executable, "-W", "error", "benchmarks/hosts_exchange.py", "--mbit", "200", "--megabytes", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    if "CannotHaveHosts" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["ring", "shares"]
    assert float(rows[0][3]) >= 0.05 and float(rows[1][3]) >= 0.06

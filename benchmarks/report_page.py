"""The page of a long run: `python benchmarks/report_page.py [--steps N ...] [--dir DIR]`: time, memory, size, opening.

Each run is made up: a record a step of four workers and two text encoders, validations, a host's record a minute,
samples cut from real photographs, as the run writes them. Of each: `sdxl-train report` as a process; a page that is
served, asked again after 100 more steps; and the page in Chromium without a window, started anew each time: from the
start of the navigation to the end of the load event and to the first paint, by the page's own clock, and the CPU time
that its main thread was busy. Times but those of the browser's clock are CPU seconds.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from skimage import data

from trainer.report.report_page import RunReport

BEGUN, STEP_S = 1_790_000_000.0, 2.0
SAMPLED, IMAGES, PX = 24, 8, 512
LIVE_STEPS, OPENED = 100, 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAINTED = "new Promise((done) => new PerformanceObserver(() => done()).observe({ type: 'paint', buffered: true }))"
CONFIG = "run: {dir: runs/long}\ntrain: {steps: %d, batch_size_per_gpu: 4}\noptimizer: {lr: 1.0e-5}\n"


def main() -> None:
    """Make the runs, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100_000, 2_000_000], help="of the runs")
    parser.add_argument("--dir", type=Path, help="where the runs are made, and stay (default: a temporary folder)")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.again:
        print(json.dumps(asked_again(arguments.again)))
        return
    folder: Path = arguments.dir or Path(tempfile.mkdtemp(prefix="report-page-"))
    print(
        "| run | records, MB | page written | peak memory, MB | page, MB | asked again | opened, ms | of it CPU, ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    try:
        for steps in arguments.steps:
            run = folder / f"run-{steps}"
            if not run.is_dir():
                write_run(run, steps)
            print(row(run, steps), flush=True)
    finally:
        if arguments.dir is None:
            shutil.rmtree(folder)


def row(run: Path, steps: int) -> str:
    """What is measured of one run."""
    records = (run / "metrics.jsonl").stat().st_size / 1e6
    page = run / "report.html"
    written_s, peak_mb = measured([sys.executable, "-m", "trainer", "report", str(run), "-o", str(page)])
    size = page.stat().st_size / 1e6
    done = subprocess.run(
        [sys.executable, __file__, "--again", str(run)], check=True, stdout=subprocess.PIPE, text=True
    )
    again = json.loads(done.stdout)
    opened = opening(page)
    shown = [f"{statistics.median(column):.0f}" for column in zip(*opened, strict=True)] or ["-", "-"]
    return (
        f"| {steps:,} steps | {records:,.0f} | {written_s:.1f} s | {peak_mb:.0f} | {size:.2f} | "
        f"{again['cpu_s'] * 1000:.0f} ms, {again['peak_mb']:.0f} MB | {shown[0]} | {shown[1]} |"
    )


def measured(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def asked_again(run: Path) -> dict[str, float]:
    """A page that is served, when a hundred steps more are there."""
    report = RunReport([run])
    report.data()
    lines = [*records(range(10**9, 10**9 + LIVE_STEPS), random.Random(9))]
    place = run / "metrics.jsonl"
    before = place.stat().st_size
    with place.open("a", encoding="utf-8") as file:
        file.writelines(lines)
    begin = time.process_time()
    stands = report.data()["runs"][0]["stands"]
    cpu_s = time.process_time() - begin
    os.truncate(place, before)
    assert stands["step"] == 10**9 + LIVE_STEPS - 1
    return {"cpu_s": cpu_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def opening(page: Path) -> list[tuple[float, float]]:
    """Of each opening: ms from the start of the navigation to the load event's end or the first contentful paint,
    whichever is later, and ms that the main thread was at work; nothing where there is no browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return []
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    found = []
    with sync_playwright() as started:
        for _ in range(OPENED):
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
            shown = browser.new_page(viewport={"width": 1280, "height": 900})
            session = shown.context.new_cdp_session(shown)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            shown.goto(page.absolute().as_uri())
            shown.evaluate(PAINTED)
            loaded = shown.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            painted = shown.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
            found.append((max(loaded, painted), 1000 * metrics["TaskDuration"]))
            browser.close()
    return found


def write_run(run: Path, steps: int) -> None:
    """A run directory, as a run of so many steps leaves it."""
    run.mkdir(parents=True)
    rng = random.Random(steps)
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(records(range(1, steps + 1), rng))
    minutes = int(steps * STEP_S / 60)
    with (run / "host.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(host_record(minute, rng) for minute in range(minutes))
    (run / "config.resolved.yaml").write_text(CONFIG % steps)
    (run / "events.txt").write_text("2026-11-29 00:00:00  worker 1 was ended; starting again\n" * 50)
    (run / "bad.jsonl").write_text('{"key": "photos/1", "reason": "cannot be read"}\n' * 1000)
    photographs = [Image.fromarray(image()) for image in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    for number in range(SAMPLED):
        place = run / "samples" / f"step-{steps * (number + 1) // SAMPLED:08d}-ema"
        place.mkdir(parents=True)
        for index in range(IMAGES):
            whole = photographs[index % len(photographs)]
            left, top = (number * 5) % (whole.width - 280), index * 2
            whole.crop((left, top, left + 280, top + 280)).resize((PX, PX)).save(place / f"{index:02d}.png")


def records(steps: range, rng: random.Random) -> Iterator[str]:
    """Lines of `metrics.jsonl`."""
    noise = rng.random
    for step in steps:
        loss = 0.1 + 0.4 / math.sqrt(step) + noise() / 20
        values = {
            "epoch": step / 775_000,
            "loss": loss,
            "lr": 1e-5,
            "grad_norm": 0.1 + noise() / 10,
            "images_per_s": 7.9 + noise() / 5,
            "data_wait_s": noise() / 1000,
            "step_s": STEP_S + noise() / 20,
            "images_seen": 16 * step,
            "lr/unet": 1e-5,
            "lr/text_encoder_1": 2e-6,
            "lr/text_encoder_2": 2e-6,
        }
        when = round(BEGUN + STEP_S * step, 3)
        yield json.dumps({"kind": "train", "step": step, **values, "time": when}) + "\n"
        if step % 25 == 0:
            by = {f"loss_t{t}": 0.4 - t / 3000 + noise() / 50 for t in range(0, 1000, 125)}
            by |= {f"images_t{t}": 50.0 for t in range(0, 1000, 125)}
            yield json.dumps({"kind": "train_by_timestep", "step": step, **by, "time": when}) + "\n"
        if step % 2000 == 0:
            scores = {"loss": loss, "ci95": 0.01, "gap": 0.01, "ci95/gap": 0.004}
            for t in range(50, 1000, 100):
                scores |= {f"loss_t{t}": 0.4 - t / 3000, f"ci95/t{t}": 0.01, f"gap/t{t}": 0.01}
            for kind in ("validation", "validation_ema"):
                yield json.dumps({"kind": kind, "step": step, **scores, "time": when}) + "\n"


def host_record(minute: int, rng: random.Random) -> str:
    """A line of `host.jsonl` of four cards."""
    card = {
        "temperature_c": 64 + rng.randrange(8),
        "power_w": 330 + rng.random() * 20,
        "clock_mhz": 1700 + rng.randrange(90),
    }
    record = {
        "time": BEGUN + 60 * minute,
        "steps_taken": 30 * minute,
        "memory_available_mib": 90_000 - rng.randrange(500),
        "workers_mib": [6000 + rng.randrange(50) for _ in range(4)],
        "growth_mib_per_1000_steps": [0.0] * 4,
        "disk_free_mib": 900_000 - minute,
        "cards": [{"uuid": f"GPU-{number}", **card} for number in range(4)],
    }
    return json.dumps(record) + "\n"


if __name__ == "__main__":
    main()

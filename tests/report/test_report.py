"""The page of a run: what is in it, in a real browser too, and the server of a run that trains."""

import http.client
import json
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.real_browser import chromium
from trainer.cli.main import main
from trainer.errors import UserError
from trainer.report.live_server import make_server
from trainer.report.report_page import report_data, report_html
from trainer.report.run_series import Series, read_series

HARM = "</script><script>alert(1)</script>/*LIVE*/\x1b[31m"
CONFIG = """
run: {dir: runs/one, seed: 7}
train: {steps: 400, batch_size_per_gpu: 2}
data:
  sources:
  - {path: photos}
  prepared: "%s"
optimizer: {lr: %s}
"""


def write_run(folder: Path, steps: int, lr: str = "1e-5") -> Path:
    """As a run leaves it: records, events, samples, host, settings."""
    rng = random.Random(3)
    (folder / "samples").mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        values = {
            "loss": 1 / math.sqrt(step) + rng.random() / 10,
            "lr": 1e-5,
            "lr/unet": 1e-5,
            "grad_norm": rng.random(),
        }
        values |= {
            "images_per_s": 4.0,
            "step_s": 2.0,
            "data_wait_s": 0.01,
            "images_seen": 8 * step,
            "epoch": step / 100,
        }
        lines.append(json.dumps({"kind": "train", "step": step, **values, "time": 1e9 + 2 * step}))
        if step % 50 == 0:
            scores = {"loss": 0.5 + 1 / step, "loss_t100": 0.01, "loss_t900": 0.9}
            if step > 100:  # older records have no intervals
                scores |= {"ci95": 0.02, "ci95/t100": 0.02, "gap": step / 5000 - 0.05, "ci95/gap": 0.03}
                scores |= {"gap/t100": 0.01, "source/photos": 0.4, "ci95/source/photos": 0.1, "source/<b>": 0.6}
            validated = {"step": step, **scores, "time": 1e9 + 2 * step}
            lines += [json.dumps({"kind": kind, **validated}) for kind in ("validation", "validation_ema")]
    lines.insert(3, json.dumps({"kind": "train", "step": 3, "loss": None}))
    lines.append('{"kind": "train", "step": 9')  # cut short
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "events.txt").write_text(f"2026-11-29 00:00:00  worker 1 was ended; starting again {HARM}\n")
    (folder / "config.resolved.yaml").write_text(CONFIG % (HARM.replace("\x1b", ""), lr))
    host = [
        {"time": 1e9 + 60 * i, "workers_mib": [2048 + i, 1024], "memory_available_mib": 9000,
         "cards": [{"uuid": "GPU-a", "temperature_c": 60 + i % 9, "power_w": 300.0}]} for i in range(30)
    ]  # fmt: skip
    (folder / "host.jsonl").write_text("\n".join(map(json.dumps, host)))
    (folder / "skipped.jsonl").write_text('{"step": 5}\n')
    for step in (100, 200, 300):
        place = folder / "samples" / f"step-{step:08d}-ema"
        place.mkdir()
        for i in range(3):
            Image.new("RGB", (96 + 32 * i, 96), (step % 256, 90 * i, 40)).save(place / f"{i:02d}.png")
        (place / "03.png").write_bytes(b"no image")
    (folder / "checkpoints" / "step-00000300").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000300" / "file").write_bytes(b"0" * 1000)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "one", 400)


def test_what_the_data_say(run: Path) -> None:
    data = report_data([run])["runs"][0]
    assert data["stands"]["step"] == 400 and data["stands"]["steps"] == "400" and data["stands"]["images"] == 3200
    assert data["stands"]["images_per_s"] == 4.0 and data["stands"]["ended"] - data["stands"]["begun"] == 798
    assert (
        len(data["series"]["train/loss"]["x"]) == 400 and data["series"]["validation_ema/loss_t900"]["y"] == [0.9] * 8
    )
    assert data["settings"]["train.steps"] == "400" and data["settings"]["data.sources.0.path"] == "photos"
    assert data["host"][4]["cards.0.temperature_c"] == 64 and data["host"][4]["workers_mib.1"] == 1024
    assert [drawn["step"] for drawn in data["samples"]] == [100, 200, 300]
    assert all(len(drawn["images"]) == 3 for drawn in data["samples"]), "what is no image is left out"
    assert data["skipped"]["count"] == 1 and data["checkpoints"][0]["name"] == "step-00000300"
    assert "\x1b" not in json.dumps(data)


def test_a_million_steps_are_thinned_without_hiding_a_spike() -> None:
    series = Series()
    for step in range(100_000):
        series.steps.append(step)
        series.values.append(100.0 if step == 54_321 else math.sin(step / 1e4))
    thin = series.thinned()
    assert len(thin["x"]) == len(thin["y"]) == 1500 and thin["x"][-1] == 99_999
    assert max(thin["high"]) == 100.0 and max(thin["y"]) < 3
    mean = sum(series.values) / len(series.values)
    assert sum(thin["y"]) / len(thin["y"]) == pytest.approx(mean, abs=2e-3)


def test_texts_of_the_run_cannot_leave_their_place(run: Path) -> None:
    page = report_html(report_data([run]))
    assert page.count("<script") == 2 and "const LIVE = false;" in page
    within = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(within)["runs"][0]["events"][0].count("alert(1)") == 1


def test_several_runs_and_what_differs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "two", 100, lr="2e-5")
    assert main(["report", str(run), str(other), "-o", str(tmp_path / "both.html")]) == 0
    assert "both.html" in capsys.readouterr().out
    data = report_data([run, other])
    assert data["differing"] == [["optimizer.lr", "1e-05", "2e-05"]] and not data["runs"][1]["samples"]


def test_mistakes_are_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder; give a run directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(tmp_path / "away" / "page.html")]) == 2
    assert "could not be written" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        read_series(tmp_path)


def test_the_live_page_answers_this_machine_and_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with make_server([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"

        def ask(method: str, path: str, name: str | None = None) -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
            connection.request(method, path, headers={"Host": name} if name else {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, page = ask("GET", "/")
        assert status == 200 and "const LIVE = true;" in page
        assert json.loads(ask("GET", "/data.json")[1])["runs"][0]["stands"]["step"] == 400
        assert ask("GET", "/metrics.jsonl")[0] == 404 and ask("GET", "/../config.resolved.yaml")[0] == 404
        assert ask("POST", "/")[0] == 501 and ask("GET", "/", "evil.example")[0] == 403
        with pytest.raises(UserError, match=r"--port \d+: .*; give another, or 0 for any"):
            make_server([run], int(port))
        server.shutdown()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.e2e
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def test_in_a_browser(run: Path, tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    other = write_run(tmp_path / "two", 100, lr="2e-5")
    assert main(["report", str(run), str(other), "-o", str(tmp_path / "page.html")]) == 0
    context, wrong = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: asked.url.startswith("data:") or wrong.append(asked.url))
    page.goto((tmp_path / "page.html").as_uri())
    titles = page.locator(".chart h3").all_text_contents()
    assert {"Training loss", "Validation loss", "Learning rate", "Gradient norm", "Cards, watts, by hours"} <= {*titles}
    assert {"Validation loss by timestep", "Validation loss by source", "Generalization gap by timestep"} <= {*titles}
    gap = page.locator(".chart", has_text="Generalization gap: ")
    assert gap.locator(".band").count() == 2 and "one: live 0.03" in gap.locator(".legend").text_content()
    assert page.locator("path[d*=NaN]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#samples img").count() == 3 and "300 (ema)" in page.locator("#sample-told").text_content()
    page.locator("#sample").fill("0")
    assert "100 (ema)" in page.locator("#sample-told").text_content()
    legend = page.locator(".chart .legend").first.text_content()
    assert "one: loss" in legend and "two: loss" in legend
    page.locator("#smoothing").fill("0")
    assert page.locator(".chart .legend").first.text_content() != legend
    page.locator("#log").check()
    assert page.locator("path[d*=NaN]").count() == 0 and page.locator(".chart .band").count() > 4
    assert page.locator("#differing tr").count() == 2
    dark = page.evaluate("document.documentElement.dataset.theme")
    assert dark == scheme
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") != dark
    assert wrong == [(tmp_path / "page.html").as_uri()]
    context.close()

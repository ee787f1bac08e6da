"""The page of a run: what is in it, and the server of a run that trains."""

import http.client
import json
import random
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.report.written_run import write_run
from trainer.cli.main import main
from trainer.errors import UserError
from trainer.report.live_server import make_server
from trainer.report.report_page import RunReport, report_html
from trainer.report.sample_images import sample_images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "one", 400)


def test_what_the_data_say(run: Path) -> None:
    data = RunReport([run]).data()["runs"][0]
    assert data["stands"]["step"] == 400 and data["stands"]["steps"] == "400" and data["stands"]["images"] == 3200
    assert data["stands"]["images_per_s"] == 4.0 and data["stands"]["ended"] - data["stands"]["begun"] == 798
    curves, xs = data["series"]["curves"], data["series"]["xs"]
    assert xs[curves["train/loss"]["x"]] == [*range(1, 401)] and curves["validation_ema/loss_t900"]["y"] == [0.9] * 8
    assert curves["train/loss"]["x"] == curves["train/grad_norm"]["x"], "told once"
    assert data["settings"]["train.steps"] == "400" and data["settings"]["data.sources.0.path"] == "photos"
    host = data["host"]["curves"]
    assert host["cards.0.temperature_c"]["y"][4] == 64 and host["workers_mib.1"]["y"] == [1024] * 30
    assert [drawn["step"] for drawn in data["samples"]] == [100, 200, 300]
    assert all(len(drawn["images"]) == 3 for drawn in data["samples"]), "what is no image is left out"
    assert data["skipped"]["count"] == 1 and data["checkpoints"][0]["name"] == "step-00000300"
    assert "\x1b" not in json.dumps(data)


def test_many_large_samples_are_fewer_on_the_page(tmp_path: Path) -> None:
    """The first and the newest step stay; a step is whole or not there."""
    noise = random.Random(1)
    for step in range(1, 31):
        place = tmp_path / f"step-{step:08d}"
        place.mkdir()
        Image.frombytes("RGB", (320, 320), noise.randbytes(320 * 320 * 3)).save(place / "00.png")
    all_ = sample_images(tmp_path, 10**9)
    assert len(all_) == 24 and (all_[0]["step"], all_[-1]["step"]) == (1, 30)
    size = len(all_[0]["images"][0])
    few = sample_images(tmp_path, 8 * size)
    assert 4 <= len(few) <= 8 and (few[0]["step"], few[-1]["step"]) == (1, 30)
    assert sum(len(image) for one in few for image in one["images"]) <= 8 * size
    assert [one["step"] for one in sample_images(tmp_path, 1)] == [30]


def test_texts_of_the_run_cannot_leave_their_place(run: Path) -> None:
    page = report_html(RunReport([run]).data())
    assert page.count("<script") == 2 and "const LIVE = false;" in page
    within = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(within)["runs"][0]["events"][0].count("alert(1)") == 1


def test_several_runs_and_what_differs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "two", 100, lr="2e-5")
    assert main(["report", str(run), str(other), "-o", str(tmp_path / "both.html")]) == 0
    assert "both.html" in capsys.readouterr().out
    data = RunReport([run, other]).data()
    assert data["differing"] == [["optimizer.lr", "1e-05", "2e-05"]] and "samples" not in data["runs"][1]


def test_mistakes_are_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder; give a run directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(tmp_path / "away" / "page.html")]) == 2
    assert "could not be written" in capsys.readouterr().err


def test_the_live_page_answers_this_machine_and_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with make_server(RunReport([run]), 0) as server:
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
        found = json.loads(ask("GET", "/data.json")[1])
        assert found["runs"][0]["stands"]["step"] == 400 and len(found["runs"][0]["samples"]) == 3
        known = json.loads(ask("GET", f"/data.json?samples={found['samples_key']}")[1])
        assert "samples" not in known["runs"][0] and known["runs"][0]["series"] == found["runs"][0]["series"]
        assert ask("GET", "/metrics.jsonl")[0] == 404 and ask("GET", "/../config.resolved.yaml")[0] == 404
        assert ask("POST", "/")[0] == 501 and ask("GET", "/", "evil.example")[0] == 403
        with pytest.raises(UserError, match=r"--port \d+: .*; give another, or 0 for any"):
            make_server(RunReport([run]), int(port))
        server.shutdown()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}

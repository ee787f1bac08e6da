"""The settings of runs side by side, and which run came before which."""

import json
import shutil
from pathlib import Path

from trainer.report.report_page import RunReport
from trainer.report.run_settings import differing, previous_run, run_settings


def write_settings(run: Path, begun: float, **settings: object) -> Path:
    """A run of one step, at that time."""
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0, "time": begun}) + "\n")
    (run / "config.resolved.yaml").write_text(json.dumps({"run": {"dir": str(run)}, **settings}))
    return run


def test_the_run_before_is_the_newest_that_began_earlier(tmp_path: Path) -> None:
    a = write_settings(tmp_path / "zebra", 100.0)
    b = write_settings(tmp_path / "ant", 300.0)
    c = write_settings(tmp_path / "bee", 200.0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.resolved.yaml").write_text("train: {}\n")
    (tmp_path / "file").write_text("\n")
    assert (previous_run(b), previous_run(c), previous_run(a)) == (c, a, None)
    # Looked at later: neither a report nor a copied file makes a run newer.
    (c / "report.html").write_text("newer")
    assert previous_run(b) == c
    shutil.rmtree(c)
    assert previous_run(b) == a and previous_run(tmp_path / "no-run") is None


def test_what_differs_is_on_the_page_of_one_run(tmp_path: Path) -> None:
    write_settings(tmp_path / "one", 1.0, optimizer={"lr": 1e-5}, train={"steps": 3}, model={"path": "a"})
    two = write_settings(tmp_path / "two", 2.0, optimizer={"lr": 2e-5}, train={"steps": 3}, ema={"averages": []})
    found = RunReport([two]).data()
    rows = [["ema.averages", "[]", ""], ["model.path", "", "a"], ["optimizer.lr", "2e-05", "1e-05"]]
    assert found["previous"] == {"name": "one", "rows": rows} and found["differing"] == []
    assert RunReport([tmp_path / "one"]).data()["previous"] is None
    both = RunReport([two, tmp_path / "one"]).data()
    assert both["differing"] == rows and "previous" not in both


def test_settings_of_any_file(tmp_path: Path) -> None:
    run = write_settings(tmp_path / "run", 1.0, data={"sources": [{"path": "x"}, {"path": "y"}], "list": [1, 2]})
    found = run_settings(run)
    assert found["data.sources.1.path"] == "y" and found["data.list"] == "[1, 2]"
    (run / "config.resolved.yaml").write_text("a: [\n")
    assert run_settings(run) == {} == run_settings(tmp_path)
    (run / "config.resolved.yaml").write_text("a: 1\n")
    assert run_settings(run) == {"a": "1"}
    assert differing([{"a": "1", "run.dir": "x"}, {"a": "1", "run.dir": "y"}]) == []

"""The page of a run in a real browser: drawn, read by keyboard and in words, without a request or an error."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report_page import write_run as write_long_run
from tests.real_browser import chromium
from tests.report.written_run import write_run
from trainer.cli.main import main

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "one", 400)


@contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """The page, which must have said nothing and asked for nothing but itself when it is closed."""
    context, wrong = browser.new_context(**options), []
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: asked.url.startswith("data:") or wrong.append(asked.url))
    page.goto(file.as_uri())
    yield page
    assert {*wrong} == {file.as_uri()}
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def test_what_is_drawn(run: Path, tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    other = write_run(tmp_path / "two", 100, lr="2e-5")
    file = tmp_path / "page.html"
    assert main(["report", str(run), str(other), "-o", str(file)]) == 0
    with opened(browser, file, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        titles = page.locator(".chart h3").all_text_contents()
        assert {"Training loss", "Validation loss", "Learning rate", "Cards, watts, by hours"} <= {*titles}
        assert {"Validation loss by timestep", "Validation loss by source", "Generalization gap by timestep"} <= {
            *titles
        }
        assert {"Training loss by timestep", "Validation loss by timestep, ema", "Gradient norm"} <= {*titles}
        by_timestep = page.locator(".chart", has=page.locator("h3", has_text=re.compile("^Training loss by timestep$")))
        assert by_timestep.locator(".smooth").count() == 8
        assert by_timestep.locator(".legend").text_content().startswith("t 0 1")
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


def test_three_runs_side_by_side(run: Path, tmp_path: Path, browser: Any) -> None:
    others = [
        write_run(tmp_path / name, steps, lr=lr) for name, steps, lr in (("two", 100, "2e-5"), ("three", 250, "4e-5"))
    ]
    file = tmp_path / "page.html"
    assert main(["report", str(run), *map(str, others), "-o", str(file)]) == 0
    with opened(browser, file) as page:
        for title in ("Training loss", "Gradient norm", "Images per second"):
            chart = page.locator(".chart", has=page.locator("h3", has_text=re.compile(f"^{title}$")))
            legend = chart.locator(".legend span").all_text_contents()
            assert [text.partition(":")[0] for text in legend] == ["one", "two", "three"]
            strokes = chart.locator(".smooth").evaluate_all("all => all.map((each) => getComputedStyle(each).stroke)")
            assert len({*strokes}) == 3
        rows = page.locator("#differing tr").evaluate_all(
            "all => all.map((row) => [...row.cells].map((c) => c.textContent))"
        )
        assert rows == [["key", "one", "two", "three"], ["optimizer.lr", "1e-05", "2e-05", "4e-05"]]


def test_what_differs_from_the_run_before_and_the_data_that_are_not_here(tmp_path: Path, browser: Any) -> None:
    write_run(tmp_path / "first", 20, lr="2e-5", begun=1e9 - 5000)
    run = write_run(tmp_path / "second", 20)
    assert main(["report", str(run)]) == 0
    with opened(browser, run / "report.html") as page:
        assert "first, the run before this one" in page.locator("#differing-told").text_content()
        assert page.locator("#differing tbody td").all_text_contents() == ["optimizer.lr", "1e-05", "2e-05"]
        assert "Nothing to look at: " in page.locator("#dataset-problem").text_content()
        assert not page.locator("#sources").is_visible()


def test_by_keyboard_alone(run: Path, tmp_path: Path, browser: Any) -> None:
    """Tab goes through everything that can be used, what has the focus is seen, arrows move sliders and read curves."""
    file = tmp_path / "page.html"
    assert main(["report", str(run), "-o", str(file)]) == 0
    with opened(browser, file) as page:
        order: list[str] = []
        for _ in range(80):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                "[document.activeElement.id || document.activeElement.dataset.title || document.activeElement.tagName,"
                " getComputedStyle(document.activeElement).outlineStyle]"
            )
            if name == "BODY":
                break
            order.append(name)
            assert outline != "none", name
        assert order[0] == "theme" and order.index("smoothing") < order.index("log") < order.index("Training loss")
        assert (
            order.index("Training loss") < order.index("sample") < order.index("Learning rate") < order.index("events")
        )
        assert order[-1] == "SUMMARY"
        page.locator("#smoothing").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#smoothing-told").text_content() == "0.89"
        page.locator("#sample").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#sample").get_attribute("aria-valuetext") == "step 200 (ema)"
        assert page.locator("#samples img").first.get_attribute("alt") == "sample 1 of step 200"
        chart = page.locator("svg[data-title='Training loss']")
        label = chart.get_attribute("aria-label")
        assert re.match(
            r"Training loss\. loss: from 1\.0\d at step 1 to 0\.\d+ at step 400; least 0\.\d+, greatest", label
        )
        chart.focus()
        page.keyboard.press("Home")
        assert re.fullmatch(r"loss 1\.0\d at 1", page.locator("#said").text_content())
        assert chart.locator(".cursor").get_attribute("visibility") == "visible"
        page.keyboard.press("ArrowRight")
        assert page.locator("#said").text_content().endswith(" at 8")
        page.keyboard.press("Escape")
        assert chart.locator(".cursor").get_attribute("visibility") == "hidden"
        page.locator("#theme").focus()
        before = page.evaluate("document.documentElement.dataset.theme")
        page.keyboard.press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") != before
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#loss"
        unnamed = "svg[role=img]:not([aria-label]), img:not([alt]), [tabindex='0'][role=region]:not([aria-label])"
        assert page.locator(unnamed).count() == 0


def test_text_can_be_read_in_both_themes(run: Path, tmp_path: Path, browser: Any) -> None:
    """The contrast of text to its ground is at least that of WCAG 2, level AA: 4.5 to 1."""
    file = tmp_path / "page.html"
    assert main(["report", str(run), "-o", str(file)]) == 0
    for scheme in ("light", "dark"):
        with opened(browser, file, color_scheme=scheme) as page:
            colours = page.evaluate(
                "['--paper', '--ground', '--ink', '--faint', '--one'].map((name) =>"
                " getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
            )
            paper, ground, *inks = [luminance(colour) for colour in colours]
            for ink in inks:
                for back in (paper, ground):
                    low, high = sorted((ink, back))
                    assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, colours)


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


PAINTED = "new Promise((done) => new PerformanceObserver(() => done()).observe({ type: 'paint', buffered: true }))"


def test_a_run_of_100_000_steps_is_small_and_opens_at_once(tmp_path: Path, browser: Any) -> None:
    """At most 3 MB, and at most a second of the main thread's CPU time until all of it is drawn."""
    run = tmp_path / "long"
    write_long_run(run, 100_000)
    assert main(["report", str(run)]) == 0
    file = run / "report.html"
    assert file.stat().st_size <= 3_000_000
    with opened(browser, file) as page:
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.reload()
        page.evaluate(PAINTED)
        metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
        assert 0 < metrics["TaskDuration"] <= 1.0
        assert page.locator("svg .smooth").count() > 50 and page.locator("#samples img").count() == 8

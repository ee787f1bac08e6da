"""The page in a real browser: no error, no request, keys work, nothing is wider than the window."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.survey.browsed_set import write_browsed_set
from tests.real_browser import chromium
from trainer.cli.main import main

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browsed")
    made = write_browsed_set(root)
    assert main(["data", "browse", str(made.config)]) == 0
    return made.prepared / "browse.html"


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Any]:
    """The opened page; at the end nothing must have gone wrong or been asked for, and no dialog been shown."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: wrong.append(dialog.message))
    opened.on("request", lambda asked: asked.url.startswith("data:") or wrong.append(asked.url))
    opened.goto(page_file.as_uri())
    yield opened
    assert wrong == [page_file.as_uri()]
    context.close()


def _shown(page: Any) -> int:
    return page.locator("#cards > .card:visible").count()


def _is_focused(page: Any, name: str) -> bool:
    """Within two seconds: after a dialog has closed, the page is told so by an event, and focuses then."""
    focused = "(document.activeElement.closest('.card')?.id ?? document.activeElement.id)"
    return bool(page.wait_for_function(f"name => {focused} === name", arg=name, timeout=2000))


def test_keys_filter_move_and_enlarge(page: Any) -> None:
    assert _shown(page) == 41
    page.keyboard.press("/")
    assert _is_focused(page, "search")
    page.keyboard.type("CROP photograph ☕")
    shown = page.locator("#cards > .card:visible")
    found = shown.count()
    assert 0 < found < 41 and page.locator("#found").inner_text() == f"{found} of 41 images"
    ids = [shown.nth(i).get_attribute("id") for i in range(found)]
    page.keyboard.press("Enter")
    assert _is_focused(page, ids[0])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert _is_focused(page, ids[1])
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("getComputedStyle(document.getElementById('cards')).gridTemplateColumns.split(' ').length")
    assert _is_focused(page, ids[1 + columns])
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    # text_content: inner_text of a card that was just scrolled to is empty until it has been laid out
    assert page.locator("dialog[open] .key").text_content() == shown.nth(1).locator(".key").text_content()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not page.locator("dialog[open]").count() and _is_focused(page, ids[2])
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert _shown(page) == 41


def test_source_and_bucket_filter_together(page: Any) -> None:
    page.select_option("#source", label="tagged")
    assert _shown(page) == 11
    counts = []
    for value in page.eval_on_selector_all("#bucket option", "all => all.map(one => one.value)")[1:]:
        page.select_option("#bucket", value)
        counts.append(_shown(page))
    assert sum(counts) == 11 and len(counts) > 1
    page.keyboard.press("Escape")
    twin = page.locator(".twin").first
    twin.locator("img").wait_for()
    twin.click()
    assert _shown(page) == 41 and page.locator("dialog[open]").count() == 1


def test_nothing_is_wider_than_the_window_and_pictures_are_there(page: Any) -> None:
    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert fits()
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert fits()
    broken = "all => all.filter(one => !(one.complete && one.naturalWidth)).length"
    assert page.eval_on_selector_all("#cards img.crop", broken) == 0
    page.locator(".open").first.click()
    assert fits()


def test_light_and_dark(page: Any) -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    was_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    before = paper()
    assert before == ("rgb(20, 23, 27)" if was_dark else "rgb(255, 255, 255)")
    page.keyboard.press("t")
    assert paper() == ("rgb(255, 255, 255)" if was_dark else "rgb(20, 23, 27)")
    page.locator("#theme").click()
    assert paper() == before


def test_texts_of_the_data_run_nothing(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("alert(1)")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    large = page.locator("dialog[open]")
    assert "</script><script>alert(1)</script>" in large.locator(".text").inner_text()
    assert large.locator("script").count() == 0 and page.locator("script").count() == 1


def test_without_scripts_all_of_it_stands_there(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("#cards > .card").count() == 41 and page.locator("svg.histogram").count() == 1
    context.close()

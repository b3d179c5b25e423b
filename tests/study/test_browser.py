"""The page as raters use it: keys, pointer, phone, two windows, a server that goes away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apt.study.document import MEDIA, Study, read_study
from apt.study.make import MakeConfig
from apt.study.serve import ServeConfig, study_server
from apt.study.store import AnswerStore
from tests.study.browser import open_page, real_browser
from tests.study.folders import small_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEYS = [("a red seven", 0), ("<img src=x onerror=alert(1)>", 0), ("a blue nine", 0)]
NO_EXTRAS = MakeConfig(check_every=0, repeat_every=0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with real_browser() as browser:
        yield browser


@contextmanager
def served(folder: Path, port: int = 0, raters: int = 3) -> Iterator[list[str]]:
    from waitress.wasyncore import close_all

    with study_server(folder, ServeConfig(port=port, raters=raters)) as (server, links):
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield links
        finally:
            # In the server's own loop, and every connection, as when a process ends.
            server.trigger.pull_trigger(lambda: close_all(server._map, ignore_all=True))
            thread.join()
            server.task_dispatcher.shutdown()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    folder = tmp_path_factory.mktemp("videos") / "study"
    small_study(folder, keys=KEYS, config=NO_EXTRAS)
    with served(folder, raters=3) as links:
        yield folder, links


def answers(folder: Path, rater: int) -> list[tuple[int, Any]]:
    store = AnswerStore(folder, read_study(folder), read_only=True)
    try:
        return [(one.version, one.choices) for one in store.everything() if one.rater == rater]
    finally:
        store.close()


def wait_for_pair(page: Page, number: int) -> None:
    """Until a pair is shown and both of its samples are there."""
    page.wait_for_selector(f"#pair-title:has-text('Pair {number} of')")
    page.wait_for_function(
        """() => [...document.querySelectorAll(".view > *")].filter((one) =>
            one.tagName === "VIDEO" ? one.readyState >= 2 : one.complete && one.naturalWidth)
            .length === 2"""
    )


def test_all_of_a_rating_by_keys_with_undo_and_a_closed_tab(
    browser: Browser, videos: tuple[Path, list[str]]
) -> None:
    folder, links = videos
    with open_page(browser, links[0]) as page:
        page.wait_for_selector("#intro:not([hidden])")
        page.click("#start")
        wait_for_pair(page, 1)
        # Nothing is sent before all is answered.
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem:has-text('answer all questions')")
        page.keyboard.press("2")
        page.keyboard.press("3")
        page.keyboard.press("Enter")
        wait_for_pair(page, 2)
        page.keyboard.press("u")
        wait_for_pair(page, 1)
        assert page.is_checked("#visual_fidelity-left")
        for key in ("3", "3", "3"):
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        wait_for_pair(page, 2)
    with open_page(browser, links[0]) as page:
        wait_for_pair(page, 2)
        assert page.text_content("#count") == "1 of 3 done"
        for number in (2, 3):
            wait_for_pair(page, number)
            for key in ("2", "2", "1", "Enter"):
                page.keyboard.press(key)
        page.wait_for_selector("#done:not([hidden])")
    right, last = (
        dict(zip(("visual_fidelity", "structural_integrity", "text_alignment"), c, strict=True))
        for c in (("right",) * 3, ("same", "same", "left"))
    )
    assert answers(folder, 1) == [(2, right), (1, last), (1, last)]


def test_videos_go_in_step_and_hold(browser: Browser, videos: tuple[Path, list[str]]) -> None:
    with open_page(browser, videos[1][1]) as page:
        page.click("#start")
        wait_for_pair(page, 1)
        # Neither begins anew before both have ended, and then both do.
        page.evaluate(
            """() => { window.seen = []; for (const v of document.querySelectorAll("video"))
                for (const kind of ["ended", "play"])
                    v.addEventListener(kind, () => seen.push([kind, v.parentNode.id])) }"""
        )
        page.wait_for_function("() => seen.length >= 8")
        twos = list(zip(*[iter(page.evaluate("seen"))] * 2, strict=False))
        # The listeners may have come between the two of a kind.
        if len({kind for kind, _ in twos[0]}) == 2:
            twos = list(zip(*[iter(page.evaluate("seen.slice(1)"))] * 2, strict=False))
        kinds = [{kind for kind, _ in two} for two in twos]
        assert all(len(kind) == 1 for kind in kinds)
        assert all(one != next_one for one, next_one in pairwise(kinds))
        assert all({side for _, side in two} == {"left", "right"} for two in twos)
        page.keyboard.press("Space")
        paused = "() => [...document.querySelectorAll('video')].every((v) => v.paused || v.ended)"
        page.wait_for_function(paused)
        assert page.text_content("#play") == "Play"
    with open_page(browser, videos[1][1], reduced_motion="reduce") as page:
        page.click("#start")
        wait_for_pair(page, 1)
        assert page.evaluate(paused) and page.text_content("#play") == "Play"
        page.click("#play")
        page.wait_for_function(f"() => !({paused})()")


def test_two_windows_keep_one_answer(browser: Browser, videos: tuple[Path, list[str]]) -> None:
    folder, links = videos
    with open_page(browser, links[2]) as one, open_page(browser, links[2]) as two:
        for page in (one, two):
            page.click("#start")
            wait_for_pair(page, 1)
        for page, key in ((one, "1"), (two, "3")):
            for pressed in (key, key, key, "Enter"):
                page.keyboard.press(pressed)
            wait_for_pair(page, 2)
        assert "another window" in (two.text_content("#problem") or "")
        assert two.evaluate("document.querySelectorAll('script, img[src=x]').length") == 1
    first, *others = answers(folder, 3)
    assert first == (1, dict.fromkeys(first[1], "left")) and {one[0] for one in others} == {0}


def test_axe_finds_nothing_on_any_view(browser: Browser, tmp_path: Path) -> None:
    """The rules of axe-core: in light colours on a desk, in dark ones on a phone."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    small_study(tmp_path / "study", keys=KEYS[:1], config=NO_EXTRAS)
    phone = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "color_scheme": "dark"}
    with served(tmp_path / "study") as links:
        for link, options in ((links[0], {"color_scheme": "light"}), (links[1], phone)):
            checked = []
            with open_page(browser, link, bypass_csp=True, **options) as page:
                page.wait_for_selector("#intro:not([hidden])")
                checked.append(axe.run(page))
                page.click("#start")
                wait_for_pair(page, 1)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                for name in ("visual_fidelity", "structural_integrity"):
                    page.check(f"#{name}-right")
                checked.append(axe.run(page))
                page.check("#text_alignment-right")
                page.click("#save")
                page.wait_for_selector("#done:not([hidden])")
                checked.append(axe.run(page))
            for found in checked:
                assert found.violations_count == 0, found.generate_report()


def test_images_zoom_together_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    study = small_study(tmp_path / "study", keys=KEYS[:2], suffix=".png", config=NO_EXTRAS)
    with served(tmp_path / "study") as links:
        phone: dict[str, Any] = {"width": 375, "height": 700}
        with open_page(browser, links[0], viewport=phone, has_touch=True) as page:
            page.tap("#start")
            wait_for_pair(page, 1)
            assert page.is_hidden("#play")
            page.tap("#left", position={"x": 20, "y": 20})
            shown = "[...document.querySelectorAll('.view > *')].map((one) => one.style.transform)"
            left, right = page.evaluate(shown)
            assert left == right and "scale(3)" in left
            page.click("#zoom-in")
            assert page.text_content("#zoom") == "4×"
            page.tap("#right")
            assert page.text_content("#zoom") == "1×"
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
        # A sample that cannot be shown is told, and its pair can be skipped.
        for name in study.pairs[0].files + study.pairs[1].files:
            (tmp_path / "study" / MEDIA / name).write_bytes(b"no picture")
        with open_page(browser, links[1]) as page:
            page.click("#start")
            page.wait_for_selector("#problem:has-text('cannot be shown here')")
            page.click("#skip")
            page.wait_for_selector("#pair-title:has-text('Pair 2 of')")
        assert answers(tmp_path / "study", 2)[0] == (1, None)


def test_choices_outlive_a_server_that_goes_and_comes(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study: Study = small_study(folder, keys=KEYS[:1], suffix=".png", config=NO_EXTRAS)
    with served(folder) as links:
        port = int(links[0].split(":")[2].split("/")[0])
        context = open_page(browser, links[0])
        page = context.__enter__()
        page.click("#start")
        wait_for_pair(page, 1)
    for key in ("1", "2", "3", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#problem:has-text('trying again')")
    with served(folder, port):
        page.wait_for_selector("#done:not([hidden])")
        context.__exit__(None, None, None)
    assert [one[0] for one in answers(folder, 1)] == [1] * len(study.pairs)

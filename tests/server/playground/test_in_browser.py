"""The playground in headless Chromium, over a scripted engine."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.server.fakes import ANSWER, DRAFT, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: install the package chromium of your system")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, server: RunningServer, **options: Any) -> Iterator[Any]:
    """The page, ready unless it waits for a key; nothing may go wrong in it."""
    context = browser.new_context(**options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Security Policy" in message.text else None)
    page.goto(server.url)
    yield page
    context.close()
    assert wrong == []


def wait_ready(page: Any) -> None:
    playwright.expect(page.locator("#state")).to_have_text(re.compile("^Ready"))


def wait_done(page: Any) -> None:
    playwright.expect(page.locator("#stop")).to_be_disabled()


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.locator(selector).all_text_contents()
    return found


def test_an_answer_converges(browser: Any) -> None:
    answer = "The sky is blue, and so on."
    with running(ScriptedEngine(answer, step_seconds=0.2)) as server, opened(browser, server) as page:
        wait_ready(page)
        page.fill("#prompt", "Hello")
        page.keyboard.press("Control+Enter")
        playwright.expect(page.locator(".answer .draft")).to_have_text(DRAFT)
        wait_done(page)
        assert "".join(texts(page, ".answer .token")) == answer
        assert texts(page, ".answer .draft") == [""]
        passes = int(page.locator("[data-meter=passes]").inner_text())
        tokens = int(page.locator("[data-meter=tokens]").inner_text())
        assert 1 < passes < tokens
        assert page.locator("[data-meter=tpf]").inner_text() == f"{tokens / passes:.2f}"
        # The token that ends the answer has no text.
        assert len(texts(page, ".answer .fast, .answer .stationary")) == tokens - passes - 1
        assert "Ended by itself." in texts(page, ".end")


def test_a_completion_goes_on_with_the_text(browser: Any, server: RunningServer) -> None:
    with opened(browser, server) as page:
        wait_ready(page)
        page.click("#tab-complete")
        playwright.expect(page.locator("#system")).to_be_hidden()
        page.fill("#prompt", "Once upon")
        page.click("#send")
        wait_done(page)
        assert "".join(texts(page, ".answer .token")) == ANSWER
        assert server.engine.decode(server.engine.requests[-1].prompt_ids).endswith("Once upon")


def test_a_race_shows_both_ways_side_by_side(browser: Any, server: RunningServer) -> None:
    with opened(browser, server) as page:
        wait_ready(page)
        page.click("#tab-race")
        page.fill("#prompt", "Hello")
        page.click("#send")
        wait_done(page)
        assert texts(page, ".lane h2") == ["Token by token", "Jacobi"]
        first, second = (page.locator(".answer").nth(index).text_content() for index in (0, 1))
        assert first == second == ANSWER
        assert page.locator("#summary").inner_text().startswith("The same text: Jacobi took")
        lengths = [request.params.block_length for request in server.engine.requests[-2:]]
        assert sorted(lengths, key=str) == [1, None]


def test_schema_tools_and_prediction_are_sent_and_shown_as_code(browser: Any, server: RunningServer) -> None:
    with opened(browser, server) as page:
        wait_ready(page)
        page.click("#options summary")
        page.click("[data-fill=schema]")
        page.fill("#prediction", "The sky is blue")
        page.fill("#block-length", "4")
        code = page.locator("#snippet").inner_text()
        body = json.loads(code[code.index("{") : code.rindex("}") + 1])
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["name", "legs", "habitat"]
        assert body["prediction"] == {"type": "content", "content": "The sky is blue"}
        page.click("[data-language=python]")
        assert 'extra_body={"block_length": 4}' in page.locator("#snippet").inner_text()
        compile(page.locator("#snippet").inner_text(), "snippet", "exec")
        page.click("[data-language=javascript]")
        assert "new OpenAI" in page.locator("#snippet").inner_text()


def test_errors_are_shown_where_they_belong(browser: Any, server: RunningServer) -> None:
    with opened(browser, server) as page:
        wait_ready(page)
        page.click("#options summary")
        page.fill("#tools", "not JSON")
        page.click("#send")
        playwright.expect(page.locator("#error")).to_contain_text("Tools: this is not JSON")
        page.fill("#tools", "")
        page.fill("#block-length", "99999")
        page.click("#send")
        playwright.expect(page.locator("#error")).to_contain_text("block_length")
        wait_done(page)


def test_a_stream_that_breaks_off_says_so(browser: Any) -> None:
    with running(ScriptedEngine(endless=True, step_seconds=0.05)) as server, opened(browser, server) as page:
        wait_ready(page)
        page.click("#send")
        playwright.expect(page.locator(".answer .draft")).to_have_text(DRAFT)
        server.in_loop(server.engine.kill_worker)
        playwright.expect(page.locator("#error")).to_contain_text("worker")
        assert texts(page, ".end") == ["Broken off."]


def test_an_answer_can_be_stopped(browser: Any) -> None:
    with running(ScriptedEngine(endless=True, step_seconds=0.05)) as server, opened(browser, server) as page:
        wait_ready(page)
        page.click("#send")
        playwright.expect(page.locator(".answer .draft")).to_have_text(DRAFT)
        page.keyboard.press("Escape")
        wait_done(page)
        assert texts(page, ".end") == ["Stopped."]
        playwright.expect(page.locator("#error")).to_be_empty()


def test_a_key_is_asked_for(browser: Any) -> None:
    with running(ScriptedEngine(), api_keys=["secret"]) as server, opened(browser, server) as page:
        playwright.expect(page.locator("#state")).to_have_text("This server asks for an API key.")
        page.fill("#key", "wrong")
        page.keyboard.press("Tab")
        playwright.expect(page.locator("#state")).to_have_text("This key is not accepted.")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        wait_ready(page)
        page.click("#send")
        wait_done(page)
        assert "".join(texts(page, ".answer .token")) == ANSWER
        assert "Authorization: Bearer YOUR_KEY" in page.locator("#snippet").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_scrolling_sideways(browser: Any, server: RunningServer, scheme: str) -> None:
    size = {"width": 340, "height": 700}
    with opened(browser, server, viewport=size, color_scheme=scheme) as page:
        wait_ready(page)
        page.click("#send")
        wait_done(page)
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1]


def test_all_of_it_can_be_reached_by_the_keyboard_and_has_a_name(browser: Any, server: RunningServer) -> None:
    with opened(browser, server) as page:
        wait_ready(page)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, select, textarea, button')].filter((element) =>
                !element.labels?.length && !element.textContent.trim()).map((element) => element.id)"""
        )
        assert nameless == []
        page.focus("#tab-chat")
        page.keyboard.press("ArrowRight")
        assert page.locator("#tab-complete").get_attribute("aria-selected") == "true"
        assert page.evaluate("document.activeElement.id") == "tab-complete"
        assert MODEL_NAME in texts(page, "#model option")

"""The page's chat, in headless Chromium beside a real server with two engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.conftest import KEY, Server
from tests.integration.pair.browser import CONTRAST, NAMELESS, Page, chromium
from tests.integration.pair.conftest import MAX_MODEL_LEN

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.browser]

SIDES = {"/generate": "pruned", "/baseline/generate": "dense"}
TRAP = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
# Notes what the page sends, and sends it.
LISTEN = """
window.sent = [];
const plain = window.fetch;
window.fetch = (path, options) => {
  if (options.body) window.sent.push([path, JSON.parse(options.body)]);
  return plain(path, options);
};
"""
# Answers in the server's place.
SAY = """
const told = [{ id: 'a', text: arguments[0], token_ids: [1] },
  { id: 'a', finish_reason: 'stop', usage: { completion_tokens: 1 }, timings: { ttft_s: 0.5, tpot_s: null } }];
window.fetch = async (path) => new Response(told.map((event) => `data: ${JSON.stringify(event)}\\n\\n`).join('') +
  'data: [DONE]\\n\\n');
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(driver: Any, server: Server) -> Page:
    page = Page(driver, server.url)
    page.size(1200)
    driver.get(f"{server.url}/")
    page.js(f"sessionStorage.setItem('pat-serve-key', '{KEY}')")
    driver.get(f"{server.url}/")
    page.until(lambda: page["main"].is_displayed())
    page.fill(max_tokens=12, temperature=0)
    page.js(LISTEN)
    page.complaints()
    return page


def say(page: Page, text: str, ends: str = "Pruned: finished. Dense: finished.") -> None:
    """Send a message with the Enter key and wait for both answers."""
    page.js("document.getElementById('play-news').textContent = ''")
    page["prompt"].send_keys(text, "\n")
    page.until(lambda: ends in page["play-news"].get_attribute("textContent"))


def sent(page: Page) -> dict[str, list[Any]]:
    """The conversations that were sent since the last call, by the side that they were for."""
    bodies = page.js("const sent = window.sent; window.sent = []; return sent")
    conversations: dict[str, list[Any]] = {"pruned": [], "dense": []}
    for path, body in bodies:
        conversations[SIDES[path]].append(body["messages"])
    return conversations


def said(page: Page, side: str) -> list[str]:
    """The answers that a model has given so far."""
    texts = page.driver.find_elements("css selector", f"[data-side={side}] .said")
    return [text.get_attribute("textContent") for text in texts]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_each_model_has_its_own_conversation(page: Page) -> None:
    say(page, "Hello")
    first = {side: said(page, side) for side in SIDES.values()}
    assert first["pruned"] != first["dense"]
    assert page["prompt"].get_attribute("value") == ""
    assert page.driver.switch_to.active_element == page["prompt"]
    page.driver.find_element("css selector", "summary").click()
    page["system"].send_keys("Be brief.")
    say(page, "Again")
    asked = sent(page)
    for side, conversations in asked.items():
        answer = {"role": "assistant", "content": first[side][0]}
        system = {"role": "system", "content": "Be brief."}
        assert conversations == [[user("Hello")], [system, user("Hello"), answer, user("Again")]]
        assert len(said(page, side)) == 2
        figures = page.driver.find_elements("css selector", f"[data-side={side}] .turn .figures")
        assert [line.text.split()[-1] for line in figures] == ["length", "length"]
    page["clear"].click()
    assert said(page, "pruned") == said(page, "dense") == []
    page["system"].clear()
    say(page, "Anew")
    assert sent(page) == {"pruned": [[user("Anew")]], "dense": [[user("Anew")]]}
    assert page.complaints() == []


def test_shift_enter_begins_a_line_and_stop_keeps_what_was_said(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.fill(max_tokens=8000)
    page["prompt"].send_keys("One", Keys.SHIFT + Keys.ENTER)
    page["prompt"].send_keys("two", Keys.ENTER)
    for side in SIDES.values():
        page.until(lambda side=side: said(page, side) and said(page, side)[0])
    assert not page["clear"].is_enabled()
    page["prompt"].send_keys("not yet", Keys.ENTER)
    page["stop"].click()
    page.until(lambda: "Pruned: stopped. Dense: stopped." in page["play-news"].get_attribute("textContent"))
    # Sent while the models were at work, it was not sent, and is not lost.
    assert page["prompt"].get_attribute("value") == "not yet"
    page["prompt"].clear()
    page.fill(max_tokens=4)
    partly = {side: said(page, side)[0] for side in SIDES.values()}
    say(page, "Go on")
    for side, conversations in sent(page).items():
        answer = {"role": "assistant", "content": partly[side]}
        assert conversations == [[user("One\ntwo")], [user("One\ntwo"), answer, user("Go on")]]


def test_a_message_that_is_refused_is_no_part_of_the_conversation(page: Page) -> None:
    page.js("document.getElementById('max-tokens').removeAttribute('max')")
    page.fill(max_tokens=MAX_MODEL_LEN)
    say(page, "Too much", "Pruned: failed. Dense: failed.")
    for side in SIDES.values():
        assert "lower max_tokens" in page.answer(side, ".problem")
    page.fill(max_tokens=4)
    say(page, "Less")
    assert sent(page)["pruned"][1] == [user("Less")]


def test_nothing_that_is_said_becomes_markup(page: Page) -> None:
    page.driver.execute_script(SAY, TRAP)
    say(page, TRAP)
    for side in SIDES.values():
        assert said(page, side) == [TRAP]
        assert page.answer(side, ".asked") == TRAP
        assert page.driver.find_elements("css selector", f"[data-side={side}] :is(img, b)") == []
    assert "owned" not in page.driver.title


def test_the_raw_prompt_is_still_there_and_alone_without_a_template(page: Page) -> None:
    assert page["prompt-label"].text == "Message"
    page["prompt"].send_keys("kept")
    page.mode("prompt")
    assert (page["prompt-label"].text, page["send"].text) == ("Prompt", "Generate")
    assert not page["clear"].is_displayed()
    assert page["prompt"].get_attribute("value") == "kept"
    page.mode("chat")
    told = "{ model: 'm', baseline: null, max_model_len: 99, has_chat: false }"
    page.js(f"import('/page/playground.js').then((page) => page.startPlayground({told}))")
    page.until(lambda: not page["modes"].is_displayed())
    assert page["prompt-label"].text == "Prompt"
    assert not page["system-field"].is_displayed()
    assert page.complaints() == []


def test_a_conversation_can_be_read_by_eye_and_ear(page: Page) -> None:
    say(page, "Hello")
    assert page.js(NAMELESS) == []
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        assert page.js(CONTRAST) == [], scheme

"""The page of a real server with two engines, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from pat_serve.server.routes.speedup_request import LiveSpeedupResult
from tests.integration.asking import check_error
from tests.integration.conftest import KEY, Server, wait_for
from tests.integration.pair.browser import CONTRAST, NAMELESS, Page, chromium
from tests.integration.pair.conftest import MAX_MODEL_LEN, PROMPT

# A browser draws by software beside two engines: not for the tests that everybody runs.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(driver: Any, server: Server) -> Page:
    """Open, with the key given and all complaints of the tests before forgotten."""
    page = Page(driver, server.url)
    page.size(1200)
    driver.get(f"{server.url}/")
    page.js(f"sessionStorage.setItem('pat-serve-key', '{KEY}')")
    driver.get(f"{server.url}/")
    page.until(lambda: page["main"].is_displayed())
    page.complaints()
    return page


def test_key_is_asked_for_and_kept_in_this_tab(driver: Any, server: Server) -> None:
    page = Page(driver, server.url)
    driver.get(f"{server.url}/")
    page.until(lambda: page["key-form"].is_displayed())
    assert driver.switch_to.active_element == page["key"]
    assert not page["main"].is_displayed()
    # Nothing was asked for without the key, so nothing was refused.
    assert page.complaints() == []
    page["key"].send_keys("wrong\n")
    page.until(lambda: "refused" in page["key-note"].text)
    page["key"].send_keys(f"{KEY}\n")
    page.until(lambda: page["main"].is_displayed())
    page.until(lambda: "ready" in page["state"].get_attribute("class"))
    assert not page["key-form"].is_displayed()
    assert KEY not in driver.current_url
    assert page.js("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    [refusal] = page.complaints()
    assert "401" in refusal


def test_a_key_that_holds_no_longer_is_asked_for_once(page: Page) -> None:
    """A server that was started anew with other keys, under an open page."""
    page.js(
        "window.refusals = 0; window.pollsPlanned = 0;"
        "document.addEventListener('key-refused', () => { window.refusals += 1; });"
        "const later = window.setTimeout; window.setTimeout = (work, ms) => {"
        "  window.pollsPlanned += window.refusals && ms === 2000; return later(work, ms); };"
        "sessionStorage.setItem('pat-serve-key', 'old')"
    )
    page.until(lambda: page["key-form"].is_displayed())
    assert page["state"].text == "waiting for a key"
    # Whatever the charts still had to do, they did in the task in which they were refused.
    assert page.js("return [window.refusals, window.pollsPlanned]") == [1, 0]
    page["key"].send_keys(f"{KEY}\n")
    page.until(lambda: "ready" in page["state"].get_attribute("class"))
    assert not page["key-form"].is_displayed()


def test_both_models_stream_side_by_side_and_stop(page: Page, server: Server, client: httpx.Client) -> None:
    from selenium.webdriver.common.keys import Keys

    with server.brake.held():
        page.mode("prompt")
        page.fill(max_tokens=8000, temperature=0)
        page["prompt"].send_keys(PROMPT, Keys.CONTROL + Keys.ENTER)
        for side in ("pruned", "dense"):
            text = page.until(lambda side=side: page.answer(side, ".text"))
            page.until(lambda side=side, text=text: len(page.answer(side, ".text")) > len(text) + 20)
            ttft, rate, tokens = page.answer(side, ".figures").split("\n")[1::2]
            assert ttft.endswith("s")
            assert float(rate) > 0
            assert int(tokens) > 1
        assert not page["send"].is_enabled()
        page["stop"].click()
        page.until(lambda: "Pruned: stopped. Dense: stopped." in page["play-news"].get_attribute("textContent"))
        wait_for(client, "vllm:num_requests_running", 0)
    assert page["send"].is_enabled()
    assert not page["stop"].is_enabled()
    assert page.complaints() == []


def test_one_after_the_other_ends_with_the_servers_figures(page: Page) -> None:
    page.mode("prompt")
    page.fill(max_tokens=12, temperature=0)
    page["turns"].click()
    page["prompt"].send_keys(PROMPT)
    page["send"].click()
    page.until(lambda: "Pruned: finished. Dense: finished." in page["play-news"].get_attribute("textContent"))
    for side in ("pruned", "dense"):
        assert page.answer(side, ".figures").split("\n")[-1] == "12 · length"
    # A refusal by the server stands in the column that the request was meant for.
    page.js("document.getElementById('max-tokens').removeAttribute('max')")
    page.fill(max_tokens=MAX_MODEL_LEN)
    page["send"].click()
    page.until(lambda: "lower max_tokens" in page.answer("pruned", ".problem"))


def test_speedup_is_checked_and_its_verdict_shown(page: Page, server: Server, client: httpx.Client) -> None:
    # A request of the test before, were one left, would have the check refused.
    wait_for(client, "pat_serve_requests_in_flight", 0)
    page.fill(claim=0.1, margin=5, prompt_tokens=16, output_tokens=9, rounds=5)
    with server.brake.held():
        page["check-run"].click()
        page.until(lambda: "run in turns" in page["verdict"].text)
        # A second one, from elsewhere, has to wait for it; one that came before it would make it wait instead.
        wait_for(client, "pat_serve_requests_in_flight", 1)
        check_error(client.post("/benchmark/latency", json={"rounds": 1}), 409, "busy", None, "another benchmark")
    page.until(lambda: page.driver.find_elements("id", "verdict-word"))

    told = client.get("/benchmark/speedup").raise_for_status().json()
    result = LiveSpeedupResult.model_validate(told)
    assert result.model_dump(mode="json") == told
    assert (result.settings.claim, len(result.rounds), result.other_requests) == (0.1, 5, 0)
    assert result.settings.margin == pytest.approx(0.05)
    assert [pair.first for pair in result.rounds] == ["baseline", "candidate"] * 2 + ["baseline"]
    assert {len(pair.candidate.decode_steps_s) for pair in result.rounds} == {8}
    assert result.baseline.shape.hidden == 2 * result.candidate.shape.hidden == 64
    # The ratio is about 1: ten times the claim, unless the machine was too busy to say.
    busy = ("spread", "drifted", "other processes", "did not settle")
    assert result.verdict.value == "pass" or any(word in result.reason for word in busy)
    assert page["verdict-word"].text == result.verdict.value
    shown = page["verdict"].text
    assert f"margin 5 %; strictly: {result.strict_verdict.value}" in shown
    for regime in result.regimes:
        assert f"[{regime.ratio.low:.3f}, {regime.ratio.high:.3f}]" in shown
        assert f"ceiling {regime.ceiling:.2f}" in shown
    # The verdict is there again when the page is opened anew.
    page.driver.refresh()
    page.until(lambda: page.driver.find_elements("id", "verdict-word"))
    assert page.complaints() == []


def test_a_grid_is_one_picture_of_shares_of_the_ceiling(page: Page, client: httpx.Client) -> None:
    wait_for(client, "pat_serve_requests_in_flight", 0)
    page.fill(claim=0.1, margin=5, output_tokens=9, rounds=5)
    page["grid"].send_keys("1x16,2x24")
    page["check-run"].click()
    page.until(lambda: page.driver.find_elements("id", "surface"))
    result = LiveSpeedupResult.model_validate(client.get("/benchmark/speedup").json())
    assert [(one.batch_size, one.prompt_tokens) for one in result.settings.grid] == [(1, 16), (2, 24)]
    label = page["surface"].get_attribute("aria-label")
    for regime in result.regimes:
        assert f"{regime.regime.value}, {regime.batch_size}x{regime.prompt_tokens}: " in label
    places = page.js("return [...document.querySelectorAll('#surface .median')].map(e => +e.getAttribute('cx'))")
    shares = [regime.ratio.median / regime.ceiling for regime in result.regimes]
    # The further along, the more of the ceiling.
    assert sorted(range(len(shares)), key=places.__getitem__) == sorted(range(len(shares)), key=shares.__getitem__)
    assert len(page.driver.find_elements("css selector", ".regime")) == len(shares) == 4
    assert page.js(CONTRAST) == []
    assert page.complaints() == []


def test_charts_show_the_servers_metrics(page: Page, client: httpx.Client) -> None:
    client.post("/generate", json={"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True})
    now = "[...document.querySelectorAll('.chart .now')].map(e => e.textContent)"
    values = page.until(lambda: (seen := page.js(f"return {now}")) and "\u2013" not in seen[:3] and seen)
    assert len(values) == 5
    assert page.js("return [...document.querySelectorAll('.chart svg')].every(e => e.getAttribute('aria-label'))")


def test_card_is_shown_and_none_of_it_runs(page: Page) -> None:
    card = page["card-text"]
    assert card.find_element("css selector", "h3").text == "A narrow model"
    assert [cell.text for cell in card.find_elements("css selector", "td")] == ["o_proj", "32"]
    assert [link.get_attribute("href") for link in card.find_elements("tag name", "a")] == [
        "https://arxiv.org/abs/2408.14721"
    ]
    assert card.find_elements("css selector", "script, img") == []
    assert "<script>" in card.text
    assert "owned" not in page.driver.title
    # And if something were markup after all, the policy would not let it run.
    page.js(
        "const script = document.createElement('script'); script.textContent = \"document.title='owned'\";"
        "document.body.append(script)"
    )
    assert "owned" not in page.driver.title
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


def test_it_is_usable_by_keyboard_eye_and_ear(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    assert page.js(NAMELESS) == []
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        assert page.js(CONTRAST) == [], scheme
    assert page.js("return document.documentElement.lang") == "en"
    levels = [
        int(tag[1]) for tag in page.js("return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => e.tagName)")
    ]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))

    seen: list[str] = []
    page.js("document.activeElement.blur()")
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        focused = (
            "const e = document.activeElement; return [e !== document.body && (e.id || e.ariaLabel || e.textContent), "
        )
        name, outline = page.js(focused + "getComputedStyle(e).outlineStyle]")
        if not name:  # past the end
            break
        assert outline == "solid", name
        seen.append(name)
    assert len(seen) == len(set(seen)) < 40
    order = ["mode-chat", "prompt", "max-tokens", "temperature", "turns"]
    order += ["send", "claim", "margin", "rounds", "check-run"]
    assert seen[0] == "Skip to the playground"
    assert [name for name in seen if name in order] == order
    assert page.complaints() == []


def test_it_fits_a_phone(page: Page) -> None:
    page.size(375, 812)
    page.fill(max_tokens=8)
    page["prompt"].send_keys("wide" * 40, "\n")
    page.until(lambda: "Pruned: finished. Dense: finished." in page["play-news"].get_attribute("textContent"))
    wide = "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
    wide += "!e.closest('pre, table') && e.getBoundingClientRect().right > 376).map(e => e.outerHTML.slice(0, 80))"
    assert page.js("return document.documentElement.scrollWidth") == 375
    assert page.js(wide) == []
    small = "return [...document.querySelectorAll('button, input:not([type=checkbox], [type=radio]), .modes label, "
    small += "textarea')]"
    assert page.js(f"{small}.filter(e => e.checkVisibility() && e.offsetHeight < 38).map(e => e.id)") == []

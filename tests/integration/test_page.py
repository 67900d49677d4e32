"""The baseline and the page on a real server with two engines: over HTTP, and in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.server.analysis.roofline import decode_ceiling, shape_of
from pat_serve.server.speedup_request import LiveSpeedupResult
from tests.integration.conftest import KEY, Server, free_port, spawn, tail, wait_for, wait_until_ready
from tests.integration.test_server import check_error, post
from tests.tiny_models import save_tiny_llama

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.vllm


def browser(test: Callable[..., None]) -> Callable[..., None]:
    """Needs a browser, which draws the page by software beside two engines: not for the tests that everybody runs."""
    needed = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
    return pytest.mark.slow(needed(test))


MAX_MODEL_LEN = 8192
PROMPT = "Return a new dictionary"
SMALL = {"prompt_tokens": 16, "output_tokens": 9, "rounds": 5}
CARD = """---
license: apache-2.0
---
# A narrow model

Some **strong** text, [a paper](https://arxiv.org/abs/2408.14721), [a trap](javascript:document.title='owned') and
<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>.

| tensor | width |
|---|---|
| `o_proj` | 32 |
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense") / "dense", max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def server(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In the place of the shared one: half as wide a model beside its baseline, and a page that a browser can open."""
    with running(dense, tmp_path_factory.mktemp("pair")) as server:
        yield server
        # Both engines end with the server.
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        assert server.process.wait(60) == 0, tail(server.log)
        assert psutil.wait_procs(family, timeout=5)[1] == []


@contextmanager
def running(dense: Path, folder: Path) -> Iterator[Server]:
    model, log = folder / "pruned", folder / "log.txt"
    save_tiny_llama(model, hidden_size=32, max_position_embeddings=MAX_MODEL_LEN)
    (model / "README.md").write_text(CARD)
    port = free_port()
    flags = ["--baseline", str(dense), "--dtype", "float32", "--kv-cache-gib", "0.05"]
    process = spawn(model, port, log, *flags, "--api-key", f"tests={KEY}", "--public-page")
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        yield Server(process=process, url=url, model=model, log=log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_baseline_answers_as_the_dense_model(dense: Path, client: httpx.Client) -> None:
    encoded = AutoTokenizer.from_pretrained(dense)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    generated = model.generate(**encoded, max_new_tokens=24, do_sample=False)
    expected = generated[0, encoded["input_ids"].shape[1] :].tolist()
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    answer = client.post("/baseline/generate", json=body).raise_for_status().json()
    assert (answer["token_ids"], answer["model"]) == (expected, str(dense))
    assert answer["timings"]["queue_s"] is not None
    assert client.post("/generate", json=body).json()["token_ids"] != expected


def test_baseline_has_the_same_door(server: Server, client: httpx.Client) -> None:
    assert httpx.post(f"{server.url}/baseline/generate", json={"prompt": "a"}).status_code == 401
    check_error(client.post("/baseline/generate", json={"prompt": ""}), 400, "invalid_request", "prompt", "at least 1")
    # The metrics are the served model's, and still there.
    assert f'model_name="{server.model}"' in client.get("/metrics").text


def test_no_speedup_is_known_before_the_first_check(client: httpx.Client) -> None:
    check_error(client.get("/benchmark/speedup"), 404, "not_found", None, "POST /benchmark/speedup")


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"claim": 0}, "claim", "greater than 0"),
        ({"rounds": 4}, "rounds", "greater than or equal to 5"),
        ({"regimes": ["both"]}, "regimes.0", "'prefill' or 'decode'"),
        ({"output_tokens": 1}, None, "at least 2"),
        ({"prompt_tokens": MAX_MODEL_LEN}, "prompt_tokens", f"{MAX_MODEL_LEN} together"),
        ({"batch_size": 200, "prompt_tokens": 1000}, "batch_size", "tokens at once"),
    ],
)
def test_bad_check_is_one_clear_400(client: httpx.Client, body: dict[str, Any], param: str | None, told: str) -> None:
    check_error(client.post("/benchmark/speedup", json=body), 400, "invalid_request", param, told)


def test_check_is_refused_while_a_user_is_served_by_either_model(server: Server, client: httpx.Client) -> None:
    endless = {"prompt": PROMPT, "max_tokens": MAX_MODEL_LEN - 100, "ignore_eos": True, "stream": True}
    with closing(post(server, "/baseline/generate", endless)) as connection:
        assert connection.getresponse().readline().startswith(b"data: ")
        check_error(client.post("/benchmark/speedup", json=SMALL), 409, "busy", None, "1 request of a user")


def test_latency_beside_a_baseline_has_the_ceiling_of_the_speed_up(
    dense: Path, server: Server, client: httpx.Client
) -> None:
    body = {"batch_size": 2, "prompt_tokens": 16, "output_tokens": 8, "rounds": 2, "warmup": 0, "force": True}
    roofline = client.post("/benchmark/latency", json=body).raise_for_status().json()["roofline"]
    shapes = [shape_of(json.loads((folder / "config.json").read_text()), folder) for folder in (dense, server.model)]
    ceiling = decode_ceiling(*shapes, batch_size=2, context_tokens=20, dtype_bytes=4)
    assert roofline["decode"]["speedup_ceiling"] == pytest.approx(ceiling)
    assert roofline["prefill"]["speedup_ceiling"] > 1


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield made
    finally:
        made.quit()


class Page:
    """The page in the browser, by the ids that its own scripts use."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def answer(self, side: str, part: str) -> str:
        return str(self.driver.find_element("css selector", f"[data-side={side}] {part}").text)

    def js(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def fill(self, **fields: object) -> None:
        for name, value in fields.items():
            element = self[name.replace("_", "-")]
            element.clear()
            element.send_keys(str(value))

    def until(self, what: Callable[[], Any], *, within_s: float = 60) -> Any:
        deadline_s = time.monotonic() + within_s
        while not (seen := what()):
            assert time.monotonic() < deadline_s, self.driver.find_element("tag name", "body").text
            time.sleep(0.05)
        return seen

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


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


@browser
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


@browser
def test_both_models_stream_side_by_side_and_stop(page: Page, client: httpx.Client) -> None:
    from selenium.webdriver.common.keys import Keys

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


@browser
def test_one_after_the_other_ends_with_the_servers_figures(page: Page) -> None:
    page.fill(max_tokens=12, temperature=0)
    page["turns"].click()
    page["prompt"].send_keys(PROMPT)
    page["send"].click()
    page.until(lambda: "Pruned: finished. Dense: finished." in page["play-news"].get_attribute("textContent"))
    for side in ("pruned", "dense"):
        assert page.answer(side, ".figures").split("\n")[-1] == "12 · length"
    # What the server refuses is told in the column that it was meant for.
    page.js("document.getElementById('max-tokens').removeAttribute('max')")
    page.fill(max_tokens=MAX_MODEL_LEN)
    page["send"].click()
    page.until(lambda: "lower max_tokens" in page.answer("pruned", ".problem"))


@browser
def test_speedup_is_checked_and_its_verdict_shown(page: Page, client: httpx.Client) -> None:
    page.fill(claim=0.1, prompt_tokens=16, output_tokens=9, rounds=5)
    page["check-run"].click()
    page.until(lambda: "run in turns" in page["verdict"].text)
    # A second one, from elsewhere, has to wait for it.
    page.until(lambda: client.post("/benchmark/latency", json={"rounds": 1}).status_code == 409)
    page.until(lambda: page.driver.find_elements("id", "verdict-word"), within_s=180)

    told = client.get("/benchmark/speedup").raise_for_status().json()
    result = LiveSpeedupResult.model_validate(told)
    assert result.model_dump(mode="json") == told
    assert (result.settings.claim, len(result.rounds), result.other_requests) == (0.1, 5, 0)
    assert [pair.first for pair in result.rounds] == ["baseline", "candidate"] * 2 + ["baseline"]
    assert {len(pair.candidate.decode_steps_s) for pair in result.rounds} == {8}
    assert result.baseline.shape.hidden_size == 2 * result.candidate.shape.hidden_size == 64
    # The ratio is about 1: ten times the claim, unless the machine was too busy to say.
    assert result.verdict.value == "pass" or "spread" in result.reason
    assert page["verdict-word"].text == result.verdict.value
    shown = page["verdict"].text
    for regime in result.regimes:
        assert f"[{regime.ratio.low:.3f}, {regime.ratio.high:.3f}]" in shown
        assert f"ceiling {regime.ceiling:.2f}" in shown
    # It is there again when the page is opened anew.
    page.driver.refresh()
    page.until(lambda: page.driver.find_elements("id", "verdict-word"))
    assert page.complaints() == []


@browser
def test_charts_show_the_servers_metrics(page: Page, client: httpx.Client) -> None:
    client.post("/generate", json={"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True})
    now = "[...document.querySelectorAll('.chart .now')].map(e => e.textContent)"
    values = page.until(lambda: (seen := page.js(f"return {now}")) and "\u2013" not in seen[:3] and seen)
    assert len(values) == 5
    assert page.js("return [...document.querySelectorAll('.chart svg')].every(e => e.getAttribute('aria-label'))")


@browser
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


CONTRAST = """
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
  if (c[3] > 250) return c.slice(0, 3); } return [255, 255, 255]; };
const low = [];
for (const e of document.querySelectorAll('body *')) {
  if (!e.checkVisibility() || e.disabled || e instanceof SVGElement) continue;
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const a = light(rgba(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) low.push(`${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 20)}: ${ratio.toFixed(2)}`);
}
return low;
"""
NAMELESS = """
const name = (e) => e.getAttribute('aria-label') || [...(e.labels ?? [])].map((l) => l.textContent).join('')
  || e.textContent || e.alt;
return [...document.querySelectorAll('a, button, input, textarea, select, [tabindex="0"], svg[role=img]')]
  .filter((e) => e.tagName !== 'TABLE' && !name(e).trim()).map((e) => e.outerHTML.slice(0, 80));
"""


@browser
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
    order = ["prompt", "max-tokens", "temperature", "turns", "send", "claim", "rounds", "check-run"]
    assert seen[0] == "Skip to the playground"
    assert [name for name in seen if name in order] == order
    assert page.complaints() == []


@browser
def test_it_fits_a_phone(page: Page) -> None:
    page.size(375, 812)
    wide = "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
    wide += "!e.closest('pre, table') && e.getBoundingClientRect().right > 376).map(e => e.outerHTML.slice(0, 80))"
    assert page.js("return document.documentElement.scrollWidth") == 375
    assert page.js(wide) == []
    small = "return [...document.querySelectorAll('button, input:not([type=checkbox]), textarea')]"
    assert page.js(f"{small}.filter(e => e.checkVisibility() && e.offsetHeight < 38).map(e => e.id)") == []


# ---- the end of the baseline: the last test, which has none any more ------------------------------------------------


def test_a_dead_baseline_ends_no_server(server: Server, client: httpx.Client) -> None:
    _, second = cores(server)
    family = [second, *second.children(recursive=True)]
    second.kill()
    deadline_s = time.monotonic() + 30
    while (answer := client.post("/baseline/generate", json={"prompt": "a", "max_tokens": 1})).status_code != 503:
        assert time.monotonic() < deadline_s, answer.text
    check_error(answer, 503, "baseline_dead", None, "restart the server")
    check_error(client.post("/benchmark/speedup", json=SMALL), 503, "baseline_dead", None, "restart the server")
    assert client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert client.get("/ready").status_code == 200
    _, left = psutil.wait_procs(family, timeout=15)
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["served engine", "supervisor", "server"])
def test_nothing_is_left_whoever_is_killed(dense: Path, tmp_path: Path, killed: str) -> None:
    with running(dense, tmp_path) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        victims = {"served engine": cores(server)[0], "supervisor": server.process, "server": family[0]}
        victims[killed].kill()
        assert server.process.wait(60) != 0
        assert psutil.wait_procs(family, timeout=60)[1] == []


def cores(server: Server) -> list[psutil.Process]:
    """The served engine's process and the baseline's, which is started after it."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = [child for child in family if any("EngineCore" in part for part in child.cmdline())]
    assert len(found) == 2
    return sorted(found, key=lambda child: float(child.create_time()))

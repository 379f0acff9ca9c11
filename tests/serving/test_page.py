"""The page at / in a browser: text appears, alternatives can be used, texts are kept, and the keyboard suffices."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.serving import Client

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="no Chromium is installed"),
    pytest.mark.slow,  # a browser takes seconds to start
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, client: Client) -> Iterator[Any]:
    """The page, in a fresh profile. What the browser complains about fails the test."""
    complaints: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(20_000)
    page.goto(f"http://127.0.0.1:{client.port}/")
    yield page
    assert [one for one in complaints if "400" not in one and "favicon" not in one] == []
    page.close()


def fill(page: Any, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)


def texts(page: Any) -> list[str]:
    return [str(one) for one in page.locator("#answer .token").all_text_contents()]


def finish(page: Any) -> None:
    playwright.expect(page.locator("#stop")).to_be_disabled()


def test_text_alternatives_and_saved_texts(page: Any, client: Client) -> None:
    fill(page, prompt="In the beginning", max_tokens="20", seed="1", temperature="1")
    page.locator("#go").click()
    finish(page)
    first = texts(page)
    expected = client.complete(prompt="In the beginning", max_tokens=20, seed=1, return_token_ids=True)["choices"][0]
    assert len(first) == len(expected["token_ids"])
    assert page.locator("#model").text_content() == "small"
    assert page.locator("#prompted").text_content() == "16"

    page.locator("#answer .token").nth(8).focus()
    page.keyboard.press("Enter")
    page.locator("#forks").wait_for(state="visible")
    finish(page)
    page.get_by_role("button", name="Use alternative 2").click()
    assert texts(page)[:8] == first[:8]
    assert texts(page) != first

    page.locator("#save").click()
    kept = texts(page)
    page.reload()
    page.get_by_role("button", name="In the beginning", exact=True).click()
    assert texts(page) == kept
    page.locator("#more").click()
    finish(page)
    assert texts(page)[: len(kept)] == kept
    page.get_by_role("button", name="Delete In the beginning").click()
    assert page.locator("#saved li").count() == 0


def test_a_schema_and_an_error(page: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    fill(page, schema=json.dumps(schema), max_tokens="60")
    page.locator("#go").click()
    finish(page)
    assert json.loads("".join(texts(page))) in ({"a": 1}, {"a": 2})
    fill(page, schema="", temperature="-1")
    page.locator("#go").click()
    playwright.expect(page.locator("#error")).to_contain_text("temperature")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_in_both_schemes(page: Any, tmp_path: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    colour = page.evaluate("getComputedStyle(document.querySelector('input')).color")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert (brightness > 128) == (scheme == "dark")
    page.screenshot(path=str(tmp_path / f"{scheme}.png"))
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')].filter((e) => !(e.labels?.length || e.textContent "
        "|| e.getAttribute('aria-label') || e.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0

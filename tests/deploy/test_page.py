"""The page in a browser: what a user drops on it, and what is seen then."""

import io
import os
import re

import pytest
import requests
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.support.made_bundle import make_bundle, picture, png
from tests.support.served import served

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "token").write_text(TOKEN)
    with served(make_bundle(folder / "b"), folder, "--token-file", str(folder / "token")) as found:
        yield found


@pytest.fixture
def page(server):
    """The page, as on a phone in the dark; what its console says fails the test."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        yield page
        browser.close()
        # The browser notes each answer with an error status by itself.
        assert [text for text in said if "Failed to load resource" not in text] == []


def choose(page, file, name="image.png"):
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": file})


def let_in(page):
    page.fill("#token", TOKEN)
    page.press("#token", "Tab")
    expect(page.locator("#model")).to_contain_text("vim_tiny")


def test_an_image_is_answered_with_all_that_belongs_to_it(page, server):
    let_in(page)
    file = png(picture(0))
    choose(page, file)
    page.wait_for_selector("#answer:not([hidden])")
    me = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png"}
    wanted = requests.post(f"{server.url}/predict", data=file, headers=me, timeout=30).json()
    assert page.inner_text("#decision") == wanted["decision"]
    assert f"{100 * wanted['score']:.1f} %" in page.inner_text("#threshold") and "40.0 %" in page.inner_text("#threshold")
    assert page.is_visible("#unlike") == wanted["unlike_training"]
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert "Not a medical device" in page.inner_text("#caveats")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_image_that_is_dropped_is_answered(page):
    let_in(page)
    data = list(png(picture(2)))
    drop = page.evaluate_handle(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"}));
            return transfer;
        }""",
        data,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": drop})
    page.wait_for_selector("#answer:not([hidden])")
    assert "dropped.png" in page.inner_text("#state")


def test_what_is_wrong_is_said_and_no_old_answer_stands_beside_it(page):
    let_in(page)
    choose(page, png(picture(0)))
    page.wait_for_selector("#answer:not([hidden])")
    choose(page, b"no image", "notes.png")
    expect(page.locator("#error")).to_contain_text("no image of a known format")
    assert not page.is_visible("#answer")


def test_a_heat_map_has_the_images_own_shape(page):
    let_in(page)
    choose(page, png(picture(0)[:32]))  # 64 x 32 px
    expect(page.locator("#heat")).to_have_attribute("style", re.compile("aspect-ratio: 2"))
    sides = page.locator("#heat").bounding_box()
    assert sides["width"] == pytest.approx(2 * sides["height"], rel=0.02)


def test_an_image_that_the_browser_cannot_show_is_predicted(page):
    let_in(page)
    file = io.BytesIO()
    Image.fromarray(picture(0)).save(file, "TIFF")
    choose(page, file.getvalue(), "image.tif")
    expect(page.locator("#name")).to_contain_text("cannot show")
    assert page.is_visible("#answer")


def test_a_file_that_is_too_large_is_not_sent(page):
    let_in(page)
    drop = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(20000001)], "large.png", {type: "image/png"}));
            return transfer;
        }"""
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": drop})
    expect(page.locator("#error")).to_contain_text("large.png has 20.0 MB")


def test_without_the_token_the_page_asks_for_it(page):
    page.wait_for_selector("#key:not([hidden])")
    choose(page, png(picture(0)))
    expect(page.locator("#error")).to_contain_text("token")

"""The page in Chromium: drawn without an error or a request, at a phone's width and a desk's, in the dark, on paper."""

import itertools
import shutil

import pytest
from PIL import Image

from medtune.report.page import write
from medtune.results import sheets_folder
from tests.report.test_report import logits_of
from tests.support.made_study import MadeStudy

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    study = MadeStudy(folder / "made")
    for number in range(20):
        external = {"external/auc": 0.9 - number / 100, "external/oa": 0.8, "external/n": 60}
        optimizer = ("adam", "adamw", "sgd")[number % 3]
        logits_of(study, study.trial(0.2 + number / 100, optimizer=optimizer, external=external))
    study.trial(0.5, state="PRUNED", epochs=2)
    study.trial(0.6, state="FAIL", epochs=1)
    sheets = sheets_folder(study, 0)
    sheets.mkdir(parents=True)
    Image.new("RGB", (900, 40), "red").save(sheets / "val-hits.png")
    return write(study.read(), folder / "report.html")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def opened(browser, page_file, width, scheme="light"):
    """The page, and what went wrong on it: no network, and every word on the console counts."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-drawn]")
    return page, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_drawn_without_an_error_and_without_scrolling_sideways(browser, page_file, width, scheme):
    page, wrong = opened(browser, page_file, width, scheme)
    assert page.locator("figure .main-svg").count() >= 10
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.locator("figure img").evaluate("img => img.naturalWidth") == 900
    sections = "answer progress space learning finalists rests transfer beside failures trials"
    for section in sections.split():
        assert page.locator(f"section#{section} h2").is_visible()
    lightness = "el => getComputedStyle(el)['{}'].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    back = page.locator("body").evaluate(lightness.format("background-color"))
    text = page.locator(".plot .xtick text").first.evaluate(lightness.format("fill"))
    assert (back < 150 and text > 500) if scheme == "dark" else (back > 600 and text < 200)
    assert wrong == []
    page.context.close()


def test_plots_keep_within_the_page_on_a_phone_but_for_the_box_that_scrolls(browser, page_file):
    page, _ = opened(browser, page_file, 360)
    widths = page.locator("figure .box").evaluate_all("boxes => boxes.map(box => box.getBoundingClientRect().right)")
    assert max(widths) <= 360
    assert page.locator("#parallel .box").evaluate("box => box.scrollWidth > box.clientWidth")
    page.context.close()


def test_a_click_on_a_head_sorts_the_trials(browser, page_file):
    page, _ = opened(browser, page_file, 1280)
    column = "rows => rows.map(row => parseFloat(row.cells[4].textContent))"
    head = page.locator("table.sortable thead button", has_text="ext. AUC")
    head.click()
    rising = page.locator("table.sortable tbody tr").evaluate_all(column)
    assert rising[:20] == sorted(rising[:20]) and rising[0] == pytest.approx(0.71)
    head.click()
    assert page.locator("table.sortable tbody tr").evaluate_all(column)[0] == pytest.approx(0.9)
    page.context.close()


def test_it_prints_light_with_plots_that_fit_the_paper(browser, page_file):
    page, wrong = opened(browser, page_file, 1280, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("body").evaluate("el => getComputedStyle(el).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("figure .main-svg").first.evaluate("el => el.getBoundingClientRect().width") <= 660
    assert page.pdf(format="A4").startswith(b"%PDF") and wrong == []
    page.context.close()


def test_heads_of_parallel_axes_do_not_touch(browser, page_file):
    page, _ = opened(browser, page_file, 1280)
    boxes = page.locator("#parallel .annotation-text-g").evaluate_all(
        "nodes => nodes.filter(n => n.querySelector('[style*=bold]')).map(n => n.getBoundingClientRect())"
        ".map(b => [b.left, b.right]).sort((a, b) => a[0] - b[0])"
    )
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(boxes)]
    assert len(gaps) >= 5 and min(gaps) > 8
    page.context.close()

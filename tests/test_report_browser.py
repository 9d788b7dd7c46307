"""Reports in a browser: nothing fails, everything that can be pressed works, phone, paper and the dark are served."""

import shutil
from pathlib import Path

import pytest

from comparisons import write_comparison
from medtpp.report import write_report
from reports import NASTY, rename_classes
from runs import run_folder
from segmented import table_of, write_segmented_run
from studies import write_study

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
KINDS = ("run", "masks", "small", "large", "study")
LEAST_CONTRAST = 4.5

# The least contrast of any text with the ground it stands on, and the text; what is hidden is left out.
CONTRAST = """() => {
  const channels = (colour) => {
    const found = colour.match(/[\\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 255 : 1;
    return [found[0] * scale, found[1] * scale, found[2] * scale, found.length > 3 ? found[3] : 1];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = channels(getComputedStyle(one).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  let least = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.matches("script, style")) continue;
    if (!element.checkVisibility({ contentVisibilityAuto: true })) continue;
    const style = getComputedStyle(element);
    const ink = luminance(channels(element.closest("svg") ? style.fill : style.color));
    const under = luminance(ground(element));
    const contrast = (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05);
    if (contrast < least[0]) least = [contrast, text];
  }
  return least;
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    run = Path(shutil.copytree(run_folder(), root / "run"))
    rename_classes(run, NASTY)
    large = {"tuners": ("lora", "ssf", "vpt_deep"), "extras": ("longer", "linear"), "labels": (30, 150, "all")}
    write_segmented_run(root / "masks", table_of(40, structures=NASTY))
    write_comparison(root / "small", seeds=1)
    write_comparison(root / "large", **large, data="a_name_without_spaces_that_is_longer_than_a_phone_is_wide")
    write_study(root / "study")
    return {kind: write_report(root / kind).as_uri() for kind in KINDS}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, reports):
    """Opens a report; in the end nothing may have failed on the page, and nothing may have been asked of a network."""
    contexts, wrong = [], []

    def show(kind, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.goto(reports[kind])
        return page

    yield show
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_can_be_pressed(opened, kind):
    page = opened(kind, reduced_motion="reduce")  # a link is there at once
    assert page.locator("nav a").count() >= 8
    for link in page.locator("nav a").all():
        link.click()
        assert page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top < innerHeight")
    for summary in page.locator("summary").all():
        summary.click()
        assert summary.evaluate("one => one.parentElement.open")
    for image in page.locator("button.zoom").all():
        image.click()
        assert page.locator("dialog img").evaluate("one => one.complete && one.naturalWidth > 0")
        page.keyboard.press("Escape")
        assert not page.locator("dialog").evaluate("one => one.open")
        assert image.evaluate("one => one === document.activeElement")
    for choice in page.locator("select").all():
        choice.select_option(index=1)
        section = choice.locator("xpath=ancestor::section")
        chosen = choice.input_value()
        faded = section.locator("[data-series].faded").all()
        assert faded
        assert all(part.get_attribute("data-series") != chosen for part in faded)
        assert section.locator(f'[data-series="{chosen}"]:not(.faded)').count()
        choice.select_option("")
        assert not section.locator(".faded").count()
    for button in page.locator("th button").all():
        button.click()


def test_a_table_is_sorted_by_a_column(opened):
    page = opened("large")
    table = page.locator("#cost table")
    columns = {"arm": (0, str), "labels": (1, lambda text: float(text.replace(",", "")))}
    for name, (column, key) in columns.items():
        header = table.locator("th", has_text=name).first
        for _ in range(2):
            header.locator("button").click()
            cells = [key(text) for text in table.locator(f"tbody tr > :nth-child({column + 1})").all_inner_texts()]
            wanted = sorted(cells, reverse=header.get_attribute("aria-sort") == "descending")
            assert cells == wanted
            assert table.locator("th[aria-sort]").count() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [320, 360, 800])
def test_a_narrow_page_does_not_scroll_sideways(opened, kind, width):
    page = opened(kind, viewport={"width": width, "height": 640})
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        "[...document.querySelectorAll('main > section > *')].map((one) => one.getBoundingClientRect().right)"
    )
    assert max(boxes) <= width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("media", "scheme"), [("screen", "light"), ("screen", "dark"), ("print", "dark")])
def test_text_stands_out(opened, kind, media, scheme):
    page = opened(kind, color_scheme=scheme)
    page.emulate_media(media=media, color_scheme=scheme)
    contrast, text = page.evaluate(CONTRAST)
    assert contrast >= LEAST_CONTRAST, text
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == ((media, scheme) != ("screen", "dark"))


@pytest.mark.parametrize("kind", KINDS)
def test_paper_shows_everything(opened, kind):
    page = opened(kind)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details > :not(summary)").count()
    assert all(part.is_visible() for part in page.locator("details > :not(summary)").all())
    assert not page.locator("nav").is_visible()
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_without_scripts_is_complete(opened, kind):
    page = opened(kind, java_script_enabled=False)
    assert page.locator("button:visible").count() == 0
    assert page.locator("select:visible").count() == 0
    assert all(image.is_visible() for image in page.locator("main img").all())
    hidden = page.locator("main section > :not(details):not(.chooser)")
    assert all(part.is_visible() for part in hidden.all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_keyboard_reaches_everything(opened, kind):
    page = opened(kind)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    wanted = page.locator("main :is(a, button, select, summary, .scroll)").evaluate_all(
        "all => all.filter((one) => one.checkVisibility({contentVisibilityAuto: true})).length"
    )
    seen = 0
    for _ in range(wanted):
        page.keyboard.press("Tab")
        seen += page.evaluate("document.activeElement.closest('main') !== null")
    assert seen == wanted


def test_a_name_does_not_run(opened):
    page = opened("run")
    page.on("dialog", lambda dialog: pytest.fail(f"a name was run: {dialog.message}"))
    assert page.locator("script").count() == 1
    assert NASTY[0] in page.locator("#confusion").inner_text()

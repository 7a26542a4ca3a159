"""The report in a real browser: it opens from a file, sorts, draws, and asks nobody for anything.

Slow; needs `pip install selenium`, and chromium and chromedriver on the PATH.
"""

import json
import shutil

import pytest

pytest.importorskip("selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no chromium and chromedriver", allow_module_level=True)

from report_test import EVIL, make_run, result
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from soup_jax.reports import write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two configs, one with three seeds, and its JSON."""
    folder = tmp_path_factory.mktemp("report")
    for seed in (0, 1, 2):
        run = make_run(folder / "runs" / f"soup-{seed}", seed=seed, evaluated=(2, 4, 6), name=EVIL)
        found = result(law=(2.0, 2.5 + seed / 10), cooking=(3.0, 2.9), python=(4.0, 4.2))
        for number, row in enumerate(found["specialists"].values()):
            row["alpha"] = [0.5 - number, 0.1, -0.3, float(seed)]
        found |= {"part": "final", "runs": {"specialist": {"step": 6}}}
        (run / "evaluation.json").write_text(json.dumps(found))
    make_run(
        folder / "runs" / "wide", num_experts=8, loss=lambda s: float("nan") if s == 4 else 3.0
    )
    out = folder / "report <&> é.html"
    write.report([str(folder / "runs")], out=out)
    return out


def cells(browser, place, column):
    rows = browser.find_elements(By.CSS_SELECTOR, f"#{place} tbody tr")
    return [
        row.find_elements(By.CSS_SELECTOR, "th, td")[column].text.split("\n")[0] for row in rows
    ]


def header(browser, place, title):
    for cell in browser.find_elements(By.CSS_SELECTOR, f"#{place} thead th"):
        if cell.text.strip(" ↕↑↓") == title:
            return cell
    raise AssertionError(title)


def shape(browser, chart="loss"):
    paths = browser.find_elements(By.CSS_SELECTOR, f"[data-chart={chart}] path.curve")
    return [path.get_attribute("d") for path in paths]


def test_a_reader_sorts_switches_and_hides(page, browser):
    browser.set_window_size(1200, 900)
    browser.get(page.as_uri())
    assert browser.find_element(By.ID, "title").text.startswith("4 runs, 2 configs")
    assert EVIL.split("\u2028")[0] in browser.find_element(By.ID, "legend").text

    # The worst gain stands first; a header sorts, by keyboard too, and says so.
    assert cells(browser, "specialists", 0) == ["cooking", "python", "law"]
    gain = header(browser, "specialists", "gain over generic_h")
    assert gain.get_attribute("aria-sort") == "ascending"
    gain.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert cells(browser, "specialists", 0) == ["law", "python", "cooking"]
    assert gain.get_attribute("aria-sort") == "descending"
    header(browser, "specialists", "Specialist").find_element(By.TAG_NAME, "button").click()
    assert cells(browser, "specialists", 0) == ["cooking", "law", "python"]
    assert gain.get_attribute("aria-sort") == "none"
    before = cells(browser, "specialists", 2)
    browser.find_element(By.CSS_SELECTOR, "#units input[value=bits_per_byte]").click()
    halves = [float(x) / 2 for x in before]
    assert [float(x) for x in cells(browser, "specialists", 2)] == pytest.approx(halves)

    # Axes, and a number that is not finite: a gap and a mark.
    drawn = shape(browser)
    assert len(drawn) == 3  # one line, and one in two pieces
    assert len(browser.find_elements(By.CSS_SELECTOR, "[data-chart=loss] .mark")) == 1
    browser.find_element(By.CSS_SELECTOR, "#axis input[value=hours]").click()
    assert "6 s" in browser.find_element(By.CSS_SELECTOR, "[data-chart=loss] svg").text
    browser.find_element(By.CSS_SELECTOR, "#axis input[value=step]").click()
    assert shape(browser) == drawn  # steps and tokens are in proportion
    browser.find_element(By.ID, "log").click()
    assert shape(browser) != drawn

    # A chart that has the focus is read by the arrow keys.
    picture = browser.find_element(By.CSS_SELECTOR, "[data-chart=loss] svg")
    picture.send_keys(Keys.ARROW_RIGHT)
    tip = browser.find_element(By.CSS_SELECTOR, "[data-chart=loss] .tip")
    assert "2 steps" in tip.text
    assert "5.8" in tip.text
    picture.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()

    # The legend takes a config out of curves and tables.
    button = browser.find_elements(By.CSS_SELECTOR, "#legend button")[0]
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-chart=loss] .band")
    assert cells(browser, "specialists", 0) == []
    button.click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "[data-chart=loss] .band")) == 1

    rectangles = browser.find_elements(By.CSS_SELECTOR, "#alpha rect title")
    assert rectangles[0].get_attribute("textContent") == "law, expert 1: 0.5000"
    assert len(rectangles) == 3 * 4
    assert not browser.get_log("browser")


def test_it_fits_a_phone_and_asks_for_nothing(page, browser):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    back = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        back.append(
            browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        )
    assert back[0] != back[1]
    assert browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert asked == {page.as_uri()}
    assert not browser.get_log("browser")


def test_a_seed_that_stopped_early_is_named_and_left_out_of_the_mean(tmp_path, browser):
    for seed, steps in ((0, (2, 4, 6)), (1, (2,)), (2, (2, 4, 6))):
        make_run(tmp_path / "runs" / str(seed), steps=steps, loss=lambda s: 9.0 - s, seed=seed)
    write.report([str(tmp_path / "runs")], out=tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    (row,) = browser.find_elements(By.CSS_SELECTOR, "#glance tbody tr")
    text = row.text.split("\n")
    assert "without seed 1 at 2" in text
    assert any(part.endswith("3.0000") for part in text)
    assert "7.0000" not in row.text

"""The served page in a real browser: it makes, compares, downloads, and asks its own server only.

Slow; needs `pip install selenium`, and chromium and chromedriver on the PATH.
"""

import json
import shutil

import pytest

pytest.importorskip("selenium")
pytest.importorskip("uvicorn")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no chromium and chromedriver", allow_module_level=True)

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.slow


def test_a_person_makes_compares_and_downloads(address, browser, tiny_text, tmp_path):
    def find(name):
        return browser.find_element(By.ID, name)

    def until(condition):
        WebDriverWait(browser, 120).until(lambda _: condition())

    browser.get(f"{address}/")
    until(lambda: "4 experts" in find("about").text)
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines()[:12]
    find("documents").send_keys("\n---\n".join(json.loads(x)["text"][:80] for x in lines))
    find("make").click()
    until(lambda: "12 documents" in find("made").text)
    until(lambda: "bits per byte" in find("bits-generic").text)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#domains .bar")) == 6
    assert len(browser.find_elements(By.CSS_SELECTOR, "#alpha .signed")) == 4
    find("prompt").send_keys("butter")
    find("tokens").clear()
    find("tokens").send_keys("20")
    find("compare").click()
    until(lambda: find("compare").is_enabled() and len(find("text-generic").text) > len("butter"))
    assert len(find("text-specialist").text) > len("butter")
    first = find("name").text
    find("download").click()
    until(lambda: (tmp_path / f"{first}.zip").exists())
    move = "const s = document.querySelectorAll('#domains input')[5]; s.value = 1;"
    browser.execute_script(f"{move} s.dispatchEvent(new Event('input'))")
    find("again").click()
    until(lambda: find("name").text not in ("", first))
    assert find("error").text == ""
    assert not browser.get_log("browser")
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert len(asked) >= 6
    assert all(url.startswith((address, f"blob:{address}")) for url in asked)

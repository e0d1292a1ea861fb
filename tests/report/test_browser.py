"""Chromium opens the page without errors, requests or overflow."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium, find_chromium
from matplotlib.colors import to_rgb
from report_runs import write_detections, write_filters, write_pair, write_report, write_run

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
EVIL = "<script>document.title = 'run'</script><img src=x onerror='document.title = 1'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with every section, and with names that look like markup."""
    root = tmp_path_factory.mktemp("report")
    folders = write_pair(root, treated="tract, with a long name that does not fit into its column")
    for method, value in (("vanilla", 0.4), ("b" * 60, 0.5), (EVIL, 0.3)):
        classes = {EVIL: value, "cat": 0.2, "dog": value / 2}
        classes |= {f"class {number}": number / 100 for number in range(45)}
        folders += [
            write_run(root / str(i), method, task, seed, {"ap50": value}, per_class=classes)
            for i, task in enumerate(("pre", "detect"))
            for seed in (0, 1)
        ]
    for folder in folders:
        write_detections(folder, label=EVIL)
        write_filters(folder)
    (folders[-1] / "results.json").write_text("{broken")
    config = json.dumps({"paper": "t1", "seed": 0, "solver": {"max_epochs": 200}})
    (folders[0] / "config.yaml").write_text(config)
    return write_report(folders, root / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_page_renders_without_errors_or_requests(browser, report, width, dark):
    browser.open(report, width, 900, dark=dark)
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert browser.requests() == [report.resolve().as_uri()]
    assert browser.errors() == []
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    title = browser.evaluate("document.title")
    assert title == "Does the backbone transfer?", "no name runs as a script"
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_enough_contrast(browser, report, dark):
    """WCAG asks for 4.5."""
    browser.open(report, 1440, 900, dark=dark)
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    names = ("--paper", "--ink", "--muted", "--bad")
    paper, *texts = (luminance(browser.evaluate(f"{style}('{name}')")) for name in names)
    for text in texts:
        darker, lighter = sorted((paper, text))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def luminance(color: str) -> float:
    """Return the relative luminance of a color (WCAG 2)."""
    parts = np.array(to_rgb(color.strip()))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_phone_shows_differences_without_horizontal_scrolling(browser, report):
    browser.open(report, 390, 844)
    for cells, least in (
        ("document.querySelector('table.results').querySelectorAll('td.num b')", 3),
        ("document.querySelectorAll('table.dense :is(th, td)')", 100),
    ):
        edges = browser.evaluate(f"[...{cells}].map(cell => cell.getBoundingClientRect().right)")
        assert len(edges) >= least
        assert max(edges) <= 390
    labels = "[...document.querySelectorAll('table.dense td')].map(cell => cell.dataset.label)"
    assert {"speed-up, pairs", "why", "bootstrap"} <= set(browser.evaluate(labels))


def test_browser_reports_requests_and_errors(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<title>x</title><img src='missing.png'><script>throw new Error('oh')</script>")
    browser.open(page, 800, 600)
    assert browser.requests() == [page.resolve().as_uri(), (tmp_path / "missing.png").as_uri()]
    assert any("oh" in error for error in browser.errors())


def test_printed_page_shows_collapsed_parts(browser, report, tmp_path):
    browser.open(report, 1440, 900)
    cells = "[...document.querySelectorAll('details table:not(.classes) td')]"
    hidden = f"{cells}.filter(cell => !cell.checkVisibility())"
    assert browser.evaluate(f"{hidden}.length") > 100
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(f"{hidden}.length") == 0
    rows = "[...document.querySelectorAll('table.classes')].map(table => [...table.rows])"
    seen = f"{rows}.map(all => all.filter(row => row.offsetHeight).length)"
    assert max(browser.evaluate(seen)) == 1 + 40
    assert max(browser.evaluate(f"{rows}.map(all => all.length)")) == 1 + 48
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="")

"""The page shows the numbers of the run folders; it runs and fetches nothing."""

import json
import re

import pytest
from report_runs import (
    edit_json,
    page_text,
    visible_text,
    write_detections,
    write_filters,
    write_pair,
    write_run,
)

from tract_transfer.report.content import read_report
from tract_transfer.report.write import FORMATS, text_table, to_html


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("odd", ["<script>alert('x')</script>", "\x01", "\ud800", "\uffff", "$x^$"])
def test_every_name_is_shown_and_none_is_run(tmp_path, odd):
    """Names in JSON may contain markup, and characters that XML and UTF-8 lack."""
    folders = write_pair(tmp_path)
    for folder in folders:
        method = json.loads((folder / "results.json").read_text())["method"]
        edit_json(
            folder / "results.json", name=f"task{odd}", protocol={"test": odd},
            details={"per_class": {f"cat{odd}": 0.5, "dog": 0.1}},
            method=method if method == "vanilla" else f"tract{odd}",
        )  # fmt: skip
        write_detections(folder, label=f"car{odd}")
    report = read_report(folders)
    for write in FORMATS.values():
        write(report).encode("utf-8")
    html = to_html(report)
    assert "<script" not in html
    text = visible_text(html)
    assert "unreadable" not in text
    if odd.isprintable():
        assert all(f"{name}{odd}" in text for name in ("task", "cat", "tract"))
        assert text.count(f"car{odd} 0.90") == 2, "on an image of each method"


def test_page_fetches_nothing_and_is_deterministic(tmp_path):
    folders = write_pair(tmp_path)
    for folder in folders:
        write_detections(folder)
        write_filters(folder)
    html = to_html(read_report(folders))
    assert html == to_html(read_report(folders))
    assert "default-src 'none'; img-src data:" in html
    assert not re.search("<(script|iframe)", html)
    assert re.findall("<link[^>]*>", html) == ['<link rel="icon" href="data:,">']
    targets = re.findall(r"""(?:src|href)=["']([^"']+)""", html)
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert html.count("http") == html.count("http-equiv") + html.count('xmlns="http://www.w3.org')
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_methods_stand_beside_the_baseline_in_an_aligned_table(tmp_path):
    folders = write_pair(tmp_path)  # top1 and loss
    folders.insert(0, write_run(tmp_path, "other", "a-longer-name", 1, {"top1": 0.8}))
    folders.append(write_run(tmp_path, "vanilla", "a-longer-name", 1, {"top1": 0.8}))
    table = text_table(read_report(folders)).splitlines()
    heads = [head.strip() for head in table[0].split("|")[1:-1]]
    assert heads[:5] == ["task", "metric", "vanilla", "other", "tract"]
    assert heads[5:] == ["other − vanilla [95 %], pairs", "tract − vanilla [95 %], pairs"]
    assert "a-longer-name: vanilla and other have no result for seeds 0, 2" in table[-1]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in table[:4]}) == 1
    text = page_text(folders)
    for fact in (
        "other − vanilla tract − vanilla", "On a-longer-name, other is level with vanilla",
        "On finetune, tract is 2.83 points ahead of vanilla",
        "finetune loss 0.1900 ± 0.0100",  # among all metrics
    ):  # fmt: skip
        assert fact in text
    assert text.count("1 task has no pair yet") == 2


def test_classes_have_their_names_beside_their_bars(tmp_path):
    """All of few classes; of many, those that gain and lose most, the largest change first."""

    def page_of(count: int) -> str:
        classes = {f"class{k:03}": (k - count // 2) / 1000 for k in range(count)}
        for method, sign in (("vanilla", 0), ("tract", 1)):
            values = {name: 0.5 + sign * change for name, change in classes.items()}
            root = tmp_path / str(count)
            for seed in (0, 1):
                write_run(root, method, "finetune", seed, {"top1": 0.5}, per_class=values)
        return to_html(read_report([root]))

    def names(html: str) -> list[list[str]]:
        lists = re.findall(r'<ul class="changes[^>]*>(.*?)</ul>', html, re.DOTALL)
        return [re.findall(r'<span class="name"[^>]*>([^<]*)', text) for text in lists]

    few, many = page_of(20), page_of(41)
    assert names(few) == [[f"class{k:03}" for k in range(19, -1, -1)]]
    assert few.count('<i style="left') == 19, "none for the class that does not change"
    assert '<svg class="bars"' not in few
    gains, losses = names(many)
    assert gains == [f"class{k:03}" for k in range(40, 30, -1)]
    assert losses == [f"class{k:03}" for k in range(10)]
    assert many.count("<rect") >= 41
    text = visible_text(many)
    assert "tract − vanilla, percentage points" in text
    assert "The 10 that gain most class040 +2.00" in text
    assert "The 10 that lose most class000 −2.00" in text

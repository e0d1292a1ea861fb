"""The page shows the numbers of the run folders; it runs and fetches nothing."""

import re

import pytest
from report_runs import (
    page_text,
    visible_text,
    write_detections,
    write_filters,
    write_pair,
    write_run,
)

from tract_transfer.report.content import read_report
from tract_transfer.report.write import text_table, to_html


def test_page_fetches_nothing_and_shows_methods_side_by_side(tmp_path):
    folders = write_pair(tmp_path)[::-1]
    for folder in folders:
        write_detections(folder)
        write_filters(folder)
    html = to_html(read_report(folders))
    assert html == to_html(read_report(folders))
    assert "default-src 'none'; img-src data:" in html
    assert not re.search("<(script|iframe)", html)
    targets = re.findall(r"""(?:src|href)=["']([^"']+)""", html)
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert html.count("http") == html.count("http-equiv") + html.count('xmlns="http://www.w3.org')
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    text = visible_text(html)
    assert "unsure" not in text, "a detection below the stated score"
    assert "vanilla street.png car 0.90 tract street.png car 0.90" in text
    assert "vanilla conv1 , the first 64 of 70 filters of 3 × 3 tract conv1" in text
    assert "No detection reaches" not in text


def test_methods_stand_beside_the_baseline_in_an_aligned_table(tmp_path):
    folders = write_pair(tmp_path)  # top1 and loss
    for method in ("other", "vanilla"):
        folders.insert(0, write_run(tmp_path, method, "a-longer-name", 1, {"top1": 0.8}))
    table = text_table(read_report(folders)).splitlines()
    heads = [head.strip() for head in table[0].split("|")[1:-1]]
    assert heads[:5] == ["task", "metric", "vanilla", "other", "tract"]
    assert heads[5:] == ["other − vanilla [95 %], pairs", "tract − vanilla [95 %], pairs"]
    assert "a-longer-name: vanilla and other have no result for seeds 0, 2" in table[-1]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in table[:4]}) == 1
    text = page_text(folders)
    assert "other − vanilla tract − vanilla" in text
    assert "On a-longer-name, other is level with vanilla" in text
    assert "On finetune, tract is 2.83 points ahead of vanilla" in text
    assert "finetune loss 0.1900 ± 0.0100" in text, "among all metrics"
    assert text.count("1 task has no pair yet") == 2


@pytest.mark.parametrize(  # all of few classes; of many, those that gain and lose most
    ("count", "names"), [(20, [range(19, -1, -1)]), (41, [range(40, 30, -1), range(10)])]
)
def test_classes_have_their_names_beside_their_bars(tmp_path, count, names):
    """The largest change comes first; the middle class does not change, so it has no bar."""
    classes = {f"class{k:03}": (k - count // 2) / 1000 for k in range(count)}
    for method, sign in (("vanilla", 0), ("tract", 1)):
        values = {name: 0.5 + sign * change for name, change in classes.items()}
        for seed in (0, 1):
            write_run(tmp_path, method, "finetune", seed, {"top1": 0.5}, per_class=values)
    html = to_html(read_report([tmp_path]))
    lists = re.findall(r'<ul class="changes[^>]*>(.*?)</ul>', html, re.DOTALL)
    shown = [re.findall(r'<span class="name"[^>]*>([^<]*)', text) for text in lists]
    assert shown == [[f"class{k:03}" for k in part] for part in names]
    text = visible_text(html)
    assert "tract − vanilla, percentage points" in text
    if count == 20:
        assert html.count('<i style="left') == 19
        assert '<svg class="bars"' not in html
    else:
        assert html.count("<rect") >= 41
        assert "The 10 that gain most class040 +2.00" in text
        assert "The 10 that lose most class000 −2.00" in text

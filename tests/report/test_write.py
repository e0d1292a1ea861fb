"""Markdown, LaTeX and JSON state what the page states, and no name is markup in any of them."""

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import (
    TRACT,
    VANILLA,
    edit_json,
    render,
    visible_text,
    write_detections,
    write_pair,
    write_report,
    write_run,
)

from tract_transfer.files import DiskFullError
from tract_transfer.report.content import read_report
from tract_transfer.report.statistics import paired_difference
from tract_transfer.report.write import (
    escape_latex,
    escape_markdown,
    save_report,
    text_table,
    to_html,
    to_json,
    to_latex,
    to_markdown,
)

# Markup of every format, and characters that XML and UTF-8 lack.
EVIL = (
    "<script>alert('x')</script> | $x_1$ & \\input{/etc/passwd} [a](b) ]]> $x^$"
    "\x01\ud800\uffff\nline"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    classes = {"cat": 0.5, EVIL: 0.25}
    return write_pair(root) + [
        write_run(root, method, "detect", seed, {"ap50": value + seed / 50}, per_class=classes)
        for method, value in (("vanilla", 0.4), ("tract", 0.5))
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs whose task, method, metric, class and objects have hostile names."""
    folders = write_pair(tmp_path_factory.mktemp("evil"))
    for folder, method in zip(folders, ["vanilla"] * 3 + [f"tract{EVIL}"] * 3, strict=True):
        edit_json(
            folder / "results.json", name=f"task{EVIL}", method=method, protocol={"test": EVIL},
            metrics={EVIL: 0.5}, primary_metric=EVIL, details={"per_class": {f"cat{EVIL}": 0.5}},
        )  # fmt: skip
        write_detections(folder, label=f"car{EVIL}")
    return folders


def test_every_format_has_the_answer_and_the_numbers(folders):
    report = read_report(folders)
    texts = {**render(report), ".txt": text_table(report)}
    (answer,) = report.answer
    assert answer in texts[".tex"]
    assert answer in texts[".html"].replace("\xa0", " ")
    assert escape_markdown(answer) in texts[".md"]
    assert json.loads(texts[".json"])["answer"] == [answer]
    difference = paired_difference(TRACT, VANILLA)
    interval = f"+2.83 [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
    for suffix in (".html", ".md", ".tex", ".txt"):
        text = re.sub(r"\$\\pm\$", "±", texts[suffix]).replace("\\[", "[").replace("\\]", "]")
        assert all(number in text for number in ("81.00 ± 1.00", "83.83 ± 0.76", interval))
    assert f"{interval} 3 pairs" in texts[".html"]
    assert "80.00 82.00 81.00" in texts[".html"], "the value of each seed"


def test_json_has_unrounded_numbers_and_a_version(folders, tmp_path):
    path = write_report(folders, tmp_path / "deep" / "report.json", title="T")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["schema"], content["schema_version"]) == ("tract_transfer.report", 1)
    row = next(row for row in content["results"] if row["task"] == "finetune")
    difference = row["differences"]["tract"]
    for part, keys in (
        (content, "schema schema_version tract_transfer title baseline methods answer results "
         "all_metrics curves speed_ups classes costs paper protocol runs problems"),
        (row, "task role metric values missing summaries differences notes seeds corrected"),
        (difference, "mean low high p_value n level std effect_size bootstrap permutation_p "
         "remark"),
        (content["speed_ups"][0], "task metric split method share pairs seeds result"),
        (content["speed_ups"][0]["result"], "target baseline treated ratio low high remark"),
        (content["costs"][0], "task quantity unit means counts ratios"),
        (content["protocol"]["detect"][0], "heading differing shared"),
        (content["runs"][0], "folder task method seed state failure metrics"),
    ):  # fmt: skip
        assert set(part) == set(keys.split())
    assert row["values"]["tract"] == {"0": 0.83, "1": 0.84, "2": 0.845}
    assert difference["mean"] == pytest.approx(0.085 / 3)
    names = [row["name"] for row in content["classes"]["detect"]]
    assert names == ["cat", EVIL.replace("\ud800", "?")]
    assert [run["folder"] for run in content["runs"]] == [folder.as_posix() for folder in folders]
    assert content["curves"][0]["curves"]["vanilla"]["0"][0] == [float(e) for e in range(1, 11)]


def test_target_never_reached_is_no_infinity(folders):
    report = read_report(folders, "tract")  # vanilla does not reach where tract ends
    assert '"never"' in to_json(report)
    assert "Infinity" not in to_json(report)
    assert "never reached it with seed" in to_markdown(report)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_page_shows_names_literally(evil):
    html = to_html(read_report(evil))
    assert "<script" not in html
    text, shown = visible_text(html), EVIL.partition("\x01")[0]
    assert "unreadable" not in text
    assert all(f"{name}{shown}" in text for name in ("task", "tract", "cat"))
    assert text.count(f"car{shown}") == 2, "on an image of each method"


def test_markdown_shows_names_literally(evil):
    text = to_markdown(read_report(evil))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.encode()
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    assert len(tables) > 5
    for table in (*tables, text_table(read_report(evil))):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_markdown_omits_classes_with_small_changes(tmp_path):
    classes = {f"class {k}": k / 100 for k in range(42)}
    write_run(tmp_path, "vanilla", "a", 0, {"top1": 0.5}, per_class=classes)
    text = to_markdown(read_report([tmp_path]))
    assert "2 classes with smaller changes are omitted." in text
    assert [f"class {k}" in text for k in (39, 40)] == [True, False]


def test_latex_has_booktabs_and_only_its_own_commands(evil):
    text = to_latex(read_report(evil))
    assert text.encode()
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\.", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    commands = set(re.findall(r"\\([a-zA-Z]+)", body))
    assert {name for name in commands if not name.startswith("text")} <= {
        "begin", "end", "centering", "footnotesize", "caption", "label", "toprule", "midrule",
        "bottomrule", "pm", "times", "lambda", "linewidth",
    }  # fmt: skip


def test_latex_prints_every_character():
    escaped = escape_latex("\\ & % $ # _ { } ~ ^ < > | \" ' ` -- [x] \x07")
    assert r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{}" in escaped
    assert "--" not in escaped
    assert "\x07" not in escaped
    assert escape_latex("[a]") == "{}[a]", "no argument of the row before"


def test_latex_has_every_failure_and_no_path(tmp_path):
    folders = write_pair(tmp_path)
    (folders[0] / "results.json").write_text("{}")
    text = to_latex(read_report(folders))
    assert r"\begin{tabular}{@{}llllp{0.5\linewidth}@{}}" in text
    assert "lacks a usable method, name, seed, primary\\_metric, metrics" in text
    assert str(tmp_path) not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
@pytest.mark.parametrize("names", ["folders", "evil"])
def test_latex_compiles_and_fits_the_page(names, request, tmp_path):
    (tmp_path / "report.tex").write_text(to_latex(read_report(request.getfixturevalue(names))))
    packages = r"\usepackage{booktabs}\usepackage{textcomp}\usepackage[T1]{fontenc}"
    page = r"\documentclass{article}\usepackage[a4paper,margin=2cm]{geometry}" + packages
    (tmp_path / "page.tex").write_text(page + r"\begin{document}\input{report.tex}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    assert names == "evil" or "Overfull" not in result.stdout


def test_full_disk_keeps_the_old_report(folders, tmp_path, monkeypatch):
    path, write_text = tmp_path / "report.md", Path.write_text
    path.write_text("the old one")

    def write_on_full_disk(self, text, **options):
        write_text(self, text[:100], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_on_full_disk)
    with pytest.raises(DiskFullError, match=r"No space left in .*: report\.md "):
        save_report(read_report(folders), path)
    assert path.read_text() == "the old one"

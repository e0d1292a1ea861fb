"""Markdown, LaTeX and JSON say what the page says, and no name is markup in any of them."""

import errno
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import load_runs, seen, write_detections, write_pair, write_report, write_run

from tract_transfer.report import write as report_latex
from tract_transfer.report import write as report_markdown
from tract_transfer.report.content import read_report
from tract_transfer.report.write import FORMATS, save_report, text_table

EVIL = "<script>alert('x')</script> | $x_1$ & \\input{/etc/passwd} [a](b) ]]>\nline"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    classes = {"cat": 0.5, EVIL: 0.25}
    pairs = write_pair(root)
    return pairs + [
        write_run(root, method, "detect", seed, {"ap50": value + seed / 50}, per_class=classes)
        for method, value in (("vanilla", 0.4), ("tract", 0.5))
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs whose task, metric and class are as bad as names can be."""
    folders = write_pair(tmp_path_factory.mktemp("evil"))
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        results["name"] = EVIL
        results["metrics"] = {EVIL: results["metrics"]["top1"]}
        results["primary_metric"] = EVIL
        results["details"] = {"per_class": {EVIL: 0.5}}
        results["protocol"]["test"] = EVIL
        (folder / "results.json").write_text(json.dumps(results))
    return folders


def test_every_format_has_the_answer_and_the_numbers(folders: list[Path], tmp_path: Path) -> None:
    report = read_report(folders)
    texts = {suffix: write(report) for suffix, write in FORMATS.items()}
    (answer,) = report.answer
    gap, numbers = "+2.83", ("81.00 ± 1.00", "83.83 ± 0.76")
    assert answer in texts[".tex"]
    assert answer in texts[".html"].replace("\xa0", " ")
    assert report_markdown.escape_markdown(answer) in texts[".md"]
    assert json.loads(texts[".json"])["answer"] == [answer]
    for number in numbers:
        assert number in texts[".html"]
        assert number in texts[".md"]
        assert number.replace("±", r"$\pm$") in texts[".tex"]
    assert all(gap in texts[suffix] for suffix in (".html", ".md", ".tex"))


def test_json_has_the_numbers_unrounded_and_a_version(folders: list[Path], tmp_path: Path) -> None:
    path = write_report(folders, tmp_path / "deep" / "report.json", title="T")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["schema"], content["schema_version"]) == ("tract_transfer.report", 1)
    assert set(content) == {
        "schema", "schema_version", "tract_transfer", "title", "baseline", "methods", "answer",
        "results", "all_metrics", "curves", "speed_ups", "classes", "costs", "paper", "protocol",
        "runs", "problems",
    }  # fmt: skip
    row = next(row for row in content["results"] if row["task"] == "finetune")
    assert row["values"]["tract"] == {"0": 0.83, "1": 0.84, "2": 0.845}
    found = row["differences"]["tract"]
    assert found["mean"] == pytest.approx(0.085 / 3)
    assert set(found) >= {
        "low",
        "high",
        "p_value",
        "n",
        "std",
        "effect_size",
        "bootstrap",
        "remark",
    }
    assert [name["name"] for name in content["classes"]["detect"]] == ["cat", EVIL]
    assert len(content["runs"]) == len(folders)
    assert content["curves"][0]["curves"]["vanilla"]["0"][0] == [float(e) for e in range(1, 11)]


def test_a_speed_up_that_is_never_reached_is_no_infinity(folders: list[Path]) -> None:
    report = read_report(folders, "tract")  # vanilla does not reach where tract ends
    text = FORMATS[".json"](report)
    assert '"never"' in text
    assert "Infinity" not in text
    assert "never reached it with seed" in FORMATS[".md"](report)


def test_markdown_shows_names_and_runs_none(evil: list[Path]) -> None:
    text = FORMATS[".md"](read_report(evil))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    unescaped = re.compile(r"(?<!\\)\|")
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    assert len(tables) > 5
    for table in tables:
        assert len({len(unescaped.findall(line)) for line in table.splitlines()}) == 1, table


def test_a_table_for_the_terminal_keeps_its_columns(evil: list[Path]) -> None:
    lines = text_table(load_runs(evil)).splitlines()
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_latex_has_booktabs_and_only_its_own_commands(evil: list[Path]) -> None:
    text = FORMATS[".tex"](read_report(evil))
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\.", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "input" not in re.findall(r"\\([a-zA-Z]+)", body)
    commands = set(re.findall(r"\\([a-zA-Z]+)", body))
    own = {"begin", "end", "centering", "footnotesize", "caption", "label", "toprule", "midrule"}
    assert commands <= own | {"bottomrule", "pm", "times", "lambda", "linewidth"} | {
        name for name in commands if name.startswith("text")
    }
    for line in body.splitlines():
        if line.endswith(r" \\"):
            assert "\n" not in line


def test_latex_takes_every_character(tmp_path: Path) -> None:
    special = "\\ & % $ # _ { } ~ ^ < > | \" ' ` -- [x] \x07"
    escaped = report_latex.escape_latex(special)
    assert r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{}" in escaped
    assert "--" not in escaped
    assert "\x07" not in escaped
    assert report_latex.escape_latex("[a]") == "{}[a]", "no argument of the row before"


def test_another_suffix_is_an_error(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of \.html, \.md, \.tex, \.json"):
        write_report(folders, tmp_path / "report.docx")


def test_a_full_disk_leaves_the_old_report(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.md"
    path.write_text("the old one")
    write_text = Path.write_text

    def full(self: Path, text: str, **options: str) -> int:
        write_text(self, text[:100], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    report = read_report(folders)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device\)\. Make room") as raised:
        save_report(report, path)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path], "no half of a file stays behind"


def test_latex_has_a_line_for_every_reason_and_no_path(folders: list[Path], tmp_path: Path) -> None:
    copies = write_pair(tmp_path)
    (copies[0] / "results.json").write_text("{}")
    text = FORMATS[".tex"](read_report(copies))
    assert r"\begin{tabular}{@{}llllp{0.5\linewidth}@{}}" in text
    assert "lacks a usable method, name, seed, primary\\_metric, metrics" in text
    assert str(copies[0].parent) not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
@pytest.mark.parametrize("names", ["folders", "evil"])
def test_latex_compiles_and_stays_on_the_page(
    names: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "report.tex").write_text(
        FORMATS[".tex"](read_report(request.getfixturevalue(names)))
    )
    packages = r"\usepackage{booktabs}\usepackage{textcomp}\usepackage[T1]{fontenc}"
    page = r"\documentclass{article}\usepackage[a4paper,margin=2cm]{geometry}" + packages
    (tmp_path / "page.tex").write_text(page + r"\begin{document}\input{report.tex}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout[-2000:]
    assert names == "evil" or "Overfull" not in said.stdout
    assert (tmp_path / "page.pdf").exists()


NINE = (f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi"))
DIGITS = "1" + "0" * 400


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "\n".join(["a: &a [1, 2, 3]", *NINE])),
        ("config.yaml", "seed: 0\na: &a {b: *a}\n"),
        ("config.yaml", "seed: 0\na: &a [*a]\n"),
        ("config.yaml", "seed: 0\na: [{2024-01-01: 1}]\n"),
        ("metrics.jsonl", f'{{"epoch": 1, "split": "val", "top1": {DIGITS}}}\n'),
        ("detections.json", f'[{{"image": "x", "boxes": [], "scores": [{DIGITS}]}}]'),
        ("environment.json", '{"data": {"a": [{"b": 1}]}}'),
        ("model.json", "[]"),
    ],
    ids=["aliases", "holds itself", "list of itself", "dates", "digits", "score", "data", "card"],
)  # fmt: skip
def test_a_report_never_fails_on_what_a_run_holds(tmp_path: Path, name: str, text: str) -> None:
    folders = write_pair(tmp_path)
    (folders[0] / name).write_text(text)
    for suffix in (".html", ".md", ".tex", ".json"):
        write_report(folders, tmp_path / f"report{suffix}")
    told = seen((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "80.00" in told
    assert ("more than 100,000 values" in told) == ("&a" in text)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("odd", ["\x01", "\ud800", "\uffff", "$x^$"])
def test_a_report_never_fails_on_a_name(tmp_path: Path, odd: str) -> None:
    """In JSON a name may have what neither XML nor UTF-8 has."""
    folders = write_pair(tmp_path)
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        results["details"] = {"per_class": {f"cat{odd}": 0.5, "dog": 0.1}}
        results["name"] = f"finetune{odd}"
        if results["method"] == "tract":
            results["method"] = f"tract{odd}"
        (folder / "results.json").write_text(json.dumps(results))
        write_detections(folder, label=f"car{odd}")
    for suffix in (".html", ".md", ".tex", ".json"):
        write_report(folders, tmp_path / f"report{suffix}")
    told = seen((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "car" in told
    assert "not readable" not in told

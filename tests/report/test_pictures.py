"""The pictures of a report show what the run folders contain, and nothing outside them."""

import json
from pathlib import Path

import pytest
from report_runs import edit_json, page_text, write_detections, write_filters, write_pair

from tract_transfer.report.curves import Evaluations
from tract_transfer.report.pictures import draw_curves, precision_recall
from tract_transfer.report.runs import Run


def run(**curves):
    return Run(Path(), method="vanilla", results={"details": {"pr_curves": curves}})


def test_precision_is_averaged_over_classes():
    curves = run(cat=[1, 0.5, 0], dog=[0.5, 0.5, 0])
    assert precision_recall(curves) == ([0, 0.5, 1], [0.75, 0.5, 0])
    (figure,) = draw_curves([curves], Evaluations("detect", "ap50", "val", {}), ["vanilla"])
    assert all(text in figure for text in ("vanilla", "detect: precision against recall"))


@pytest.mark.parametrize(
    "curves", [{}, {"cat": [1, None]}, {"cat": [1], "dog": [1, 2]}, {"cat": "x"}, {"cat": []}]
)
def test_runs_without_curves_have_no_figure(curves):
    assert draw_curves([run(**curves)], Evaluations("a", "ap50", "val", {}), ["vanilla"]) == []


def test_weak_detector_shows_its_best_detections(tmp_path):
    folders = write_pair(tmp_path)
    for folder in folders:
        write_detections(folder)
        (entry,) = json.loads((folder / "detections.json").read_text())
        entry |= {"scores": [0.05, 0.2, 0.01, 0.1], "labels": ["b", "a", "d", "c"]}
        entry["boxes"] = [[1, 1, 20, 20]] * 4
        (folder / "detections.json").write_text(json.dumps([entry]))
    text = page_text(folders)
    assert "No detection reaches a score of 0.3: each picture shows its 3 highest." in text
    assert [f"{name} 0." in text for name in "abcd"] == [True, True, True, False]


def test_unreadable_pictures_and_those_outside_the_run_are_problems(tmp_path):
    folders = write_pair(tmp_path)
    write_detections(folders[0], name="../seed1/street.png")
    write_detections(folders[1], name="missing.png")
    write_filters(folders[2])
    edit_json(folders[2] / "model.json", first_layers=["conv2"])
    text = page_text(folders[:1])
    assert "images must be inside the run folder" in text
    assert "car 0.90" not in text
    text = page_text(folders[1:3])
    assert "missing.png: " in text
    assert f"{folders[2] / 'model.safetensors'}: " in text

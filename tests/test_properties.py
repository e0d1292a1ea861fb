"""Laws that hold for anything: merging of configs, boxes, and evaluation."""

import copy
import string

import numpy as np
import pytest
import torch
from fuzzing import fuzzed
from hypothesis import assume, given
from hypothesis import strategies as st
from random_detections import NAMES, loop_ap, loop_iou, rows

from tract_transfer.config.file import dump_yaml, merge, read_config_file
from tract_transfer.data.findings import Findings
from tract_transfer.engine.run_folder import flatten
from tract_transfer.evaluation.classification import label_ranks
from tract_transfer.evaluation.voc import VocProtocol, average_precision, paired_iou, voc_ap
from tract_transfer.models.detection.two_stage import mirror

# ------------------------------------------------------------------------- merging of configs

plain = st.none() | st.booleans() | st.integers() | st.text(string.printable, max_size=6)
finite = st.floats(allow_nan=False, allow_infinity=False)  # what a config may hold
value = plain | finite | st.lists(plain, max_size=3)
section = st.recursive(
    value,
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
    max_leaves=6,
)
config = st.dictionaries(st.sampled_from("abcd"), section, max_size=4)


@fuzzed
@given(base=config, over=config)
def test_a_key_is_the_overs_where_it_has_one_and_else_the_bases(base, over):
    before = copy.deepcopy((base, over))
    own, others = flatten(over), flatten(base)

    def hidden(key):
        """Whether `over` says something of the key, of a part of it or of what it is a part of."""
        return any(f"{key}.".startswith(f"{o}.") or f"{o}.".startswith(f"{key}.") for o in own)

    kept = {key: found for key, found in others.items() if not hidden(key)}
    assert flatten(merge(base, over)) == {**kept, **own}
    assert (base, over) == before


@fuzzed
@given(base=config, one=config, two=config)
def test_merging_twice_is_merging_what_was_merged(base, one, two):
    assume(not any(isinstance(x, dict) != isinstance(y, dict) for x, y in clashes(one, two)))
    assert merge(merge(base, one), two) == merge(base, merge(one, two))


def clashes(one, two):
    """The values of all keys that both have."""
    for key in one.keys() & two.keys():
        yield one[key], two[key]
        if isinstance(one[key], dict) and isinstance(two[key], dict):
            yield from clashes(one[key], two[key])


@fuzzed
@given(base=config, over=config, tags=st.tuples(*[st.sampled_from(["x", "y"])] * 2))
def test_another_source_keeps_nothing_of_the_one_before(base, over, tags):
    one, two = ({**part, "source": tag} for part, tag in zip((base, over), tags, strict=True))
    expected = two if tags[0] != tags[1] else {**merge(base, over), "source": tags[0]}
    assert merge({"data": one}, {"data": two}) == {"data": expected}


@fuzzed
@given(tree=config)
def test_a_config_that_is_written_reads_back_the_same(tmp_path_factory, tree):
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(dump_yaml(tree), encoding="utf-8")
    assert read_config_file(file)[0] == tree


# --------------------------------------------------------------------------------------- boxes

side = st.floats(-60, 160, width=32)
corners = st.tuples(side, side, side, side)
start, length = st.integers(0, 4), st.integers(1, 4)
pixels = st.tuples(start, start, length, length).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@fuzzed
@given(box=corners, size=st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_a_clipped_box_is_what_lies_in_the_image_and_stays_so(box, size):
    height, width = size
    found = Findings("clip").box(box, size, "x", "y")
    x1, x2 = max(box[0], 0), min(box[2], width)
    y1, y2 = max(box[1], 0), min(box[3], height)
    assert found == ((x1, y1, x2, y2) if min(x2 - x1, y2 - y1) >= 0.01 else None)
    if found is not None:
        assert Findings().box(found, size, "x", "y") == found


@fuzzed
@given(one=pixels, two=pixels)
def test_the_overlap_is_that_of_counted_pixels(one, two):
    grid = np.zeros((2, 8, 8), bool)
    for each, (x1, y1, x2, y2) in zip(grid, (one, two), strict=True):
        each[y1:y2, x1:x2] = True
    expected = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    first, second = np.array([one], float), np.array([two], float)
    assert paired_iou(first, second, 0)[0] == pytest.approx(expected, abs=1e-12)
    assert paired_iou(second, first, 0)[0] == paired_iou(first, second, 0)[0]
    assert paired_iou(first, second, 1)[0] == pytest.approx(loop_iou(one, two, 1), abs=1e-12)


@fuzzed
@given(box=pixels, width=st.integers(8, 99))
def test_two_mirrors_are_none(box, width):
    found = {"boxes": torch.tensor([box]).float()}
    once = mirror(found, width)
    (x1, _, x2, _) = once["boxes"][0].tolist()
    assert 0 <= x1 < x2 <= width
    assert torch.equal(mirror(once, width)["boxes"], found["boxes"])


# ---------------------------------------------------------------------------------- evaluation


@st.composite
def evaluated(draw):
    """Some images with what was found in them and what is there, as in random_detections.py."""
    label, score = st.integers(0, 2), st.integers(0, 5).map(lambda n: n / 5)
    made = []
    for image_id in range(draw(st.integers(1, 3))):
        found = draw(st.lists(st.tuples(pixels, label, score), max_size=5))
        truth = draw(st.lists(st.tuples(pixels, label, st.booleans()), max_size=4))
        made.append((
            {
                "boxes": torch.tensor([row[0] for row in found]).reshape(-1, 4).float(),
                "labels": torch.tensor([row[1] for row in found], dtype=torch.int64),
                "scores": torch.tensor([row[2] for row in found]).float(),
            },
            {
                "boxes": torch.tensor([row[0] for row in truth]).reshape(-1, 4).float(),
                "labels": torch.tensor([row[1] for row in truth], dtype=torch.int64),
                "difficult": torch.tensor([row[2] for row in truth], dtype=torch.bool),
                "image_id": image_id,
            },
        ))  # fmt: skip
    assume(any(not bool(truth["difficult"].all()) for _, truth in made))
    return made


@fuzzed
@given(
    made=evaluated(),
    method=st.sampled_from(["11point", "area"]),
    strict=st.booleans(),
    offset=st.sampled_from([0, 1]),
    threshold=st.sampled_from([0.3, 0.5, 0.75]),
)
def test_average_precision_is_vocs_definition_by_loops(made, method, strict, offset, threshold):
    protocol = VocProtocol("x", "a test's", method, strict, pixel_offset=offset)
    result = voc_ap(*rows(made), NAMES, protocol, (threshold,))
    for label in range(3):
        ap, npos, _ = loop_ap(made, label, protocol, threshold)
        assert result.npos[label] == npos
        assert result.ap[label, 0] == pytest.approx(ap, abs=1e-12, nan_ok=True) or ap is None
        assert (ap is None) == bool(np.isnan(result.ap[label, 0]))
    backwards = voc_ap(*rows(made[::-1]), NAMES, protocol, (threshold,))
    np.testing.assert_array_equal(backwards.ap, result.ap)  # the order of the images is free


@fuzzed
@given(
    hits=st.lists(st.booleans(), max_size=12),
    more=st.integers(0, 5),
    method=st.sampled_from(["11point", "11point_float", "area"]),
)
def test_average_precision_is_a_fraction_that_no_false_detection_raises(hits, more, method):
    npos = sum(hits) + more
    assume(npos)

    def ap(flags):
        true = np.cumsum(np.array(flags, int))
        return average_precision(true / npos, true / np.arange(1, len(flags) + 1), method)

    assert 0 <= ap(hits) <= 1 + 1e-12
    for at in range(len(hits) + 1):
        assert ap([*hits[:at], False, *hits[at:]]) <= ap(hits) + 1e-12
    assert ap([*hits, False]) == pytest.approx(ap(hits))


@fuzzed
@given(data=st.data(), count=st.integers(1, 5), num_classes=st.integers(1, 6))
def test_the_rank_of_a_label_is_its_place_among_the_sorted(data, count, num_classes):
    logit = st.integers(-3, 3).map(float)
    row = st.lists(logit, min_size=num_classes, max_size=num_classes)
    logits = np.array(data.draw(st.lists(row, min_size=count, max_size=count)))
    labels = np.array(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=count,
                                         max_size=count)))  # fmt: skip
    order = [sorted(range(num_classes), key=lambda k: (-each[k], k)) for each in logits.tolist()]
    places = [row.index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    assert label_ranks(logits, labels).tolist() == places

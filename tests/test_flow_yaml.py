"""One line of settings is YAML, and holds what it was made of."""

import pytest
import yaml

from tract_transfer.flow_yaml import as_yaml, without_python

SETTINGS = {
    "lr": 0.1, "clip": None, "nesterov": False, "steps": [2, 4], "head": {"name": "mlp"},
    "note": "a: b, {c} 'd' \u00e9 " + "long " * 50,
}  # fmt: skip


def test_a_line_of_settings_is_yaml_without_braces():
    assert (
        as_yaml({"lr": 0.1, "clip": None, "steps": (2, 4)}) == "lr: 0.1, clip: null, steps: [2, 4]"
    )
    text = as_yaml(SETTINGS)
    assert "\n" not in text
    assert yaml.safe_load(f"{{{text}}}") == SETTINGS


def test_what_python_printed_is_read_and_written_as_yaml():
    assert without_python(str(SETTINGS)) == as_yaml(SETTINGS)


@pytest.mark.parametrize("text", ["", "plain", "{'a': open('x')}", "{'a'", "{'a'}", "{'a': " * 999])
def test_what_is_no_dict_stays_as_it_is(text):
    assert without_python(text) == text

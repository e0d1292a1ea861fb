"""One line of settings is YAML, and holds what it was made of."""

import yaml

from tract_transfer.files import as_yaml

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

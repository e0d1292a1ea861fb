"""Settings on one line, as YAML names them: `lr: 0.1, steps: [2, 4], clip: null`."""

import json
from collections.abc import Mapping

import yaml


def as_yaml(settings: Mapping[str, object]) -> str:
    """Return nested plain values as flow YAML, without the outer braces."""
    plain = json.loads(json.dumps(settings, default=str))
    text = yaml.safe_dump(
        plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.strip().removeprefix("{").removesuffix("}")

"""YAML as configs are written in it: safe, with YAML 1.2's numbers and bools."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

# What reading a text raises that is not YAML, or has a tag that its value does not fit.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
_MAX_NODES = 100_000  # of a config with its aliases written out


class _Loader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2's scalars: 1e-3 is a number, and only true and false are bools."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as the string it is."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789.")
    )
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool",
    re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    list("tTfF"),
)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return a tree as YAML that reads back as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML text, which know their lines, and its value.

    Raises:
        NOT_YAML: it is not YAML, or not safe YAML; or its aliases stand for too much.
    """
    node = yaml.compose(text, _Loader)
    if node is not None and _count(node, {}) > _MAX_NODES:
        raise ValueError(f"its aliases stand for more than {_MAX_NODES} values. Write fewer")
    return node, yaml.load(text, _Loader)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return how many values a node stands for, aliases written out; refuse one in itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = 0  # until it is known
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        counts[id(node)] = 1 + sum(_count(part, counts) for pair in pairs for part in pair)
    elif not counts[id(node)]:
        raise ValueError("an alias stands inside what it is an alias of. Write it out")
    return counts[id(node)]

"""YAML files with bases and overrides, and errors that know where each key was set."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from pydantic import ValidationError


# --- YAML as configs are written in it: safe, with YAML 1.2's numbers and bools.

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


# Dotted key -> "configs/x.yaml line 12"; "" -> the file that was asked for.
Origins = dict[str, str]
COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """A config that cannot be used; the message names key, problem, fix and place."""


class Override(NamedTuple):
    """A dotted key's value over a file's, and where it was set."""

    key: str
    value: Any
    place: str = COMMAND_LINE


def read_config_file(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Origins]:
    """Return the merged tree of a file, its bases and the overrides, and where each key was set.

    A file's keys go over its `_BASE_` (a path beside it, or a list of them), key by key. Where
    `source` changes, or a `name` under `model`, the section starts anew: the arguments of one
    entry are not another's.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, repeats a key or includes itself.
    """
    tree, origins = override(*_read(path, ()), parse_words(overrides))
    origins[""] = str(path)
    return tree, origins


def override(
    tree: dict[str, Any], origins: Origins, overrides: Sequence[Override]
) -> tuple[dict[str, Any], Origins]:
    """Return a tree with overrides over it, and where each key was set; neither is changed."""
    given, given_origins = _as_tree(overrides)
    origins = dict(origins)
    for key, place in given_origins.items():  # a section that no file has is the override's
        section = key
        while section := section.rpartition(".")[0]:
            origins.setdefault(section, place)
    return merge(tree, given), {**origins, **given_origins}


def parse_words(words: Sequence[str]) -> list[Override]:
    """Parse `key=value` and `key value` words; values are YAML.

    Raises:
        ConfigError: a word is no override, or its value no YAML.
    """
    overrides = []
    rest = iter(words)
    for word in rest:
        key, equals, text = word.partition("=")
        if key.startswith("-") or not key:
            raise ConfigError(f"{word!r} is no override: write key=value or key value.")
        if not equals:
            try:
                text = next(rest)
            except StopIteration:
                raise ConfigError(f"{key}: given without a value: {key}=...") from None
        try:
            _, value = parse_yaml(text)
        except NOT_YAML as error:
            raise ConfigError(f"{key}: {text[:200]!r} is not YAML ({error}).") from None
        overrides.append(Override(key, value))
    return overrides


def _as_tree(overrides: Sequence[Override]) -> tuple[dict[str, Any], Origins]:
    tree: dict[str, Any] = {}
    origins: Origins = {}
    for key, value, place in overrides:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} was given a value before ({place}).")
        node[leaf] = copy.deepcopy(value)  # which a longer key may go into
        _record_override(key, value, place, origins)
    return tree, origins


def _record_override(key: str, value: Any, place: str, origins: Origins) -> None:
    """Note where a key and all below it came from."""
    origins[key] = place
    if isinstance(value, dict):
        for name, part in value.items():
            _record_override(f"{key}.{name}", part, place, origins)


def merge(base: dict[str, Any], over: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `base` with `over` on it; see `read_config_file` for where a section starts anew."""
    tag = "name" if path.startswith("model.") else "source"
    if tag in over and over[tag] != base.get(tag, over[tag]):
        return over
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        nested = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value, f"{path}{key}.") if nested else value  # type: ignore[arg-type]
    return merged


def explain(key: str, message: str, origins: Origins, *, missing: bool = False) -> str:
    """Return `key: message (file line n)`, from the nearest key whose place is known."""
    place = key.rpartition(".")[0] if missing else key
    while place not in origins and place:
        place = place.rpartition(".")[0]
    where = f" ({origins[place]})" if place in origins else ""
    return f"{key}: {message}{where}" if key else f"{message}{where}"


def explain_all(
    error: "ValidationError",
    tree: Mapping[str, Any],
    origins: Origins,
    known: Mapping[str, Sequence[str]],
) -> str:
    """Turn pydantic's errors into lines of ours; `known` lists the keys of each task."""
    lines = []
    task = str(tree.get("task"))
    for problem in error.errors():
        key = _dotted(problem["loc"], tree)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = _unknown(key, task, known, _section_of(key, tree))
        elif problem["type"] == "missing":
            message = "needed, and not given."
        elif problem["type"] == "union_tag_not_found":
            message = f"needed, one of {list(known)}." if not key else "needed, and not given."
            key = "task" if not key else f"{key}.source"
        elif problem["type"] == "union_tag_invalid":
            tag = "task" if not key else f"{key}.source"
            context = problem["ctx"]
            key, message = tag, f"{context['tag']!r} is none of {context['expected_tags']}."
        elif problem["type"] != "value_error":
            message = f"{message}, got {problem['input']!r}."
        elif named := _places_of(message, origins):
            lines.append(f"{key}: {message} ({named})" if key else f"{message} ({named})")
            continue
        lines.append(explain(key, message, origins, missing=problem["type"] == "missing"))
    return "\n".join(dict.fromkeys(lines))


def _places_of(message: str, origins: Origins) -> str:
    """Return where the keys that a message names were set: several files may disagree."""
    keys = dict.fromkeys(re.findall(r"[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)+", message))
    return "; ".join(f"{key}: {origins[key]}" for key in keys if key in origins)


def _read(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    if path.resolve() in parents:
        raise ConfigError(f"{path}: _BASE_ leads back to the file itself.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        by = f" (_BASE_ of {parents[-1]})" if parents else ""
        raise ConfigError(f"No config can be read at {path}{by}: {error}") from None
    try:
        node, own = parse_yaml(text)
    except NOT_YAML as error:
        raise ConfigError(f"{path}: not YAML, or not safe YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a config is a mapping of keys to values.")
    origins: Origins = {}
    _record(node, "", path, origins)
    bases = own.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"_BASE_: a path or a list of paths, got {bases!r} ({path}).")
    tree: dict[str, Any] = {}
    inherited: Origins = {}
    for base in bases:
        place = Path(os.path.normpath(path.parent / base))  # as errors name it
        base_tree, base_origins = _read(place, (*parents, path.resolve()))
        tree = merge(tree, base_tree)
        inherited.update(base_origins)
    return merge(tree, own), {**inherited, **origins}


def _record(node: yaml.MappingNode, prefix: str, path: Path, origins: Origins) -> None:
    """Note the line of every key, and refuse repeated ones."""
    for key_node, value in node.value:
        key = prefix + str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in origins:
            raise ConfigError(f"{key}: given twice ({path} line {line} and {origins[key]}).")
        origins[key] = f"{path} line {line}"
        if isinstance(value, yaml.MappingNode):
            _record(value, f"{key}.", path, origins)


def _dotted(location: Sequence[Any], tree: Any) -> str:
    """Turn pydantic's location into our key: without the tags of unions."""
    parts: list[str] = []
    for part in location:
        if (
            isinstance(tree, dict)
            and part not in tree
            and part in (tree.get("source"), tree.get("task"))
        ):
            continue
        tree = tree.get(part) if isinstance(tree, dict) else None
        parts.append(str(part))
    return ".".join(parts)


def _section_of(key: str, tree: Any) -> Any:
    """The part of the tree that holds a dotted key."""
    for part in key.split(".")[:-1]:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _unknown(key: str, task: str, known: Mapping[str, Sequence[str]], section: Any) -> str:
    """Say that a key is unknown in its section, and what may have been meant."""
    keys = known.get(task, ())
    if key in keys and isinstance(section, dict):
        return f"not a key of source: {section.get('source')}."
    elsewhere = [other for other, theirs in known.items() if key in theirs]
    if elsewhere:
        return f"not a key of a {task} config (of {' and '.join(elsewhere)})."
    parent, _, leaf = key.rpartition(".")
    siblings = [name for name in keys if name.rpartition(".")[0] == parent]
    leaves = {name.rpartition(".")[2]: name for name in siblings}
    near = [leaves[name] for name in get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    near = near or [name for name in keys if name.rpartition(".")[2] == leaf]
    if not near and siblings:
        near = [
            name for name in keys if get_close_matches(leaf, [name.rpartition(".")[2]], 1, 0.75)
        ]
    near = near or ([] if siblings and parent else get_close_matches(key, keys, n=1, cutoff=0.6))
    return f"unknown. Did you mean {near[0]}?" if near else f"unknown. Known: {siblings}."

"""Config files: YAML with `_BASE_` files and overrides, and errors that name file and line."""

import copy
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from tract_transfer.config.data import PLUGIN
from tract_transfer.registry import find_plugin

# Dotted key -> where it was set: "configs/x.yaml line 12"; "" -> the file that was asked for.
Origins = dict[str, str]
# Changes of a config: `key=value` words, or dotted keys and their values.
Overrides = Sequence[str] | Mapping[str, Any]
COMMAND_LINE, ARGUMENT, MAPPING = "command line", "overrides", "the given mapping"
# The configs that come with the package: in it once installed, beside it in a clone.
_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(
    path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()
)


class ConfigError(ValueError):
    """A config that cannot be used; the message names key, problem, fix and line."""


class Override(NamedTuple):
    """A value for a dotted key, and where it was set."""

    key: str
    value: Any
    place: str = COMMAND_LINE


# Files and overrides.


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """Return the config file `name`, or else the packaged config: `transfer/cifar10_finetune`.

    Args:
        folder: what a relative path is relative to.

    Raises:
        ConfigError: there is neither; the message names the nearest packaged configs.
    """
    path = Path(os.path.normpath(folder / name))  # short, for error messages
    if path.is_file():
        return path
    packaged = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if not Path(name).is_absolute() and (CONFIGS / f"{packaged}.yaml").is_file():
        return CONFIGS / f"{packaged}.yaml"
    if path.exists():
        raise ConfigError(f"No config {path}: it is a folder. Name a file in it.")
    names = config_names()
    stems = {known.rpartition("/")[2]: known for known in names}
    near = get_close_matches(packaged, names, n=3)
    near += [stems[stem] for stem in get_close_matches(packaged.rpartition("/")[2], stems, n=3)]
    hint = f" Nearest: {', '.join(dict.fromkeys(near))}." if near else ""
    raise ConfigError(
        f"No config {path}: there is no such file, and no packaged config of that name.{hint} "
        "`tract-transfer configs` lists them."
    )


def config_names() -> list[str]:
    """Return the names of the packaged configs, such as `transfer/cifar10_finetune`."""
    files = sorted(CONFIGS.glob("*/*.yaml"))
    return [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in files]


def read_config_file(
    path: Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> tuple[dict[str, Any], Origins]:
    """Return the merged tree of a file, its bases and the overrides, and where each key was set.

    A file overrides its `_BASE_` (a path relative to it or the name of a packaged config, or a list
    of them) key by key; see `merge`. `path` may be the name of a packaged config too. The `plugins`
    of a file are added to those of its bases, and the argument's to them all; paths of files are
    absolute in the tree.
    """
    path = find_config(path)
    tree, origins = override(*_read(path, ()), parse_words(overrides))
    origins[""] = str(path)
    return add_plugins(tree, origins, plugins)


def add_plugins(
    tree: dict[str, Any], origins: Origins, plugins: Sequence[str] = ()
) -> tuple[dict[str, Any], Origins]:
    """Return a tree with more `plugins`, and paths of the working directory made absolute."""
    tree = _with_absolute_plugins(tree, Path())
    old = tree.get("plugins", [])
    if not plugins or not isinstance(old, list):
        return tree, origins
    new = [plugin for plugin in dict.fromkeys(map(find_plugin, plugins)) if plugin not in old]
    return {**tree, "plugins": [*old, *new]}, {**origins, "plugins": COMMAND_LINE}


def _with_absolute_plugins(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a tree whose `plugins`, if they are names and paths, are as `find_plugin` has them."""
    plugins = tree.get("plugins")
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        return tree
    return {**tree, "plugins": [find_plugin(plugin, folder) for plugin in plugins]}


def read_config(
    config: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Overrides = (),
    plugins: Sequence[str] = (),
) -> tuple[dict[str, Any], Origins]:
    """Return what `read_config_file` returns, for a config as a mapping and overrides as one too.

    A mapping may have a `_BASE_` (relative to the working directory). Its tuples become lists, its
    paths strings and NumPy's numbers Python's.

    Raises:
        TypeError: an argument of another type.
    """
    if not isinstance(config, str | os.PathLike | Mapping):
        raise TypeError(
            "config: must be the name of a packaged config, a path to a YAML file, a dict or a "
            f"config that load_config returned, got {type(config).__name__}."
        )
    changes = read_overrides(overrides)
    if not isinstance(config, Mapping):
        tree, origins = read_config_file(Path(config))
        return add_plugins(*override(tree, origins, changes), plugins)
    tree = _plain(config, "config")
    origins = dict.fromkeys(_keys_below("", tree), MAPPING)
    origins = {key.removeprefix("."): place for key, place in origins.items()}
    tree, origins = override(*_with_bases(tree, origins, Path(), MAPPING, ()), changes)
    return add_plugins(tree, origins, plugins)


def read_overrides(overrides: Overrides) -> list[Override]:
    """Return the overrides of a Python call. Raises TypeError, ConfigError."""
    if isinstance(overrides, Mapping):
        changes = _plain(overrides, "overrides")
        return [Override(key, value, ARGUMENT) for key, value in changes.items()]
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise TypeError(
            'overrides: must be a dict such as {"solver.lr": 0.1} or a list such as '
            f'["solver.lr=0.1"], got {overrides!r}.'
        )
    for word in overrides:
        if not isinstance(word, str):
            raise TypeError(f"overrides: must be a list of strings key=value, got {word!r} in it.")
    return parse_words(overrides)


def _plain(value: Any, name: str) -> Any:
    """Return a value of Python as YAML would give it; a TypeError names what it cannot hold."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: keys must be strings, got {key!r}.")
        return {str(key): _plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, name) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for kind, convert in ((numbers.Integral, int), (numbers.Real, float)):
        if isinstance(value, kind):
            return convert(value)  # type: ignore[call-overload]
    raise TypeError(
        f"{name}: must be a number, a string, a bool, None, a list or a dict of these, got "
        f"{type(value).__name__}."
    )


def _read(path: Path, including: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    if path.resolve() in including:
        raise ConfigError(f"{path}: _BASE_ leads back to the file itself.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"No config can be read at {path}: {error}") from None
    try:
        node, tree = parse_yaml(text)
    except NOT_YAML as error:
        raise ConfigError(f"{path}: not YAML, or not safe YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a config must be a mapping of keys to values.")
    origins: Origins = {}
    _record_lines(node, "", path, origins)
    return _with_bases(tree, origins, path.parent, str(path), (*including, path.resolve()))


def _with_bases(
    tree: dict[str, Any], origins: Origins, folder: Path, place: str, including: tuple[Path, ...]
) -> tuple[dict[str, Any], Origins]:
    """Return the tree at `place` merged over its `_BASE_`, whose paths are relative to `folder`."""
    bases = tree.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"_BASE_: must be a path or a list of paths, got {bases!r} ({place}).")
    tree = _with_absolute_plugins(tree, folder)
    merged: dict[str, Any] = {}
    inherited: Origins = {}
    for base in bases:
        try:
            base_path = find_config(base, folder)
        except ConfigError as error:
            raise ConfigError(explain("_BASE_", str(error), origins)) from None
        base_tree, base_origins = _read(base_path, including)
        merged = _merge_files(merged, base_tree)
        inherited.update(base_origins)
    return _merge_files(merged, tree), {**inherited, **origins}


def _merge_files(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `merge` of two files, with the plug-ins of both."""
    lists = [tree["plugins"] for tree in (base, over) if isinstance(tree.get("plugins"), list)]
    merged = merge(base, over)
    if len(lists) == 2:
        merged["plugins"] = lists[0] + [plugin for plugin in lists[1] if plugin not in lists[0]]
    return merged


def _record_lines(node: yaml.MappingNode, prefix: str, path: Path, origins: Origins) -> None:
    """Record the line of every key; refuse repeated keys."""
    for key_node, value in node.value:
        key = prefix + str(key_node.value)
        place = f"{path} line {key_node.start_mark.line + 1}"
        if key in origins:
            raise ConfigError(f"{key}: given twice ({place} and {origins[key]}).")
        origins[key] = place
        if isinstance(value, yaml.MappingNode):
            _record_lines(value, f"{key}.", path, origins)


def merge(base: dict[str, Any], over: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `base` overridden by `over`, key by key; neither is changed.

    A section whose `source` (or `name`, under `model`) changes is replaced as a whole: the
    arguments of one entry do not fit another.
    """
    tag = "name" if path.startswith("model.") else "source"
    if tag in over and over[tag] != base.get(tag, over[tag]):
        return over
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value, f"{path}{key}.")
        merged[key] = value
    return merged


def parse_words(words: Sequence[str]) -> list[Override]:
    """Parse the overrides of a command line: `key=value` or `key value`, where values are YAML."""
    overrides = []
    rest = iter(words)
    for word in rest:
        key, equals, text = word.partition("=")
        if key.startswith("-") or not key:
            raise ConfigError(f"{word!r} is not an override: write key=value or key value.")
        if not equals and (text := next(rest, "")) == "":
            raise ConfigError(f"{key}: given without a value: write {key}=...")
        try:
            _, value = parse_yaml(text)
        except NOT_YAML as error:
            raise ConfigError(f"{key}: {text[:200]!r} is not YAML ({error}).") from None
        overrides.append(Override(key, value))
    return overrides


def override(
    tree: dict[str, Any], origins: Origins, overrides: Sequence[Override]
) -> tuple[dict[str, Any], Origins]:
    """Return a tree with overrides applied, and where each key was set; neither is changed."""
    over: dict[str, Any] = {}
    over_origins: Origins = {}
    sections: Origins = {}  # those that no file has were created by the override
    for key, value, place in overrides:
        *parents, leaf = key.split(".")
        node = over
        for depth, parent in enumerate(parents, 1):
            sections[".".join(parents[:depth])] = place
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} was given a value before ({place}).")
        node[leaf] = copy.deepcopy(value)  # a later, longer key may change it
        over_origins.update(dict.fromkeys(_keys_below(key, value), place))
    return merge(tree, over), {**sections, **origins, **over_origins}


def _keys_below(key: str, value: Any) -> Iterator[str]:
    """Yield a dotted key and those of the values below it."""
    yield key
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _keys_below(f"{key}.{name}", part)


# YAML.

# What the parser raises for a text that is not YAML, or has a tag that does not fit its value.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
_MAX_VALUES = 100_000  # of a config with its aliases expanded
_FLOAT = r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
_BOOL = r"^(?:true|True|TRUE|false|False|FALSE)$"


class _Loader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2's scalars: 1e-3 is a number, and only true and false are bools."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, ten times as fast; it refuses `{key:}`, which is YAML."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


for _loader in (_Loader, _FastLoader):
    _loader.yaml_implicit_resolvers = {
        first: [
            (tag, regexp)
            for tag, regexp in resolvers
            if not tag.endswith((":bool", ":float", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(_BOOL), [*"tTfF"])
for _yaml in (_Loader, _FastLoader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), [*"-+0123456789."])


def dump_yaml(tree: Mapping[str, Any], *, is_short: bool = False) -> str:
    """Return a tree as YAML that reads back as the same tree; short: innermost values in a line."""
    style = None if is_short else False
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=style
    )


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML text, which know their lines, and its value, or raise NOT_YAML."""
    try:
        return _parse(text, _FastLoader)
    except yaml.YAMLError:
        return _parse(text, _Loader)  # its message shows the line


def _parse(text: str, kind: type) -> tuple[yaml.Node | None, Any]:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _count_values(node, {}) > _MAX_VALUES:
            raise ValueError(f"its aliases expand to more than {_MAX_VALUES} values. Write fewer")
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return how many values a node has with aliases expanded; refuse an alias inside itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = 0  # being counted
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        counts[id(node)] = 1 + sum(_count_values(part, counts) for pair in pairs for part in pair)
    elif not counts[id(node)]:
        raise ValueError("an alias is part of the value it refers to. Write the value out")
    return counts[id(node)]


# Errors.


def explain(key: str, message: str, origins: Origins, place: str | None = None) -> str:
    """Return `key: message (place)`, by default the line of the nearest section that has one."""
    place = place_of(key, origins) if place is None else place
    return (f"{key}: " if key else "") + message + (f" ({place})" if place else "")


def place_of(key: str, origins: Origins) -> str:
    """Return where a key, or the section that contains it, is set."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


def explain_all(
    error: ValidationError,
    tree: Mapping[str, Any],
    origins: Origins,
    keys_by_task: Mapping[str, Sequence[str]],
) -> str:
    """Return pydantic's errors as one line each; `keys_by_task` are all that exist."""
    lines: dict[str, None] = {}
    for problem in error.errors():
        key = _dotted(problem["loc"], tree)
        place = place_of(key, origins)
        message = problem["msg"].removeprefix("Value error, ")
        match problem["type"]:
            case "extra_forbidden":
                message = _unknown(key, problem["loc"], str(tree.get("task")), keys_by_task)
            case "missing":  # from a section that may have replaced one with this key
                message = "required, but not set."
                place = place_of(key.rpartition(".")[0], origins)
            case "union_tag_not_found" | "union_tag_invalid" as kind:
                message = (
                    "required, but not set." if key else f"required, one of {[*keys_by_task]}."
                )
                if kind == "union_tag_invalid":
                    message = "{tag!r} is none of {expected_tags}.".format(**problem["ctx"])
                    message = message.replace(f"'{PLUGIN}'", PLUGIN)
                key = f"{key}.source" if key else "task"
                place = place_of(key, origins)
            case "value_error" | "unused_key" as kind:
                if kind == "unused_key":
                    unused = ".".join(filter(None, [key, problem["ctx"]["key"]]))
                    key, message = "", f"{unused} has no use here: {message}"
                # The keys that the message names may be set in several files.
                names = dict.fromkeys(re.findall(r"[a-z_]\w*(?:\.[a-z_]\w*)+", message))
                places = [f"{name}: {origins[name]}" for name in names if name in origins]
                place = "; ".join(places) or place
            case _:
                message = f"{message}, got {problem['input']!r}."
        lines[explain(key, message, origins, place)] = None
    return "\n".join(lines)


def _dotted(location: Sequence[Any], tree: Any) -> str:
    """Return pydantic's location as a dotted key, without the tags of unions."""
    parts = []
    for part in location:
        if isinstance(tree, dict):
            if part not in tree and part in (tree.get("source"), tree.get("task"), PLUGIN):
                continue
            tree = tree.get(part)
        else:
            tree = None
        parts.append(str(part))
    return ".".join(parts)


def _unknown(
    key: str, location: Sequence[Any], task: str, keys_by_task: Mapping[str, Sequence[str]]
) -> str:
    """Return that a key is unknown in its section, and which key may have been meant."""
    keys = keys_by_task.get(task, ())
    if key in keys:  # pydantic's location has the source before it
        return f"not a key of source: {location[-2]}."
    if others := [other for other, keys_of_other in keys_by_task.items() if key in keys_of_other]:
        return f"not a key of a {task} config (of {' and '.join(others)})."
    parent, _, leaf = key.rpartition(".")
    siblings = [name for name in keys if name.rpartition(".")[0] == parent]
    for names, cutoff in ((siblings, 0.6), (keys, 0.75)):
        leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
        for near in get_close_matches(leaf, leaves, n=1, cutoff=cutoff):
            return f"unknown. Did you mean {leaves[near]}?"
    return f"unknown. Known: {siblings}."

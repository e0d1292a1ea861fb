"""Registries of backbones, heads, detectors, evaluators and other open sets, and plug-ins.

Each registry lives in the module that defines its entries (`BACKBONES` in models/backbones.py), so
importing a registry also fills it. A plug-in is a module or a .py file that registers more.
"""

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import sha256
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakSet

from fvcore.common.registry import Registry as FvcoreRegistry

Entry = TypeVar("Entry", bound=Callable[..., Any])
_PACKAGE = Path(__file__).parent
_registries: WeakSet["Registry"] = WeakSet()
_folders: set[Path] = set()  # those of plug-in files, added to sys.path


class NameTakenError(ValueError):
    """A name that is registered already."""


class Registry(FvcoreRegistry):  # type: ignore[misc]
    """fvcore's Registry with arbitrary names, and an error that suggests the nearest one.

    Attributes:
        modules: name -> the module that registered it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.modules: dict[str, str] = {}
        _registries.add(self)

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Register the decorated class or function as `name`.

        Raises:
            NameTakenError: the name exists; the message says by which module.
        """
        module = str(sys._getframe(1).f_globals.get("__name__"))

        def add(entry: Entry) -> Entry:
            if name in self:
                raise NameTakenError(
                    f"{self._name} has {name!r} already: {_shown(self.modules[name])} registers "
                    "it. Register another name, such as mine/net."
                )
            self._do_register(name, entry)
            self.modules[name] = module
            return entry

        return add

    def get(self, name: str) -> Any:
        """Return the entry registered as `name`.

        Raises:
            KeyError: there is none; the message lists all names.
        """
        if name not in self:
            names = sorted(key for key, _ in self)
            raise KeyError(
                f"{self._name} has no {name!r}.{did_you_mean(name, names)} Known: {names}"
            )
        return super().get(name)

    def is_built_in(self, name: str) -> bool:
        """Whether this package registered `name`, and no plug-in."""
        return self.modules[name].partition(".")[0] == "tract_transfer"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest name in `names`, or an empty string."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


# Plug-ins.


class PluginError(ValueError):
    """A plug-in that cannot be used; the message names it, the reason and the fix."""


def load_plugins(plugins: Iterable[str], folder: Path = Path()) -> None:
    """Import plug-ins, each once in a process.

    The folder of a .py file is appended to sys.path, so that the file can import others beside it.

    Args:
        plugins: names of modules, or paths of .py files: existing ones, or else files among the
            packaged configs (`paper/cifar_zoo.py`).
        folder: what a relative path is relative to.

    Raises:
        PluginError: one does not exist, does not import, registers nothing, or registers a name
            that is taken. Then nothing of it stays registered.
    """
    for plugin in plugins:
        name = find_plugin(plugin, folder)
        if not is_file(name) and not _MODULE.fullmatch(name):
            raise PluginError(
                f"{plugin!r} is no plug-in: write the name of a module, or a path that ends in .py."
            )
        if is_file(name) and not Path(name).is_file():
            raise PluginError(f"The plug-in {name} does not exist. Correct the path.")
        with _undone_on_error(name):
            before = _entries()
            if _import(name) and _entries() == before:
                raise PluginError(
                    f"The plug-in {name} registers nothing. Register an entry in it, as in "
                    '@BACKBONES.register("mine/net"), or remove it.'
                )


def find_plugin(plugin: str, folder: Path = Path()) -> str:
    """Return a module's name as it is, and the absolute path of a .py file: see `load_plugins`."""
    if not is_file(plugin):
        return plugin
    path = Path(os.path.abspath(folder / Path(plugin).expanduser()))  # noqa: PTH100 - keeps links
    packaged = None if path.is_file() else _packaged(plugin)
    return str(packaged or path)


def is_file(plugin: str) -> bool:
    """Whether a plug-in is a .py file, and no module's name."""
    return plugin.endswith(".py")


def plugin_name(plugin: str) -> str:
    """Return a plug-in without the folder of its file."""
    return Path(plugin).name if is_file(plugin) else plugin


def plugin_hashes(plugins: Iterable[str]) -> dict[str, str]:
    """Return the sha256 (hex) of the file of each imported plug-in, by its name without folder."""
    hashes = {}
    for plugin in plugins:
        module = sys.modules.get(plugin)
        file = plugin if is_file(plugin) else getattr(module, "__file__", None)
        if file is not None:
            hashes[plugin_name(plugin)] = sha256(Path(file).read_bytes()).hexdigest()
    return hashes


def trusted_plugins(recorded: Any, named: Iterable[str], where: str) -> list[str]:
    """Return what to import for a run or weights that may come from somebody else.

    A file that they record is not imported: the user must name it, wherever it is. Installed
    modules, the package's own plug-ins, and what this process has imported are.

    Args:
        recorded: the plug-ins that a run's config.yaml or model.json lists.
        named: the plug-ins that the user names, which are all returned.
        where: what records them, for the error.

    Raises:
        PluginError: a recorded plug-in is missing.
    """
    plugins = [find_plugin(plugin) for plugin in named]
    stems = {_stem(plugin) for plugin in plugins}
    for plugin in recorded if isinstance(recorded, list) else []:
        if not isinstance(plugin, str) or _stem(plugin) in stems:
            continue
        packaged = _packaged(plugin) if is_file(plugin) else None
        if packaged is not None:
            plugins.append(str(packaged))
        elif _imported(Path(plugin)) if is_file(plugin) else _is_installed(plugin):
            plugins.append(plugin)
        else:
            place = plugin
            if is_file(plugin) and not Path(plugin).is_file():
                place = f"PATH/{plugin_name(plugin)}, where it is now"
            raise PluginError(
                f"{where} needs the plug-in {plugin}, which is not imported because a run or "
                "weights name it: they can come from somebody else. If you trust it, name it: "
                f"--plugin {place} (in Python: plugins=[...])"
            )
    return list(dict.fromkeys(plugins))


_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def _stem(plugin: str) -> str:
    """Return the name by which a plug-in that was moved is recognized."""
    return Path(plugin).stem if is_file(plugin) else plugin.rpartition(".")[2]


def _packaged(plugin: str) -> Path | None:
    """Return the packaged file of that name, also for its path in another installation."""
    folders = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in a wheel, in a clone
    folder = next((path for path in folders if path.is_dir()), None)
    name = Path(plugin).as_posix().rpartition("configs/")[2]
    if folder is None or ".." in name or name.startswith("/") or not (folder / name).is_file():
        return None
    return folder / name


def _is_installed(name: str) -> bool:
    """Whether a module is installed: not one of Python's own, and none that is beside a plug-in."""
    top = name.partition(".")[0]
    if name in sys.modules or not _MODULE.fullmatch(name):
        return name in sys.modules
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    return spec is not None and top not in sys.stdlib_module_names and not _is_beside(spec)


def _is_beside(spec: ModuleSpec) -> bool:
    """Whether a module is in the working directory, or in the folder of a plug-in's file."""
    # The folder is resolved, not the module: a link in it is in it.
    places = spec.submodule_search_locations or ([spec.origin or ""] if spec.has_location else [])
    return any(Path(place).parent.resolve() in {Path.cwd(), *_folders} for place in places)


def _imported(file: Path) -> ModuleType | None:
    """Return the module that a file was imported as in this process, by whatever name."""
    for module in list(sys.modules.values()):
        path = getattr(module, "__dict__", {}).get("__file__")
        of_module = Path(path) if isinstance(path, str) else Path()
        if of_module.name == file.name and of_module.resolve() == file.resolve():
            return module
    return None


def _import(plugin: str) -> bool:
    """Import a plug-in; return False if it was imported. Convert its errors to PluginErrors."""
    file = Path(plugin).resolve() if is_file(plugin) else None
    try:
        if file is None and plugin in sys.modules:
            return False
        spec = None if file else importlib.util.find_spec(plugin)
        origin = Path(spec.origin) if spec and spec.origin else file
        if origin and _imported(origin):
            return False
        if file is None:
            importlib.import_module(plugin)
        else:
            _import_file(file)
        return True
    except ModuleNotFoundError as error:
        if file is None and error.name and f"{plugin}.".startswith(f"{error.name}."):
            hint = f" There is a file: write {plugin}.py." if Path(f"{plugin}.py").exists() else ""
            message = f"The plug-in {plugin} does not exist: no module {error.name!r}.{hint}"
            raise PluginError(f"{message} Install it, or give the path of a .py file.") from error
        raise PluginError(_reason(plugin, error)) from error
    except (Exception, SystemExit) as error:
        raise PluginError(_reason(plugin, error)) from error


def _import_file(file: Path) -> None:
    """Import a file by its own name, or by another one if that is a module's already."""
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # so data workers that are not forked find it too
        _folders.add(file.parent)
    name = file.stem
    if name.isidentifier() and name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin and Path(found.origin).resolve() == file:
            importlib.import_module(name)
            return
    name = f"{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _reason(plugin: str, error: BaseException) -> str:
    """Return why a plug-in does not import, with the line of its own that fails."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and frame.filename[:1] != "<"
    ]
    own = [f for f in frames if Path(f.filename).parent == Path(frames[0].filename).parent]
    line = f" ({own[-1].filename} line {own[-1].lineno})" if own else ""
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename:
        line, text = f" ({error.filename} line {error.lineno})", error.msg
    reason = f"it does not import: {type(error).__name__}: {text}"
    if isinstance(error, NameTakenError):
        reason = text
    return f"The plug-in {plugin} cannot be used: {reason}{line}"


def _entries() -> set[tuple[Registry, str]]:
    """Return registry and name of every entry that is not built in."""
    return {
        (registry, name)
        for registry in _registries
        for name in registry.modules
        if not registry.is_built_in(name)
    }


@contextmanager
def _undone_on_error(plugin: str) -> Iterator[None]:
    """After an error, remove what a plug-in registered in the block, and its modules.

    Installed modules that it imports stay: NumPy, for one, cannot be imported twice.
    """
    entries, modules = _entries(), set(sys.modules)
    try:
        yield
    except BaseException:
        names = set()
        for registry, entry in _entries() - entries:
            names.add(registry.modules.pop(entry))
            del registry._obj_map[entry]
        for name in sys.modules.keys() - modules:
            if _is_part(name, plugin):
                names.add(name)
        for name in names - modules:
            sys.modules.pop(name, None)
        raise


def _is_part(name: str, plugin: str) -> bool:
    """Whether an imported module is the plug-in, in its package or beside it."""
    top = name.partition(".")[0]
    if top == _PACKAGE.name:  # also beside a plug-in in a clone
        return False
    spec = getattr(sys.modules.get(top), "__spec__", None)
    if spec is not None and _is_beside(spec):
        return True
    if is_file(plugin):
        return Path(getattr(spec, "origin", None) or "").resolve() == Path(plugin).resolve()
    return top == plugin.partition(".")[0]


def _shown(module: str) -> str:
    """Return a module's name, or the file of a plug-in."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return module if module.startswith("tract_transfer.") or not file else str(file)

"""Opening rows with Hugging Face `datasets`: which kind a path is, which splits it has."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.findings import Origin, check_size, is_below
from tract_transfer.registry import did_you_mean

_SPLIT_NAMES = ("train", "validation", "val", "valid", "test")


class RowImages:
    """One image column of rows, kept encoded and memory-mapped.

    An image in a file must lie in one of `folders`; one of more than `max_pixels` is not decoded.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        title: str,
        folders: Sequence[Path],
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        import datasets

        undecoded = rows.select_columns([column])
        self._rows = undecoded.cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._title = title
        self._folders = folders
        self._max_pixels = max_pixels

    def stored(self, row: int) -> bytes | Path:
        """Return a row's encoded image, or its file; an empty cell is no bytes.

        Raises:
            ValueError: the file is outside the dataset's folder.
        """
        cell = self._rows[row][self._column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            return b""
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        if not any(is_below(folder, cell["path"]) for folder in self._folders):
            listed = " or ".join(map(str, self._folders))
            raise ValueError(
                f"{self.item(row)} is the file {cell['path']}, which is not below {listed}: data "
                "must not read other files. Save the dataset with its images in it (save_to_disk)."
            )
        return Path(cell["path"])

    def encoded(self, row: int) -> bytes:
        """Return a row's encoded image."""
        return images.read_stored(self.stored(row))

    def image(self, row: int) -> Tensor:
        """Return a row's image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        stored = self.stored(row)
        item = self.item(row)
        return images.decode_image(
            stored,
            f"{item} ({stored})" if isinstance(stored, Path) else item,
            max_pixels=self._max_pixels,
        )

    def item(self, row: int) -> str:
        """Return what an error message calls a row, as `cifar10 split train row 17`."""
        return f"{self._title} row {row}"


def folders_of(path: str) -> list[Path]:
    """Return where the images of a dataset may lie: its folder, or the hub's caches."""
    import datasets
    import huggingface_hub

    if not is_hub_id(path):
        folder = Path(path).expanduser()
        return [folder if folder.is_dir() else folder.parent]
    caches = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    return [Path(cache) for cache in caches]


def is_hub_id(path: str) -> bool:
    """Whether a path is none on this machine: it neither looks local nor exists."""
    return not (path.startswith((".", "/", "~")) or Path(path).exists())


def open_rows(
    path: str, split: str, config_name: str | None, revision: str | None, key: str
) -> Any:
    """Return the `datasets.Dataset` of a split; see `classification.load_huggingface`."""
    if is_hub_id(path):
        return _open_hub(path, split, config_name, revision, key)
    folder = local_path(path, config_name, revision, key)
    if is_saved(folder):
        return open_saved(folder, split, key)
    if folder.is_file() or parquet_files(folder):
        return _open_parquet(folder, split, key)
    return _open_image_folder(folder, split, key)


def origin_of(rows: Any, path: str, split: str) -> Origin:
    """Return where the rows of `open_rows` come from, and how their number compares."""
    is_hub = is_hub_id(path)
    size_check = check_size(path, rows.info.dataset_name, is_hub, split, len(rows))
    return Origin(path if is_hub else None, size_check)


def local_path(path: str, config_name: str | None, revision: str | None, key: str) -> Path:
    """Return where local data lie; refuse what is not there, and what only the hub has."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"{folder.absolute()} does not exist. Set {key}.path.")
    if revision is not None or config_name is not None:
        raise ValueError(
            f"{path} is local and has neither revisions nor configurations. Remove "
            f"{key}.revision and {key}.config_name."
        )
    return folder


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _open_hub(
    path: str, split: str, config_name: str | None, revision: str | None, key: str
) -> Any:
    import datasets

    with hub_errors(path, split, key):
        return datasets.load_dataset(path, config_name, split=split, revision=revision)


@contextmanager
def hub_errors(path: str, split: str, key: str) -> Iterator[None]:
    """Say what can be done about a data set of the hub that does not load.

    Raises:
        ConnectionError: the hub does not answer.
        FileNotFoundError: it has no such data set.
        ValueError: it has, and the split or configuration does not fit.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        away = isinstance(error, ConnectionError | TimeoutError)
        raise (ConnectionError if away else FileNotFoundError)(
            f"The hub dataset {path!r} did not load ({type(error).__name__}: {_first(error)}). "
            f"Check the name and the connection; or save a copy where there is one, with "
            f"datasets.load_dataset({path!r}).save_to_disk('./copy'), and set "
            f"{key}.path: ./copy. A local path starts with . or / or ~."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The hub dataset {path!r} with {key}.split: {split} did not load: {_first(error)}. "
            f"Where it has several configurations, set {key}.config_name; where it has a loading "
            f"script, save a copy with an older version of datasets and set {key}.path to it."
        ) from error


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def check_split(split: str, known: list[str], path: Path | str, key: str) -> list[str]:
    """Return the names in a spec such as `train[:10%]+test`, each of them known."""
    named = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    for name in named:
        if name not in known:
            raise ValueError(
                f"{path} has no split {name!r}.{did_you_mean(name, known)} "
                f"Set {key}.split to one of {known}."
            )
    return named


def open_saved(folder: Path, split: str, key: str) -> Any:
    """Return the `datasets.Dataset` of a split of what `save_to_disk` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except IndexError as error:  # of a split that was saved without rows
        raise ValueError(
            f"{folder} has a split without rows. Save it anew, or set {key}.path."
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        saved = datasets.DatasetDict({str(saved.split or own_split(folder)): saved})
    check_split(split, list(saved), folder, key)
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(saved.num_rows)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{key}.split: {split} is no slice of {folder}: {error}") from error
    parts = [saved[part.splitname].select(range(part.from_, part.to)) for part in slices]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def own_split(path: Path) -> str:
    """Return the split that a file or folder is: the one it is named after, and else train.

    Any name would do, but then one folder could be train and test at once without a word.
    """
    return path.stem if path.stem in _SPLIT_NAMES else "train"


def parquet_files(folder: Path) -> list[Path]:
    """Return a folder's parquet files, or those in its folder `data`."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def _open_parquet(path: Path, split: str, key: str) -> Any:
    import datasets

    files = split_files(path, split, key)
    data_files = {name: [str(file) for file in group] for name, group in files.items()}
    try:
        return datasets.load_dataset("parquet", data_files=data_files, split=split)
    except (ValueError, AssertionError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} with {key}.split: {split} did not load: {cause}") from error


def split_files(path: Path, split: str, key: str) -> dict[str, list[Path]]:
    """Return the parquet files of each split that `split` names."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is not a parquet file nor a folder. Set {key}.path.")
        groups = {own_split(path): [path]}
    else:
        groups = _group_shards(parquet_files(path))
    return {name: groups[name] for name in check_split(split, list(groups), path, key)}


def _group_shards(files: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file in files:
        name, _, total = re.fullmatch(r"(.+?)(-\d+-of-(\d+))?", file.stem).groups()  # type: ignore[union-attr]
        groups.setdefault(name, []).append(file)
        expected = len(list(file.parent.glob(f"{name}-*-of-{total}.parquet")))
        if total is not None and expected != int(total):
            raise ValueError(
                f"{file.parent} must hold all {int(total)} files of split {name!r}, but has "
                f"{expected}. Complete the copy."
            )
    return groups


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of an image folder's splits; itself is one where it has none."""
    splits = [name for name in _SPLIT_NAMES if (folder / name).is_dir()]
    return {name: folder / name for name in splits} or {own_split(folder): folder}


def _open_image_folder(folder: Path, split: str, key: str) -> Any:
    import datasets

    folders = split_folders(folder)
    check_split(split, list(folders), folder, key)
    # All splits at once, so that the classes are those of their union.
    data_files = {name: str(place / "**") for name, place in folders.items()}
    try:
        return datasets.load_dataset("imagefolder", data_files=data_files, split=split)
    except (OSError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{folder} with {key}.split: {split} did not load as a folder of images, "
            f"<class>/x.png or <split>/<class>/x.png: {_first(error)}. Set {key}.path."
        ) from error


# --- Which columns of Hugging Face data hold images and labels: those named, or of that type.


def find_image_column(rows: Any, column: str | None, key: str) -> str:
    """Return the image column: the named one, or the only one with feature `Image`."""
    import datasets

    column = _find(rows, column, datasets.Image, f"{key}.image_column")
    if not isinstance(rows.features[column], datasets.Image):
        raise ValueError(
            f"{key}.image_column: {column!r} must have the feature Image, not "
            f"{rows.features[column]}. Convert it with cast_column({column!r}, datasets.Image()) "
            "and save_to_disk."
        )
    return column


def find_label_column(rows: Any, column: str | None, key: str) -> str:
    """Return the label column: the named one, or the only one with feature `ClassLabel`."""
    import datasets

    column = _find(rows, column, datasets.ClassLabel, f"{key}.label_column")
    feature = rows.features[column]
    dtype = str(getattr(feature, "dtype", feature))
    if not isinstance(feature, datasets.ClassLabel) and not re.fullmatch(r"u?int\d+|bool", dtype):
        raise ValueError(
            f"{key}.label_column: {column!r} must hold integers, booleans or a ClassLabel, not "
            f"{dtype}. "
            f"Convert it with class_encode_column({column!r}) on all splits together, and "
            "save_to_disk."
        )
    return column


def _find(rows: Any, column: str | None, feature: type, key: str) -> str:
    listed = ", ".join(f"{name} ({_type(kind)})" for name, kind in rows.features.items())
    if column is not None:
        if column not in rows.features:
            hint = did_you_mean(column, rows.features)
            raise ValueError(f"{key}: no column {column!r}.{hint} Columns: {listed}.")
        return column
    found: list[str] = [name for name, kind in rows.features.items() if isinstance(kind, feature)]
    if len(found) != 1:
        raise ValueError(
            f"One column must have the feature {feature.__name__}, but {len(found)} have: set "
            f"{key}. Columns: {listed}."
        )
    return found[0]


def _type(feature: Any) -> str:
    plain = type(feature).__name__
    return str(feature.dtype) if plain == "Value" else plain

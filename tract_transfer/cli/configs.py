"""List the configs that come with the package, show one, or copy one to edit.

tract-transfer configs
tract-transfer configs detection
tract-transfer configs --show transfer/cifar10_finetune
tract-transfer configs --copy transfer/cifar10_finetune

Every command takes such a name in place of a file: --config-file transfer/cifar10_finetune.
"""

import re
import sys
import textwrap
from pathlib import Path

from tract_transfer.cli.main import make_parser, reports_errors

MAX_CHARACTERS = 100  # of a description
_BASES = "base/"  # configs that others build on: they run nothing themselves
_RELATIVE = re.compile(r"(?<![\w./-])(?:\.\./)*(?:[\w-]+/)?[\w-]+\.(?:yaml|py)\b")


@reports_errors
def main() -> int:
    """List, show or copy packaged configs; return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="list those whose line has it")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", metavar="NAME", help="print a config")
    text = "write a config to FILE to edit it (default: its own name, in this folder)"
    instead.add_argument("--copy", nargs="+", metavar=("NAME", "FILE"), help=text)
    arguments = parser.parse_args()
    if arguments.words and (arguments.show or arguments.copy):
        parser.error("--show and --copy take one config.")
    if arguments.copy and len(arguments.copy) > 2:
        parser.error("--copy takes NAME and FILE.")
    from tract_transfer.config.file import find_config

    if arguments.show:
        print(find_config(arguments.show).read_text(encoding="utf-8"), end="")
    elif arguments.copy:
        print(copy(*arguments.copy))
    else:
        print_list(arguments.words)
    return 0


def copy(name: str, destination: str | None = None) -> Path:
    """Write a packaged config to a new file and return its path.

    Its bases and plug-ins stay in the package.

    Raises:
        FileExistsError: there is such a file; it is kept.
    """
    from tract_transfer.config.file import CONFIGS, find_config

    source = find_config(name)
    path = Path(destination or source.name)
    path = path / source.name if path.is_dir() else path
    if path.exists():
        raise FileExistsError(f"{path} exists and is kept. Name another file.")

    def packaged(match: re.Match[str]) -> str:
        """Return the packaged name of a config or plug-in, given relative to the source."""
        file = (source.parent / match[0]).resolve()
        if not file.is_relative_to(CONFIGS.resolve()) or not file.is_file():
            return match[0]
        name = file.relative_to(CONFIGS.resolve())
        return (name if name.suffix == ".py" else name.with_suffix("")).as_posix()

    lines = source.read_text(encoding="utf-8").splitlines()
    text = [line if line.startswith("#") else _RELATIVE.sub(packaged, line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def print_list(words: list[str]) -> None:
    """Print the name and the first sentence of each config that runs something."""
    from tract_transfer.config.file import CONFIGS, config_names

    names = [name for name in config_names() if not name.startswith(_BASES)]
    width = max(map(len, names))
    lines = [f"{name:{width}}  {about(CONFIGS / f'{name}.yaml')}" for name in names]
    shown = [line for line in lines if all(word.lower() in line.lower() for word in words)]
    if not shown:
        raise ValueError(f"No packaged config has {' and '.join(words)} in its line.")
    print("\n".join(shown))


def about(path: Path) -> str:
    """Return the first sentence of a config's leading comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    sentence = re.split(r"(?<!et al)[.;]\s", " ".join(comment), maxsplit=1)[0].rstrip(".;")
    return textwrap.shorten(sentence, MAX_CHARACTERS, placeholder=" ...")


if __name__ == "__main__":
    sys.exit(main())

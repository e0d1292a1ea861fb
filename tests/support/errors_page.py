"""The rows of docs/reference/errors.md: what `refused` records, and holds messages to.

A test says `with refused("a box outside", ValueError): ...`. docs/generate.py runs these tests with
a Recorder and writes the page; otherwise each message is compared with its row.
"""

import re
import traceback
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/errors.md"
PACKAGE = ROOT / "tract_transfer"
RECORDER = "errors-page"
LONGEST = 200  # characters of a message
# Words of other libraries and results of the machine, shown as …
FOREIGN = (
    r"Instruction \"[^!]*!",
    r"(?<=Known: )\['alexnet'.*",
    r"(?<=its )\d+(?= bytes)",
    r"(?<=no image of )[A-Z0-9, ]+",
    r"(?<=cannot be read as weights: ).*(?=\. It is cut short)",
    r"(?<=is no complete parquet file: ).*(?= Copy it again)",
    r"(?<=\()Error\(s\) in loading .*(?=\))",
    r"[0-9a-f]{12}(?= (?:then|now))",
    r"\d+ on \S+ since [^\s.]+",
    r"(?<=and )\S+(?= cannot tell)",
    r"[\d,]+(?= bytes are free)",
    r"(?<=loss_cls )[0-9.]+",
)


class Recorder:
    """A plugin of pytest: runs only the tests that use `refused`, and collects their rows."""

    def __init__(self) -> None:
        self.__name__ = RECORDER
        self.rows: dict[str, tuple[str, str]] = {}

    def add(self, bad_input: str, package: str, message: str) -> None:
        row = (package, message)
        assert self.rows.setdefault(bad_input, row) == row, f"two messages for {bad_input!r}"

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if "refused" in getattr(item, "fixturenames", ())]


def shown(message: str, base: Path) -> str:
    """Return a message as the page has it; `base` is the folder of the tests' own folders."""
    text = " ".join(message.split())
    folder = rf"{re.escape(str(base))}/[^/\s'\"]+?(?=[/\s'\",:;.)]|$)"
    text = re.sub(folder, "…", text).replace(f"{ROOT}/", "").replace(str(ROOT), "…")
    for pattern in FOREIGN:
        text = re.sub(pattern, "…", text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} …"


def raised_by(trace: TracebackType | None) -> str:
    """Return the package of the innermost module of tract_transfer in a traceback."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(trace)]
    inside = [file.relative_to(PACKAGE) for file in files if file.is_relative_to(PACKAGE)]
    assert inside, "raised outside of the package"
    return inside[-1].parts[0]


def read_page() -> dict[str, str]:
    """Return the messages of docs/reference/errors.md by their input."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and line.endswith("` |"):
            cells = re.split(r" (?<!\\)\| ", line[2:-2], maxsplit=1)
            bad_input, code = (cell.replace("\\|", "|") for cell in cells)
            rows[bad_input] = code[3:-3] if code.startswith("`` ") else code[1:-1]
    return rows

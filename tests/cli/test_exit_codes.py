"""How tools end that cannot do what they were asked; test_tools.py has command lines."""

from pathlib import Path

import pytest

from tract_transfer import cli
from tract_transfer.cli.main import reports_errors
from tract_transfer.files import DiskFullError

CLI = Path(cli.__file__).parent
COMMANDS = sorted(file for file in CLI.glob("*.py") if file.stem not in ("__init__", "main"))
ENDS = {
    "a user's mistake": (ValueError("no good"), 2, "error: no good\n"),
    "a file that is not there": (FileNotFoundError("No x."), 2, "error: No x.\n"),
    "a package that is not there": (ImportError("Install x."), 2, "error: Install x.\n"),
    "a full disk": (DiskFullError("full"), 1, "failed: DiskFullError: full\n"),
    "a failure": (RuntimeError("lost"), 1, "failed: RuntimeError: lost\n"),
    "no numbers": (FloatingPointError("nan"), 1, "failed: FloatingPointError: nan\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "SIGINT: ended.\n"),
}


@pytest.mark.parametrize(("error", "code", "told"), ENDS.values(), ids=ENDS)
def test_an_error_is_one_line_and_a_code(error, code, told, capsys, monkeypatch):
    @reports_errors
    def main():
        raise error

    assert main() == code
    assert capsys.readouterr().err == told
    monkeypatch.setenv("TRACT_TRANSFER_TRACEBACK", "1")
    if code != 130:
        with pytest.raises(type(error)):
            main()


def test_a_mistake_of_ours_keeps_its_traceback():
    @reports_errors
    def main():
        return {}["key"]

    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.name)
def test_every_tool_ends_in_words(file):
    assert "@reports_errors\ndef main() -> int:" in file.read_text()

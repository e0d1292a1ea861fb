"""Kill a suite with SIGKILL at random moments, and compare it with an undisturbed one.

python tests/support/killed_suite.py --config-file benchmarks/configs/suites/cpu_demo.yaml \\
    --kills 3 --undisturbed output/cpu_demo --killed output/cpu_demo_killed
python tests/support/killed_suite.py --undisturbed output/cpu_demo --killed output/cpu_demo_killed

Every second kill ends run_suite.py alone, the others all its processes. The undisturbed suite runs
first if its folder has none. Without `--config-file` two folders are only compared: results.json
and weights of every run, and the report's JSON except costs, paths and the machine.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from run_folders import results_of  # noqa: E402

from tract_transfer.report.content import read_report  # noqa: E402
from tract_transfer.report.write import to_json  # noqa: E402

LAST_MOMENT = 0.9  # of the runs, so that a kill comes before the end
OF_THE_MACHINE = ("command", "git.", "hardware.")
POLL_SECONDS = 0.2


def content_of(folder: Path) -> dict[str, Any]:
    """Return what must be equal of a suite's report."""
    run = next(entry for entry in runs_of(folder) if entry["state"] == "finished")["folder"]
    written = yaml.safe_load((folder / run / "config.yaml").read_text())["output_dir"]
    text = to_json(read_report([folder]))
    for path in (str(folder), written.removesuffix(f"/{run}")):
        text = text.replace(f"{path}/", "SUITE/")
    content = json.loads(text)
    del content["costs"]
    for cards in content["protocol"].values():
        for card in cards:
            for part in ("differing", "shared"):
                items = card[part].items()
                card[part] = {k: v for k, v in items if not k.startswith(OF_THE_MACHINE)}
    return content


def differences(one: Any, two: Any, key: str = "") -> list[str]:
    """Return a line for every difference between nested plain values."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [*one, *(k for k in two if k not in one)]
        pairs = [(f"{key}.{k}", one.get(k), two.get(k)) for k in keys]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = [(f"{key}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return [] if one == two else [f"{key}: {one!r} and {two!r}"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def compare(one: Path, two: Path) -> list[str]:
    """Return a line for every difference between two suites' runs and reports."""
    finished = [{p.parent.relative_to(f) for p in f.rglob("results.json")} for f in (one, two)]
    lines = [f"{run}: is finished in one alone" for run in sorted(finished[0] ^ finished[1])]
    for run in sorted(finished[0] & finished[1]):
        texts = [
            json.dumps(results_of(suite / run)).replace(str(suite), "") for suite in (one, two)
        ]
        lines += differences(*map(json.loads, texts), f"{run}/results.json")
        weights = [suite / run / "model.safetensors" for suite in (one, two)]
        if len({file.read_bytes() if file.exists() else b"" for file in weights}) > 1:
            lines.append(f"{run}/model.safetensors: other bytes")
    return lines + differences(content_of(one), content_of(two), "report")


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """Return the runs in suite.json; none before the suite has started."""
    file = folder / "suite.json"
    return json.loads(file.read_text())["runs"] if file.exists() else []


def start(arguments: argparse.Namespace, folder: Path) -> "subprocess.Popen[bytes]":
    """Start run_suite.py in a session of its own."""
    command = [sys.executable, ROOT / "tools/run_suite.py", "--config-file", arguments.config_file]
    return subprocess.Popen(
        [*command, f"output_dir={folder}", *arguments.overrides], start_new_session=True
    )


def wait_until(suite: "subprocess.Popen[bytes]", folder: Path, moment: float) -> bool:
    """Wait for this many finished runs and a part of one more; False if the suite ends first."""
    begun = time.monotonic()
    while suite.poll() is None:
        runs = runs_of(folder)
        states = [run["state"] for run in runs]
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None] or [10.0]
        if states.count("finished") < int(moment) or "running" not in states:
            begun = time.monotonic()
        elif time.monotonic() - begun >= (moment % 1) * sum(seconds) / len(seconds):
            return True
        time.sleep(POLL_SECONDS)
    return False


def kill(suite: "subprocess.Popen[bytes]", everything: bool) -> int:
    """Kill run_suite.py, and on request its children; return the number of processes."""
    children = psutil.Process(suite.pid).children(recursive=True) if everything else []
    suite.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert suite.wait() == -signal.SIGKILL
    psutil.wait_procs(children, timeout=60)
    return 1 + len(children)


def run_with_kills(arguments: argparse.Namespace) -> int:
    """Run the suite with kills; return their number."""
    rng, count = random.Random(arguments.seed), len(runs_of(arguments.undisturbed))
    killed = 0
    for moment in sorted(rng.uniform(0, LAST_MOMENT * count) for _ in range(arguments.kills)):
        suite = start(arguments, arguments.killed)
        if not wait_until(suite, arguments.killed, moment):
            break
        ended = kill(suite, everything=killed % 2 == 1)
        killed += 1
        states = [run["state"] for run in runs_of(arguments.killed)]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        print(f"kill {killed}: {ended} processes, at {counts}", flush=True)
    code = start(arguments, arguments.killed).wait()
    assert code == 0, f"the suite ended with {code}"
    return killed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="of the suite; without it, compare")
    parser.add_argument("--undisturbed", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--killed", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the suite's keys")
    arguments = parser.parse_intermixed_args()
    if arguments.config_file:
        if not (arguments.undisturbed / "report.html").exists():
            assert start(arguments, arguments.undisturbed).wait() == 0, "the suite failed"
        if runs_of(arguments.killed):
            parser.error(f"--killed {arguments.killed} contains a suite; name another folder")
        if (killed := run_with_kills(arguments)) < arguments.kills:
            print(f"{killed} of {arguments.kills} kills came before the end")
            return 1
    lines = compare(arguments.undisturbed, arguments.killed)
    equal = f"equal: {len(runs_of(arguments.killed))} runs, their results, weights and the report"
    print("\n".join(lines) or equal)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

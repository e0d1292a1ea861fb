"""Kill a suite with SIGKILL at random moments, and compare what comes out with an undisturbed one.

python tests/support/killed_suite.py --config-file benchmarks/configs/suites/cpu_demo.yaml \\
    --kills 3 --undisturbed output/cpu_demo --killed output/cpu_demo_killed
python tests/support/killed_suite.py --undisturbed output/cpu_demo --killed output/cpu_demo_killed

Every second kill takes run_suite.py alone and leaves its runs to the next start; the others take
every process. The undisturbed suite is carried out first where its folder holds none. Without
`--config-file` two folders are compared, and nothing is run. Equal are, of every run, results.json
and the weights to the bit, and the report's JSON: all but costs, places and the machine.
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
    """Return a suite's report as it has to be the same, however the suite came to it."""
    plan = json.loads((folder / "suite.json").read_text())
    run = next(entry["folder"] for entry in plan["runs"] if entry["state"] == "finished")
    written = yaml.safe_load((folder / run / "config.yaml").read_text())["output_dir"]
    text = to_json(read_report([folder]))
    for place in (str(folder), written.removesuffix(f"/{run}")):
        text = text.replace(f"{place}/", "SUITE/")
    content = json.loads(text)
    del content["costs"]
    for cards in content["protocol"].values():
        for card in cards:
            for part in ("differing", "shared"):
                own = card[part].items()
                card[part] = {k: v for k, v in own if not k.startswith(OF_THE_MACHINE)}
    return content


def differences(one: Any, two: Any, key: str = "") -> list[str]:
    """Return what differs between nested plain values, a line each."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [*one, *(k for k in two if k not in one)]
        pairs = [(f"{key}.{k}", one.get(k), two.get(k)) for k in keys]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = [(f"{key}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return [] if one == two else [f"{key}: {one!r} and {two!r}"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def compare(one: Path, two: Path) -> list[str]:
    """Return what differs between two suites' runs and reports, a line each."""
    runs = [{p.parent.relative_to(f) for p in f.rglob("results.json")} for f in (one, two)]
    lines = [f"{run}: is finished in one alone" for run in sorted(runs[0] ^ runs[1])]
    for run in sorted(runs[0] & runs[1]):
        told = [
            json.dumps(results_of(folder / run)).replace(str(folder), "") for folder in (one, two)
        ]
        lines += differences(*map(json.loads, told), f"{run}/results.json")
        weights = [folder / run / "model.safetensors" for folder in (one, two)]
        if len({file.read_bytes() if file.exists() else b"" for file in weights}) > 1:
            lines.append(f"{run}/model.safetensors: other bytes")
    return lines + differences(content_of(one), content_of(two), "report")


def start(config_file: str, folder: Path, overrides: list[str]) -> "subprocess.Popen[bytes]":
    """Start run_suite.py in a session of its own."""
    words = [str(ROOT / "tools/run_suite.py"), "--config-file", config_file]
    return subprocess.Popen(
        [sys.executable, *words, f"output_dir={folder}", *overrides], start_new_session=True
    )


def states_of(folder: Path) -> list[str]:
    """Return the state of every run; none before the suite has begun."""
    try:
        return [run["state"] for run in json.loads((folder / "suite.json").read_text())["runs"]]
    except FileNotFoundError:
        return []


def wait_until(suite: "subprocess.Popen[bytes]", folder: Path, moment: float) -> bool:
    """Wait for so many finished runs, and a part of one more; False where the suite has ended."""
    begun = time.monotonic()
    while suite.poll() is None:
        states = states_of(folder)
        if states.count("finished") < int(moment) or "running" not in states:
            begun = time.monotonic()
        elif time.monotonic() - begun >= (moment % 1) * mean_seconds(folder):
            return True
        time.sleep(POLL_SECONDS)
    return False


def mean_seconds(folder: Path) -> float:
    """Return how long a run took in the mean; 10 before the first one has ended."""
    runs = json.loads((folder / "suite.json").read_text())["runs"]
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    return sum(seconds) / len(seconds) if seconds else 10.0


def kill(suite: "subprocess.Popen[bytes]", everything: bool) -> int:
    """Kill run_suite.py, and on request all that it has started; return how many that were."""
    children = psutil.Process(suite.pid).children(recursive=True) if everything else []
    suite.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert suite.wait() == -signal.SIGKILL
    psutil.wait_procs(children, timeout=60)
    return 1 + len(children)


def carry_out(arguments: argparse.Namespace) -> int:
    """Run the suite with kills; return how often it was killed."""
    rng = random.Random(arguments.seed)
    count = len(states_of(arguments.undisturbed))
    moments = sorted(rng.uniform(0, LAST_MOMENT * count) for _ in range(arguments.kills))
    killed = 0
    for moment in moments:
        suite = start(arguments.config_file, arguments.killed, arguments.overrides)
        if not wait_until(suite, arguments.killed, moment):
            break
        ended = kill(suite, everything=killed % 2 == 1)
        killed += 1
        states = states_of(arguments.killed)
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        print(f"kill {killed}: {ended} processes, at {told}", flush=True)
    code = start(arguments.config_file, arguments.killed, arguments.overrides).wait()
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the suite's keys")
    arguments = parser.parse_intermixed_args()
    if arguments.config_file:
        if not (arguments.undisturbed / "report.html").exists():
            whole = start(arguments.config_file, arguments.undisturbed, arguments.overrides)
            assert whole.wait() == 0, "the undisturbed suite did not end well"
        if states_of(arguments.killed):
            parser.error(f"--killed {arguments.killed} holds a suite; name another folder")
        if (killed := carry_out(arguments)) < arguments.kills:
            print(f"{killed} of {arguments.kills} kills came before the end")
            return 1
    lines = compare(arguments.undisturbed, arguments.killed)
    equal = f"equal: {len(states_of(arguments.killed))} runs, their results, weights and the report"
    print("\n".join(lines) or equal)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

"""Memory of a streamed training against the length of the data set.

Each case is a process of its own (tools/train_net.py, `data.train.streaming: true`) that trains a
small ResNet for as many iterations on a parquet file of other length, made before. Memory is the
peak of the main process's resident memory, as the kernel keeps it (VmHWM), and Pss_Anon of the
process and its workers (see memory.py) as time goes by.

    python benchmarks/streaming_memory.py [--rows 4000 32000 128000] [--iters 600] [--workers 0]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import write_rows
from memory import anonymous_kib

TRAIN = Path(__file__).parents[1] / "tools" / "train_net.py"
PARTS = 5
CONFIG = """
task: classification
output_dir: {folder}/run
model: {{backbone: {{name: cifar/resnet18, args: {{width: 8}}}}}}
data:
  train: {{source: huggingface, path: {folder}/train.parquet, split: train, streaming: true}}
  test: {{source: huggingface, path: {folder}/test.parquet, split: test}}
  transforms: {{size_px: 32, crop: pad, flip_prob: 0.5}}
  batch_size: 64
  num_workers: {workers}
solver: {{optimizer: sgd, lr: 0.01, max_iters: {iters}}}
engine: {{device: cpu, log: {{every_iters: 10}}}}
"""


def watch(folder: Path) -> tuple[int, list[tuple[int, int]]]:
    """Train; return the peak of resident memory, and (iteration, Pss_Anon) as time goes by, KiB."""
    command = [sys.executable, str(TRAIN), "--config-file", str(folder / "config.yaml")]
    metrics, resident, seen, iteration = folder / "run/metrics.jsonl", 0, [], 0
    log = (folder / "log.txt").open("w")
    with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            time.sleep(0.05)
            if metrics.exists() and (lines := metrics.read_text().splitlines()[:-1]):
                iteration = json.loads(lines[-1])["iteration"]
            seen.append((iteration, anonymous_kib(process.pid)))
            resident = max(resident, peak_resident_kib(process.pid))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(folder / 'log.txt').read_text()}")
    return resident, seen


def peak_resident_kib(process: int) -> int:
    """VmHWM of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) if found else 0


def curve(seen: list[tuple[int, int]], iters: int) -> list[float]:
    """Return the peak in each fifth of the iterations, MiB."""
    peaks = [0] * PARTS
    for iteration, kib in seen:
        if iteration:
            part = min(iteration * PARTS // iters, PARTS - 1)
            peaks[part] = max(peaks[part], kib)
    return [peak / 1024 for peak in peaks]


def main() -> None:
    """Print a row of a Markdown table for each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[4_000, 32_000, 128_000])
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    print(f"| rows | file, MiB | Pss_Anon by fifths of {arguments.iters} iterations | peak, MiB |")
    print("| --- | --- | --- | --- |")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # Dictionaries would keep each of the thousand images once.
            kind = {"size_px": 32, "use_dictionary": False}
            write_rows(folder / "train.parquet", rows, **kind)
            write_rows(folder / "test.parquet", 200, **kind)
            size = (folder / "train.parquet").stat().st_size
            config = CONFIG.format(folder=folder, iters=arguments.iters, workers=arguments.workers)
            (folder / "config.yaml").write_text(config)
            resident, seen = watch(folder)
        parts = ", ".join(f"{part:.0f}" for part in curve(seen, arguments.iters))
        print(f"| {rows:,} | {size / 2**20:.0f} | {parts} | {resident / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Measure how the memory of training on a stream depends on the length of the data set.

Each case runs tools/train_net.py with `data.train.streaming: true`: a small ResNet trains for the
same number of iterations on a parquet file of another length. Reports the peak resident memory of
the main process (VmHWM), and Pss_Anon of the process and its workers (see memory.py) over time.

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
    """Train; return peak resident memory and samples of (iteration, Pss_Anon), in KiB."""
    command = [sys.executable, str(TRAIN), "--config-file", str(folder / "config.yaml")]
    metrics, resident, samples, iteration = folder / "run/metrics.jsonl", 0, [], 0
    log = (folder / "log.txt").open("w")
    with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            time.sleep(0.05)
            if metrics.exists() and (lines := metrics.read_text().splitlines()[:-1]):
                iteration = json.loads(lines[-1])["iteration"]
            samples.append((iteration, anonymous_kib(process.pid)))
            resident = max(resident, peak_resident_kib(process.pid))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(folder / 'log.txt').read_text()}")
    return resident, samples


def peak_resident_kib(process: int) -> int:
    """Return VmHWM of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s+(\d+)", status)
    return int(match[1]) if match else 0


def curve(samples: list[tuple[int, int]], iters: int) -> list[float]:
    """Return the peak in each fifth of the iterations, in MiB."""
    peaks = [0] * PARTS
    for iteration, kib in samples:
        if iteration:
            part = min(iteration * PARTS // iters, PARTS - 1)
            peaks[part] = max(peaks[part], kib)
    return [peak / 1024 for peak in peaks]


def main() -> None:
    """Print a Markdown table with a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[4_000, 32_000, 128_000])
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    print(f"| rows | file, MiB | Pss_Anon per fifth of {arguments.iters} iterations | peak, MiB |")
    print("| --- | --- | --- | --- |")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # Dictionary encoding would store each of the 1000 images only once.
            kind = {"size_px": 32, "use_dictionary": False}
            write_rows(folder / "train.parquet", rows, **kind)
            write_rows(folder / "test.parquet", 200, **kind)
            size = (folder / "train.parquet").stat().st_size
            config = CONFIG.format(folder=folder, iters=arguments.iters, workers=arguments.workers)
            (folder / "config.yaml").write_text(config)
            resident, samples = watch(folder)
        parts = ", ".join(f"{part:.0f}" for part in curve(samples, arguments.iters))
        print(f"| {rows:,} | {size / 2**20:.0f} | {parts} | {resident / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()

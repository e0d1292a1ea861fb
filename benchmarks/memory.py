"""Measure how peak anonymous memory depends on the length of a run and the size of the data.

Each case trains a small ResNet on a parquet file in a separate process. Memory is Pss_Anon of the
process and its workers: it counts shared pages once, and does not count files mapped by Arrow. A
dry run first builds the index of `datasets`; its peak depends on the file's row groups and not on
the size of the data.

    python benchmarks/memory.py
"""

import argparse
import io
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

CASES = {  # name: rows, iterations
    "short run, 2,000 rows": (2_000, 100),
    "10x the iterations": (2_000, 1_000),
    "10x the rows": (20_000, 100),
}
CONFIG = """
task: classification
output_dir: {folder}/run
model: {{backbone: {{name: cifar/resnet18, args: {{width: 8}}}}}}
data:
  train: {{source: huggingface, path: {folder}/train.parquet, split: train}}
  test: {{source: huggingface, path: {folder}/test.parquet, split: test}}
  transforms: {{size_px: 32, crop: pad, flip_prob: 0.5}}
  batch_size: 32
  num_workers: 2
solver: {{optimizer: sgd, lr: 0.01, max_iters: {iters}}}
"""


def write_parquet(path: Path, rows: int) -> None:
    """Write `rows` random 32 px images of ten classes."""
    import datasets
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)

    def png() -> dict[str, bytes]:
        stream = io.BytesIO()
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "png")
        return {"bytes": stream.getvalue()}

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    columns = {"img": [png() for _ in range(rows)], "label": [i % 10 for i in range(rows)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def anonymous_kib(process: int) -> int:
    """Return Pss_Anon of a process and its children, in KiB."""
    total = 0
    try:
        status = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += int(status.split("Pss_Anon:")[1].split()[0])
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += anonymous_kib(int(child))
    except (OSError, IndexError):
        return total
    return total


def measure(folder: Path, rows: int, iters: int) -> int:
    """Train in a separate process; return its peak in KiB."""
    write_parquet(folder / "train.parquet", rows)
    write_parquet(folder / "test.parquet", 200)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, iters=iters))
    tool = Path(__file__).parents[1] / "tools" / "train_net.py"
    command = [sys.executable, str(tool), "--config-file", str(config)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--dry-run"], check=True, **quiet)
    process = subprocess.Popen(command, **quiet)
    peak = 0
    done = threading.Event()
    while process.poll() is None:
        peak = max(peak, anonymous_kib(process.pid))
        done.wait(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return peak


def main() -> None:
    """Measure every case, and print its peak and the ratio to the first case."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    first = None
    for name, (rows, iters) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            peak = measure(Path(folder), rows, iters)
        first = first or peak
        print(f"{name:<24} {peak / 1024:8.0f} MiB   {peak / first:.3f}", flush=True)


if __name__ == "__main__":
    main()

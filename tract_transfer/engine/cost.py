"""What a run costs beside its time: the peak of its memory, and the energy of the machine."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

_SELF = Path("/proc/self")
_POWERCAP = Path("/sys/class/powercap")


class CostMeter:
    """Measures from its making to `read()`, in this process.

    Memory is the resident memory of this process at its highest, without its data workers, and
    what torch allocated on the GPU at its highest. Energy is that of whole packages and GPUs, with
    everything else that runs on them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resettable = _forget_peak_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._joules = _joules(device)
        self._started = time.perf_counter()

    def read(self, *, whole: bool) -> dict[str, Any]:
        """Return seconds, peak_memory_bytes and energy_joules, each by what it is of.

        Args:
            whole: whether the run began with this meter. The memory and the energy of a resumed
                run's last part are not those of the run, and are left out.

        Returns:
            `seconds`; `peak_memory_bytes` by "process" (Linux) and "gpu"; `energy_joules` by meter;
            None where they are left out or the machine has none that can be read.
        """
        memory = _peak_memory() if self._resettable else {}
        if self.device.type == "cuda":
            memory["gpu"] = torch.cuda.max_memory_allocated(self.device)
        now = _joules(self.device)
        spent = {
            name: joules - self._joules[name]
            for name, joules in now.items()
            if name in self._joules and joules >= self._joules[name]  # a counter may have wrapped
        }
        return {
            "seconds": time.perf_counter() - self._started,
            "peak_memory_bytes": memory or None if whole else None,
            "energy_joules": spent or None if whole else None,
        }


def _forget_peak_memory() -> bool:
    """Let the peak of resident memory begin anew (Linux); return whether it does."""
    try:
        (_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory() -> dict[str, int]:
    """Return {"process": the highest resident memory since the reset, in bytes}."""
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return {"process": int(line.split()[1]) * 1024}
    return {}


def _joules(device: torch.device) -> dict[str, float]:
    """Return the counters that can be read: packages of processors (RAPL), NVIDIA's GPUs."""
    found = {}
    for folder in sorted(_POWERCAP.glob("intel-rapl:[0-9]")):
        with contextlib.suppress(OSError, ValueError):  # most systems let root alone read it
            name = f"{(folder / 'name').read_text().strip()} {folder.name}"
            found[name] = int((folder / "energy_uj").read_text()) / 1e6
    if device.type == "cuda":
        found |= _gpu_joules(device)
    return found


def _gpu_joules(device: torch.device) -> dict[str, float]:
    try:
        import pynvml
    except ImportError:
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {uuid: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}
    except pynvml.NVMLError:  # not every GPU counts
        return {}

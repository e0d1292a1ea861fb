"""What a training counts between two lines of its log."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Meter:
    """Sums since the last log line, kept on the device until they are read."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def count(self, losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Count a step with the losses of its micro-batches; it waits for no device."""
        for name, loss in ((name, loss) for each in losses for name, loss in each.items()):
            value = loss.detach().double()
            total = self.losses.get(name)
            self.losses[name] = value if total is None else total + value
        self.steps += 1

"""The bridge to a step that was not finite: it is run again, watched."""

from pathlib import Path

from accelerate.utils import send_to_device

from tract_transfer.build import build_accelerator, build_trainer
from tract_transfer.build_data import build_data
from tract_transfer.config import Config, ProbeConfig
from tract_transfer.data.loader import Batch
from tract_transfer.engine.debug_batch import load_debug_batch, replay
from tract_transfer.engine.determinism import deterministic
from tract_transfer.engine.non_finite import images_of


def replay_debug_batch(config: Config, file: Path) -> list[str]:
    """Run the step in `file` with the weights it had; tell in lines where it is not finite.

    Raises:
        ConfigError: the config is a probe's, which trains nothing.
        FileNotFoundError: there is no such file.
        ValueError: it is no debug batch, or of another model than the config's.
    """
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains nothing, and keeps no batch to run again.")
    kept = load_debug_batch(file)
    with deterministic(config.engine.deterministic):
        trainer = build_trainer(config, build_data(config), build_accelerator(config))
        try:
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(kept.model)
        except RuntimeError as error:
            raise ValueError(
                f"{file} is of another model than this config's. Use the config.yaml beside it. "
                f"({error})"
            ) from error
        device = trainer.accelerator.device
        batches = [Batch(**send_to_device(each, device), skipped=[]) for each in kept.batches]
        return [
            f"Iteration {kept.iteration + 1}. {images_of([kept.about])}",
            *replay(trainer, kept, batches),
        ]

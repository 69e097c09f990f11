"""The weights of a run's best model as a safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fastvae._files import whole_file
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.config import read_config
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.trained import versions


def export_weights(folder: RunFolder, path: Path) -> None:
    """Write the best model's `state_dict` to `path`, whole or not at all.

    The file's metadata has the run's settings ("config", JSON), the best model's epoch and its validation bound in
    nats ("epoch", "validation_bound"), and the versions ("versions", JSON).

    Raises:
        RunError: there is no run, or it is damaged.
        FileError: the file cannot be written.
    """
    from safetensors.torch import save

    config, checkpoint = read_config(folder.config), read_checkpoint(folder)
    metadata = {
        "config": json.dumps(asdict(config)),
        "epoch": str(checkpoint["best_epoch"]),
        "validation_bound": str(checkpoint["best_bound"]),
        "versions": json.dumps(versions()),
    }
    content = save({name: tensor.contiguous() for name, tensor in checkpoint["best_model"].items()}, metadata)
    with whole_file(path) as file:
        file.write(content)

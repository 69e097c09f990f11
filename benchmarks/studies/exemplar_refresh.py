"""What it costs to train an exemplar prior with fewer exemplars encoded in a step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from . import digits

SAMPLES = 1000  # of the log-likelihood


def study() -> dict[str, Any]:
    """An exemplar prior trained with all 1,200 components encoded in each step, and with fewer."""
    data, rows = digits.load(), []
    ways: dict[str, dict[str, Any]] = {
        "all": {},
        "subset=300": {"subset": 300},
        "subset=60": {"subset": 60},
        "all, shared_variance": {"shared_variance": True},
        "subset=300, shared_variance": {"subset": 300, "shared_variance": True},
        "backward_components=100": {"backward_components": 100},
        "backward_components=30": {"backward_components": 30},
        "refresh=0.05": {"refresh": 0.05},
        "refresh=0.05, neighbours=2": {"refresh": 0.05, "neighbours": 2},
        "refresh=0.05, neighbours=5": {"refresh": 0.05, "neighbours": 5},
    }
    for name, options in ways.items():
        vae, encoded = digits.new_model(data, options), [0]
        vae.encoder.register_forward_pre_hook(_counter(encoded))
        seconds = digits.train(vae, data)
        log_likelihood = vae.eval().log_likelihood(data.validation, SAMPLES).double()
        steps = digits.EPOCHS * math.ceil(len(data.train) / digits.BATCH)
        rows.append(
            {
                "way": name,
                "log_likelihood": float(log_likelihood.mean()),
                "encoded_in_a_step": encoded[0] / steps - len(data.train) * digits.EPOCHS / steps,
                "seconds_per_epoch": seconds,
            }
        )
        print(rows[-1], flush=True)
    return {"rows": rows, "exemplars": len(data.train), "images": len(data.validation), "seeds": 1}


def _counter(total: list[int]) -> Any:
    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total[0] += len(inputs[0]) if module.training else 0

    return count

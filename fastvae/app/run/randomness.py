"""Where every random number of a run comes from."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What the random numbers are for; streams of one seed are independent of each other."""

    INITIALISE = 0
    TRAIN = 1
    VALIDATE = 2
    EVALUATE = 3
    PICTURES = 4


def reseed(seed: int, stream: Stream, step: int = 0) -> None:
    """Set torch's random number generators, on every device, for one step of one stream.

    Since each epoch begins so, its random numbers depend on the seed and the epoch's number alone, and a
    resumed run draws the same ones as a run that never stopped.
    """
    (state,) = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))

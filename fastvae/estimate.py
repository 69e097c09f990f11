"""What is estimated from draws."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A mean over draws, and its standard error; nats."""

    value: Tensor
    standard_error: Tensor

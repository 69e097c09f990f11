"""The backends: who computes an operation, on which device, at which precision.

`backend.py` says what a backend is, `registry.py` lists them and chooses one for a call, `choice.py` is where the
caller of a prior or a model says which.  A new backend is a module
here with one :class:`Backend` record, and a line in the registry: see docs/developers/adding-a-backend.md.
"""

from fastvae.backends.backend import Backend
from fastvae.backends.choice import BackendOptions, choose, use_backend
from fastvae.backends.info import info
from fastvae.backends.registry import BACKENDS, PRECISIONS

__all__ = ["BACKENDS", "PRECISIONS", "Backend", "BackendOptions", "choose", "info", "use_backend"]

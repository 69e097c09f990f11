"""DTensors as arguments: what each rank holds of them, and which group their placements speak of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Local(NamedTuple):
    """The arguments of a call as each rank's own tensors."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    log_weights: Tensor | None
    exclude: Tensor | None
    group: ProcessGroup | None
    rows: str
    like_z: Callable[[Tensor], Tensor]  # a result [..., or ..., D] as a DTensor where z is one


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor, without an import of the module, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def group_of(mu: object, group: ProcessGroup | None) -> ProcessGroup | None:
    """The group that a call speaks of, whether or not :func:`to_local` takes its arguments."""
    if not is_dtensor(mu):
        return group
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(mu, DTensor)
    return mu.device_mesh.get_group(mu.placements.index(Shard(0))) if Shard(0) in mu.placements else group


def to_local(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    group: ProcessGroup | None,
    rows: str,
) -> Local:
    """Each rank's own tensors.  Arguments that hold no DTensor are given back as they are.

    mu is Shard(0) on one dimension of its mesh, whose group it is, and Replicate on the others; so are log_weights, and
    logvar unless it is shared.  z may be Shard(0) on any dimension of the mesh; exclude is placed as z.

    Raises:
        TypeError: mu is no DTensor, or log_weights, while another argument is one.
        ValueError: a mesh or placement is another; there is a group as well.
    """
    if not any(map(is_dtensor, (z, mu, logvar, log_weights, exclude))):
        return Local(z, mu, logvar, log_weights, exclude, group, rows, lambda result: result)
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    if not isinstance(mu, DTensor) or (log_weights is not None and not isinstance(log_weights, DTensor)):
        raise TypeError("mu and log_weights must be DTensors if another argument is one; or give .to_local() of all")
    mesh, placements = mu.device_mesh, mu.placements
    if [p for p in placements if p != Replicate()] != [Shard(0)]:
        raise ValueError(
            f"mu must be Shard(0) on one dimension of its mesh and Replicate() on the others, not {placements}"
        )
    if group is not None:
        raise ValueError("group must be None where mu is a DTensor, whose mesh has the group")
    dim = placements.index(Shard(0))
    points = z.placements if isinstance(z, DTensor) else (Replicate(),) * mesh.ndim
    allowed = {"mu": [placements], "log_weights": [placements], "logvar": [placements, (Replicate(),) * mesh.ndim]}
    named = {"mu": mu, "logvar": logvar, "log_weights": log_weights, "z": z, "exclude": exclude}
    for name, value in named.items():
        if not isinstance(value, DTensor):
            continue
        if value.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of mu, {mesh}, not {value.device_mesh}")
        if name in allowed and value.placements not in allowed[name]:
            raise ValueError(f"{name} must be placed as mu, {placements}, not {value.placements}")
        if name not in allowed and (value.placements != points or not set(points) <= {Shard(0), Replicate()}):
            raise ValueError(f"{name} must be Shard(0) or Replicate(), z and exclude alike, not {value.placements}")
    if isinstance(z, DTensor):
        rows = "sharded" if points[dim] == Shard(0) else "replicated"

    def own(value: Tensor | None) -> Tensor | None:
        """A parameter's share.  Where the rows are sharded, each part of them gives a part of its gradient."""
        if not isinstance(value, DTensor):
            return value
        gradient: list[Placement] = [Partial() if p == Shard(0) else Replicate() for p in points]
        if value.placements[dim] == Shard(0):
            gradient[dim] = Shard(0)
        return value.redistribute(placements=value.placements).to_local(grad_placements=gradient)

    def like_z(result: Tensor) -> Tensor:
        if not isinstance(z, DTensor):
            return result
        shape = z.shape[: result.ndim]
        stride = [1] * len(shape)
        for i in range(len(shape) - 1, 0, -1):
            stride[i - 1] = stride[i] * shape[i]
        return DTensor.from_local(result, mesh, points, run_check=False, shape=shape, stride=tuple(stride))

    local_z = z.to_local(grad_placements=points) if isinstance(z, DTensor) else z
    local_exclude = exclude.to_local() if isinstance(exclude, DTensor) else exclude
    own_mu, own_logvar = own(mu), own(logvar)
    assert own_mu is not None and own_logvar is not None
    return Local(local_z, own_mu, own_logvar, own(log_weights), local_exclude, group_of(mu, None), rows, like_z)

# SPDX-License-Identifier: Apache-2.0
"""The device mesh and the two shardings in use."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from synister_jax.command import UserError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or these) along the axis `data`."""
    devices = jax.devices() if devices is None else devices
    # Auto, not Explicit: Linen's Dropout does not run under explicit axes.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and types of a tree's arrays, placed as `sharding` says."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
    )


def require_divisible(batch_size: int, mesh: Mesh) -> None:
    if batch_size % mesh.size:
        raise UserError(
            f"batch size {batch_size} is not divisible by {mesh.size} devices; "
            f"use {max(1, batch_size // mesh.size) * mesh.size} or fewer devices"
        )

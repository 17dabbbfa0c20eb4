# SPDX-License-Identifier: Apache-2.0
"""Processes, the device mesh, and the shardings in use.

Mesh axes: `model` are devices that share the dense head, `data` the groups of them.
Crops are split over all devices, so convolutions are data-parallel everywhere; the
matrices of the head, 99.8 % of VGG3D's parameters, are split over `model`.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from synister_jax.base.errors import UserError


def join_processes(coordinator: str, processes: int | None, index: int | None) -> None:
    """Makes this process one of several that train together; call it before JAX runs.

    Args:
      coordinator: host:port of process 0, or `auto` where the cluster says all three
        (Slurm, Open MPI, Cloud TPU).
    """
    mend = (
        "give host:port of process 0 with --processes and --process_index, the same "
        "command in every process"
    )
    if coordinator != "auto":
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator}: {mend}")
        if processes is None or index is None or index >= processes:
            raise UserError(
                f"--processes={processes} --process_index={index}: {mend}, from 0"
            )
        print(f"process {index} of {processes}: waiting for all", flush=True)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, index)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--coordinator={coordinator}: {error}; {mend}") from None


def make_mesh(
    devices: Sequence[jax.Device] | None = None, head_devices: int = 1
) -> Mesh:
    """All devices (or these), `head_devices` of them to a group that shares the head.

    Raises:
      UserError: the devices do not divide into such groups.
    """
    devices = jax.devices() if devices is None else devices
    if head_devices < 1 or len(devices) % head_devices:
        raise UserError(
            f"config.head_devices = {head_devices} does not divide the "
            f"{len(devices)} devices"
        )
    # Auto, not Explicit: Linen's Dropout does not run under explicit axes.
    return jax.make_mesh(
        (len(devices) // head_devices, head_devices),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "model")))


def head_input(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` alone: each group has its crops' features."""
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


def abstract_state(tree: Any, mesh: Mesh) -> Any:
    """As `abstract`; matrices split by columns over `model`, all else replicated.

    Moments and averages have the shape of what they belong to, hence its place.
    """
    groups = mesh.shape["model"]

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        splits = leaf.ndim == 2 and leaf.shape[1] % groups == 0
        spec = PartitionSpec(None, "model") if splits else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def shardings(abstract_tree: Any) -> Any:
    """Where the arrays of an abstract tree are to lie."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_tree)


def local_places(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Places in the global batch, ascending, that this process must provide."""
    places = np.arange(batch_size)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([places[s] for s in slices]))


def require_divisible(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises `UserError` unless every device gets as many crops, in every part."""
    if batch_size % (mesh.size * accumulate_steps):
        parts = f" × {accumulate_steps} parts" if accumulate_steps > 1 else ""
        unit = mesh.size * accumulate_steps
        raise UserError(
            f"batch size {batch_size} is not divisible by {mesh.size} devices{parts}; "
            f"make it {max(1, batch_size // unit) * unit}, or take fewer devices"
        )

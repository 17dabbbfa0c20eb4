# SPDX-License-Identifier: Apache-2.0
"""Defines how arrays are split over processes and devices.

The device mesh has two axes. The devices along the axis `model` share one dense head.
The axis `data` counts these groups of devices. The crops of a batch are split over all
devices, so every device computes the convolutions of its own crops. The matrices of the
head hold 99.8 % of VGG3D's parameters; they are split over `model`.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from synister_jax.base.errors import UserError


def join_processes(coordinator: str, processes: int | None, index: int | None) -> None:
    """Joins this process to the others that train together; call it before JAX runs.

    Args:
      coordinator: host:port of process 0, or `auto` on a cluster that tells JAX all
        three values (Slurm, Open MPI, Cloud TPU).
      processes: number of all processes; ignored with `auto`.
      index: number of this process, from 0; ignored with `auto`.

    Raises:
      UserError: the three values do not fit together, or the processes cannot connect.
    """
    mend = (
        "give host:port of process 0 together with --processes and --process_index; "
        "start every process with the same command, except for its --process_index"
    )
    if coordinator != "auto":
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator}: {mend}")
        if processes is None or index is None or index >= processes:
            raise UserError(
                f"--processes={processes} --process_index={index}: {mend}, which "
                "counts from 0"
            )
        print(f"process {index} of {processes}: waiting for all processes", flush=True)
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
    """Returns the device mesh, with the axes `data` and `model`.

    Args:
      devices: the devices to use; None uses all of them.
      head_devices: how many devices share one dense head (the length of `model`).

    Raises:
      UserError: `head_devices` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if head_devices < 1 or len(devices) % head_devices:
        raise UserError(
            f"config.head_devices = {head_devices} does not divide the "
            f"{len(devices)} devices; choose a divisor of this number"
        )
    # The axes are Auto, because Linen's Dropout does not run under Explicit axes.
    return jax.make_mesh(
        (len(devices) // head_devices, head_devices),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "model")))


def head_input(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over `data` only.

    Every device of a group then has the features of all crops of the group.
    """
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Returns the shapes and dtypes of a tree's arrays, all with this sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
    )


def abstract_state(tree: Any, mesh: Mesh) -> Any:
    """Returns the shapes, dtypes and shardings of the arrays of a training state.

    Matrices are split by columns over `model`, if the length of `model` divides the
    number of columns. All other arrays are replicated. The optimiser's moments and the
    averages have the shape of their parameter, so they get the same sharding.
    """
    groups = mesh.shape["model"]

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        splits = leaf.ndim == 2 and leaf.shape[1] % groups == 0
        spec = PartitionSpec(None, "model") if splits else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def shardings(abstract_tree: Any) -> Any:
    """Returns the shardings of the arrays of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_tree)


def local_places(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns the places in the global batch that this process must read, ascending."""
    places = np.arange(batch_size)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([places[s] for s in slices]))


def require_divisible(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises `UserError` unless every device gets equally many crops.

    Args:
      batch_size: crops of a batch, over all devices.
      accumulate_steps: number of parts into which the batch is divided; the devices
        must get equally many crops in every part.
    """
    if batch_size % (mesh.size * accumulate_steps):
        parts = f" × {accumulate_steps} parts" if accumulate_steps > 1 else ""
        unit = mesh.size * accumulate_steps
        raise UserError(
            f"batch size {batch_size} is not divisible by {mesh.size} devices{parts}; "
            f"make it {max(1, batch_size // unit) * unit}, or use fewer devices"
        )

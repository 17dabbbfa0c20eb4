# SPDX-License-Identifier: Apache-2.0
"""Reads the voxel size and the offset in nm from the metadata of N5 and Zarr arrays."""

from collections.abc import Sequence
from typing import Any

from synister_jax.base.errors import UserError

_NM_PER_UNIT = {
    "angstrom": 0.1,
    "nm": 1.0,
    "nanometer": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "micrometer": 1e3,
}

Triple = tuple[float, ...]


def physical_nm(
    driver: str, metadata: dict[str, Any], axes_zyx: Sequence[int], uri: str
) -> tuple[Triple | None, Triple]:
    """Returns (voxel size, offset) in nm, each as (z, y, x).

    The voxel size is None if the metadata does not state it. The function looks for
    these conventions, in this order:

    - `resolution`, `offset` and `units` (funlib, daisy)
    - `pixelResolution` with `downsamplingFactors` (n5-viewer)
    - `multiscales` of the group that holds the array (OME-Zarr 0.4 and 0.5)

    Args:
      driver: the driver of TensorStore, such as "n5".
      metadata: the metadata of the array. For Zarr it also has the keys `attributes`,
        `name` and `parent`.
      axes_zyx: the places of z, y and x among the axes of the array on disk.
      uri: the address of the volume, for messages.

    Raises:
      UserError: the metadata follows one of the conventions but cannot be understood.
    """
    attributes = metadata if driver == "n5" else metadata.get("attributes", {})
    parent = metadata.get("parent", {})
    multiscales = parent.get("ome", parent).get("multiscales")
    try:
        if "resolution" in attributes:
            units = attributes.get("units", ["nm"] * 3)
            size, offset = attributes["resolution"], attributes.get("offset", (0,) * 3)
        elif "pixelResolution" in attributes:
            pixel = attributes["pixelResolution"]
            if isinstance(pixel, dict):
                size, units = pixel["dimensions"], [pixel.get("unit", "nm")] * 3
            else:
                size, units = pixel, ["nm"] * 3
            factors = attributes.get("downsamplingFactors", (1, 1, 1))
            size = [s * f for s, f in zip(size, factors, strict=True)]
            offset = attributes.get("offset", (0, 0, 0))
        elif multiscales:
            size, offset, units = _multiscale(multiscales[0], metadata["name"])
        else:
            units, size = ["nm"] * 3, None
            offset = attributes.get("offset", (0, 0, 0))
        nm = [_NM_PER_UNIT[unit] for unit in units]
        offset_nm = _turned(offset, nm, axes_zyx)
        return None if size is None else _turned(size, nm, axes_zyx), offset_nm
    except (AttributeError, KeyError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"volume {uri}: cannot understand its voxel size, offset or units "
            f"({error!r}); correct the metadata of the container"
        ) from None


def _turned(values: Sequence[float], nm: list[float], axes: Sequence[int]) -> Triple:
    if len(values) != 3 or len(nm) != 3:
        raise ValueError(f"{len(values)} values, {len(nm)} units for three axes")
    return tuple(float(values[axis]) * nm[axis] for axis in axes)


def _multiscale(
    multiscale: dict[str, Any], name: str
) -> tuple[list[float], list[float], list[str]]:
    [dataset] = [d for d in multiscale["datasets"] if d["path"].strip("/") == name]
    units = [axis.get("unit", "nanometer") for axis in multiscale["axes"]]
    size, offset = [1.0] * len(units), [0.0] * len(units)
    steps = dataset["coordinateTransformations"]
    for step in [*steps, *multiscale.get("coordinateTransformations", [])]:
        if step["type"] == "scale":
            size = [s * f for s, f in zip(size, step["scale"], strict=True)]
            offset = [o * f for o, f in zip(offset, step["scale"], strict=True)]
        else:
            moved = zip(offset, step["translation"], strict=True)
            offset = [o + t for o, t in moved]
    return size, offset, units

# SPDX-License-Identifier: Apache-2.0
"""Converts coordinates of the sources to nm in the volume frame."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from synister_jax.base.errors import UserError

if TYPE_CHECKING:  # only the type is needed here
    from synister_jax.em.volumes import Volume


@dataclasses.dataclass(frozen=True)
class Space:
    """A coordinate space of a source, and how it becomes nm in a volume frame.

    Axis a of the volume (z, y, x) takes the source's coordinate `order_zyx[a]`. If
    `flip_zyx[a]` is true, the coordinate is replaced by (length of the axis in voxels -
    1 - coordinate). Then nm = coordinate · `scale_nm_zyx[a]` + `offset_nm_zyx[a]`.
    """

    frame: str  # the volume whose frame the result is in
    scale_nm_zyx: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset_nm_zyx: tuple[float, ...] = (0.0, 0.0, 0.0)
    order_zyx: tuple[str, ...] = ("z", "y", "x")
    flip_zyx: tuple[bool, ...] = (False, False, False)
    # Whether the fraction of a coordinate is cut off first.
    whole_voxels: bool = False


# The sources of these numbers are funkelab/synistereq (repositories) and
# funkelab/synister_data (NOTES.md, consolidate), and for BANC htem/synister_banc.
SPACES: Mapping[str, Space] = {
    "volume": Space("the volume"),
    # CATMAID's FAFB v14 and the N5 container differ by one section (40 nm).
    "fafb-catmaid": Space("FAFB v14 N5", offset_nm_zyx=(-40.0, 0.0, 0.0)),
    "hemibrain-neuprint": Space(
        "hemibrain export N5",
        scale_nm_zyx=(8.0, 8.0, 8.0),
        order_zyx=("x", "z", "y"),
        flip_zyx=(True, False, False),
    ),
    "malevnc-neuprint": Space("male VNC export N5", scale_nm_zyx=(8.0, 8.0, 8.0)),
    "banc": Space("BANC", scale_nm_zyx=(45.0, 4.0, 4.0), whole_voxels=True),
}


def to_volume(
    space: Space,
    coordinates: Mapping[str, np.ndarray],
    shape_zyx: Sequence[int] | None = None,
) -> np.ndarray:
    """Returns positions in nm in the volume frame, [n, 3] float64 as (z, y, x).

    Args:
      space: the space of the coordinates.
      coordinates: `x`, `y` and `z` as the source gives them, each [n] float64.
      shape_zyx: the shape of the volume in voxels. It is needed if an axis is flipped.

    Raises:
      UserError: an axis is flipped and the shape is not given.
    """
    result = []
    for axis, name in enumerate(space.order_zyx):
        values = np.asarray(coordinates[name], np.float64)
        if space.whole_voxels:
            values = np.trunc(values)
        if space.flip_zyx[axis]:
            if shape_zyx is None:
                raise UserError(
                    f"coordinates of {space.frame} count from the far end of an axis: "
                    "give the volume with --volume=URI"
                )
            values = shape_zyx[axis] - 1 - values
        result.append(values * space.scale_nm_zyx[axis] + space.offset_nm_zyx[axis])
    return np.stack(result, axis=1)


def describe(space: Space, shape_zyx: Sequence[int] | None) -> dict[str, Any]:
    """Returns what `to_volume` does with these arguments, for a table's metadata."""
    record = dataclasses.asdict(space)
    if any(space.flip_zyx):
        assert shape_zyx is not None  # `to_volume` needs the shape to flip
        record["shape_zyx"] = [int(size) for size in shape_zyx]
    return record


def crop_starts_vx_zyx(
    positions_nm_zyx: np.ndarray,
    crop_shape_zyx: Sequence[int],
    voxel_size_nm_zyx: Sequence[float],
    offset_nm_zyx: Sequence[float] = (0, 0, 0),
) -> np.ndarray:
    """Returns the first voxel of the crop around each position, [n, 3] int64.

    This is the rule of the original: `rint((position - size//2 * voxel) / voxel)`. Here
    rint rounds halves to even, and the position is relative to the offset of the
    volume. If the size is even, the synapse is at index size/2 of the crop.

    Args:
      positions_nm_zyx: [n, 3] in nm.
      crop_shape_zyx: the size of a crop in voxels.
      voxel_size_nm_zyx: the voxel size in nm.
      offset_nm_zyx: the position of voxel (0, 0, 0) in nm.
    """
    voxel = np.asarray(voxel_size_nm_zyx)
    half = np.asarray(crop_shape_zyx) // 2 * voxel
    corner_nm = positions_nm_zyx - np.asarray(offset_nm_zyx) - half
    return np.rint(corner_nm / voxel).astype(np.int64)


def outside(positions_nm_zyx: np.ndarray, volume: "Volume") -> np.ndarray:
    """Returns which positions are outside the volume, [n] bool. NaN is outside."""
    voxel = np.asarray(volume.voxel_size_nm_zyx)
    index = np.rint((positions_nm_zyx - volume.offset_nm_zyx) / voxel)
    return ~((index >= 0) & (index < volume.shape_zyx)).all(axis=1)


def doubt(
    positions_nm_zyx: np.ndarray, volume: "Volume", least_share: float = 0.5
) -> str | None:
    """Returns what seems wrong with the unit or the order of the axes, or None.

    The function tries three simple changes of the positions that are outside the
    volume. It names the first change that moves at least 90 % of them into the volume.

    If more than half of all positions are outside, the function tries the changes on
    all positions outside. Otherwise it tries them only on the positions that are
    further away than a length of the volume. If these are at most `least_share` of all
    positions, it returns None.

    Args:
      positions_nm_zyx: [n, 3] in nm. Positions that are not finite are ignored.
      volume: the volume that the positions should be in.
      least_share: a fraction between 0 and 1.
    """
    positions, lost = _lost(positions_nm_zyx, volume)
    if len(lost) * 2 <= len(positions):
        length_nm = np.multiply(volume.shape_zyx, volume.voxel_size_nm_zyx)
        lengths = (lost - volume.offset_nm_zyx) / length_nm
        lost = lost[(np.abs(lengths - 0.5) > 1.5).any(axis=1)]
        if len(lost) <= least_share * len(positions):
            return None
    voxel = np.asarray(volume.voxel_size_nm_zyx)
    guesses = {
        "they look like x, y, z in place of z, y, x": lost[:, ::-1],
        "they look like nm multiplied by the voxel size once more": lost / voxel,
        "they look like thousandths of nm": lost / 1000,
    }
    for guess, changed in guesses.items():
        if outside(changed, volume).mean() <= 0.1:
            return (
                f"{len(lost):,} of {len(positions):,} positions lie outside volume "
                f"{volume.uri} (shape {volume.shape_zyx}, voxels of "
                f"{volume.voxel_size_nm_zyx} nm); {guess}"
            )
    return None


def look_like_voxels(positions_nm_zyx: np.ndarray, volume: "Volume") -> bool:
    """Returns whether the positions seem to be voxel indices instead of nm.

    This is true if there are at least 100 finite positions, and all would be possible
    voxel indices. It is always false if the voxels are 3 nm or smaller along an axis.
    With larger voxels, the positions that are possible indices fill a corner of at most
    1/27 of the volume.
    """
    positions, _ = _lost(positions_nm_zyx, volume)
    corner = positions - volume.offset_nm_zyx < volume.shape_zyx
    coarse = np.greater(volume.voxel_size_nm_zyx, 3).all()
    return bool(len(positions) >= 100 and coarse and corner.all())


def _lost(
    positions_nm_zyx: np.ndarray, volume: "Volume"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the finite positions, and the finite positions outside the volume."""
    positions = positions_nm_zyx[np.isfinite(positions_nm_zyx).all(axis=1)]
    return positions, positions[outside(positions, volume)]

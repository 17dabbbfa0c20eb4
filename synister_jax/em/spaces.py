# SPDX-License-Identifier: Apache-2.0
"""Coordinate spaces of the sources, and how they become nm in a volume's frame."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from synister_jax.base.errors import UserError

if TYPE_CHECKING:  # what a table needs of a volume, without opening one
    from synister_jax.em.volumes import Volume


@dataclasses.dataclass(frozen=True)
class Space:
    """What to do to coordinates of a source, axis by axis of the volume (z, y, x).

    Axis a of the volume takes the source's coordinate `order_zyx[a]`; where
    `flip_zyx[a]`, it counts from the far end (length in voxels - 1 - coordinate); then
    nm = coordinate · `scale_nm_zyx[a]` + `offset_nm_zyx[a]`.
    """

    frame: str  # the volume that the result belongs to
    scale_nm_zyx: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset_nm_zyx: tuple[float, ...] = (0.0, 0.0, 0.0)
    order_zyx: tuple[str, ...] = ("z", "y", "x")
    flip_zyx: tuple[bool, ...] = (False, False, False)
    # Fractions of a voxel are cut off before anything else.
    whole_voxels: bool = False


# funkelab/synistereq (repositories) and funkelab/synister_data (NOTES.md, consolidate)
# say how each service's coordinates reach the containers; htem/synister_banc for BANC.
SPACES: Mapping[str, Space] = {
    "volume": Space("the volume"),
    # One section lies between CATMAID's FAFB v14 and the N5 container.
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
    """Positions in nm in the volume's frame, [n, 3] float64 as (z, y, x).

    Args:
      coordinates: `x`, `y`, `z`, [n] float64 each, as the source gives them.
      shape_zyx: of the volume in voxels; needed where an axis is flipped.

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
    """What `to_volume` did, for a table's metadata."""
    record = dataclasses.asdict(space)
    if any(space.flip_zyx):
        assert shape_zyx is not None  # `to_volume` refuses to flip without it
        record["shape_zyx"] = [int(size) for size in shape_zyx]
    return record


def crop_starts_vx_zyx(
    positions_nm_zyx: np.ndarray,
    crop_shape_zyx: Sequence[int],
    voxel_size_nm_zyx: Sequence[float],
    offset_nm_zyx: Sequence[float] = (0, 0, 0),
) -> np.ndarray:
    """First voxel of each crop, [n, 3] int64, for positions [n, 3] in nm.

    The original's rule: `rint((position - size//2 * voxel) / voxel)`, half to even,
    in the container's frame; for even sizes the synapse lies at index size/2.
    """
    voxel = np.asarray(voxel_size_nm_zyx)
    half = np.asarray(crop_shape_zyx) // 2 * voxel
    corner_nm = positions_nm_zyx - np.asarray(offset_nm_zyx) - half
    return np.rint(corner_nm / voxel).astype(np.int64)


def outside(positions_nm_zyx: np.ndarray, volume: "Volume") -> np.ndarray:
    """[n] bool: positions that lie in no voxel of the volume (NaN: True)."""
    voxel = np.asarray(volume.voxel_size_nm_zyx)
    index = np.rint((positions_nm_zyx - volume.offset_nm_zyx) / voxel)
    return ~((index >= 0) & (index < volume.shape_zyx)).all(axis=1)


def doubt(
    positions_nm_zyx: np.ndarray, volume: "Volume", least_share: float = 0.5
) -> str | None:
    """What seems wrong with the unit or the order of positions in a volume, or None.

    A guess is made where one simple change puts nine tenths of the positions inside
    that lie outside. Where these are less than half, only those count that lie outside
    by the volume's length and more (others are neighbours of it), and they must be more
    than `least_share` of all.
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
    """All of 100 or more positions lie where their voxel indices would.

    Only told of volumes whose voxels are larger than 3 nm on every axis: there that
    corner is a twenty-seventh of the volume or less.
    """
    positions, _ = _lost(positions_nm_zyx, volume)
    corner = positions - volume.offset_nm_zyx < volume.shape_zyx
    coarse = np.greater(volume.voxel_size_nm_zyx, 3).all()
    return bool(len(positions) >= 100 and coarse and corner.all())


def _lost(
    positions_nm_zyx: np.ndarray, volume: "Volume"
) -> tuple[np.ndarray, np.ndarray]:
    """(finite positions, those of them outside)."""
    positions = positions_nm_zyx[np.isfinite(positions_nm_zyx).all(axis=1)]
    return positions, positions[outside(positions, volume)]

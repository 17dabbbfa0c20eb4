# SPDX-License-Identifier: Apache-2.0
"""The published geometric chain as one resampling: where each voxel comes from.

The original (gunpowder's ElasticAugment over funkey/augment) adds to every voxel's
position the displacement of an elastic grid, of a rotation in the section plane about
the crop's middle, and of its section's misalignment, and interpolates linearly.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

# Two truncations that the original does not have bound the context a crop needs.
# Displacements of control points are normal within 3 σ (0.3 % of draws lie beyond);
# shifts of sections add up to at most twice the largest single one (0.5 % of the
# published crops have a section beyond, counted in 400,000 draws).
SIGMAS = 3.0
MISALIGN_STEPS = 2


def control_shape_zyx(
    crop_shape_zyx: Sequence[int], spacing_zyx: Sequence[float]
) -> tuple[int, ...]:
    """Number of control points; they span the crop from its first voxel to its last."""
    return tuple(
        max(1, round(size / spacing))
        for size, spacing in zip(crop_shape_zyx, spacing_zyx, strict=True)
    )


@functools.cache
def upsampling(size: int, points: int, subsample: int) -> np.ndarray:
    """[size, points] float32: displacement at each voxel from those of control points.

    As the original: a cubic spline to every `subsample`-th voxel, linear between them;
    first and last control point sit on the first and last voxel.
    """
    coarse = max(1, int(size / subsample))
    cubic = _zoom(np.eye(points), coarse, order=3)
    return _zoom(cubic, size, order=1).astype(np.float32)


def _zoom(values: np.ndarray, size: int, order: int) -> np.ndarray:
    factors = (size / len(values), 1)
    # `mirror` is the boundary of the spline's prefilter; no sample lies outside.
    return ndimage.zoom(values, factors, order=order, mode="mirror")


@functools.cache
def reach_zyx(
    crop_shape_zyx: tuple[int, ...],
    *,
    jitter_zyx: tuple[int, ...],
    elastic_spacing_zyx: tuple[float, ...],
    elastic_sigma_zyx: tuple[float, ...],
    elastic_subsample: int,
    rotation: tuple[float, float],
    max_misalign_yx: tuple[int, ...],
) -> tuple[int, ...]:
    """Voxels beyond either side of the crop from which a voxel can come.

    Sizes in voxels; arguments as in `augment.Settings`.
    """
    points = control_shape_zyx(crop_shape_zyx, elastic_spacing_zyx)
    # Splines overshoot: at each voxel the worst signs of all control points.
    bend = [
        np.abs(upsampling(size, n, elastic_subsample)).sum(axis=1)
        for size, n in zip(crop_shape_zyx, points, strict=True)
    ]
    bend_z = SIGMAS * bend[0] * bend[1].max() * bend[2].max()
    bend_yx = SIGMAS * bend[0].max() * np.outer(bend[1], bend[2])
    half = [(size - 1) / 2 for size in crop_shape_zyx]
    z = np.mgrid[-half[0] : half[0] + 0.5]
    y, x = np.mgrid[-half[1] : half[1] + 0.5, -half[2] : half[2] + 0.5]
    furthest = [(np.abs(z) + elastic_sigma_zyx[0] * bend_z).max(), 0.0, 0.0]
    for angle in np.linspace(*rotation, 361):
        sine, cosine = math.sin(angle), math.cos(angle)
        for axis, turned in ((1, cosine * y + sine * x), (2, cosine * x - sine * y)):
            reached = (np.abs(turned) + elastic_sigma_zyx[axis] * bend_yx).max()
            furthest[axis] = max(furthest[axis], reached)
    misalign = (0, *(MISALIGN_STEPS * most for most in max_misalign_yx))
    reach = [
        furthest[axis] - half[axis] + jitter_zyx[axis] + misalign[axis]
        for axis in range(3)
    ]
    # Angles are sampled and positions are float32; both err by less than the slack.
    slack = 0.02
    return tuple(
        math.ceil(r + slack) if r > j + 1e-6 else j
        for r, j in zip(reach, jitter_zyx, strict=True)
    )


def source_vx_zyx(
    control: jax.Array,
    angle: jax.Array,
    offset_yx: jax.Array,
    crop_shape_zyx: Sequence[int],
    subsample: int,
) -> jax.Array:
    """Where each voxel of the crop comes from, relative to the crop's middle.

    Args:
      control: displacements of control points, [3, *control_shape_zyx] voxels.
      angle: of the rotation in the section plane, radians.
      offset_yx: of each section, [z, 2] voxels.

    Returns:
      [3, *crop_shape_zyx] float32.
    """
    up = [
        jnp.asarray(upsampling(size, points, subsample))
        for size, points in zip(crop_shape_zyx, control.shape[1:], strict=True)
    ]
    elastic = jnp.einsum("dabc,za,yb,xc->dzyx", control, *up, precision="highest")
    z, y, x = jnp.meshgrid(
        *(jnp.arange(size) - (size - 1) / 2 for size in crop_shape_zyx),
        indexing="ij",
    )
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    turned = jnp.stack([z, cosine * y + sine * x, cosine * x - sine * y])
    misaligned = jnp.stack([jnp.zeros_like(offset_yx[:, 0]), *offset_yx.T])
    return turned + elastic + misaligned[:, :, None, None]


def resample(record: jax.Array, source: jax.Array, whole_sections: bool) -> jax.Array:
    """Linear interpolation of uint8 [z, y, x] at `source` → float32 in 0…255.

    Args:
      source: [3, ...] voxels, within the record (`reach_zyx` says how large it must
        be; what lies outside would be the nearest border).
      whole_sections: the positions along z are whole numbers: then four voxels make
        one, else eight.
    """
    shape = record.shape
    flat = record.ravel()
    low = jnp.floor(source).astype(jnp.int32)
    weight = source - low
    steps = [
        (
            jnp.clip(low[d], 0, shape[d] - 1) * stride,
            jnp.clip(low[d] + 1, 0, shape[d] - 1) * stride,
        )
        for d, stride in enumerate((shape[1] * shape[2], shape[2], 1))
    ]

    def along(axis: int, index: jax.Array | int) -> jax.Array:
        if axis == 3:
            return flat[index].astype(jnp.float32)
        first, second = steps[axis]
        before = along(axis + 1, index + first)
        if axis == 0 and whole_sections:
            return before
        return before + weight[axis] * (along(axis + 1, index + second) - before)

    return along(0, 0)

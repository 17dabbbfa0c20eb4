# SPDX-License-Identifier: Apache-2.0
"""The published geometric augmentation, as one resampling.

This module computes from where in the record each voxel of a crop comes. The original
(gunpowder's ElasticAugment, with funkey/augment) adds three displacements to the
position of every voxel: of an elastic grid, of a rotation in the section plane about
the middle of the crop, and of the misalignment of its section. Then it interpolates
linearly. So does this module.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Two limits, which the original does not have, bound the context that a crop needs. A
# control point moves by at most 3 σ (0.3 % of the draws lie beyond). The shifts of
# sections add up to at most twice the largest single shift (0.5 % of the published
# crops have a section beyond, counted in 400,000 draws).
SIGMAS = 3.0
MISALIGN_STEPS = 2


def control_shape_zyx(
    crop_shape_zyx: Sequence[int], spacing_zyx: Sequence[float]
) -> tuple[int, ...]:
    """Returns the number of control points, [3].

    They span the crop from its first voxel to its last.
    """
    return tuple(
        max(1, round(size / spacing))
        for size, spacing in zip(crop_shape_zyx, spacing_zyx, strict=True)
    )


@functools.cache
def upsampling(size: int, points: int, subsample: int) -> np.ndarray:
    """Returns the weights of the control points at each voxel, float32 [size, points].

    As in the original, a cubic spline gives the displacement at every `subsample`-th
    voxel, and it is linear between them. The first and the last control point are on
    the first and the last voxel.
    """
    coarse = max(1, int(size / subsample))
    cubic = _zoom(np.eye(points), coarse, order=3)
    return _zoom(cubic, size, order=1).astype(np.float32)


def _zoom(values: np.ndarray, size: int, order: int) -> np.ndarray:
    factors = (size / len(values), 1)
    from scipy import ndimage  # takes half a second to import, and is needed once

    # `mirror` is the boundary of the spline's prefilter. No sample lies outside.
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
    """Returns how many voxels beyond the crop a voxel can come from, [3].

    All sizes are in voxels. The arguments are those of `augment.AugmentSettings`.
    """
    points = control_shape_zyx(crop_shape_zyx, elastic_spacing_zyx)
    # Splines overshoot, so each voxel takes the worst signs of all control points.
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
    # Angles are sampled and positions are float32. The slack covers both errors.
    slack = 0.02
    return tuple(
        math.ceil(r + slack) if r > j + 1e-6 else j
        for r, j in zip(reach, jitter_zyx, strict=True)
    )


class Field(NamedTuple):
    """From where the voxels of a crop come, as small arrays along its axes.

    The position of a voxel is a sum: one summand from each axis, and the displacement
    of every control point times the product of its weights along the three axes.
    """

    control: jax.Array  # displacements of the control points, [3, *points] voxels
    weights: tuple[jax.Array, ...]  # for each axis, [size, points]
    added: tuple[jax.Array, ...]  # for each axis, [size, 3] voxels

    def mirrored(self, mirror: jax.Array) -> "Field":
        """Returns the field of the crop mirrored along axes, `mirror` bool [3]."""

        def turned(along: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            pairs = zip(mirror, along, strict=True)
            return tuple(jnp.where(turn, rows[::-1], rows) for turn, rows in pairs)

        return Field(self.control, turned(self.weights), turned(self.added))

    def transposed(self, permutation: jax.Array, axes: Sequence[int]) -> "Field":
        """Returns the field of the crop with its `axes` permuted.

        Args:
          permutation: the number of the order in `itertools.permutations(axes)`, int32.
          axes: the axes, which must have equal length.
        """
        # All orders need the same shapes, so control points that do not move are added.
        points = self.control.shape[1:]
        most = max((points[axis] for axis in axes), default=0)
        more = [(0, most - n if axis in axes else 0) for axis, n in enumerate(points)]
        control = jnp.pad(self.control, [(0, 0), *more])
        weights = [
            jnp.pad(w, [(0, 0), n]) for w, n in zip(self.weights, more, strict=True)
        ]

        def ordered(order: Sequence[int]) -> Field:
            return Field(
                control.transpose(0, *(1 + axis for axis in order)),
                tuple(weights[axis] for axis in order),
                tuple(self.added[axis] for axis in order),
            )

        branches = []
        for shuffled in itertools.permutations(axes):
            order = [0, 1, 2]
            for axis, new in zip(axes, shuffled, strict=True):
                order[axis] = new
            branches.append(functools.partial(ordered, order))
        return jax.lax.switch(permutation, branches)

    def source_vx_zyx(self, whole_sections: bool) -> list[jax.Array]:
        """Returns the positions of all voxels along z, y and x, float32 [*crop] each.

        Args:
          whole_sections: whether no control point moves along z.
        """
        unbent = int(whole_sections)
        elastic = jnp.einsum(
            "dabc,za,yb,xc->dzyx",
            self.control[unbent:],
            *self.weights,
            precision="highest",
        )
        source = []
        for axis in range(3):
            first, second, third = (rows[:, axis] for rows in self.added)
            position = second[:, None] + third
            if axis >= unbent:
                position = position + elastic[axis - unbent]
            # The middle is the largest number. Added last, it costs the least
            # precision.
            source.append(position + first[:, None, None])
        return source


def field(
    control: jax.Array,
    angle: jax.Array,
    offset_yx: jax.Array,
    middle_zyx: jax.Array,
    crop_shape_zyx: Sequence[int],
    subsample: int,
) -> Field:
    """Returns the field of an elastic warp, a rotation and misaligned sections.

    Args:
      control: the displacements of the control points, [3, *control_shape_zyx] voxels.
      angle: the angle of the rotation in the section plane, in radians.
      offset_yx: the displacement of each section, [z, 2] voxels.
      middle_zyx: the position from which the middle of the crop comes, in voxels.
      crop_shape_zyx: the voxels of the crop.
      subsample: see `upsampling`.
    """
    weights = tuple(
        jnp.asarray(upsampling(size, points, subsample))
        for size, points in zip(crop_shape_zyx, control.shape[1:], strict=True)
    )
    z, y, x = (jnp.arange(size)[:, None] - (size - 1) / 2 for size in crop_shape_zyx)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    added = (
        jnp.concatenate([z, offset_yx], axis=1) + middle_zyx,
        y * jnp.stack([jnp.zeros_like(angle), cosine, -sine]),
        x * jnp.stack([jnp.zeros_like(angle), sine, cosine]),
    )
    return Field(control, weights, added)


def resample(
    record: jax.Array, source: Sequence[jax.Array], whole_sections: bool
) -> jax.Array:
    """Interpolates a record linearly at the positions `source`.

    Args:
      record: uint8 [z, y, x].
      source: the positions along z, y and x in voxels, float32 [*crop] each.
        `reach_zyx` says how large the record must be. A position outside takes the
        nearest border.
      whole_sections: whether the positions along z are whole numbers. Then four voxels
        make one, otherwise eight.

    Returns:
      float32 [*crop] from 0 to 255.
    """
    flat = record.ravel()
    index: Any = 0  # becomes an array
    weight, steps = [], []
    for axis, size in enumerate(record.shape):
        stride = math.prod(record.shape[axis + 1 :])
        interpolated = size > 1 and not (axis == 0 and whole_sections)
        position = jnp.clip(source[axis], 0, size - 1)
        # The last voxel is the next of the voxel before it, with all the weight.
        low = jnp.minimum(position.astype(jnp.int32), size - 1 - interpolated)
        index += low * stride
        weight.append(position - low)
        steps.append(stride if interpolated else 0)

    def along(axis: int, index: jax.Array) -> jax.Array:
        if axis == 3:
            voxel = flat.at[index].get(
                mode="promise_in_bounds", wrap_negative_indices=False
            )
            return voxel.astype(jnp.float32)
        before = along(axis + 1, index)
        if not steps[axis]:
            return before
        after = along(axis + 1, index + steps[axis])
        return before + weight[axis] * (after - before)

    return along(0, index)

# SPDX-License-Identifier: Apache-2.0
"""The published geometric chain as one resampling: where each voxel comes from.

The original (gunpowder's ElasticAugment over funkey/augment) adds to every voxel's
position the displacement of an elastic grid, of a rotation in the section plane about
the crop's middle, and of its section's misalignment, and interpolates linearly.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    from scipy import ndimage  # half a second to import, and needed once a run

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

    Sizes in voxels; arguments as in `augment.AugmentSettings`.
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


class Field(NamedTuple):
    """Where the voxels of a crop come from, as small arrays along each of its axes.

    A position is the sum of what the three axes add and of the displacements of all
    control points, each times the product of its weights along the axes.
    """

    control: jax.Array  # [3, *points] voxels
    weights: tuple[jax.Array, ...]  # along each axis, [size, points]
    added: tuple[jax.Array, ...]  # along each axis, [size, 3] voxels

    def mirrored(self, mirror: jax.Array) -> "Field":
        """That of the crop mirrored along the axes that `mirror` ([3] bool) names."""

        def turned(along: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            pairs = zip(mirror, along, strict=True)
            return tuple(jnp.where(turn, rows[::-1], rows) for turn, rows in pairs)

        return Field(self.control, turned(self.weights), turned(self.added))

    def transposed(self, permutation: jax.Array, axes: Sequence[int]) -> "Field":
        """That of the crop with `axes`, all of one size, in another of their orders.

        Args:
          permutation: number of the order among `itertools.permutations(axes)`.
        """
        # All orders need the same shapes: further control points, of no displacement.
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
        """Positions of all voxels along z, y and x, float32 arrays of the crop's shape.

        Args:
          whole_sections: no control point is displaced along z.
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
            # The largest number last, the middle's: float32 loses least.
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
    """Elastic warp, rotation and misalignment of a crop about its middle.

    Args:
      control: displacements of control points, [3, *control_shape_zyx] voxels.
      angle: of the rotation in the section plane, radians.
      offset_yx: of each section, [z, 2] voxels.
      middle_zyx: where the crop's middle comes from, voxels.
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
    """Linear interpolation of uint8 [z, y, x] at `source` → float32 in 0…255.

    Args:
      source: along each axis, voxels, within the record (`reach_zyx` says how large it
        must be; what lies outside is the nearest border).
      whole_sections: the positions along z are whole numbers: then four voxels make
        one, else eight.
    """
    flat = record.ravel()
    index: Any = 0  # an array from the first axis on
    weight, steps = [], []
    for axis, size in enumerate(record.shape):
        stride = math.prod(record.shape[axis + 1 :])
        interpolated = size > 1 and not (axis == 0 and whole_sections)
        position = jnp.clip(source[axis], 0, size - 1)
        # The last voxel is the one before it with all weight on the next.
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

# SPDX-License-Identifier: Apache-2.0
"""Augments the crops of a batch on the device.

The numbers and the order follow the original (train_pipeline.py). One resampling makes
the elastic warp, the rotation, the shifts of sections and the jitter of the location
(warp.py). Then come mirror, transpose, intensity per section, clipping, and scaling to
[-1, 1]. Every example has its own key, so a batch does not depend on how many devices
or processes share it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from synister_jax.base.errors import UserError
from synister_jax.training import warp


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """The settings of `config.augment`, with sizes in voxels."""

    crop_shape_zyx: tuple[int, int, int]
    jitter_zyx: tuple[int, int, int]  # the location moves by at most this
    elastic_spacing_zyx: tuple[float, float, float]  # between two control points
    elastic_sigma_zyx: tuple[float, float, float]  # of the control points' moves
    # The warp is computed at every n-th voxel, and is linear between these voxels.
    elastic_subsample: int
    rotation: tuple[float, float]  # lowest and highest angle in the section plane, rad
    warp_probability: float  # of bending and rotating a crop
    slip_probability: float  # of moving one section
    shift_probability: float  # of moving a section and all sections after it
    max_misalign_yx: tuple[int, int]  # a slip or a shift moves by at most this
    mirror: bool  # mirrors along each axis with probability 1/2
    transpose_axes: tuple[int, ...]  # these axes are permuted
    intensity_scale: tuple[float, float]  # lowest and highest factor about the mean
    intensity_shift: tuple[float, float]  # lowest and highest summand, of [0, 1]
    intensity_per_section: bool  # else each crop has one factor and one summand

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "AugmentSettings":
        """Reads the settings of a config.

        Raises:
          UserError: a setting has a value that makes no sense.
        """
        given = config.augment
        if given.sizes_in not in ("voxels", "nm"):
            raise UserError(
                f"config.augment.sizes_in is {given.sizes_in!r}; give voxels or nm"
            )
        unit = config.voxel_size_nm_zyx if given.sizes_in == "nm" else (1, 1, 1)

        def numbers(name: str, count: int, low: float, high: float) -> tuple:
            values = tuple(given[name])
            if len(values) != count or not all(low <= v <= high for v in values):
                raise UserError(
                    f"config.augment.{name} is {values}; {count} numbers from {low:g} "
                    f"to {high:g} are needed"
                )
            return values

        def sizes(name: str, low: float = 0) -> tuple[Any, ...]:
            axes = unit[1:] if name.endswith("_yx") else unit
            values = numbers(name, len(axes), low, 1e6)
            return tuple(size / voxel for size, voxel in zip(values, axes, strict=True))

        def whole(name: str) -> tuple[Any, ...]:
            return tuple(round(size) for size in sizes(name))

        warps = given.warp_probability > 0
        settings = cls(
            crop_shape_zyx=tuple(config.crop_shape_zyx),
            jitter_zyx=whole("jitter_zyx"),
            elastic_spacing_zyx=sizes("elastic_spacing_zyx", 1e-3),
            elastic_sigma_zyx=sizes("elastic_sigma_zyx") if warps else (0.0,) * 3,
            elastic_subsample=given.elastic_subsample,
            rotation=numbers("rotation", 2, -2 * math.pi, 2 * math.pi)
            if warps
            else (0.0, 0.0),
            warp_probability=given.warp_probability,
            slip_probability=given.slip_probability,
            shift_probability=given.shift_probability,
            max_misalign_yx=whole("max_misalign_yx"),
            mirror=given.mirror,
            transpose_axes=tuple(given.transpose_axes),
            intensity_scale=numbers("intensity_scale", 2, 0, 10),
            intensity_shift=numbers("intensity_shift", 2, -1, 1),
            intensity_per_section=given.intensity_per_section,
        )
        axes = settings.transpose_axes
        if len(set(axes)) < len(axes) or not set(axes) <= {0, 1, 2}:
            raise UserError(
                f"config.augment.transpose_axes is {axes}; give some of 0, 1 and 2, "
                "each once"
            )
        if len({settings.crop_shape_zyx[axis] for axis in axes}) > 1:
            raise UserError(
                f"config.augment.transpose_axes {axes} swaps axes of different size "
                f"(config.crop_shape_zyx {settings.crop_shape_zyx}); name only axes of "
                "the same size"
            )
        chances = settings.slip_probability, settings.shift_probability
        if not (min(chances) >= 0 and sum(chances) <= 1):
            raise UserError(
                f"config.augment: slip_probability {chances[0]} and shift_probability "
                f"{chances[1]} must not be negative, nor more than 1 together"
            )
        if not 0 <= settings.warp_probability <= 1:
            raise UserError(
                f"config.augment.warp_probability is {settings.warp_probability}; give "
                "a number from 0 to 1"
            )
        if settings.elastic_subsample < 1:
            raise UserError(
                f"config.augment.elastic_subsample is {settings.elastic_subsample}; it "
                "must be at least 1"
            )
        return settings

    @property
    def resamples(self) -> bool:
        """Whether voxels move inside the crop; jitter only moves the whole crop."""
        warps = any((*self.elastic_sigma_zyx, *self.rotation)) or self.misaligns
        return warps or self.mirror or bool(self.transpose_axes)

    @property
    def misaligns(self) -> bool:
        probability = self.slip_probability + self.shift_probability
        return probability > 0 and any(self.max_misalign_yx)

    @property
    def margin_vx_zyx(self) -> tuple[int, ...]:
        """The voxels on either side of a crop that augmentation can reach, [3]."""
        return warp.reach_zyx(
            self.crop_shape_zyx,
            jitter_zyx=self.jitter_zyx,
            elastic_spacing_zyx=self.elastic_spacing_zyx,
            elastic_sigma_zyx=self.elastic_sigma_zyx,
            elastic_subsample=self.elastic_subsample,
            rotation=self.rotation,
            max_misalign_yx=self.max_misalign_yx if self.misaligns else (0, 0),
        )


class Draws(NamedTuple):
    """Everything that is random in one example, with sizes in voxels."""

    jitter: jax.Array  # [3] int32
    control: jax.Array  # [3, *control points]
    angle: jax.Array  # radians
    offset_yx: jax.Array  # [z, 2], of each section
    mirror: jax.Array  # [3] bool
    permutation: jax.Array  # int32, of the transposed axes
    scale: jax.Array  # [z, 1, 1] or [1, 1, 1]
    shift: jax.Array


def augment(
    records: jax.Array, keys: jax.Array, settings: AugmentSettings
) -> jax.Array:
    """Augments a batch.

    Args:
      records: uint8 [batch, *record], crops with their context.
      keys: [batch], see `batch_keys`.
      settings: the settings.

    Returns:
      float32 [batch, *crop] in [-1, 1].
    """
    return jax.vmap(lambda r, k: apply(r, draw(k, settings), settings))(records, keys)


def batch_keys(seed: int, step: jax.Array | int, batch_size: int) -> jax.Array:
    """Returns the keys [batch]. A key depends on (seed, step, place in the batch)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))


def draw(key: jax.Array, settings: AugmentSettings) -> Draws:
    """Returns the draws of one example, which depend only on its key."""
    depth = settings.crop_shape_zyx[0]
    sections = (depth if settings.intensity_per_section else 1, 1, 1)
    points = warp.control_shape_zyx(
        settings.crop_shape_zyx, settings.elastic_spacing_zyx
    )
    shapes = {
        "jitter": (3,),
        "control": (3, *points),
        "angle": (),
        "warp": (),
        "misalign": (depth,),
        "offset_yx": (depth, 2),
        "mirror": (3,),
        "permutation": (),
        "scale": sections,
        "shift": sections,
    }
    # One call draws everything, because every call costs time to compile.
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    pieces = jnp.split(jax.random.uniform(key, (ends[-1],)), ends[:-1])
    u = {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
    sigma = jnp.asarray(settings.elastic_sigma_zyx)[:, None, None, None]
    permutations = math.factorial(len(settings.transpose_axes))
    warped = u["warp"] < settings.warp_probability
    return Draws(
        jitter=_symmetric(u["jitter"], settings.jitter_zyx),
        control=warped * sigma * _truncated_normal(u["control"]),
        angle=warped * _between(u["angle"], settings.rotation),
        offset_yx=_misalignment(u["misalign"], u["offset_yx"], settings),
        mirror=(u["mirror"] < 0.5) & settings.mirror,
        permutation=jnp.floor(u["permutation"] * permutations).astype(jnp.int32),
        scale=_between(u["scale"], settings.intensity_scale),
        shift=_between(u["shift"], settings.intensity_shift),
    )


def apply(record: jax.Array, draws: Draws, settings: AugmentSettings) -> jax.Array:
    """Returns the augmented crop, float32 in [-1, 1], of a record, uint8 [z, y, x]."""
    # A record has an even number of voxels more than the crop, so their middles agree.
    if settings.resamples:
        field = warp.field(
            draws.control,
            draws.angle,
            draws.offset_yx,
            (jnp.asarray(record.shape) - 1) / 2 + draws.jitter,
            settings.crop_shape_zyx,
            settings.elastic_subsample,
        )
        # The field is mirrored and transposed, not the crop, because it is smaller.
        field = field.mirrored(draws.mirror)
        field = field.transposed(draws.permutation, settings.transpose_axes)
        whole_sections = settings.elastic_sigma_zyx[0] == 0
        source = field.source_vx_zyx(whole_sections)
        crop = warp.resample(record, source, whole_sections)
    else:
        more = np.subtract(record.shape, settings.crop_shape_zyx)
        start = jnp.asarray(more // 2) + draws.jitter
        crop = jax.lax.dynamic_slice(record, start, settings.crop_shape_zyx)
        crop = crop.astype(jnp.float32)
    # The mean and the result use the same crop. If it were scaled to [0, 1] here, XLA
    # on a CPU would sample it twice.
    axes = (1, 2) if settings.intensity_per_section else (0, 1, 2)
    mean = crop.mean(axis=axes, keepdims=True)
    crop = (mean + (crop - mean) * draws.scale) / 255 + draws.shift
    return jnp.clip(crop, 0, 1) * 2 - 1


def _misalignment(
    chance: jax.Array, offset: jax.Array, settings: AugmentSettings
) -> jax.Array:
    """Returns the displacement of each section, float32 [z, 2].

    A slip moves one section. A shift moves a section and all sections after it. As in
    the original, shifts do not move a section that slips.
    """
    slips = chance < settings.slip_probability
    shifts = ~slips & (chance < settings.slip_probability + settings.shift_probability)
    offset = _symmetric(offset, settings.max_misalign_yx)
    total = jnp.cumsum(shifts[:, None] * offset, axis=0)
    total = jnp.where(slips[:, None], offset, total)
    limit = warp.MISALIGN_STEPS * jnp.asarray(settings.max_misalign_yx)
    return jnp.clip(total, -limit, limit).astype(jnp.float32)


def _between(u: jax.Array, interval: Sequence[float]) -> jax.Array:
    low, high = interval
    return low + u * (high - low)


def _symmetric(u: jax.Array, reach: Sequence[int]) -> jax.Array:
    """Turns u in [0, 1) into whole numbers from -reach to reach, uniformly."""
    most = jnp.asarray(reach)
    return jnp.floor(u * (2 * most + 1)).astype(jnp.int32) - most


def _truncated_normal(u: jax.Array) -> jax.Array:
    """Turns u in [0, 1) into standard normal numbers within ± warp.SIGMAS."""
    within = math.erf(warp.SIGMAS / math.sqrt(2))
    return math.sqrt(2) * jax.lax.erf_inv(within * (2 * u - 1))

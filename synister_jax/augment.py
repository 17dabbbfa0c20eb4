# SPDX-License-Identifier: Apache-2.0
"""Augmentation of a batch on the device, and the scaling that every network input gets.

Numbers and order follow the original (train_pipeline.py): mirror, transpose,
intensity per section, clip, scale to [-1, 1]. Every example draws from a key of its
own, so a batch does not depend on how many devices share it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections


def margin_vx_zyx(settings: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Voxels of context, on either side of a crop, that augmentation can reach."""
    return tuple(int(j) for j in settings.jitter_vx_zyx)


def augment(
    records: jax.Array,
    key: jax.Array,
    crop_shape_zyx: Sequence[int],
    settings: ml_collections.ConfigDict,
) -> jax.Array:
    """uint8 [batch, *record] with margin → float32 [batch, *crop] in [-1, 1]."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(records)))

    def one(record: jax.Array, key: jax.Array) -> jax.Array:
        place, mirror, transpose, intensity = jax.random.split(key, 4)
        crop = _jitter(record, place, crop_shape_zyx, settings.jitter_vx_zyx)
        crop = crop.astype(jnp.float32) / 255
        if settings.mirror:
            crop = _mirror(crop, mirror)
        if settings.transpose:
            swap = jax.random.bernoulli(transpose)
            crop = jnp.where(swap, crop.swapaxes(1, 2), crop)
        return _intensity(crop, intensity, settings)

    return jnp.clip(jax.vmap(one)(records, keys), 0, 1) * 2 - 1


def centre(records: jax.Array, crop_shape_zyx: Sequence[int]) -> jax.Array:
    """uint8 [batch, *record] → float32 [batch, *crop] in [-1, 1], no randomness."""
    middle = tuple(
        slice((r - c) // 2, (r - c) // 2 + c)
        for r, c in zip(records.shape[1:], crop_shape_zyx, strict=True)
    )
    return records[(slice(None), *middle)].astype(jnp.float32) / 255 * 2 - 1


def _jitter(
    record: jax.Array,
    key: jax.Array,
    crop_shape_zyx: Sequence[int],
    jitter_vx_zyx: Sequence[int],
) -> jax.Array:
    reach = jnp.asarray(jitter_vx_zyx)
    shift = jax.random.randint(key, (3,), -reach, reach + 1)
    middle = [(r - c) // 2 for r, c in zip(record.shape, crop_shape_zyx, strict=True)]
    return jax.lax.dynamic_slice(record, jnp.asarray(middle) + shift, crop_shape_zyx)


def _mirror(crop: jax.Array, key: jax.Array) -> jax.Array:
    flips = jax.random.bernoulli(key, shape=(3,))
    for axis in range(3):
        crop = jnp.where(flips[axis], jnp.flip(crop, axis), crop)
    return crop


def _intensity(
    crop: jax.Array, key: jax.Array, settings: ml_collections.ConfigDict
) -> jax.Array:
    """mean + (value - mean)·scale + shift, a draw and a mean for each z section."""
    draw_scale, draw_shift = jax.random.split(key)
    shape = (crop.shape[0], 1, 1)
    low, high = settings.intensity_scale
    scale = jax.random.uniform(draw_scale, shape, minval=low, maxval=high)
    low, high = settings.intensity_shift
    shift = jax.random.uniform(draw_shift, shape, minval=low, maxval=high)
    mean = crop.mean(axis=(1, 2), keepdims=True)
    return mean + (crop - mean) * scale + shift

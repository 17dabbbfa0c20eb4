# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import ndimage

from configs import demo, hemibrain, skeleton
from synister_jax.base.errors import UserError
from synister_jax.network import input_scaling
from synister_jax.training import augment, warp
from tests.helpers.small_data import tiny_config

pytestmark = pytest.mark.long

SHAPE = (4, 16, 16)
MARGIN = (1, 2, 2)
RECORD = (6, 20, 20)


def settings(**change: object) -> augment.AugmentSettings:
    """Returns settings in which all augmentation is off, except what `change` says."""
    config = tiny_config()
    config.augment.update(
        jitter_zyx=(0, 0, 0),
        mirror=False,
        transpose_axes=(),
        intensity_scale=(1.0, 1.0),
        intensity_shift=(0.0, 0.0),
    )
    config.augment.update(change)
    return augment.AugmentSettings.of(config)


def full(config: ml_collections.ConfigDict | None = None) -> augment.AugmentSettings:
    """Returns settings of the whole chain. Without a config, the crop is small."""
    if config is None:
        config = skeleton.get_config()
        config.crop_shape_zyx = (8, 40, 40)
        config.augment.elastic_spacing_zyx = (4, 10, 10)
    return augment.AugmentSettings.of(config)


def records(count: int, shape: tuple[int, ...] = RECORD) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(60, 190, (count, *shape), dtype=np.uint8)


def record_shape(chosen: augment.AugmentSettings) -> tuple[int, ...]:
    pairs = zip(chosen.crop_shape_zyx, chosen.margin_vx_zyx, strict=True)
    return tuple(size + 2 * margin for size, margin in pairs)


def centre(record: np.ndarray) -> np.ndarray:
    return record[1:-1, 2:-2, 2:-2].astype(np.float32) / 255 * 2 - 1


def run(batch: np.ndarray, chosen: augment.AugmentSettings, key: int = 0) -> np.ndarray:
    keys = augment.batch_keys(key, 0, len(batch))
    return np.asarray(jax.jit(lambda b, k: augment.augment(b, k, chosen))(batch, keys))


def draws(chosen: augment.AugmentSettings, count: int) -> augment.Draws:
    keys = jax.random.split(jax.random.key(0), count)
    return jax.device_get(jax.jit(jax.vmap(lambda k: augment.draw(k, chosen)))(keys))


def test_nothing_switched_on_is_the_centre_scaled() -> None:
    batch = records(3)
    expected = np.stack([centre(record) for record in batch])
    np.testing.assert_allclose(run(batch, settings()), expected, atol=1e-6)
    middle = input_scaling.centre(jnp.asarray(batch), SHAPE)
    np.testing.assert_allclose(middle, expected, atol=1e-6)


def test_scale_is_the_published_one() -> None:
    batch = np.zeros((2, *RECORD), np.uint8)
    batch[1] = 255
    assert run(batch, settings())[:, 0, 0, 0].tolist() == [-1, 1]


def test_jitter_reaches_the_margin_and_no_further() -> None:
    z, y, x = np.indices(RECORD)
    batch = np.repeat((z * 40 + y + x * 2)[None].astype(np.uint8), 400, axis=0)
    chosen = settings(jitter_zyx=MARGIN)
    corner = np.rint((run(batch, chosen)[:, 0, 0, 0] + 1) / 2 * 255).astype(int)
    reached = {(z, y, x) for z in range(3) for y in range(5) for x in range(5)}
    values = {z * 40 + y + x * 2 for z, y, x in reached}
    assert set(corner) == values
    assert chosen.margin_vx_zyx == MARGIN


@pytest.mark.parametrize(
    ("shape", "spacing", "sigma", "axes", "per_section"),
    [
        ((8, 40, 40), (4, 10, 10), (0.0, 2.0, 2.0), (1, 2), True),  # as published
        ((8, 40, 40), (4, 8, 20), (0.0, 2.0, 2.0), (1, 2), True),  # uneven grid
        ((16, 16, 16), (8, 4, 5), (1.0, 2.0, 2.0), (0, 1, 2), False),
        ((16, 16, 16), (4, 4, 4), (0.0, 2.0, 2.0), (2, 0), True),  # z and x
    ],
)
def test_the_whole_chain_agrees_with_scipy(
    shape: tuple, spacing: tuple, sigma: tuple, axes: tuple, per_section: bool
) -> None:
    """SciPy and NumPy give the same crop for the same draws, in the published order."""
    config = skeleton.get_config()
    config.crop_shape_zyx = shape
    config.augment.update(
        elastic_spacing_zyx=spacing,
        elastic_sigma_zyx=sigma,
        transpose_axes=axes,
        intensity_per_section=per_section,
    )
    chosen = full(config)
    orders = []
    for shuffled in itertools.permutations(axes):
        orders.append([0, 1, 2])
        for axis, new in zip(axes, shuffled, strict=True):
            orders[-1][axis] = new
    record = records(1, record_shape(chosen))[0]
    chain = jax.jit(lambda r, d: augment.apply(r, d, chosen))
    for key in jax.random.split(jax.random.key(1), 6):
        drawn = augment.draw(key, chosen)
        middle = (np.array(record.shape) - 1) / 2 + np.asarray(drawn.jitter)
        field = warp.field(
            drawn.control,
            drawn.angle,
            drawn.offset_yx,
            middle,
            chosen.crop_shape_zyx,
            chosen.elastic_subsample,
        )
        positions = np.stack(field.source_vx_zyx(whole_sections=sigma[0] == 0))
        crop = ndimage.map_coordinates(record / 255.0, positions, order=1)
        crop = np.flip(crop, np.flatnonzero(drawn.mirror))
        crop = crop.transpose(orders[int(drawn.permutation)])
        mean = crop.mean(axis=(1, 2) if per_section else None, keepdims=True)
        crop = mean + (crop - mean) * np.asarray(drawn.scale) + np.asarray(drawn.shift)
        expected = np.clip(crop, 0, 1) * 2 - 1
        np.testing.assert_allclose(chain(record, drawn), expected, atol=2e-3)


def test_draws_follow_the_published_distributions() -> None:
    chosen = full(skeleton.get_config())
    drawn = draws(chosen, 2_000)
    jitter = drawn.jitter
    assert jitter.min(axis=0).tolist() == [-1, -10, -10]
    assert jitter.max(axis=0).tolist() == [1, 10, 10]
    assert not drawn.control[:, 0].any()
    np.testing.assert_allclose(drawn.control[:, 1:].std(), 2, rtol=0.03)
    assert drawn.control.shape[1:] == (3, 4, 4, 4)
    np.testing.assert_allclose(drawn.angle.mean(), math.pi / 4, atol=0.03)
    assert 0 <= drawn.angle.min() < 0.01 and 1.56 < drawn.angle.max() <= math.pi / 2
    for scale, low, high in ((drawn.scale, 0.9, 1.1), (drawn.shift, -0.1, 0.1)):
        assert scale.shape == (2_000, 16, 1, 1)
        assert low <= scale.min() and scale.max() <= high
        np.testing.assert_allclose(scale.mean(), (low + high) / 2, atol=0.002)
        np.testing.assert_allclose(scale.std(), 0.2 / 12**0.5, rtol=0.02)


def test_some_crops_stay_sharp() -> None:
    """Crops are warped only with `warp_probability`; sections may slip in all crops."""
    config = skeleton.get_config()
    config.augment.warp_probability = 0.25
    drawn = draws(augment.AugmentSettings.of(config), 2_000)
    sharp = drawn.angle == 0
    np.testing.assert_allclose(sharp.mean(), 0.75, atol=0.04)
    np.testing.assert_array_equal(sharp, ~drawn.control.any(axis=(1, 2, 3, 4)))
    assert drawn.offset_yx[sharp].any()
    chosen = full()
    record = records(1, record_shape(chosen))[0]
    still = draws_like(chosen, np.zeros(3), np.zeros((3, 2, 4, 4)), 0.0, np.zeros(2))
    z, y, x = (slice(m, -m) for m in chosen.margin_vx_zyx)
    expected = record[z, y, x].astype(np.float32) / 255 * 2 - 1
    crop = augment.apply(jnp.asarray(record), still, chosen)
    np.testing.assert_allclose(crop, expected, atol=1e-6)  # not interpolated
    # If no crop is ever warped, the records need no margin for it.
    never = settings(rotation=(0.3, 0.4), warp_probability=0.0)
    assert never.margin_vx_zyx == (0, 0, 0) and not never.resamples


def test_slips_displace_a_section_and_shifts_all_that_follow() -> None:
    slips = settings(slip_probability=0.25, shift_probability=0, max_misalign_yx=(3, 3))
    shifts = settings(
        slip_probability=0, shift_probability=0.25, max_misalign_yx=(3, 3)
    )
    slipped = draws(slips, 3_000).offset_yx
    moved = (slipped != 0).any(axis=2)
    # One of the 49 possible offsets is (0, 0), which moves nothing.
    np.testing.assert_allclose(moved.mean(), 0.25 * 48 / 49, atol=0.015)
    assert np.abs(np.corrcoef(moved.T)[0, 1]) < 0.06  # independent sections
    assert np.abs(slipped).max() == 3
    shifted = draws(shifts, 3_000).offset_yx
    changed = (np.diff(shifted, axis=1) != 0).any(axis=2)
    # Without a shift, a section has the same offset as the section before.
    assert 0.2 < changed.mean() < 0.26
    assert np.abs(shifted).max() == warp.MISALIGN_STEPS * 3  # the limit
    together = draws(full(skeleton.get_config()), 3_000).offset_yx
    assert np.abs(together).max() == 20


def worst_draws(chosen: augment.AugmentSettings) -> list[augment.Draws]:
    """Returns draws at their limits, which add up in one direction, at many angles."""
    points = warp.control_shape_zyx(chosen.crop_shape_zyx, chosen.elastic_spacing_zyx)
    up = [
        warp.upsampling(size, n, chosen.elastic_subsample)
        for size, n in zip(chosen.crop_shape_zyx, points, strict=True)
    ]
    # Splines overshoot most with control points of these signs (the worst rows).
    signs = [m[np.abs(m).sum(axis=1).argmax()] for m in up]
    grid = np.sign(np.einsum("a,b,c->abc", *signs))
    corner = np.sign(np.einsum("a,b,c->abc", *(m[0] for m in up)))
    low, high = (
        np.sign(np.einsum("a,b,c->abc", up[0][end], *signs[1:])) for end in (0, -1)
    )
    limit = warp.SIGMAS * np.array(chosen.elastic_sigma_zyx)
    offset = warp.MISALIGN_STEPS * np.array(chosen.max_misalign_yx) * chosen.misaligns
    found = []
    for sign in itertools.product((-1, 1), repeat=3):
        for angle in np.linspace(*chosen.rotation, 9):
            for bend in (grid, corner, low, high):
                # The sign moves the voxels outwards on each axis.
                found.append(
                    draws_like(
                        chosen,
                        jitter=np.array(chosen.jitter_zyx) * sign,
                        control=(limit * sign)[:, None, None, None] * bend,
                        angle=angle,
                        offset=offset * sign[1:],
                    )
                )
    return found


def draws_like(
    chosen: augment.AugmentSettings,
    jitter: np.ndarray,
    control: np.ndarray,
    angle: float,
    offset: np.ndarray,
) -> augment.Draws:
    depth = chosen.crop_shape_zyx[0]
    return augment.Draws(
        jitter=jnp.asarray(jitter, jnp.int32),
        control=jnp.asarray(control, jnp.float32),
        angle=jnp.float32(angle),
        offset_yx=jnp.asarray(np.tile(offset, (depth, 1)), jnp.float32),
        mirror=jnp.zeros(3, bool),
        permutation=jnp.int32(0),
        scale=jnp.ones((depth, 1, 1)),
        shift=jnp.zeros((depth, 1, 1)),
    )


@pytest.mark.parametrize(
    "config", [skeleton.get_config(), hemibrain.get_config(), demo.get_config()]
)
def test_no_voxel_comes_from_beyond_the_margin(
    config: ml_collections.ConfigDict,
) -> None:
    """All voxels are in the record, for draws at their limits and for random draws."""
    chosen = augment.AugmentSettings.of(config)
    shape = np.array(record_shape(chosen))

    @jax.jit
    def extent(drawn: augment.Draws) -> tuple[jax.Array, jax.Array]:
        field = warp.field(
            drawn.control,
            drawn.angle,
            drawn.offset_yx,
            (jnp.asarray(shape) - 1) / 2 + drawn.jitter,
            chosen.crop_shape_zyx,
            chosen.elastic_subsample,
        )
        source = jnp.stack(field.source_vx_zyx(whole_sections=False))
        return source.min(axis=(1, 2, 3)), source.max(axis=(1, 2, 3))

    random = jax.random.split(jax.random.key(0), 100)
    ends = [extent(augment.draw(key, chosen)) for key in random]
    ends += [extent(drawn) for drawn in worst_draws(chosen)]
    lowest = np.min([low for low, _ in ends], axis=0)
    highest = np.max([high for _, high in ends], axis=0)
    assert (lowest >= 0).all() and (highest <= shape - 1).all()
    # The margin is not too large: the worst draws come within two voxels of its end.
    assert (lowest < 2).all() and (highest > shape - 3).all()


def test_no_fill_reaches_the_network() -> None:
    """Crops of a white record are white, so no voxel comes from outside the record."""
    chosen = full()
    white = np.full((64, *record_shape(chosen)), 255, np.uint8)
    drawn = draws(chosen, 64)
    drawn = drawn._replace(
        scale=np.ones_like(drawn.scale), shift=np.zeros_like(drawn.shift)
    )
    out = jax.jit(jax.vmap(lambda r, d: augment.apply(r, d, chosen)))(white, drawn)
    np.testing.assert_allclose(out, 1, atol=1e-5)


def test_mirror_and_transpose_give_the_sixteen_symmetries_equally_often() -> None:
    record = records(1)[0]
    batch = np.repeat(record[None], 1600, axis=0)
    out = run(batch, settings(mirror=True, transpose_axes=(1, 2)))
    crop = centre(record)
    counts = []
    for turned in (crop, crop.swapaxes(1, 2)):
        for flips in np.ndindex(2, 2, 2):
            axes = [axis for axis in range(3) if flips[axis]]
            expected = np.flip(turned, axes)
            counts.append(
                np.isclose(out, expected, atol=1e-6).all(axis=(1, 2, 3)).sum()
            )
    assert sum(counts) == 1600
    # Binomial(1600, 1/16): mean 100, standard deviation 9.7.
    assert min(counts) > 60 and max(counts) < 140


def test_isotropic_crops_turn_every_axis_into_every_other() -> None:
    config = hemibrain.get_config()
    config.crop_shape_zyx = (8, 8, 8)
    config.augment.update(
        jitter_zyx=(0, 0, 0),
        elastic_sigma_zyx=(0.0, 0.0, 0.0),
        rotation=(0.0, 0.0),
        intensity_scale=(1.0, 1.0),
        intensity_shift=(0.0, 0.0),
    )
    chosen = augment.AugmentSettings.of(config)
    assert chosen.margin_vx_zyx == (0, 0, 0)
    record = records(1, (8, 8, 8))[0]
    out = run(np.repeat(record[None], 1200, axis=0), chosen)
    crop = record.astype(np.float32) / 255 * 2 - 1
    seen = 0
    for order in itertools.permutations(range(3)):
        for flips in np.ndindex(2, 2, 2):
            axes = [axis for axis in range(3) if flips[axis]]
            turned = np.flip(crop, axes).transpose(order)
            alike = np.isclose(out, turned, atol=1e-6).all(axis=(1, 2, 3)).sum()
            assert alike > 5  # Binomial(1200, 1/48): mean 25
            seen += alike
    assert seen == 1200


def test_sizes_in_nm_are_those_in_voxels() -> None:
    config = hemibrain.get_config()
    chosen = augment.AugmentSettings.of(config)
    assert chosen.jitter_zyx == (5, 5, 5)  # 80 nm, the central 1/8 of 640
    assert chosen.elastic_spacing_zyx == (20, 20, 20)
    assert chosen.elastic_sigma_zyx == (1, 1, 1)
    config = skeleton.get_config()
    in_voxels = augment.AugmentSettings.of(config)
    config.augment.update(
        sizes_in="nm",
        jitter_zyx=(40, 40, 40),
        elastic_spacing_zyx=(160, 160, 160),
        elastic_sigma_zyx=(0.0, 8.0, 8.0),
        max_misalign_yx=(40, 40),
    )
    assert augment.AugmentSettings.of(config) == in_voxels


def test_values_are_clipped_before_scaling() -> None:
    batch = np.full((50, *RECORD), 250, np.uint8)
    batch[:, :, ::2] = 5
    out = run(batch, settings(intensity_shift=(-0.5, 0.5)))
    assert out.min() == -1 and out.max() == 1


def test_an_example_depends_on_its_key_and_place_alone() -> None:
    chosen = full()
    batch = records(6, record_shape(chosen))
    out = run(batch, chosen)
    np.testing.assert_allclose(run(batch[:3], chosen), out[:3], atol=1e-6)
    assert np.abs(run(batch, chosen, key=1) - out).max() > 0.1
    same = run(np.repeat(batch[:1], 6, axis=0), chosen)
    assert np.abs(same[0] - same[1]).max() > 0.1


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_it_lowers_for_accelerators_without_going_to_the_host(platform: str) -> None:
    chosen = full(skeleton.get_config())
    shapes = (
        jax.ShapeDtypeStruct((8, *record_shape(chosen)), jnp.uint8),
        jax.eval_shape(lambda: augment.batch_keys(0, 0, 8)),
    )
    function = jax.jit(lambda r, k: augment.augment(r, k, chosen))
    text = jax.export.export(function, platforms=[platform])(*shapes).mlir_module()
    assert "gather" in text and "callback" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes_in": "furlongs"}, "voxels or nm"),
        ({"jitter_zyx": (-1, 2, 2)}, "jitter_zyx is .* 3 numbers from 0"),
        ({"jitter_zyx": (2, 2)}, "3 numbers"),
        ({"elastic_spacing_zyx": (0, 4, 4)}, "elastic_spacing_zyx"),
        ({"elastic_sigma_zyx": (0.0, math.nan, 2.0)}, "elastic_sigma_zyx"),
        ({"elastic_subsample": 0}, "elastic_subsample is 0"),
        ({"rotation": (0, 90)}, "rotation is .* from -6.28319 to 6.28319"),
        ({"transpose_axes": (1, 3)}, "some of 0, 1 and 2, each once"),
        ({"transpose_axes": (1, 1)}, "some of 0, 1 and 2, each once"),
        ({"warp_probability": 1.5}, "warp_probability is 1.5"),
        ({"slip_probability": math.nan}, "slip_probability nan"),
        ({"transpose_axes": (0, 1)}, "swaps axes of different size"),
        ({"slip_probability": 0.7, "shift_probability": 0.7}, "probability"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**change)

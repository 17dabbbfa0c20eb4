# SPDX-License-Identifier: Apache-2.0
import jax
import ml_collections
import numpy as np
from conftest import tiny_config

from synister_jax import augment

SHAPE = (4, 16, 16)
MARGIN = (1, 2, 2)
RECORD = (6, 20, 20)


def settings(**change: object) -> ml_collections.ConfigDict:
    off = tiny_config().augment
    off.update(
        jitter_vx_zyx=(0, 0, 0),
        mirror=False,
        transpose=False,
        intensity_scale=(1.0, 1.0),
        intensity_shift=(0.0, 0.0),
    )
    off.update(change)
    return off


def records(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(60, 190, (count, *RECORD), dtype=np.uint8)


def centre(record: np.ndarray) -> np.ndarray:
    return record[1:-1, 2:-2, 2:-2].astype(np.float32) / 255 * 2 - 1


def run(
    batch: np.ndarray, chosen: ml_collections.ConfigDict, key: int = 0
) -> np.ndarray:
    return np.asarray(augment.augment(batch, jax.random.key(key), SHAPE, chosen))


def test_nothing_switched_on_is_the_centre_scaled() -> None:
    batch = records(3)
    expected = np.stack([centre(record) for record in batch])
    np.testing.assert_allclose(run(batch, settings()), expected, atol=1e-6)
    middle = augment.centre(jax.numpy.asarray(batch), SHAPE)
    np.testing.assert_allclose(middle, expected, atol=1e-6)


def test_scale_is_the_published_one() -> None:
    batch = np.zeros((2, *RECORD), np.uint8)
    batch[1] = 255
    assert run(batch, settings())[:, 0, 0, 0].tolist() == [-1, 1]


def test_jitter_reaches_the_margin_and_no_further() -> None:
    z, y, x = np.indices(RECORD)
    batch = np.repeat((z * 40 + y + x * 2)[None].astype(np.uint8), 400, axis=0)
    chosen = settings(jitter_vx_zyx=MARGIN)
    corner = np.rint((run(batch, chosen)[:, 0, 0, 0] + 1) / 2 * 255).astype(int)
    reached = {(z, y, x) for z in range(3) for y in range(5) for x in range(5)}
    values = {z * 40 + y + x * 2 for z, y, x in reached}
    assert set(corner) == values
    assert augment.margin_vx_zyx(chosen) == MARGIN


def test_mirror_and_transpose_give_the_sixteen_symmetries_equally_often() -> None:
    record = records(1)[0]
    batch = np.repeat(record[None], 1600, axis=0)
    out = run(batch, settings(mirror=True, transpose=True))
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


def test_intensity_is_the_published_formula_for_each_section() -> None:
    batch = records(200)
    out = (
        run(batch, settings(intensity_scale=(0.9, 1.1), intensity_shift=(-0.1, 0.1)))
        + 1
    ) / 2
    raw = (np.stack([centre(record) for record in batch]) + 1) / 2
    mean = raw.mean(axis=(2, 3), keepdims=True)
    scale = out.std(axis=(2, 3)) / raw.std(axis=(2, 3))
    shift = out.mean(axis=(2, 3)) - mean[..., 0, 0]
    expected = mean + (raw - mean) * scale[..., None, None] + shift[..., None, None]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for drawn, low, high in ((scale, 0.9, 1.1), (shift, -0.1, 0.1)):
        assert drawn.min() >= low - 1e-5 and drawn.max() <= high + 1e-5
        # Uniform over the range, and drawn for each section by itself.
        np.testing.assert_allclose(
            drawn.mean(), (low + high) / 2, atol=0.02 * (high - low) * 2
        )
        np.testing.assert_allclose(drawn.std(), (high - low) / 12**0.5, rtol=0.1)
        assert np.abs(np.corrcoef(drawn.T)[0, 1]) < 0.3


def test_values_are_clipped_before_scaling() -> None:
    batch = np.full((50, *RECORD), 250, np.uint8)
    batch[:, :, ::2] = 5
    out = run(batch, settings(intensity_shift=(-0.5, 0.5)))
    assert out.min() == -1 and out.max() == 1


def test_an_example_depends_on_its_key_and_place_alone() -> None:
    batch = records(8)
    chosen = tiny_config().augment
    out = run(batch, chosen)
    np.testing.assert_allclose(run(batch[:3], chosen), out[:3], atol=1e-6)
    assert np.abs(run(batch, chosen, key=1) - out).max() > 0.1
    same = run(np.repeat(batch[:1], 8, axis=0), chosen)
    assert np.abs(same[0] - same[1]).max() > 0.1

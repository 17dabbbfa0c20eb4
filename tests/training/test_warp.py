# SPDX-License-Identifier: Apache-2.0
"""Compares warping with SciPy and with the original, which zooms coarse fields."""

import math

import jax
import numpy as np
import pytest
from scipy import ndimage

from synister_jax.training import warp

pytestmark = pytest.mark.long


def reference_field(
    control: np.ndarray,
    angle: float,
    offset_yx: np.ndarray,
    shape: tuple[int, ...],
    subsample: int,
) -> np.ndarray:
    """Returns the absolute source positions [3, *shape], computed as in the original.

    The original adds identity, elastic field and rotation on a coarse grid. It
    upsamples their sum linearly, and adds the misalignment last.
    """
    coarse = tuple(max(1, size // subsample) for size in shape)

    def to(field: np.ndarray, size: tuple[int, ...], order: int) -> np.ndarray:
        factors = [s / n for s, n in zip(size, field.shape[1:], strict=True)]
        return np.stack(
            [ndimage.zoom(f, factors, order=order, mode="mirror") for f in field]
        )

    axes = [
        np.linspace(0, s - 1, n) if n > 1 else np.array([0.0])
        for s, n in zip(shape, coarse, strict=True)
    ]
    field = np.stack(np.meshgrid(*axes, indexing="ij"))
    field += to(control, coarse, 3)
    corners = np.zeros((3, 2, 2, 2))
    half_y, half_x = (shape[1] - 1) / 2, (shape[2] - 1) / 2
    for corner in np.ndindex(2, 2, 2):
        y, x = (2 * corner[1] - 1) * half_y, (2 * corner[2] - 1) * half_x
        turned_y = math.sin(angle) * x + math.cos(angle) * y
        turned_x = -math.sin(angle) * y + math.cos(angle) * x
        corners[(slice(None), *corner)] = 0, turned_y - y, turned_x - x
    field += to(corners, coarse, 1)
    field = to(field, shape, 1)
    field[1:] += offset_yx.T[:, :, None, None]
    return field


@pytest.mark.parametrize(
    ("shape", "spacing", "sigma", "subsample"),
    [
        ((16, 40, 48), (4, 10, 12), (0, 2, 2), 8),  # published proportions
        ((16, 40, 40), (4, 10, 10), (0, 2, 2), 1),
        ((24, 24, 24), (6, 6, 6), (1.5, 1.5, 1.5), 4),  # isotropic
    ],
)
def test_source_positions_agree_with_the_original_path(
    shape: tuple[int, ...], spacing: tuple, sigma: tuple, subsample: int
) -> None:
    rng = np.random.default_rng(0)
    points = warp.control_shape_zyx(shape, spacing)
    assert points == tuple(s // p for s, p in zip(shape, spacing, strict=True))
    control = rng.normal(size=(3, *points)) * np.array(sigma)[:, None, None, None]
    angle, offset = 0.7, rng.integers(-10, 11, (shape[0], 2)).astype(float)
    middle = (np.array(shape) - 1) / 2
    field = warp.field(
        jax.numpy.asarray(control),
        angle,
        jax.numpy.asarray(offset),
        middle,
        shape,
        subsample,
    )
    ours = field.source_vx_zyx(whole_sections=sigma[0] == 0)
    expected = reference_field(control, angle, offset, shape, subsample)
    np.testing.assert_allclose(np.stack(ours), expected, atol=2e-4)


@pytest.mark.parametrize("whole_sections", [True, False])
def test_resampling_agrees_with_scipy(whole_sections: bool) -> None:
    rng = np.random.default_rng(0)
    record = rng.integers(0, 256, (7, 30, 31), dtype=np.uint8)
    source = rng.uniform(0, 6, (3, 5, 12, 13)).astype(np.float32)
    source[1:] *= 29 / 6
    if whole_sections:
        source[0] = np.array([0, 6, 3, 3, 1])[:, None, None]
    source[:, 2, 0, 0] = (3, 29, 30)  # exactly the last voxel
    ours = warp.resample(jax.numpy.asarray(record), source, whole_sections)
    expected = ndimage.map_coordinates(
        record.astype(float), source, order=1, mode="nearest"
    )
    np.testing.assert_allclose(ours, expected, atol=1e-2)


@pytest.mark.parametrize("whole_sections", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 5, 6), (4, 1, 6), (1, 1, 1)])
def test_what_lies_outside_is_the_nearest_border(
    shape: tuple[int, ...], whole_sections: bool
) -> None:
    record = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    source = np.random.default_rng(1).uniform(-3, 9, (3, 200)).astype(np.float32)
    source[0] = np.round(source[0]) if whole_sections else source[0]
    ours = warp.resample(jax.numpy.asarray(record), source, whole_sections)
    expected = ndimage.map_coordinates(
        record.astype(float), source, order=1, mode="nearest"
    )
    np.testing.assert_allclose(ours, expected, atol=1e-2)


def test_upsampling_meets_the_control_points_at_its_ends() -> None:
    matrix = warp.upsampling(33, 5, 1)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)  # keeps constants
    np.testing.assert_allclose(matrix[::8], np.eye(5), atol=1e-5)
    np.testing.assert_array_equal(warp.upsampling(7, 1, 8), np.ones((7, 1)))

# SPDX-License-Identifier: Apache-2.0
"""Paints synthetic EM images of neuropil with synapses of six neurotransmitters.

The images imitate serial-section TEM of fly neuropil. The voxels are 40x4x4 nm
(z, y, x). The images are invented for a demonstration.

A tone is a grey value relative to the surrounding tissue: 0 is the mean of the tissue,
and 1 is one standard deviation above the mean. Synapses are painted in tones, so that
they blend into synthetic tissue and into real tissue.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from demo_synapses import (
    BOUTON_DEPTH_NM,
    CYTOSOL,
    VOXEL_NM_ZYX,
    ZONE_PX,
    Synapse,
    generator,
)
from scipy import ndimage, spatial

_MEMBRANE, _DENSITY = -1.9, -1.6  # tones
# A synapse is painted within _REACH_PX of a point inside the bouton. This point is
# _MIDDLE_PX away from the position of the synapse.
_REACH_PX, _MIDDLE_PX = 40, 11
_BLOCK_PX = 8  # near cells are searched once per block; walls are computed per pixel
_SCALED_PX_PER_SECTION = 6.5  # less than the true 10, so that cells span more sections
_CELLS, _WARP, _SECTION, _NOISE = range(2, 6)  # keys of random streams


def paint(
    seed: int,
    shape_zyx: tuple[int, int, int],
    synapses: Sequence[Synapse],
    background: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yields the sections of the volume, uint8 arrays (y, x), in the order of z.

    Args:
      seed: the same seed paints the same volume again.
      shape_zyx: the shape of the volume in voxels.
      synapses: the synapses to paint.
      background: an array of shape `shape_zyx`, uint8. The synapses are painted onto
        this background. Without a background, synthetic tissue is painted first.
    """
    tissue = Tissue(seed, shape_zyx) if background is None else None
    shape_yx = shape_zyx[1:]
    rng = generator(seed, _NOISE)
    # Drawing noise is slow. The noise is drawn once, and every section rolls the noise
    # by offsets of its own.
    noises = [_noise(rng, shape_yx, sigma) for sigma in (1.0, 2.5, 14.0, 0.55)]

    def section(z: int) -> np.ndarray:
        rng = generator(seed, _SECTION, z)
        fine, coarse, wide, shot = (
            np.roll(field, rng.integers(0, shape_yx), (0, 1)) for field in noises
        )
        grain = _grain(fine, coarse)
        ripple_px = 0.5 * coarse + 2.2 * wide
        if tissue is None:
            assert background is not None  # without a background there is a tissue
            shift_px_yx = np.zeros(2, int)
            image = background[z].astype(np.float32)
            sharp = image - ndimage.gaussian_filter(image, 1.0)
            noise = 1.4 * sharp.std() * shot
        else:
            shift_px_yx = rng.integers(-3, 4, 2) * (rng.random() < 0.6)
            image = tissue.section(z, shift_px_yx, grain)
            noise = np.zeros_like(image)
        fields = (image.mean(), image.std(), grain, ripple_px, noise)
        for synapse in synapses:
            dz = z - synapse.position_vx_zyx[0]
            if abs(dz) <= 3:
                _paint_synapse(image, fields, synapse, dz, shift_px_yx)
        if tissue is not None:
            image = _expose(rng, image, shot)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8)

    # Each section has a random stream of its own. The order of painting cannot matter.
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(section, range(shape_zyx[0]))


def _noise(
    rng: np.random.Generator, shape: Sequence[int], sigma: float | Sequence[float]
) -> np.ndarray:
    """Returns smooth noise, float32, with mean 0 and standard deviation 1."""
    field = rng.standard_normal(shape, np.float32)
    field = ndimage.gaussian_filter(field, sigma, truncate=2.5, mode="wrap")
    return field / field.std()


def _grain(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Returns the texture of the cytosol in tones: granules and dark filaments."""
    filaments = _bump(coarse, 0.25) * np.clip(0.6 - fine, 0, 1.5)
    return 0.16 * fine + 0.10 * coarse - 0.45 * filaments + 0.07


def _expose(
    rng: np.random.Generator, image: np.ndarray, shot: np.ndarray
) -> np.ndarray:
    """Adds illumination, contrast and noise, which differ between sections."""
    drift = rng.normal(0, 5, (4, 4)).astype(np.float32)
    drift = _upsample(drift, image.shape, max(image.shape) / 3)
    gain, offset = rng.normal(1, 0.06), rng.normal(0, 5)
    shot = shot * np.sqrt(np.clip(image, 20, None))
    return (image - 140) * gain + 140 + offset + drift + 0.75 * shot


def _upsample(
    coarse: np.ndarray, shape_yx: Sequence[int], step_px: float
) -> np.ndarray:
    """Interpolates a grid linearly to all pixels; its nodes are step_px apart."""
    for axis, size in enumerate(shape_yx):
        at = np.arange(size, dtype=np.float32) / np.float32(step_px)
        low = np.minimum(at.astype(int), coarse.shape[axis] - 2)
        weight = np.expand_dims(at - low, 1 - axis).astype(np.float32)
        first = coarse.take(low, axis)
        coarse = first + weight * (coarse.take(low + 1, axis) - first)
    return coarse


class Tissue:
    """Synthetic neuropil: a warped Voronoi diagram of cells, cut into sections.

    All lengths are in pixels. Lengths along z are scaled, so that one cell is visible
    in many successive sections.
    """

    def __init__(self, seed: int, shape_zyx: tuple[int, int, int]) -> None:
        self._shape_yx = shape_zyx[1:]
        rng = generator(seed, _CELLS)
        size = np.array([shape_zyx[0] * _SCALED_PX_PER_SECTION, *shape_zyx[1:]]) + 200
        big = rng.uniform(0, 1, (round(np.prod(size) / 130**3), 3)) * size
        bundles = rng.uniform(0, 1, (round(np.prod(size) / 260**3), 3)) * size
        small = np.repeat(bundles, rng.integers(8, 24, len(bundles)), axis=0)
        small += rng.normal(0, 1, small.shape) * (90, 70, 70)
        centre = (np.concatenate([big, small]) - 100).astype(np.float32)
        # If two centres almost coincide, the search for a pixel's cells can miss the
        # wall between one of these cells and a third cell.
        close = spatial.cKDTree(centre).query_pairs(45, output_type="ndarray")
        self._centre = np.delete(centre, close[:, 1], axis=0)
        self._tree = spatial.cKDTree(self._centre)
        apart = spatial.distance.cdist(self._centre, self._centre)
        self._apart = np.maximum(apart, 1).astype(np.float32)
        count = len(self._centre)
        self._tone = rng.normal(0, 0.16, count).astype(np.float32)
        self._tone[rng.random(count) < 0.05] -= 0.7  # glia are dark
        # The columns are the semi-axes (z, long, short) and the tilt. Small cells
        # contain no mitochondrion.
        axes = rng.uniform(0.8, 1.3, (count, 3)) * (45, 36, 18)
        tilt_rad = rng.uniform(0, np.pi, (count, 1))
        self._mitochondrion = np.hstack([axes, tilt_rad]).astype(np.float32)
        self._has_mitochondrion = np.arange(count) < 0.6 * len(big)
        grid = [shape_zyx[0]] + [size // _BLOCK_PX + 2 for size in self._shape_yx]
        rng = generator(seed, _WARP)
        self._warp_px_yx = [
            26 * _noise(rng, grid, (5, 7, 7)) + 4.5 * _noise(rng, grid, (2, 1.8, 1.8))
            for _ in range(2)
        ]

    def section(self, z: int, shift_px_yx: np.ndarray, grain: np.ndarray) -> np.ndarray:
        """Returns the grey values of section z, float32 (y, x), moved by the shift."""
        padded_yx = [-(-size // _BLOCK_PX) * _BLOCK_PX for size in self._shape_yx]
        y, x = (_upsample(warp[z], padded_yx, _BLOCK_PX) for warp in self._warp_px_yx)
        y += np.arange(padded_yx[0], dtype=np.float32)[:, None] - int(shift_px_yx[0])
        x += np.arange(padded_yx[1], dtype=np.float32) - int(shift_px_yx[1])
        depth = np.float32(z * _SCALED_PX_PER_SECTION)
        cell, wall_px = self._cells(depth, y, x)
        tone = CYTOSOL + self._tone[cell]
        self._add_mitochondria(tone, depth, y, x, cell, wall_px)
        inside = tuple(map(slice, self._shape_yx))
        tone, wall_px = tone[inside] + grain, wall_px[inside]
        membrane = _bump(wall_px, 3.0) - 0.25 * _bump(wall_px, 0.9)
        return 140 + 54 * (tone + membrane * (_MEMBRANE - tone))

    def _cells(
        self, depth: np.floating, *yx: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the cell of each pixel, and the distance to the cell wall in px."""
        blocks = [
            at.reshape(-1, _BLOCK_PX, at.shape[1] // _BLOCK_PX, _BLOCK_PX) for at in yx
        ]
        y, x = (at.swapaxes(1, 2) for at in blocks)
        half = _BLOCK_PX // 2
        middle = np.stack([y[..., half, half], x[..., half, half]], axis=-1)
        distance, nearest = self._tree.query(np.insert(middle, 0, depth, axis=-1), k=6)
        cell = np.broadcast_to(nearest[..., :1, None], y.shape).astype(np.int32)
        wall_px = np.square(distance[..., 1]) - np.square(distance[..., 0])
        wall_px /= 2 * self._apart[nearest[..., 0], nearest[..., 1]]
        busy = wall_px < 2.5 * _BLOCK_PX  # walls elsewhere are too far to be visible
        wall_px = np.broadcast_to(wall_px[..., None, None], y.shape).astype(np.float32)
        y, x = y[busy], x[busy]
        first, second = np.full((2, *y.shape), np.inf, np.float32)
        owner, rival = np.zeros((2, *y.shape), np.int32)
        for index in nearest[busy].astype(np.int32).T[..., None, None]:
            dz, dy, dx = np.moveaxis(self._centre[index], -1, 0)
            square = (depth - dz) ** 2 + (y - dy) ** 2 + (x - dx) ** 2
            nearer, near = square < first, square < second
            np.copyto(rival, np.where(nearer, owner, index), where=near)
            np.copyto(second, np.where(nearer, first, square), where=near)
            np.copyto(owner, index, where=nearer)
            np.copyto(first, square, where=nearer)
        cell[busy] = owner
        wall_px[busy] = (second - first) / (2 * self._apart[owner, rival])
        cell, wall_px = (
            at.swapaxes(1, 2).reshape(yx[0].shape) for at in (cell, wall_px)
        )
        return cell, wall_px

    def _add_mitochondria(
        self, tone: np.ndarray, depth: np.floating, *place: np.ndarray
    ) -> None:
        """Paints mitochondria into tone; place is y, x, cell, wall_px of each pixel."""
        where = np.nonzero(self._has_mitochondrion[place[2]] & (place[3] > 6))
        y, x, cell, _ = (field[where] for field in place)
        deep, long, short, tilt_rad = self._mitochondrion[cell].T
        dz, dy, dx = np.stack([np.full_like(y, depth), y, x]) - self._centre[cell].T
        along, across = _turn(dy, dx, tilt_rad)
        radius = np.sqrt((dz / deep) ** 2 + (along / long) ** 2 + (across / short) ** 2)
        edge_px = (1 - radius) * short
        cristae = np.sin(0.75 * along + 2.5 * np.sin(0.12 * across) + 0.3 * across)
        body = -0.75 + 0.3 * cristae - 0.7 * _bump(edge_px - 1.5, 1.6)
        tone[where] += np.clip(edge_px + 0.5, 0, 0.8) * (body - tone[where])


def _paint_synapse(
    image: np.ndarray,
    fields: tuple[float, float, np.ndarray, np.ndarray, np.ndarray],
    synapse: Synapse,
    dz: int,
    shift_px_yx: np.ndarray,
) -> None:
    """Paints a synapse that is dz sections away into the image (y, x), in place.

    The fields are the mean and the standard deviation of the image, the grain (tones),
    the ripple (px) and the noise (grey values).
    """
    image_mean, image_std, grain, ripple_px, noise = fields
    centre = np.array(synapse.position_vx_zyx[1:]) + shift_px_yx
    towards = np.cos(synapse.angle_rad), np.sin(synapse.angle_rad)
    middle = centre + np.rint(np.multiply(_MIDDLE_PX, towards)).astype(int)
    low, high = np.maximum(middle - _REACH_PX, 0), middle + _REACH_PX + 1
    window = tuple(map(slice, low, np.maximum(high, 0)))
    under = image[window]
    if not under.size:
        return
    # The ripple deforms the coordinates, because real boutons are no perfect ellipses.
    ripple_px_yx = ripple_px[window], ripple_px[::-1, ::-1][window]
    dz_nm = dz * VOXEL_NM_ZYX[0]
    patch = _Patch(synapse, dz_nm, low - centre, ripple_px_yx, grain[window])
    for vesicle in synapse.vesicles:
        patch.add_vesicle(vesicle)
    mean, spread = 0.5 * (under.mean() + image_mean), max(under.std(), image_std)
    under += patch.alpha * (mean + spread * patch.tone + noise[window] - under)


class _Patch:
    """The tone and the opacity, arrays (y, x), of one synapse in one section."""

    def __init__(
        self,
        synapse: Synapse,
        dz_nm: float,
        corner_px_yx: np.ndarray,
        ripple_px_yx: Sequence[np.ndarray],
        grain: np.ndarray,
    ) -> None:
        self._dz_nm, self._corner_px_yx = dz_nm, corner_px_yx
        corner_px_yx = corner_px_yx.astype(np.float32)[:, None, None]
        dy, dx = np.indices(grain.shape, np.float32) + corner_px_yx + ripple_px_yx
        self._dy, self._dx = dy, dx
        along_px, across_px = synapse.bouton_px
        u, v = _turn(dy, dx, synapse.angle_rad)
        radius = np.hypot((u - along_px + ZONE_PX) / along_px, v / across_px)
        inside_px = (math.sqrt(1 - (dz_nm / BOUTON_DEPTH_NM) ** 2) - radius) * along_px
        self.tone = synapse.tone + grain
        self.alpha = np.clip(0.25 * inside_px + 1, 0, 0.9)
        self._blend(_bump(inside_px, 2.0), _MEMBRANE)
        zone = _bump(v, 13) * (u < 0) * float(_bump(dz_nm, 70))
        self._blend(zone * _bump(inside_px + 3.6, 1.5), 0.6)  # the cleft
        self._blend(zone * _bump(inside_px + 7.5, 2.4), _MEMBRANE)  # postsynaptic
        u, v = u / synapse.t_bar_scale, np.abs(v / synapse.t_bar_scale)
        pedestal = np.clip(2.2 - v / 2, 0, 1) * np.clip(3.5 - np.abs(u + 4) / 2, 0, 1)
        platform = np.clip(5 - v / 2, 0, 1) * np.clip(2 - np.abs(u - 1) / 2, 0, 1)
        self._blend(float(_bump(dz_nm, 50)) * np.maximum(pedestal, platform), _DENSITY)

    def add_vesicle(self, vesicle: np.ndarray) -> None:
        """Adds the part of a vesicle (a row of `Synapse.vesicles`) in the section."""
        z_nm, y_nm, x_nm, long_nm, short_nm, tilt_rad, core_ratio, darkness = (
            vesicle.tolist()
        )
        half_nm = VOXEL_NM_ZYX[0] / 2
        off_nm = abs(z_nm - self._dz_nm)
        shown_nm = min(half_nm, off_nm + short_nm) - max(-half_nm, off_nm - short_nm)
        opacity = (max(shown_nm, 0) / (2 * min(short_nm, half_nm))) ** 0.7
        if opacity < 0.15:
            return
        # A section has a thickness, and its image is a projection. The projection of a
        # vesicle is as wide as the widest cut through the vesicle in this section.
        widest = math.sqrt(1 - (max(off_nm - half_nm, 0) / short_nm) ** 2)
        widest_px = widest / VOXEL_NM_ZYX[1]
        long_px, short_px = widest_px * long_nm, widest_px * short_nm
        y_px, x_px = y_nm / VOXEL_NM_ZYX[1], x_nm / VOXEL_NM_ZYX[2]
        box_px = np.array([y_px, x_px]) - self._corner_px_yx
        reach_px = long_px + 8  # includes the largest ripple
        first = np.maximum(box_px - reach_px, 0).astype(int)
        window = tuple(map(slice, first, np.maximum(box_px + reach_px, 0).astype(int)))
        dy, dx = self._dy[window] - y_px, self._dx[window] - x_px
        along, across = _turn(dy, dx, tilt_rad)
        radius = np.hypot(along / long_px, across / short_px)
        inside_px = (1 - radius) * short_px
        self._blend(0.7 * opacity * np.clip(inside_px + 0.5, 0, 1), 0.8, window)
        self._blend(0.9 * opacity * _bump(inside_px - 0.8, 1.1), -1.3, window)
        if core_ratio > 0:
            core = np.clip(0.5 * (core_ratio - radius) * short_px + 0.5, 0, 1)
            self._blend(opacity * core, 0.4 - 2.5 * darkness, window)

    def _blend(
        self, weight: np.ndarray, target: float, window: tuple[slice, ...] = ()
    ) -> None:
        self.tone[window] += weight * (target - self.tone[window])
        self.alpha[window] = np.maximum(self.alpha[window], weight)


def _turn(
    dy: np.ndarray, dx: np.ndarray, angle_rad: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates along a direction and across it."""
    cosine, sine = (
        np.cos(angle_rad, dtype=np.float32),
        np.sin(angle_rad, dtype=np.float32),
    )
    return dy * cosine + dx * sine, dx * cosine - dy * sine


def _bump(x: np.ndarray | float, width: float) -> Any:
    return np.exp(-((x / width) ** 2))

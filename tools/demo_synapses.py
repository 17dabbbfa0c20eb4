# SPDX-License-Identifier: Apache-2.0
"""Draws the geometry of synapses of six neurotransmitters at random.

The module `demo_em` paints these synapses. The synaptic vesicles of the six classes
differ roughly as the literature describes: small, clear and round for acetylcholine,
flattened for GABA, with dense cores for the amines. The numbers are invented for a
demonstration and say nothing about real neurotransmitters.
"""

from dataclasses import dataclass

import numpy as np

VOXEL_NM_ZYX = (40, 4, 4)
# Two numbers set how difficult the classes are to tell apart. The first is the fraction
# of synapses that are drawn as a mixture with another class. The second scales how much
# a synapse differs from its class (1 means the spreads given below).
AMBIGUOUS_FRACTION = 0.05
JITTER = 0.4

# Each row is a class. The columns are the number of vesicles per synapse, the fraction
# with a dense core, the diameter (nm) and the aspect ratio of clear vesicles, the
# diameter (nm) of dense-core vesicles, the ratio of core to vesicle diameter, and the
# darkness of the core.
_PROFILES = {
    "gaba": (60, 0.0, 40, 2.40, 66, 0.50, 0.8),
    "acetylcholine": (90, 0.0, 34, 1.05, 66, 0.50, 0.8),
    "glutamate": (30, 0.0, 62, 1.05, 66, 0.50, 0.8),
    "serotonin": (34, 0.95, 40, 1.10, 54, 0.40, 1.4),
    "octopamine": (14, 0.95, 38, 1.10, 94, 0.78, 1.4),
    "dopamine": (26, 0.95, 38, 1.10, 66, 0.66, 0.5),
}
CLASSES = tuple(_PROFILES)
# The logarithmic standard deviations of the columns, between the synapses of a class
# and between the vesicles of a synapse.
_SPREAD_SYNAPSE = np.array([0.25, 0.25, 0.08, 0.08, 0.07, 0.12, 0.18])
_SPREAD_VESICLE = np.array([0.00, 0.00, 0.10, 0.12, 0.09, 0.12, 0.10])

CYTOSOL = 0.45  # a tone; `demo_em` explains tones
BOUTON_DEPTH_NM = 150.0  # semi-axis along z; a bouton is visible in seven sections
ZONE_PX = 8.0  # from the position of the synapse to the presynaptic membrane
_SYNAPSE = 1  # key of a random stream; demo_em and make_demo have the others


@dataclass(frozen=True)
class Synapse:
    """The geometry of one synapse; the angle points from the cleft into the bouton."""

    position_vx_zyx: tuple[int, int, int]
    angle_rad: float
    bouton_px: tuple[float, float]  # semi-axes along and across the angle
    tone: float
    t_bar_scale: float
    # Shape (n, 8). The columns are the offset z, y, x (nm), the long and the short
    # semi-axis (nm), the tilt (rad), the ratio of core to vesicle diameter (0 for a
    # clear vesicle) and the darkness of the core. The semi-axis along z equals the
    # short semi-axis.
    vesicles: np.ndarray


def generator(seed: int, *key: int) -> np.random.Generator:
    """Returns the random stream of a key; streams of other keys are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_synapse(
    seed: int, index: int, class_name: str, position_vx_zyx: tuple[int, int, int]
) -> Synapse:
    """Returns the geometry of the synapse with this index, drawn at random.

    The geometry depends on the seed and the index, and not on the other synapses.
    """
    rng = generator(seed, _SYNAPSE, index)
    profile = np.array(_PROFILES[class_name])
    other = _PROFILES[rng.choice([name for name in CLASSES if name != class_name])]
    share = rng.uniform(0.3, 0.6) * (rng.random() < AMBIGUOUS_FRACTION)
    profile = (1 - share) * profile + share * np.array(other)
    profile *= np.exp(JITTER * _SPREAD_SYNAPSE * rng.standard_normal(profile.size))
    count = max(3, round(profile[0]))
    strayed = JITTER * _SPREAD_VESICLE * rng.standard_normal((count, profile.size))
    _, _, clear_nm, clear_aspect, dense_nm, core, darkness = (
        profile * np.exp(strayed)
    ).T
    dense = rng.random(count) < profile[1]
    diameter_nm = np.where(dense, dense_nm, clear_nm)
    aspect = np.where(dense, 1.05, np.maximum(clear_aspect, 1))
    vesicles = np.zeros((count, 8))
    vesicles[:, 3] = 0.5 * diameter_nm * np.sqrt(aspect)
    vesicles[:, 4] = 0.5 * diameter_nm / np.sqrt(aspect)
    vesicles[:, 5] = rng.uniform(0, np.pi, count)
    vesicles[:, 6] = np.where(dense, np.minimum(core, 0.85), 0)
    vesicles[:, 7] = np.minimum(darkness, 1.1)
    angle_rad = rng.uniform(0, 2 * np.pi)
    bouton_px = (rng.uniform(21, 25), rng.uniform(24, 30))
    vesicles = _scatter(rng, vesicles, angle_rad, bouton_px)
    tone, t_bar_scale = CYTOSOL + rng.normal(0, 0.15), rng.uniform(0.8, 1.15)
    return Synapse(position_vx_zyx, angle_rad, bouton_px, tone, t_bar_scale, vesicles)


def _scatter(
    rng: np.random.Generator,
    vesicles: np.ndarray,
    angle_rad: float,
    bouton_px: tuple[float, float],
) -> np.ndarray:
    """Places vesicles in a bouton, 25 to 130 nm from the position of the synapse.

    Vesicles overlap only a little. The function returns the vesicles that could be
    placed, with their offsets filled in.
    """
    along_nm, across_nm = np.multiply(bouton_px, VOXEL_NM_ZYX[1:])
    bouton_nm = np.array([BOUTON_DEPTH_NM, along_nm, across_nm])
    centre_nm = np.array([0, along_nm - ZONE_PX * VOXEL_NM_ZYX[1], 0])
    # Large vesicles are placed first, because they would find no space later.
    vesicles = vesicles[np.argsort(-vesicles[:, 3], kind="stable")]
    tries = rng.uniform(-1, 1, (len(vesicles), 30, 3)) * bouton_nm + centre_nm
    room_nm = bouton_nm - 0.8 * vesicles[:, None, 3:4]
    fits = (((tries - centre_nm) / room_nm) ** 2).sum(axis=2) < 1
    distance_nm = np.linalg.norm(tries, axis=2)
    fits &= (distance_nm > 25 + vesicles[:, 3:4]) & (distance_nm < 130)
    from scipy import spatial  # takes half a second to import

    kept: list[int] = []
    for index, vesicle in enumerate(vesicles):
        places, placed = tries[index, fits[index]], vesicles[kept]
        gap_nm = spatial.distance.cdist(places, placed[:, :3])
        free = (gap_nm > 0.75 * (vesicle[3] + placed[:, 3])).all(axis=1)
        if free.any():
            vesicle[:3] = places[free.argmax()]
            kept.append(index)
    vesicles = vesicles[kept]
    cosine, sine = np.cos(angle_rad), np.sin(angle_rad)
    vesicles[:, 1:3] = vesicles[:, 1:3] @ np.array([[cosine, sine], [-sine, cosine]])
    return vesicles

# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.ground_truth import leakage
from synister_jax.tables import synapses

SHAPE, VOXEL = (4, 20, 30), (40.0, 4.0, 4.0)


def table(count: int, extent_vx: tuple[int, int, int], seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    position = rng.uniform(0, np.multiply(extent_vx, VOXEL), (count, 3))
    position[: count // 4] = np.rint(position[: count // 4] / VOXEL) * VOXEL
    parts = np.array([*synapses.PARTS, None], object)[rng.integers(0, 4, count)]
    neuron = rng.integers(0, 30, count)
    columns = {"synapse_id": np.arange(count)}
    columns |= dict(zip(synapses.POSITION, position.T, strict=True))
    columns |= {"neuron_id": 2**60 + neuron}
    known = np.array(["gaba", "dopamine", None, "dopamine+gaba"], object)
    columns |= {"neurotransmitter": pa.array(known[np.minimum(neuron % 9, 3)])}
    columns |= {"hemilineage": np.char.add("H", (neuron % 7).astype(str))}
    columns |= {"split_a": pa.array(parts, pa.string())}
    return synapses.conform(pa.table(columns), "made here")


@pytest.mark.parametrize("extent_vx", [(8, 60, 90), (40, 300, 400), (1, 5, 5)])
def test_overlaps_equal_all_pairs(extent_vx: tuple[int, int, int]) -> None:
    rows = table(400, extent_vx)
    found = leakage.measure(rows, "a", SHAPE, VOXEL)["crops"]
    position = synapses.positions_nm_zyx(rows)
    half = np.array([2, 10, 15]) * VOXEL
    start = np.rint((position - half) / VOXEL)
    apart = np.abs(start[:, None] - start[None])
    shares = (apart < SHAPE).all(axis=-1)
    label = synapses.labels(rows, ["gaba", "dopamine"]) >= 0
    part = np.array(rows["split_a"].to_pylist(), object)
    affected = np.zeros(len(rows), bool)
    for pair, counts in found["overlapping"].items():
        one, other = pair.split(" and ")
        for own, others in ((one, other), (other, one)):
            mine, theirs = label & (part == own), label & (part == others)
            hit = mine & (shares & theirs[None]).any(axis=1)
            assert counts[own] == hit.sum()
            affected |= hit
    assert found["synapses"] == affected.sum()
    assert len(found["overlapping"]) == 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_crops_that_touch_share_nothing(axis: int) -> None:
    start = np.zeros((1, 3), int)
    for distance, shares in ((SHAPE[axis] - 1, True), (SHAPE[axis], False)):
        for sign in (1, -1):
            other = start.copy()
            other[0, axis] = sign * distance
            [found] = leakage.overlapping(start, other, SHAPE)
            assert found == shares


def test_counts() -> None:
    rows = table(400, (40, 300, 400))
    found = leakage.measure(rows, "a", SHAPE, VOXEL)
    json.dumps(found)
    listed = rows.to_pylist()
    for name in ("gaba", "dopamine"):
        for part in synapses.PARTS:
            mine = [
                row
                for row in listed
                if row["neurotransmitter"] == name and row["split_a"] == part
            ]
            cell = found["classes"][name][part]
            assert cell["synapses"] == len(mine)
            assert cell["neurons"] == len({row["neuron_id"] for row in mine})
    counted = [r for r in listed if r["split_a"] and r["neurotransmitter"]]
    counted = [r for r in counted if "+" not in r["neurotransmitter"]]
    parts: dict[int, set] = {}
    for row in counted:
        parts.setdefault(row["neuron_id"], set()).add(row["split_a"])
    shared = {neuron for neuron, its in parts.items() if len(its) > 1}
    told = found["in_several_parts"]["neuron_id"]
    assert told["values"] == len(shared) and set(told["named"]) <= shared
    assert told["synapses"] == sum(row["neuron_id"] in shared for row in counted)
    assert found["in_several_parts"]["cell_type"]["values"] == 0
    without = [row for row in listed if row["split_a"] is None]
    assert sum(found["in_no_part"].values()) == len(without)


def test_mistakes() -> None:
    rows = table(20, (8, 60, 90))
    with pytest.raises(UserError, match="no split 'b'"):
        leakage.measure(rows, "b", SHAPE, VOXEL)
    with pytest.raises(UserError, match="must be positive"):
        leakage.measure(rows, "a", (0, 1, 1), VOXEL)

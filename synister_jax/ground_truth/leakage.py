# SPDX-License-Identifier: Apache-2.0
"""Measures what the parts of a split share: neurons, cell types, regions and voxels."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError
from synister_jax.em import spaces
from synister_jax.ground_truth import splits
from synister_jax.tables import synapses

_SHOWN = 20


def measure(
    table: pa.Table,
    split: str,
    crop_shape_zyx: Sequence[int],
    voxel_size_nm_zyx: Sequence[float],
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns numbers about the column `split_<split>` of a synapse table, for JSON.

    A row counts as being in a part only if it has a part and exactly one known
    neurotransmitter, which is one of `classes`.

    Args:
      table: the synapse table.
      split: the name of the split.
      crop_shape_zyx: the shape of the crops, in voxels.
      voxel_size_nm_zyx: the size of a voxel, in nm.
      classes: the classes; by default, all classes in the table.

    Returns:
      split: the name of the split.
      classes: for each class and part, the synapses, the neurons, and the fraction of
        the class's synapses that is in the part.
      in_no_part: the number of rows in no part, for each reason.
      part_without_class: the number of rows that have a part but no class.
      in_several_parts: for each column of groups, how many values have synapses in more
        than one part, how many synapses these are, and some of the values.
      crops: how many synapses have a crop that shares a voxel with a crop of another
        part, for each pair of parts and for all parts together.

    Raises:
      UserError: a size is not positive, or the table does not have the split.
    """
    classes = splits.classes_of(table) if classes is None else tuple(classes)
    if not all(n > 0 for n in (*crop_shape_zyx, *voxel_size_nm_zyx)):
        raise UserError(
            "--crop_shape_zyx and --voxel_size_nm_zyx must be positive on every axis"
        )
    part = _parts(table, split)
    labels = synapses.labels(table, classes)
    counted = (part >= 0) & (labels >= 0)
    rows = np.flatnonzero(counted)
    # The function does not know the volume, and takes its offset as 0 nm.
    starts = spaces.crop_starts_vx_zyx(
        synapses.positions_nm_zyx(table)[rows], crop_shape_zyx, voxel_size_nm_zyx
    )
    return {
        "split": split,
        "classes": _per_class(table, classes, part, labels, rows),
        "in_no_part": _in_no_part(table, part, labels),
        "part_without_class": int(((part >= 0) & (labels < 0)).sum()),
        "in_several_parts": {
            column: _in_several_parts(table[column].take(rows), part[rows])
            for column in synapses.GROUP_COLUMNS.values()
        },
        "crops": {
            "shape_zyx": list(map(int, crop_shape_zyx)),
            "voxel_size_nm_zyx": list(map(float, voxel_size_nm_zyx)),
            **_crops(starts, part[rows], crop_shape_zyx),
        },
    }


def overlapping(
    starts_vx_zyx: np.ndarray, others_vx_zyx: np.ndarray, crop_shape_zyx: Sequence[int]
) -> np.ndarray:
    """Returns which crops share a voxel with at least one of the other crops.

    Two crops share a voxel when their starts differ by less than the shape of a crop on
    every axis.

    Args:
      starts_vx_zyx: [n, 3] first voxel of each crop.
      others_vx_zyx: [m, 3] first voxel of each of the other crops.
      crop_shape_zyx: the shape of all crops, in voxels.

    Returns:
      [n] bool.
    """
    from scipy import spatial  # takes half a second to import

    if not len(starts_vx_zyx) or not len(others_vx_zyx):
        return np.zeros(len(starts_vx_zyx), bool)
    shape = np.asarray(crop_shape_zyx)
    # The synapses of one T-bar have equal positions. A k-d tree over many equal points
    # would be as slow as a list, so each position is used only once.
    places, place_of = np.unique(starts_vx_zyx, axis=0, return_inverse=True)
    tree = spatial.cKDTree(np.unique(others_vx_zyx, axis=0) / shape)
    # Distances are in units of the shape. Crops that touch without a shared voxel are 1
    # apart. Crops that share a voxel are at most 1 - 1/shape apart.
    farthest = 1 - 1 / (2 * shape.max())
    distance, _ = tree.query(places / shape, p=math.inf, distance_upper_bound=farthest)
    return np.isfinite(distance)[place_of]


def _parts(table: pa.Table, split: str) -> np.ndarray:
    part = np.full(len(table), -1)
    for number, name in enumerate(synapses.PARTS):
        part[synapses.in_part(table, split, name)] = number
    return part


def _per_class(
    table: pa.Table,
    classes: Sequence[str],
    part: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
) -> dict[str, dict[str, Any]]:
    cell = labels[rows] * len(synapses.PARTS) + part[rows]
    shape = (len(classes), len(synapses.PARTS))
    counts = np.bincount(cell, minlength=math.prod(shape)).reshape(shape)
    ids = table["neuron_id"].take(rows)
    known = ids.is_valid().to_numpy()
    pairs = pa.table({"cell": cell[known], "neuron": ids.drop_null()})
    pairs = pairs.group_by(["cell", "neuron"]).aggregate([])
    neurons = np.bincount(pairs["cell"].to_numpy(), minlength=math.prod(shape))
    neurons = neurons.reshape(shape)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {
        name: {
            part_name: {
                "synapses": int(counts[k, p]),
                "neurons": int(neurons[k, p]),
                "fraction": float(fractions[k, p]),
            }
            for p, part_name in enumerate(synapses.PARTS)
        }
        for k, name in enumerate(classes)
    }


def _in_no_part(
    table: pa.Table, part: np.ndarray, labels: np.ndarray
) -> dict[str, int]:
    known = table["neurotransmitter"]
    several = pc.fill_null(pc.match_substring(known, "+"), False).to_numpy()
    unknown = known.is_null().to_numpy()
    without = part < 0
    return {
        "no_known_neurotransmitter": int((without & unknown).sum()),
        "several_neurotransmitters": int((without & several).sum()),
        "other_class": int((without & ~unknown & ~several & (labels < 0)).sum()),
        "held_out_or_no_group": int((without & (labels >= 0)).sum()),
    }


def _in_several_parts(column: pa.ChunkedArray, part: np.ndarray) -> dict[str, Any]:
    known = column.is_valid().to_numpy()
    pairs = pa.table({"value": column.drop_null(), "part": part[known]})
    of_value = pairs.group_by("value").aggregate(
        [("part", "count_distinct"), ("part", "count")]
    )
    shared = of_value.filter(pc.greater(of_value["part_count_distinct"], 1))
    shared = shared.sort_by([("part_count", "descending"), ("value", "ascending")])
    return {
        "values": len(shared),
        "synapses": pc.sum(shared["part_count"]).as_py() or 0,
        "named": shared["value"][:_SHOWN].to_pylist(),
    }


def _crops(
    starts_vx_zyx: np.ndarray, part: np.ndarray, crop_shape_zyx: Sequence[int]
) -> dict[str, Any]:
    affected = np.zeros(len(part), bool)
    pairs: dict[str, dict[str, int]] = {}
    for pair in itertools.combinations(range(len(synapses.PARTS)), 2):
        names = [synapses.PARTS[p] for p in pair]
        entry = pairs.setdefault(" and ".join(names), {})
        for name, own, other in zip(names, pair, pair[::-1], strict=True):
            rows = np.flatnonzero(part == own)
            others = starts_vx_zyx[part == other]
            shares = overlapping(starts_vx_zyx[rows], others, crop_shape_zyx)
            affected[rows[shares]] = True
            entry[name] = int(shares.sum())
    return {"overlapping": pairs, "synapses": int(affected.sum())}

# SPDX-License-Identifier: Apache-2.0
"""What the parts of a split share: neurons, cell types, regions, voxels."""

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
    """Numbers on `split_<split>` of a synapse table, ready for JSON.

    Only rows with a part and one known neurotransmitter of `classes` count as being in
    a part.

    Args:
      table: synapse table.
      split: name of the split.
      crop_shape_zyx: voxels.
      voxel_size_nm_zyx: nm.
      classes: default all in the table.

    Returns:
      classes: per class and part synapses, neurons and fraction of the synapses.
      in_no_part: rows in no part, by reason.
      part_without_class: rows in a part that have no class.
      in_several_parts: per column how many values have synapses in more than one part,
        how many synapses these are, and some of the values.
      crops: of each pair of parts, and of all, the synapses of a part whose crop shares
        a voxel with a crop of another part.
    """
    classes = splits.classes_of(table) if classes is None else tuple(classes)
    if not all(n > 0 for n in (*crop_shape_zyx, *voxel_size_nm_zyx)):
        raise UserError("--crop_shape_zyx and --voxel_size_nm_zyx must be positive")
    part = _parts(table, split)
    labels = synapses.labels(table, classes)
    counted = (part >= 0) & (labels >= 0)
    rows = np.flatnonzero(counted)
    # In a volume that begins at 0 nm.
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
    """[n] bool: whether a crop at `starts` [n, 3] shares a voxel with one at `others`.

    Two crops do when their starts differ by less than the shape on every axis.
    """
    from scipy import spatial  # half a second to import

    if not len(starts_vx_zyx) or not len(others_vx_zyx):
        return np.zeros(len(starts_vx_zyx), bool)
    shape = np.asarray(crop_shape_zyx)
    # A k-d tree over many equal points is a list; synapses of one T-bar are equal.
    places, place_of = np.unique(starts_vx_zyx, axis=0, return_inverse=True)
    tree = spatial.cKDTree(np.unique(others_vx_zyx, axis=0) / shape)
    # In units of the shape, starts that touch without sharing are 1 apart, and those
    # that share a voxel at most 1 - 1/shape.
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

# SPDX-License-Identifier: Apache-2.0
"""Serves predicted synapses as precomputed annotations of Neuroglancer.

The annotations are computed for each request. Every row with a position becomes a point
in nm of the volume frame, and the row number becomes the annotation id. A point has two
properties: `probability` (float32), the probability of the called class, or 0 without a
prediction; and `nt` (uint8), the index of the called class, or the number of classes
without a prediction. The ids of synapses and neurons are too long for properties, so
they are related objects.

Format: google/neuroglancer, src/datasource/precomputed/annotations.md (@type
neuroglancer_annotations_v1).
"""

import dataclasses
import functools
import json
import pathlib
import urllib.parse
from typing import Any

import numpy as np

from synister_jax.base import files
from synister_jax.pages import neurons_table
from synister_jax.tables import predictions, synapses

NEUROGLANCER = "https://neuroglancer-demo.appspot.com/"
RELATIONSHIPS = {"neuron": "neuron_id", "synapse": "synapse_id"}
# The palette c0 to c9 of style.css, for a dark background.
COLOURS = (
    *("#3d8fd1", "#e8a72b", "#2bb38a", "#d995bb", "#e8793a"),
    *("#9bdcff", "#c8649d", "#b3b34d", "#c3cad1", "#7d8894"),
)
_NONE = "#ffffff"  # for points without a prediction
_SEED = 0
# In this format, larger properties come first, and a row is a multiple of 4 bytes.
_ROW = np.dtype(
    [("xyz", "<f4", 3), ("probability", "<f4"), ("nt", "u1"), ("padding", "u1", 3)]
)


@dataclasses.dataclass(frozen=True)
class _Points:
    """The n rows that have a position."""

    classes: tuple[str, ...]
    ids: np.ndarray  # rows of the table, ascending, [n] uint64
    encoded: np.ndarray  # [n] of _ROW
    related: dict[str, np.ndarray]  # [n] int64; negative if the row has no id


def info(predictions_path: pathlib.Path) -> dict[str, Any]:
    """Returns the `info` of the annotations; one spatial cell holds all points.

    Args:
      predictions_path: The Feather file with the predictions of a job.
    """
    points = _points(predictions_path)
    xyz = points.encoded["xyz"].astype(np.float64)
    low = np.floor(xyz.min(axis=0)) if len(xyz) else np.zeros(3)
    high = np.floor(xyz.max(axis=0)) + 1 if len(xyz) else np.ones(3)
    classes = points.classes
    return {
        "@type": "neuroglancer_annotations_v1",
        "dimensions": {name: [1e-9, "m"] for name in "xyz"},
        "lower_bound": low.tolist(),
        "upper_bound": high.tolist(),
        "annotation_type": "POINT",
        "properties": [
            {
                "id": "probability",
                "type": "float32",
                "description": "probability of the called class",
            },
            {
                "id": "nt",
                "type": "uint8",
                "description": "called class",
                "enum_values": list(range(len(classes) + 1)),
                "enum_labels": [*classes, "no prediction"],
            },
        ],
        "relationships": [{"id": name, "key": name} for name in RELATIONSHIPS],
        "by_id": {"key": "by_id"},
        "spatial": [
            {
                "key": "spatial0",
                "grid_shape": [1, 1, 1],
                "chunk_size": (high - low).tolist(),
                "limit": max(1, len(xyz)),
            }
        ],
    }


def spatial(predictions_path: pathlib.Path) -> bytes:
    """Returns all points, encoded as the cell 0_0_0 of the only level."""
    points = _points(predictions_path)
    # The viewer may show only the first annotations of a cell. In random order, these
    # annotations represent all of them.
    order = np.random.default_rng(_SEED).permutation(len(points.ids))
    return _several(points, order)


def by_id(predictions_path: pathlib.Path, annotation_id: int) -> bytes | None:
    """Returns one point with its related objects, or None without a position."""
    points = _points(predictions_path)
    if not 0 <= annotation_id < 1 << 63:
        return None
    place = int(np.searchsorted(points.ids, np.uint64(annotation_id)))
    if place == len(points.ids) or points.ids[place] != annotation_id:
        return None
    parts = [points.encoded[place].tobytes()]
    for name in RELATIONSHIPS:
        objects = points.related[name][place : place + 1]
        objects = objects[objects >= 0]
        parts += [np.uint32(len(objects)).astype("<u4").tobytes()]
        parts += [objects.astype("<u8").tobytes()]
    return b"".join(parts)


def related(
    predictions_path: pathlib.Path, relationship: str, object_id: int
) -> bytes | None:
    """Returns the encoded points of a neuron or synapse id, or None without points.

    Args:
      predictions_path: The Feather file with the predictions of a job.
      relationship: A key of `RELATIONSHIPS`.
      object_id: The id of the neuron or of the synapse.
    """
    points = _points(predictions_path)
    if relationship not in points.related or not 0 <= object_id < 1 << 63:
        return None
    order = np.flatnonzero(points.related[relationship] == object_id)
    return _several(points, order) if len(order) else None


def link(
    predictions_path: pathlib.Path, view_url: str, neuroglancer: str = NEUROGLANCER
) -> str:
    """Returns the address that opens the volume and the points in Neuroglancer.

    The points are coloured by class.

    Args:
      predictions_path: The Feather file with the predictions of a job. The file
        `predictions.json` must be next to it.
      view_url: The address from which the browser reads the volume and annotations.
      neuroglancer: The address of the viewer.
    """
    points = _points(predictions_path)
    record = files.read_json(predictions_path.with_name("predictions.json"))
    voxel_nm = np.array(record["voxel_size_nm_zyx"][::-1])
    offset_vx = np.array(record["offset_nm_zyx"][::-1]) / voxel_nm
    dimensions = {
        name: [size * 1e-9, "m"] for name, size in zip("xyz", voxel_nm, strict=True)
    }
    # An image of this format starts at a whole voxel. The transform adds the part of
    # the offset that is smaller than a voxel.
    left = offset_vx - np.round(offset_vx)
    image: dict[str, Any] = {"url": f"precomputed://{view_url}/volume"}
    if np.abs(left).max() > 1e-6:
        matrix = np.column_stack([np.eye(3), left])
        image["transform"] = {
            "matrix": matrix.tolist(),
            "outputDimensions": dimensions,
        }
    state: dict[str, Any] = {
        "dimensions": dimensions,
        "crossSectionScale": 1,
        "layers": [
            {"type": "image", "name": "volume", "source": image},
            {
                "type": "annotation",
                "name": "synapses",
                "source": f"precomputed://{view_url}/annotations",
                "shader": _shader(points.classes),
                "tab": "annotations",
            },
        ],
        "selectedLayer": {"visible": True, "layer": "synapses"},
        "layout": "xy-3d",
    }
    if len(points.ids):
        xyz = points.encoded["xyz"].astype(np.float64)
        # The view opens at the synapse that is nearest to the median position. The
        # median position itself may lie where no synapse is.
        away = np.abs(xyz - np.median(xyz, axis=0)).max(axis=1)
        state["position"] = (xyz[away.argmin()] / voxel_nm).round(2).tolist()
        extent = np.ptp(xyz, axis=0).max() / voxel_nm.min()
        state["projectionScale"] = max(256.0, float(2.5 * extent))
    text = json.dumps(state, separators=(",", ":"))
    return f"{neuroglancer.rstrip('/')}/#!{urllib.parse.quote(text, safe=',:/')}"


def _shader(classes: tuple[str, ...]) -> str:
    lines = ["void main() {", "  setPointMarkerSize(9.0);"]
    chosen = [COLOURS[c.colour] for c in neurons_table.legend(classes)]
    for place, colour in enumerate([*chosen, _NONE]):
        # Each class has its own line with its name, so that users can change a colour
        # in the viewer.
        name = classes[place] if place < len(classes) else "no prediction"
        red, green, blue = bytes.fromhex(colour[1:])
        mixed = ", ".join(f"{part / 255:.3f}" for part in (red, green, blue))
        safe = "".join(c if c.isalnum() or c in " _-" else "?" for c in name)
        lines += [f"  if (prop_nt() == {place}u) setColor(vec3({mixed}));  // {safe}"]
    return "\n".join([*lines, "}"]) + "\n"


def _several(points: _Points, order: np.ndarray) -> bytes:
    count = np.uint64(len(order)).astype("<u8")
    rows, ids = points.encoded[order], points.ids[order].astype("<u8")
    return count.tobytes() + rows.tobytes() + ids.tobytes()


def _points(path: pathlib.Path) -> _Points:
    return _load(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _load(path: pathlib.Path, _changed: int) -> _Points:
    source = predictions.open(path)
    classes = source.classes
    names = map(predictions.probability_column, classes)
    columns = [*synapses.POSITION, *RELATIONSHIPS.values(), *names]
    first, pieces = 0, []
    for table in source.tables(columns):
        zyx = synapses.positions_nm_zyx(table)
        placed = np.isfinite(zyx).all(axis=1)
        values = predictions.probabilities(table)[placed]
        called = predictions.called_of(values)
        encoded = np.zeros(len(called), _ROW)
        encoded["xyz"] = zyx[placed, ::-1]
        encoded["probability"] = np.where(called < 0, 0, values.max(axis=1))
        encoded["nt"] = np.where(called < 0, len(classes), called)
        ids = first + np.flatnonzero(placed).astype(np.uint64)
        related = [
            table[name].fill_null(-1).to_numpy()[placed]
            for name in RELATIONSHIPS.values()
        ]
        pieces.append((ids, encoded, *related))
        first += len(table)
    ids, encoded, *related = map(np.concatenate, zip(*pieces, strict=True))
    return _Points(
        classes, ids, encoded, dict(zip(RELATIONSHIPS, related, strict=True))
    )

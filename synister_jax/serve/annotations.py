# SPDX-License-Identifier: Apache-2.0
"""Predicted synapses as Neuroglancer's precomputed annotations, computed when asked.

Every row with a position is a point in nm of the volume's frame; its annotation id is
its row. Properties: `probability` float32 of the called class (0 where there is no
prediction) and `nt` uint8, place of that class (the number of classes where there is
none). The ids of synapse and neuron, too long for a property, are related objects.

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
# Of style.css's palette c0 to c9, as seen on a dark ground.
COLOURS = (
    *("#3d8fd1", "#e8a72b", "#2bb38a", "#d995bb", "#e8793a"),
    *("#9bdcff", "#c8649d", "#b3b34d", "#c3cad1", "#7d8894"),
)
_NONE = "#ffffff"  # no class
_SEED = 0
# Larger properties first, and each row a multiple of 4 bytes, as the format wants.
_ROW = np.dtype(
    [("xyz", "<f4", 3), ("probability", "<f4"), ("nt", "u1"), ("padding", "u1", 3)]
)


@dataclasses.dataclass(frozen=True)
class _Points:
    """The rows that have a position; n of them."""

    classes: tuple[str, ...]
    ids: np.ndarray  # rows of the table, ascending, [n] uint64
    encoded: np.ndarray  # [n] of _ROW
    related: dict[str, np.ndarray]  # [n] int64, below 0 for none


def info(predictions_path: pathlib.Path) -> dict[str, Any]:
    """The collection's `info`: one cell of space holds every row."""
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
                "description": "of the called class",
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
    """All points: cell 0_0_0 of the only level."""
    points = _points(predictions_path)
    # The viewer thins out a cell by showing its first annotations only.
    order = np.random.default_rng(_SEED).permutation(len(points.ids))
    return _several(points, order)


def by_id(predictions_path: pathlib.Path, annotation_id: int) -> bytes | None:
    """One point with its related objects; None where the row has no position."""
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
    """The points of a neuron, or of a synapse id; None where there are none."""
    points = _points(predictions_path)
    if relationship not in points.related or not 0 <= object_id < 1 << 63:
        return None
    order = np.flatnonzero(points.related[relationship] == object_id)
    return _several(points, order) if len(order) else None


def link(
    predictions_path: pathlib.Path, view_url: str, neuroglancer: str = NEUROGLANCER
) -> str:
    """Neuroglancer's address with the volume and the points coloured by class.

    Args:
      view_url: where the browser reaches this job's volume and annotations.
    """
    points = _points(predictions_path)
    record = files.read_json(predictions_path.with_name("predictions.json"))
    voxel_nm = np.array(record["voxel_size_nm_zyx"][::-1])
    offset_vx = np.array(record["offset_nm_zyx"][::-1]) / voxel_nm
    dimensions = {
        name: [size * 1e-9, "m"] for name, size in zip("xyz", voxel_nm, strict=True)
    }
    # An image starts at a whole voxel; what is left of its offset is put here.
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
        # At a synapse, not between: the one nearest to the middle of them all.
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
        # A word of its own for each class, for who changes a colour in the viewer.
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

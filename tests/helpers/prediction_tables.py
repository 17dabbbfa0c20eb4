# SPDX-License-Identifier: Apache-2.0
"""Made-up and random prediction tables, and helpers to write and read files."""

import csv
import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax import export
from synister_jax.exchange.export_files import ExportOptions
from synister_jax.tables import predictions, synapses
from tests.helpers.small_data import CLASSES

SIX = ("gaba", "acetylcholine", "glutamate", "serotonin", "octopamine", "dopamine")
# As large as FlyWire's root ids: as floats, neighbouring ids would be equal.
NEURON = 720_575_940_600_000_001
# Nine synapses of two neurons, and a synapse without a neuron.
NEURONS = [NEURON] * 5 + [NEURON + 1] * 4 + [None]
CALLS = ["gaba", "gaba", "dopamine", None, "gaba", "serotonin", "glutamate"]
CALLS += ["serotonin", "acetylcholine", "gaba"]
VOXEL = ExportOptions(voxel_size_nm_zyx=(40, 4, 4))


def table_of(
    probabilities: Sequence[Sequence[float]] | np.ndarray,
    columns: Mapping[str, Any],
    classes: Sequence[str] = CLASSES,
    about: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Returns predictions with these probabilities.

    If they are not given, ids are row numbers, positions are 0, and other columns null.
    """
    values = np.asarray(probabilities, np.float32).reshape(-1, len(classes))
    n = len(values)
    made: dict[str, Any] = {"synapse_id": pa.array(np.arange(n))}
    made |= {name: pa.array(np.zeros(n)) for name in synapses.POSITION}
    for field in (*synapses.SCHEMA, *synapses.OPTIONAL):
        if field.name in columns:
            made[field.name] = pa.array(columns[field.name], field.type)
        elif field.name not in made and field.name in synapses.SCHEMA.names:
            made[field.name] = pa.nulls(n, field.type)
    for name in columns:
        if name.startswith("split_"):
            made[name] = pa.array(columns[name], pa.string())
    status = np.where(np.isnan(values).any(axis=1), "outside", "ok")
    return predictions.build(pa.table(made), values, status, classes, about or {})


def drawn(rows: int, neurons: int = 20, seed: int = 0, nan: float = 0.05) -> pa.Table:
    """Returns random rows; some lack a neuron, transmitter, prediction or score."""
    rng = np.random.default_rng(seed)
    k = len(CLASSES)
    values = rng.dirichlet(np.full(k, 0.5), rows).astype(np.float32)
    tied = rng.random(rows) < 0.2
    values[tied] = rng.permuted(np.tile([0.5, 0.5, 0], (tied.sum(), 1)), axis=1)
    values[rng.random(rows) < nan] = np.nan
    neuron = rng.integers(0, neurons, rows)

    def some(of: Any, missing: float = 0.1) -> pa.Array:
        return pa.array(of, mask=rng.random(rows) < missing)

    columns = {
        "synapse_id": rng.permutation(rows) + 720_575_940_000_000_000,
        "neuron_id": some(neuron + 720_575_940_600_000_000),
        "neurotransmitter": some(np.array(CLASSES)[neuron % k], 0.2),
        "hemilineage": some([f"H{n % 7}" for n in neuron]),
        "cell_type": some([f"T{n % 5}" for n in neuron], 0.0),
        "brain_region": some(np.array(["AL", "MB"])[rng.integers(0, 2, rows)]),
        "cleft_score": some(rng.integers(0, 256, rows).astype(np.float32)),
        "split_skeleton": some(np.array(synapses.PARTS)[neuron % 3]),
    }
    return table_of(values, columns)


def make(
    neurons: Sequence[int | None],
    calls: Sequence[str | None],
    classes: Sequence[str] = SIX,
    **columns: Any,
) -> pa.Table:
    """Returns one row for each synapse.

    The probabilities of a row are multiples of 1/64 that sum to 1. Synapse i is at the
    voxel zyx (i, 2i, 3i), and voxels have 40×4×4 nm.

    Args:
      calls: the class with the largest probability. None: the row has no prediction.
      columns: additional columns, or other values for the default columns.
    """
    n, k = len(neurons), len(classes)
    rng = np.random.default_rng(0)
    rest = rng.multinomial(24, np.full(k, 1 / k), n)
    probabilities = rest / 64
    for row, name in enumerate(calls):
        if name is None:
            probabilities[row] = np.nan
        else:
            probabilities[row, classes.index(name)] += 40 / 64
    index = np.arange(n)
    given = {
        "synapse_id": 9_007_199_254_740_993 + index,
        "z_nm": index * 40.0,
        "y_nm": index * 8.0,
        "x_nm": index * 12.0,
        "neuron_id": neurons,
        **columns,
    }
    about = {"step": 1000, "volume": "raw.n5"}
    return table_of(probabilities, given, classes, about)


def write(folder: pathlib.Path, table: pa.Table, rows: int = 7) -> str:
    """Writes a Feather file with small batches, so that a reader streams several."""
    path = folder / "predictions.feather"
    with pa.ipc.new_file(str(path), table.schema) as sink:
        for start in range(0, len(table), rows):
            sink.write_table(table.slice(start, rows).combine_chunks())
    return str(path)


def export_to(
    tmp_path: pathlib.Path,
    to: str,
    table: pa.Table,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    drop_classes: tuple[str, ...] = (),
) -> tuple[pathlib.Path, list[str]]:
    """Exports the table into tmp_path/`to`. Returns this folder and the notes."""
    path = write(tmp_path, table)
    output = tmp_path / to
    content = export.export(path, to, output, options, drop_classes)
    return output, content["notes"]


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, which may be gzipped."""
    text = path.read_bytes()
    text = gzip.decompress(text) if path.suffix == ".gz" else text
    return list(csv.DictReader(text.decode().splitlines()))


def confusion(tmp_path: pathlib.Path, classes: tuple[str, ...] = SIX) -> str:
    """Writes a confusion matrix and returns its path.

    Of ten synapses of each class, nine are called right. The tenth is called the first
    class.
    """
    counts = np.eye(len(classes)) * 9
    counts[:, 0] += 1
    content = {"classes": classes, "synapses": {"confusion": counts.tolist()}}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(content))
    return str(path)


def columns_of(table: pa.Table) -> dict[str, str]:
    """Returns the type of each column by its name."""
    return {field.name: str(field.type) for field in table.schema}


def probabilities(table: pa.Table, name: str) -> np.ndarray:
    return table[predictions.probability_column(name)].to_numpy()

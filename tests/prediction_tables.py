# SPDX-License-Identifier: Apache-2.0
"""Prediction tables that are made up, for tests of what reads them."""

import csv
import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax import export, predictions
from synister_jax.export import Options

SIX = ("gaba", "acetylcholine", "glutamate", "serotonin", "octopamine", "dopamine")
# As FlyWire's: floats would take them for each other.
NEURON = 720_575_940_600_000_001
# Of two neurons and one synapse without.
NEURONS = [NEURON] * 5 + [NEURON + 1] * 4 + [None]
CALLS = ["gaba", "gaba", "dopamine", None, "gaba", "serotonin", "glutamate"]
CALLS += ["serotonin", "acetylcholine", "gaba"]
VOXEL = Options(voxel_size_nm_zyx=(40, 4, 4))


def make(
    neurons: Sequence[int | None],
    calls: Sequence[str | None],
    classes: Sequence[str] = SIX,
    **columns: Any,
) -> pa.Table:
    """A row a synapse, called as `calls` says; None: without a prediction.

    Probabilities are multiples of 1/64 that sum to 1, the largest that of the call;
    synapse i is at voxel (i, 2i, 3i) of 40×4×4 nm.

    Args:
      columns: others than the defaults, or of other values.
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
    table = {
        "synapse_id": 9_007_199_254_740_993 + index,
        "z_nm": index * 40.0,
        "y_nm": index * 8.0,
        "x_nm": index * 12.0,
        "neuron_id": pa.array(neurons, pa.int64()),
        "neurotransmitter": pa.nulls(n, pa.string()),
        "hemilineage": pa.nulls(n, pa.string()),
        "brain_region": pa.nulls(n, pa.string()),
        "cell_type": pa.nulls(n, pa.string()),
        **columns,
    }
    status = ["ok" if name else "outside" for name in calls]
    about = {"step": 1000, "volume": "raw.n5"}
    return predictions.build(pa.table(table), probabilities, status, classes, about)


def write(folder: pathlib.Path, table: pa.Table, rows: int = 7) -> str:
    """Feather of batches of a few rows, so that whoever streams has several."""
    path = folder / "predictions.feather"
    with pa.ipc.new_file(str(path), table.schema) as sink:
        for start in range(0, len(table), rows):
            sink.write_table(table.slice(start, rows).combine_chunks())
    return str(path)


def export_to(
    tmp_path: pathlib.Path,
    to: str,
    table: pa.Table,
    options: Options = Options(),  # noqa: B008 - frozen
    drop_classes: tuple[str, ...] = (),
) -> tuple[pathlib.Path, list[str]]:
    """Exports the table into tmp_path/`to`; that folder, and the notes."""
    path = write(tmp_path, table)
    output = tmp_path / to
    content = export.export(path, to, output, options, drop_classes)
    return output, content["notes"]


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file, gzipped or not."""
    text = path.read_bytes()
    text = gzip.decompress(text) if path.suffix == ".gz" else text
    return list(csv.DictReader(text.decode().splitlines()))


def confusion(tmp_path: pathlib.Path, classes: tuple[str, ...] = SIX) -> str:
    """Nine of ten right, the tenth called the first class."""
    counts = np.eye(len(classes)) * 9
    counts[:, 0] += 1
    content = {"classes": classes, "synapses": {"confusion": counts.tolist()}}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(content))
    return str(path)


def columns_of(table: pa.Table) -> dict[str, str]:
    """Names and types."""
    return {field.name: str(field.type) for field in table.schema}


def probabilities(table: pa.Table, name: str) -> np.ndarray:
    return table[predictions.probability_column(name)].to_numpy()

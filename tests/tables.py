# SPDX-License-Identifier: Apache-2.0
"""Prediction tables for tests, made by hand or drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from conftest import CLASSES

from synister_jax import predictions, synapses


def table_of(
    probabilities: Sequence[Sequence[float]] | np.ndarray,
    columns: Mapping[str, Any],
    classes: Sequence[str] = CLASSES,
    about: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Rows with these probabilities; columns not given are 0, or null."""
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
    """Random rows: some without neuron, transmitter, prediction or cleft score."""
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

# SPDX-License-Identifier: Apache-2.0
"""The prediction table: one row a synapse, a probability a class, a status.

Columns: those of the synapse table (synapses.py), `status`, and `nt_<class>_prob`
float32 in the network's class order, NaN where there is no prediction. No other column
begins with `nt`, because FlyEM's reader takes every such column for a probability
(flyem_snapshot/inputs/neurotransmitters.py). The class order is also in the schema's
metadata.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather, parquet

from synister_jax import synapses
from synister_jax.command import UserError

BAD_POSITION = "bad_position"


def build(
    table: pa.Table,
    probabilities: np.ndarray,
    status: Sequence[str],
    classes: Sequence[str],
    about: Mapping[str, Any],
) -> pa.Table:
    """Adds [n, classes] probabilities and [n] statuses to the n rows of `table`.

    Args:
      about: what made them (run, step, volume, …), kept in the schema's metadata.
    """
    names = [*synapses.SCHEMA.names, *synapses.split_columns(table)]
    result = table.select(names).append_column("status", pa.array(status, pa.string()))
    for index, name in enumerate(classes):
        column = pa.array(probabilities[:, index].astype(np.float32))
        result = result.append_column(probability_column(name), column)
    metadata = {"classes": list(classes), **about}
    return result.replace_schema_metadata({"synister_jax": json.dumps(metadata)})


def probability_column(class_name: str) -> str:
    return f"nt_{class_name}_prob"


def load(path: str | os.PathLike[str]) -> pa.Table:
    """Reads a prediction table, Feather or a folder of Parquet files.

    Raises:
      UserError: it is not one.
    """
    try:
        if pathlib.Path(path).is_dir():
            table = parquet.read_table(path)
        else:
            table = feather.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read predictions {path}: {error}") from None
    check(table, path)
    return table


def check(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Raises `UserError` unless the columns and the class order are all there."""
    columns = set(table.column_names)
    try:
        wanted = [probability_column(name) for name in classes(table)]
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"{path} is not a prediction table: no class order") from None
    for name in [*synapses.SCHEMA.names, "status", *wanted]:
        if name not in columns:
            raise UserError(f"{path} is not a prediction table: no column {name}")


def about(table: pa.Table) -> dict[str, Any]:
    """The metadata given to `build`, with the class order."""
    return json.loads((table.schema.metadata or {})[b"synister_jax"])


def classes(table: pa.Table) -> tuple[str, ...]:
    """Class names in the order of the network's outputs."""
    return tuple(about(table)["classes"])


def probabilities(table: pa.Table) -> np.ndarray:
    """[n, classes] float32."""
    names = [probability_column(name) for name in classes(table)]
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def called(table: pa.Table) -> np.ndarray:
    """Index of the likeliest class, [n] int32; -1 where there is no prediction."""
    values = probabilities(table)
    unpredicted = np.isnan(values).any(axis=1)
    best = np.where(np.isnan(values), -1, values).argmax(axis=1)
    return np.where(unpredicted, -1, best).astype(np.int32)

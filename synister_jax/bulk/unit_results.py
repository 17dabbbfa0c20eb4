# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the result files of work units, with a checksum of their content.

The file of a unit is `part-<unit>-of-<units>.feather`. `row` is the row of the synapse
table. `whole` is False if a chunk that the crop needs cannot be read. The probabilities
of such a row have no meaning. Each class has a float32 column. A file that is
truncated, changed or made for another plan counts as missing.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pyarrow import feather

from synister_jax.base import files, table_metadata
from synister_jax.bulk.planning import Plan
from synister_jax.em import crops


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """The predictions for the rows of a unit, in the order of the unit."""

    rows: np.ndarray  # int64 [n]
    whole: np.ndarray  # bool [n]
    probabilities: np.ndarray  # float32 [n, classes]
    unreadable: frozenset[crops.Corner]  # chunks that cannot be read


def path_of(plan: Plan, unit: int) -> pathlib.Path:
    """Returns the path of the result file of a unit."""
    return plan.folder / "parts" / f"part-{unit:06d}-of-{len(plan):06d}.feather"


def write(plan: Plan, unit: int, part: UnitResult) -> None:
    """Writes the result file of a unit.

    Other processes may write the same file at the same time. Their content is the same,
    so the order does not matter.

    Raises:
      UserError: the file cannot be written.
    """
    table = pa.table({"row": part.rows, "whole": part.whole})
    for name, values in zip(plan.about["classes"], part.probabilities.T, strict=True):
        table = table.append_column(name, pa.array(np.ascontiguousarray(values)))
    about = {
        "unreadable": sorted(part.unreadable),
        "sha256": _sha256(plan, unit, part),
    }
    table = table_metadata.described(table, about)
    files.write_feather(path_of(plan, unit), table, several_writers=True)


def read(plan: Plan, unit: int) -> UnitResult | None:
    """Returns the result of a unit, or None if its file is missing or damaged."""
    path = path_of(plan, unit)
    try:
        # A memory-mapped file counts as memory of this process. With all files of a
        # folder, this would be too much.
        table = feather.read_table(path, memory_map=False)
        about = table_metadata.of(table)
        part = UnitResult(
            table["row"].to_numpy(),
            table["whole"].to_numpy(),
            np.stack([table[name].to_numpy() for name in plan.about["classes"]], 1),
            frozenset(tuple(corner) for corner in about["unreadable"]),
        )
        intact = about["sha256"] == _sha256(plan, unit, part)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    return part if intact else None


def unfinished(plan: Plan, units: Sequence[int], retry_missing: bool) -> dict[int, int]:
    """Returns the units to compute, and for each unit the number of rows to predict.

    These are the units without a valid result file, in the order of `units`.

    Args:
      retry_missing: also return the units with a crop that could not be read. Only the
        rows of such crops are counted.
    """
    left = {}
    for unit in units:
        part = read(plan, unit)
        if part is None:
            left[unit] = plan.size(unit)
        elif retry_missing and not part.whole.all():
            left[unit] = int((~part.whole).sum())
    return left


def _sha256(plan: Plan, unit: int, part: UnitResult) -> str:
    """Returns the checksum of the content, the number of the unit and the plan."""
    digest = hashlib.sha256(plan.fingerprint + f"unit {unit}".encode())
    for values in (part.rows, part.whole, part.probabilities):
        digest.update(f"{values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    digest.update(json.dumps(sorted(part.unreadable)).encode())
    return digest.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""Part files: what a unit of a plan found, with a checksum of its content.

`part-<unit>-of-<units>.feather`: `row` of the table, `whole` (False where a chunk that
the crop needs is unreadable; the probabilities mean nothing then), a float32 column a
class. A part that is cut short, changed, or of another plan is as good as none.
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
    """The rows of a unit, in the unit's order."""

    rows: np.ndarray  # int64 [n]
    whole: np.ndarray  # bool [n]
    probabilities: np.ndarray  # float32 [n, classes]
    unreadable: frozenset[crops.Corner]


def path_of(plan: Plan, unit: int) -> pathlib.Path:
    return plan.folder / "parts" / f"part-{unit:06d}-of-{len(plan):06d}.feather"


def write(plan: Plan, unit: int, part: UnitResult) -> None:
    """Other processes may write the same part: it is the same, whoever is last."""
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
    """The part of a unit; None where it is not there or not what was written."""
    path = path_of(plan, unit)
    try:
        # Not mapped into memory: a folder's worth of it would count as this process's.
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
    """The units that have no part, or none that can be used, in their order.

    Args:
      retry_missing: those too whose part has a crop that could not be read.

    Returns:
      How many rows of each are to be predicted.
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
    """Of the content, which unit it is, and all that the plan was made from."""
    digest = hashlib.sha256(plan.fingerprint + f"unit {unit}".encode())
    for values in (part.rows, part.whole, part.probabilities):
        digest.update(f"{values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    digest.update(json.dumps(sorted(part.unreadable)).encode())
    return digest.hexdigest()

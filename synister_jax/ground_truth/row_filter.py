# SPDX-License-Identifier: Apache-2.0
"""Which rows of the sources stay in a table, and why the others do not."""

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError, listed

_DROPPED = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("synapse_id", pa.int64()),
        ("neuron_id", pa.int64()),
        ("reason", pa.string()),
    ]
)
# `empty_table()` would import pandas, which takes a quarter of a second.
NOTHING_DROPPED = pa.Table.from_batches([], _DROPPED)


class RowFilter:
    """Rows are taken out one reason after another; the first one counts.

    Args:
      rows: with the columns file, row (from 0), synapse_id and neuron_id.
      drop_bad_rows: `refuse` drops rather than raising.
    """

    def __init__(self, rows: pa.Table, drop_bad_rows: bool) -> None:
        self._rows = rows
        self._drop_bad_rows = drop_bad_rows
        self._reason = np.full(len(rows), None, object)

    @property
    def kept(self) -> np.ndarray:
        """[n] bool."""
        return self._reason == None  # noqa: E711 - element by element

    def drop(self, rows: np.ndarray, reason: str) -> None:
        """Takes out the rows, [n] bool."""
        self._reason[rows & self.kept] = reason

    def refuse(self, rows: np.ndarray, reason: str) -> None:
        """An error that names the rows, or a drop where the user asked for that."""
        at = np.flatnonzero(rows & self.kept)
        if not len(at) or self._drop_bad_rows:
            self.drop(rows, reason)
            return
        places = self._rows.select(["file", "row"]).take(at[:5]).to_pylist()
        named = (f"{place['file']} row {place['row']}" for place in places)
        raise UserError(
            f"{reason}: {listed(named, len(at))} (rows count from 0 after the header); "
            "mend them, or leave them out and list them with --drop_bad_rows"
        )

    def dropped(self, synapse_id: pa.Array) -> pa.Table:
        """The rows that are out, with the ids that were made or given, and why."""
        reason = pa.array(self._reason, pa.string())
        rows = self._rows.set_column(
            self._rows.column_names.index("synapse_id"), "synapse_id", [synapse_id]
        )
        rows = rows.append_column("reason", reason).filter(~self.kept)
        return rows.select(_DROPPED.names).cast(_DROPPED)

# SPDX-License-Identifier: Apache-2.0
"""Filters the rows of the sources, and records why a row is dropped."""

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
# The method `empty_table()` would import pandas, which takes a quarter of a second.
NOTHING_DROPPED = pa.Table.from_batches([], _DROPPED)


class RowFilter:
    """A filter that drops rows for one reason after another.

    If several reasons apply to a row, the first reason is recorded.

    Args:
      rows: a table with the columns file, row (from 0), synapse_id and neuron_id.
      drop_bad_rows: `refuse` drops rows and does not raise an error.
    """

    def __init__(self, rows: pa.Table, drop_bad_rows: bool) -> None:
        self._rows = rows
        self._drop_bad_rows = drop_bad_rows
        self._reason = np.full(len(rows), None, object)

    @property
    def kept(self) -> np.ndarray:
        """Whether each row is still kept, [n] bool."""
        return self._reason == None  # noqa: E711 - element by element

    def drop(self, rows: np.ndarray, reason: str) -> None:
        """Drops the rows that are True in `rows`, [n] bool, for this reason."""
        self._reason[rows & self.kept] = reason

    def refuse(self, rows: np.ndarray, reason: str) -> None:
        """Raises an error for the rows, [n] bool, or drops them with `drop_bad_rows`.

        Raises:
          UserError: some of the rows are still kept; the message names the first five.
        """
        at = np.flatnonzero(rows & self.kept)
        if not len(at) or self._drop_bad_rows:
            self.drop(rows, reason)
            return
        places = self._rows.select(["file", "row"]).take(at[:5]).to_pylist()
        named = (f"{place['file']} row {place['row']}" for place in places)
        raise UserError(
            f"{reason}: {listed(named, len(at))} (rows count from 0 after the header); "
            "correct them, or leave them out and list them with --drop_bad_rows"
        )

    def dropped(self, synapse_id: pa.Array) -> pa.Table:
        """Returns the dropped rows with their reasons.

        Args:
          synapse_id: [n] the ids of all rows, from the file or computed.
        """
        reason = pa.array(self._reason, pa.string())
        rows = self._rows.set_column(
            self._rows.column_names.index("synapse_id"), "synapse_id", [synapse_id]
        )
        rows = rows.append_column("reason", reason).filter(~self.kept)
        return rows.select(_DROPPED.names).cast(_DROPPED)

# SPDX-License-Identifier: Apache-2.0
"""A synapse table of any size, read in batches by commands that answer every row."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.tables import synapses


@dataclasses.dataclass(frozen=True)
class SynapseStream:
    """A synapse table that can be read several times, always in the same order."""

    name: str
    raw_batches: Callable[[], Iterator[pa.RecordBatch]]  # yields at least one
    part: tuple[str, str] | None = None  # (split, part): read only these rows

    def tables(self) -> Iterator[pa.Table]:
        """Yields all rows as synapse tables, checked by `synapses.conform`.

        Coordinates that are missing or not finite are NaN. An id may occur twice.

        Raises:
          UserError: the table does not have the split, or a row is not usable. The
            message names the row, counted from 0.
        """
        first_row = 0
        for batch in self.raw_batches():
            table = pa.Table.from_batches([batch])
            table = synapses.conform(
                table, self.name, answer_all=True, first_row=first_row
            )
            first_row += len(batch)
            if self.part is not None:
                table = table.filter(pa.array(self._in_part(table, *self.part)))
            yield table

    def _in_part(self, table: pa.Table, split: str, part: str) -> np.ndarray:
        try:
            return synapses.in_part(table, split, part)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None


class Checksum:
    """The SHA-256 of the ids and positions of a table, for any size of the batches."""

    NAMES = ("synapse_id", *synapses.POSITION)

    def __init__(self) -> None:
        self._digests = [hashlib.sha256() for _ in self.NAMES]
        self.rows = 0

    def update(self, table: pa.Table) -> None:
        """Adds the rows of `table`."""
        for name, digest in zip(self.NAMES, self._digests, strict=True):
            digest.update(np.ascontiguousarray(table[name].to_numpy()).data)
        self.rows += len(table)

    def hexdigest(self) -> str:
        """Returns the checksum of all rows that were added, as hexadecimal text."""
        together = "".join(digest.hexdigest() for digest in self._digests)
        return hashlib.sha256(together.encode()).hexdigest()


def checksum(source: SynapseStream) -> Checksum:
    """Reads all rows and returns their checksum."""
    found = Checksum()
    for table in source.tables():
        found.update(table)
    return found

# SPDX-License-Identifier: Apache-2.0
"""A synapse table of any size, batch by batch, for who answers every row of it."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.tables import synapses


@dataclasses.dataclass(frozen=True)
class SynapseStream:
    """Rows in an order of their own, to be read any number of times."""

    name: str
    raw_batches: Callable[[], Iterator[pa.RecordBatch]]  # one at least
    part: tuple[str, str] | None = None  # (split, part): only its rows

    def tables(self) -> Iterator[pa.Table]:
        """The rows as synapse tables (`synapses.conform`), every one of them.

        Coordinates that are missing or not finite are NaN; an id may be there twice.

        Raises:
          UserError: names the row, counted from 0, that is not usable; no such split.
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
    """SHA-256 of the ids and positions of a table's rows, however they are batched."""

    NAMES = ("synapse_id", *synapses.POSITION)

    def __init__(self) -> None:
        self._digests = [hashlib.sha256() for _ in self.NAMES]
        self.rows = 0

    def update(self, table: pa.Table) -> None:
        for name, digest in zip(self.NAMES, self._digests, strict=True):
            digest.update(np.ascontiguousarray(table[name].to_numpy()).data)
        self.rows += len(table)

    def hexdigest(self) -> str:
        together = "".join(digest.hexdigest() for digest in self._digests)
        return hashlib.sha256(together.encode()).hexdigest()


def checksum(source: SynapseStream) -> Checksum:
    """That of all rows, for the price of reading them."""
    found = Checksum()
    for table in source.tables():
        found.update(table)
    return found

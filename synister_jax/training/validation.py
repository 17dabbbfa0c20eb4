# SPDX-License-Identifier: Apache-2.0
"""Predicts a whole part of a split, for validation in training and for `evaluate`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.network import sharding
from synister_jax.tables import predictions, synapses
from synister_jax.training import input_pipeline
from synister_jax.training.shards import Shards


@dataclasses.dataclass(frozen=True)
class SplitPart:
    """A whole part of a split. Every number is computed over all its examples."""

    name: str
    shards: Shards
    rows: np.ndarray  # the n rows of the shards' index, int64 [n]
    table: pa.Table  # these rows of the index

    @classmethod
    def of(cls, shards: Shards, split: str, name: str) -> "SplitPart":
        """Returns the part `name` of the split.

        Raises:
          UserError: the part is empty, or there is no such part or split.
        """
        rows = np.flatnonzero(synapses.in_part(shards.index, split, name))
        if not len(rows):
            raise UserError(
                f"shards {shards.folder} have no crop in part {name!r} of split "
                f"{split!r}; choose another part or split"
            )
        return cls(name, shards, rows, shards.index.take(pa.array(rows)))

    def predict(
        self,
        classify_batch: Callable[[jax.Array], jax.Array | np.ndarray],
        batch_size: int,
        mesh: jax.sharding.Mesh,
        about: dict[str, Any],
    ) -> pa.Table:
        """Returns the prediction table of the part. It does not depend on batch_size.

        Args:
          classify_batch: a function from uint8 [batch, *record] to probabilities.
          batch_size: how many crops are classified at once, over all devices of `mesh`.
          about: what the table says about itself.
        """
        batches = input_pipeline.padded_batches(
            self.shards, self.rows, batch_size, sharding.batch(mesh)
        )
        results = [np.asarray(classify_batch(batch["crop"])) for batch in batches]
        probabilities = np.concatenate(results)[: len(self.rows)]
        status = self.table["status"].to_pylist()
        return predictions.build(
            self.table, probabilities, status, self.shards.classes, about
        )

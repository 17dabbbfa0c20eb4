# SPDX-License-Identifier: Apache-2.0
"""A part of a split, predicted whole: validation while training, and `evaluate`."""

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
    """A part of a split, all of it: every number is over every example."""

    name: str
    shards: Shards
    rows: np.ndarray  # of the shards' index, [n]
    table: pa.Table  # these rows of the index

    @classmethod
    def of(cls, shards: Shards, split: str, name: str) -> "SplitPart":
        """The part `name` of the split; `UserError` when it is empty or unknown."""
        rows = np.flatnonzero(synapses.in_part(shards.index, split, name))
        if not len(rows):
            raise UserError(
                f"shards {shards.folder}: part {name!r} of {split!r} is empty"
            )
        return cls(name, shards, rows, shards.index.take(pa.array(rows)))

    def predict(
        self,
        classify_batch: Callable[[jax.Array], jax.Array | np.ndarray],
        batch_size: int,
        mesh: jax.sharding.Mesh,
        about: dict[str, Any],
    ) -> pa.Table:
        """The prediction table of the part, whatever the batch size."""
        batches = input_pipeline.padded_batches(
            self.shards, self.rows, batch_size, sharding.batch(mesh)
        )
        results = [np.asarray(classify_batch(batch["crop"])) for batch in batches]
        probabilities = np.concatenate(results)[: len(self.rows)]
        status = self.table["status"].to_pylist()
        return predictions.build(
            self.table, probabilities, status, self.shards.classes, about
        )

# SPDX-License-Identifier: Apache-2.0
"""A trained network as a function from crops to class probabilities."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from synister_jax import augment, checkpoint, model, sharding

Variables = dict[str, Any]  # {"params", "batch_stats"}


def make_classify(
    config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Variables, jax.Array], jax.Array]:
    """Jitted (variables, uint8 records [batch, *record]) → probabilities [batch, k].

    The batch is split over the mesh; crops are taken from the records' middle. Every
    process gets all probabilities.
    """
    network = model.from_config(config, sharding.head_input(mesh))
    crop_shape_zyx = tuple(config.crop_shape_zyx)

    def classify(variables: Variables, records: jax.Array) -> jax.Array:
        crops = augment.centre(records, crop_shape_zyx)
        return jax.nn.softmax(network.apply(variables, crops, train=False))

    return jax.jit(
        classify,
        in_shardings=(None, sharding.batch(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


class Classifier:
    """A checkpoint of a run, ready to classify crops of any number.

    Args:
      workdir: folder of the run; its config.json says what the network is.
      step: checkpoint, the latest when None.
      batch_size: crops that are computed at once.

    Raises:
      UserError: no run, no such checkpoint, or one of another architecture.
    """

    def __init__(
        self, workdir: pathlib.Path, step: int | None, batch_size: int, mesh: Mesh
    ) -> None:
        sharding.require_divisible(batch_size, mesh)
        self.config = checkpoint.load_config(workdir)
        self.step = checkpoint.choose_step(workdir, step)
        self.batch_size = batch_size
        self._classify = make_classify(self.config, mesh)
        self._batch_sharding = sharding.batch(mesh)
        abstract = sharding.abstract(
            abstract_variables(self.config), sharding.replicated(mesh)
        )
        self.variables = checkpoint.load_variables(
            workdir, self.step, abstract, self.config
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.classes)

    def __call__(self, records: np.ndarray) -> np.ndarray:
        """uint8 [n, *record] → float32 probabilities [n, classes]."""
        n = len(records)
        filled = np.zeros(
            (-(-n // self.batch_size) * self.batch_size, *records.shape[1:]), np.uint8
        )
        filled[:n] = records
        parts = [
            self.classify_batch(
                jax.device_put(filled[i : i + self.batch_size], self._batch_sharding)
            )
            for i in range(0, len(filled), self.batch_size)
        ]
        return np.concatenate(parts)[:n]

    def classify_batch(self, records: jax.Array) -> np.ndarray:
        """One batch of `batch_size` records that is on the devices already."""
        return np.asarray(self._classify(self.variables, records))


def abstract_variables(config: ml_collections.ConfigDict) -> Variables:
    """Shapes and types of the network's variables."""
    network = model.from_config(config)
    crops = jnp.zeros((1, *config.crop_shape_zyx), jnp.float32)
    return jax.eval_shape(
        lambda key: network.init(key, crops, train=False), jax.random.key(0)
    )

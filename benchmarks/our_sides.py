# SPDX-License-Identifier: Apache-2.0
"""Runs our network for the benchmarks, as `predict` and `train` run it."""

import pathlib
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from benchmarks import command_line, made_inputs
from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint, inference, model, sharding
from synister_jax.training import loss_and_optimizer, train_step


def classifier(batch_size: int) -> inference.Classifier:
    """Returns the Classifier of `predict` on all devices.

    Its weights are those of the PyTorch network (torch_sides.py).
    """
    return inference.Classifier([(torch_run(), None)], batch_size, sharding.make_mesh())


def check_agreement(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> float:
    """Returns the largest difference between the probabilities of two sides.

    Raises:
      UserError: the difference is too large for two programs with the same network.
    """
    difference = float(np.abs(ours - theirs).max())
    # On tensor cores, and in bfloat16, products are rounded.
    is_exact = dtype == "float32" and jax.default_backend() == "cpu"
    if not difference <= (1e-4 if is_exact else 0.05):
        raise UserError(f"the probabilities of two sides differ by {difference:.2g}")
    return difference


def torch_run() -> pathlib.Path:
    """Returns the run with PyTorch's weights, which torch_sides.make_run makes."""
    folder, config = command_line.folder(), command_line.CONFIG.value
    return made_inputs.run(folder, config, "torch-run", dict)


class Network:
    """The weights on all devices, and the training that changes them.

    Attributes:
      state: the state of the training. All functions that `training` returns share this
        state, because it takes 4 GB at full size.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: pathlib.Path | None = None
    ) -> None:
        """Makes the initial weights of a training, or reads the weights of a run."""
        self._mesh = sharding.make_mesh()
        self._optimizer = loss_and_optimizer.make_optimizer(config)
        where = sharding.replicated(self._mesh)
        init = jax.jit(
            lambda key: train_step.create_state(key, config, self._optimizer),
            out_shardings=where,
            compiler_options={
                "xla_backend_optimization_level": 1
            },  # this program runs only once
        )
        self.state = init(jax.random.key(0))
        if workdir is not None:
            abstract = sharding.abstract(inference.abstract_variables(config), where)
            self.state = self.state.replace(params={}, batch_stats={})
            variables = checkpoint.load_variables(workdir, 0, abstract, config)
            self.state = self.state.replace(**variables)

    def variables(self) -> inference.Variables:
        """Returns the weights as they are now."""
        return {"params": self.state.params, "batch_stats": self.state.batch_stats}

    def training(self, config: ml_collections.ConfigDict) -> Callable[[], jax.Array]:
        """Returns a function that does one training step and returns the loss.

        All steps use the same batch of random crops.
        """
        network = model.from_config(config, sharding.head_input(self._mesh))
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        step_fn = train_step.jit_step(config, network, self._optimizer, placed)
        records, labels = made_inputs.batch(config)
        batch = {"crop": records, "label": labels}
        batch = jax.device_put(batch, sharding.batch(self._mesh))

        def step() -> jax.Array:
            self.state, numbers = step_fn(self.state, batch)
            return numbers["loss"]

        return step

# SPDX-License-Identifier: Apache-2.0
"""A run whose network was never trained."""

import pathlib

import jax
import numpy as np

from synister_jax.network import checkpoint, inference
from tests.helpers.small_data import tiny_config


def make_workdir(folder: pathlib.Path) -> pathlib.Path:
    """Makes a run with random parameters, whose network prefers no class strongly."""
    config = tiny_config()
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda a: rng.uniform(0.05, 0.3, a.shape).astype(np.float32),
        inference.abstract_variables(config),
    )
    kernel = variables["params"]["logits"]["kernel"]
    kernel *= rng.uniform(-0.02, 0.02, kernel.shape)
    checkpoint.save_imported(folder, 20, variables, config)
    return folder

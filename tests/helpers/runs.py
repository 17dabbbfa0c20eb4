# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests that train: configurations, commands, states of checkpoints."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np

from synister_jax.network import checkpoint, sharding
from synister_jax.training import loss_and_optimizer, train_step
from tests.helpers.small_data import ROOT, tiny_config


def everything_on() -> ml_collections.ConfigDict:
    """Returns the tiny configuration with the whole augmentation and every option."""
    config = tiny_config()
    config.augment.update(
        elastic_spacing_zyx=(2, 8, 8),
        elastic_sigma_zyx=(0.0, 0.3, 0.3),
        rotation=(0.0, math.pi / 2),
        max_misalign_yx=(1, 1),
    )
    config.balance_clusters = True
    config.batch_size = 24
    config.accumulate_steps = 2
    config.schedule = "cosine"
    config.warmup_steps = 2
    config.weight_decay = 1e-3
    config.clip_norm = 1.0
    config.ema_decay = 0.9
    config.label_smoothing = 0.1
    config.focal_gamma = 2.0
    config.class_weights = (1.0, 0.8, 1.2)
    return config


def saved_state(
    workdir: pathlib.Path, step: int, config: ml_collections.ConfigDict
) -> dict[str, np.ndarray]:
    """Returns all arrays of a checkpoint by name."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    tx = loss_and_optimizer.make_optimizer(config)
    abstract = jax.eval_shape(
        lambda key: train_step.create_state(key, config, tx), jax.random.key(0)
    )
    abstract = sharding.abstract(abstract, sharding.replicated(mesh))
    path = (workdir / "checkpoints" / str(step)).resolve()
    state = checkpoint.load_partly(path, abstract)
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name, strict=True)


def command(
    folder: pathlib.Path, config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[str]:
    """Returns the train command with exactly this configuration."""
    path = folder / "config.py"
    content = config.to_json_best_effort()
    path.write_text(
        "import json\n"
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from configs import skeleton\n"
        "def tuples(x):\n"
        "    if isinstance(x, dict):\n"
        "        return {k: tuples(v) for k, v in x.items()}\n"
        "    return tuple(map(tuples, x)) if isinstance(x, list) else x\n"
        "def get_config():\n"
        "    config = skeleton.get_config()\n"
        f"    config.update(tuples(json.loads({json.dumps(content)})))\n"
        "    return config\n"
    )
    module = [sys.executable, "-m", "synister_jax.train"]
    return [*module, f"--config={path}", f"--workdir={workdir}"]


def start(command: list[str], devices: int = 4) -> subprocess.Popen:
    """Starts a command with fake CPU devices. The caller must read its output."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

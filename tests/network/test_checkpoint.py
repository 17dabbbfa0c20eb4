# SPDX-License-Identifier: Apache-2.0
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint, inference, sharding
from synister_jax.training import checkpoint_evaluation
from tests.helpers.small_data import tiny_config

pytestmark = pytest.mark.long


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    config = tiny_config()
    config.keep_latest = 1
    config.ema_decay = 0.9  # ignored: an import has no averaged weights
    return config


@pytest.fixture
def workdir(tmp_path: pathlib.Path, config: ml_collections.ConfigDict) -> pathlib.Path:
    """A run of four imported checkpoints; each is biased towards class `step % 3`."""
    for step in (100, 200, 300, 50):
        rng = np.random.default_rng(step)
        variables = jax.tree.map(
            lambda a, rng=rng: rng.uniform(0.05, 0.3, a.shape).astype(np.float32),
            inference.abstract_variables(config),
        )
        variables["params"]["logits"]["bias"][step % 3] = 30
        checkpoint.save_imported(tmp_path / "run", step, variables, config)
    return tmp_path / "run"


def test_every_imported_checkpoint_stays(
    workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    assert checkpoint.steps(workdir) == [50, 100, 200, 300]
    mesh = sharding.make_mesh(jax.devices()[:1])
    for step in (50, 100, 200):
        classifier = inference.Classifier([(workdir, step)], 2, mesh)
        crops = np.zeros((2, *config.crop_shape_zyx), np.uint8)
        assert classifier(crops).argmax(axis=1).tolist() == [step % 3] * 2
    with pytest.raises(UserError, match="has a checkpoint of step 50 already"):
        abstract = inference.abstract_variables(config)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract)
        checkpoint.save_imported(workdir, 50, zeros, config)


def test_the_best_is_that_of_all_that_were_evaluated_and_are_there(
    workdir: pathlib.Path, shards_folder: pathlib.Path
) -> None:
    with pytest.raises(UserError, match="no checkpoint of .* was validated"):
        checkpoint.best_step(workdir)
    shards = str(shards_folder)
    every = checkpoint_evaluation.evaluate(
        workdir, "validation", [50, 100, 200, 300], shards, 8
    )
    # Every checkpoint calls all synapses one class. All are equally good, so the
    # latest one is the best.
    assert checkpoint.best_step(workdir) == every["best_step"] == 300
    path = workdir / "evaluation" / "validation" / "summary.json"
    summary = files.read_json(path)
    summary["checkpoints"][1]["synapse_mean_class_accuracy"] = 0.9
    summary["checkpoints"].append(
        {"step": 999, "synapse_mean_class_accuracy": 1.0}  # this checkpoint was deleted
    )
    files.write_json(path, summary)
    assert checkpoint.best_step(workdir) == 100
    assert checkpoint.best_or_latest_step(workdir) == 100


def test_a_run_of_an_older_version_can_still_be_used(
    workdir: pathlib.Path, shards_folder: pathlib.Path
) -> None:
    path = workdir / "config.json"
    known = files.read_json(path)
    for name in ("ema_decay", "compute_dtype", "head_devices", "neither_crops"):
        del known[name]
    del known["model"]["network"]
    known["augment"] = {"jitter_vx_zyx": [1, 2, 2]}
    files.write_json(path, known)
    measured = checkpoint_evaluation.evaluate(
        workdir, "test", [100], str(shards_folder), 8
    )
    assert measured["checkpoints"][0]["step"] == 100

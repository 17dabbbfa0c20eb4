# SPDX-License-Identifier: Apache-2.0
"""Tests of the published networks at full size, which need up to 15 GB.

They are in one file, because one test worker runs all tests of a file in turn.
"""

import functools
import gc
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from configs import skeleton
from synister_jax.network import checkpoint, inference, model, sharding
from synister_jax.training import augment, loss_and_optimizer, train_step

CUBIC = ((2, 2, 2),) * 4
FLAT = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(((16, 160, 160), 6, 12, FLAT), id="FAFB, 12 features"),
        pytest.param(((16, 160, 160), 6, 16, FLAT), id="FAFB, 16 features"),
        pytest.param(((80, 80, 80), 6, 24, CUBIC, (4, 2, 2, 2)), id="hemibrain"),
        pytest.param(((80, 80, 80), 4, 16, CUBIC), id="male VNC"),
    ],
)
def test_imported_weights_give_the_same_logits(arguments: tuple) -> None:
    pytest.importorskip("torch")
    from synister_jax.network import torch_weights
    from tests.helpers import torch_comparison as torch_side

    config = torch_side.vgg_config(*arguments)
    network = torch_side.torch_vgg(config)
    found = torch_side.deviation(config, network, torch_weights.vgg3d)
    print(f"largest relative deviation {found:.1e}")
    assert found < 1e-4


@pytest.mark.slow
def test_published_configuration_steps_and_restores(tmp_path: pathlib.Path) -> None:
    """The network (16×160×160 voxels, 332 M parameters) trains, restores, predicts."""
    config = skeleton.get_config()
    config.batch_size = 1
    mesh = sharding.make_mesh(jax.devices()[:1])
    tx = loss_and_optimizer.make_optimizer(config)
    init = jax.jit(lambda key: train_step.create_state(key, config, tx))
    rng = np.random.default_rng(0)
    margin = augment.AugmentSettings.of(config).margin_vx_zyx
    shape = np.add(config.crop_shape_zyx, np.multiply(2, margin))
    batch = {
        "crop": rng.integers(0, 256, (1, *shape), dtype=np.uint8),
        "label": np.array([5], np.int32),
    }
    step = jax.jit(
        functools.partial(train_step.train_step, config, model.from_config(config), tx),
        donate_argnums=0,
    )
    state, numbers = step(init(jax.random.key(0)), batch)
    assert 1 < float(numbers["loss"]) < 4  # a guess among 6 classes has ln 6 = 1.8

    checkpointer = checkpoint.Checkpointer(tmp_path, config, "")
    checkpointer.save(1, state)
    checkpointer.close()
    abstract = sharding.abstract(state, sharding.replicated(mesh))
    restored = checkpoint.Checkpointer(tmp_path, config, "").restore(abstract)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()

    checkpoint.save_config(tmp_path, config, "")
    classifier = inference.Classifier([(tmp_path, None)], 1, mesh)
    z, y, x = (slice(m, -m) for m in margin)
    probabilities = classifier(batch["crop"][:1, z, y, x])
    assert probabilities.shape == (1, 6)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)

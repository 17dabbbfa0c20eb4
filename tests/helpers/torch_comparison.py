# SPDX-License-Identifier: Apache-2.0
"""Compares networks of PyTorch with our networks of the same weights."""

from collections.abc import Callable

import jax
import ml_collections
import numpy as np
import torch

from configs import skeleton
from synister_jax.network import model
from tests.helpers import torch_networks


def vgg_config(
    crop_shape_zyx: tuple[int, int, int],
    classes: int,
    features: int,
    downsample_factors: tuple[tuple[int, int, int], ...],
    convolutions: tuple[int, ...] = (2, 2, 2, 2),
    dense_features: int = 4096,
) -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.classes = tuple(f"class{i}" for i in range(classes))
    config.crop_shape_zyx = crop_shape_zyx
    config.model.features = features
    config.model.feature_multipliers = (2,) * len(convolutions)
    config.model.downsample_factors = downsample_factors
    config.model.convolutions = convolutions
    config.model.dense_features = dense_features
    return config


def torch_vgg(
    config: ml_collections.ConfigDict, dropout: float = 0.5, seed: int = 0
) -> torch_networks.Vgg3D:
    torch.manual_seed(seed)
    config = config.copy_and_resolve_references()
    config.model.dropout = dropout
    return torch_networks.Vgg3D.of(config)


def arrays(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the state of the network, as `torch_weights.load` returns it."""
    return {key: value.numpy() for key, value in network.state_dict().items()}


def crops_of(config: ml_collections.ConfigDict, count: int, seed: int) -> np.ndarray:
    """Returns crops with noise on a slope of random direction.

    No two axes are alike, so that a comparison notices exchanged axes.
    """
    rng = np.random.default_rng(seed)
    shape = config.crop_shape_zyx
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    slopes = np.tensordot(rng.normal(size=(count, 3)), np.stack(axes), axes=1)
    noise = rng.uniform(-1, 1, slopes.shape)
    return np.clip((slopes + noise) / 2, -1, 1).astype(np.float32)


def deviation(
    config: ml_collections.ConfigDict,
    network: torch.nn.Module,
    convert: Callable,
    axes: tuple[int, int, int] = (0, 1, 2),
) -> float:
    """Returns the largest difference of their and our logits, relative to the largest.

    Args:
      axes: the axes of our crop [z, y, x], in the order that their network takes.
    """
    torch_networks.randomise(network)
    network.eval()
    crops = crops_of(config, 2, seed=1)
    theirs_in = crops.transpose(0, *(axis + 1 for axis in axes))[:, None]
    with torch.no_grad():
        theirs = network(torch.from_numpy(theirs_in.copy())).numpy()
    variables = convert(arrays(network), config)
    apply = jax.jit(model.from_config(config).apply, static_argnames="train")
    ours = np.asarray(apply(variables, crops, train=False))
    largest = np.abs(theirs).max()
    assert np.ptp(theirs, axis=0).max() > 0.1 * largest  # the logits depend on the crop
    return float(np.abs(ours - theirs).max() / largest)

# SPDX-License-Identifier: Apache-2.0
import importlib
import math
import pathlib

import jax
import ml_collections
import pytest

from configs import banc, brain_region, hemilineage, malevnc, skeleton
from synister_jax.network import inference
from synister_jax.training import augment, loss_and_optimizer, training_run

CONFIGS = sorted(
    path.stem for path in pathlib.Path(skeleton.__file__).parent.glob("*.py")
)


def get_config(name: str) -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def parameters(config: ml_collections.ConfigDict) -> int:
    params = inference.abstract_variables(config)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_possible(name: str) -> None:
    """Network, augmentation and training settings are valid.

    The docstring of the configuration shows a command that uses it.
    """
    config = get_config(name)
    logits = inference.abstract_variables(config)["params"]["logits"]["kernel"]
    assert logits.shape[-1] == len(config.classes)
    augment.AugmentSettings.of(config)
    loss_and_optimizer.check(config)
    training_run.check(config)
    module = importlib.import_module(f"configs.{name}")
    command = f"--config=configs/{name}.py"
    assert command in module.__doc__ or f"make {name}" in module.__doc__


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_invents_an_option(name: str) -> None:
    """No code would read an option that skeleton.py does not have."""
    known, config = skeleton.get_config(), get_config(name)
    assert set(config) == set(known)
    assert set(config.augment) == set(known.augment)
    assert set(config.model) <= set(known.model)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("skeleton", 331.9),
        ("hemilineage", 331.9),
        ("brain_region", 331.9),
        ("production_fafb", 437.1),
        ("hemibrain", 117.1),
        ("malevnc", 83.2),
    ],
)
def test_sizes_are_the_published_ones(name: str, millions: float) -> None:
    assert round(parameters(get_config(name)) / 1e6, 1) == millions


def test_banc_has_the_size_of_torchvision_s_r3d_18() -> None:
    assert parameters(banc.get_config()) == 33_151_560


def test_class_orders_are_the_published_ones() -> None:
    classes = banc.get_config().classes
    assert len(classes) == 8 and list(classes) == sorted(classes)
    weights = dict(zip(classes, banc.get_config().class_weights, strict=True))
    not_one = {name: weight for name, weight in weights.items() if weight != 1}
    assert not_one == {"dopamine": 1.1, "histamine": 0.9, "serotonin": 1.1}
    published = ("gaba", "acetylcholine", "glutamate")
    assert malevnc.get_config().classes == (*published, "neither")
    six = (*published, "serotonin", "octopamine", "dopamine")
    for name in ("skeleton", "hemibrain", "production_fafb", "demo"):
        assert get_config(name).classes == six


def test_skeleton_has_nothing_that_the_publication_has_not() -> None:
    config = skeleton.get_config()
    published = {
        "learning_rate": 1e-4,
        "batch_size": 8,
        "neither_crops": 0,
        "unknown_per_class": 0,
    }
    off = {
        "init_from": None,
        "warmup_steps": 0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "ema_decay": 0.0,
        "label_smoothing": 0.0,
        "focal_gamma": 0.0,
        "class_weights": (),
        "accumulate_steps": 1,
        "head_devices": 1,
        "compute_dtype": "float32",
        "early_stop_evals": 0,
    }
    assert {name: config[name] for name in published | off} == published | off


@pytest.mark.parametrize("module", [hemilineage, brain_region])
def test_other_splits_differ_in_the_split_alone(module: object) -> None:
    config, published = module.get_config(), skeleton.get_config()
    assert config.split == module.__name__.removeprefix("configs.")
    config.split = published.split
    assert config.to_dict() == published.to_dict()


def test_crops_cut_for_one_split_serve_the_others() -> None:
    """The crops also serve the production network."""
    names = ("skeleton", "hemilineage", "brain_region", "production_fafb")
    margins = {augment.AugmentSettings.of(get_config(n)).margin_vx_zyx for n in names}
    assert len(margins) == 1

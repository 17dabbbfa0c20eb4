# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints of the original PyTorch systems to variables of our networks.

`load` reads the file. `vgg3d` and `resnet18` put its arrays into the tree of our
network. Every array of the file must have a place in the tree, and every place must get
an array.
"""

import configparser
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import TypeVar

import ml_collections
import numpy as np
from jax import tree_util

from synister_jax.base.errors import UserError
from synister_jax.network import inference
from synister_jax.network.inference import Variables

_T = TypeVar("_T")

# Axis i of our array is axis _AXES[ndim][i] of the PyTorch array. The weights of a
# convolution are [out, in, z, y, x] in PyTorch and [z, y, x, in, out] here. Dense
# weights are [out, in] in PyTorch and [in, out] here.
_AXES = {1: (0,), 2: (1, 0), 5: (2, 3, 4, 1, 0)}
# BANC's crops have the axes (z, x, y), so the last axis of its kernels is our y.
_AXES_ZXY = _AXES | {5: (2, 4, 3, 1, 0)}

_LAYER = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean"}
_NORM |= {"var": "running_var"}


def read_setup(
    path: pathlib.Path, base: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns a config with the data and network settings of an original setup.

    Args:
      path: the folder of the setup, or its train_config.ini. A predict_config.ini can
        also be used if it repeats the keys of the training.
      base: a config of VGG3D. The result keeps its settings that an .ini file does not
        have, for example dense_features (4096 in the original's code) and the
        augmentation.

    Raises:
      UserError: the file does not exist, or a key is missing or malformed.
    """
    setup = _Setup(path)
    config = base.copy_and_resolve_references()
    if setup.read("network", str, "VGG") != "VGG":
        raise setup.error("network", "only VGG networks can be imported")
    classes = setup.read("synapse_types", _words)
    if setup.read("neither_class", str, "False") == "True":
        classes = (*classes, "neither")
    if len(set(classes)) < len(classes):
        raise setup.error("synapse_types", "a class is named twice")
    config.classes = classes
    config.crop_shape_zyx = setup.read("input_shape", _three_counts)
    config.voxel_size_nm_zyx = setup.read("voxel_size", _three_counts)
    config.batch_size = setup.read("batch_size", _count)
    config.split = setup.read("split_name", str)
    config.model.features = setup.read("fmaps", _count)
    factors = setup.read("downsample_factors", _triples)
    config.model.downsample_factors = factors
    for ours, theirs in (
        ("feature_multipliers", "fmap_inc"),
        ("convolutions", "n_convolutions"),
    ):
        values: tuple[int, ...] = setup.read(theirs, _counts, (2, 2, 2, 2))
        if len(values) != len(factors):
            raise setup.error(
                theirs,
                f"{len(values)} numbers for {len(factors)} levels (downsample_factors)",
            )
        config.model[ours] = values
    return config


class _Setup:
    """The section of an original .ini file that describes the network."""

    def __init__(self, path: pathlib.Path) -> None:
        names = ("train_config.ini", "predict_config.ini")
        if path.is_dir():
            there = [path / name for name in names if (path / name).exists()]
            if not there:
                raise UserError(
                    f"{path} is not the folder of an original setup: it has no "
                    f"{names[0]}; give the folder with this file"
                )
            path = there[0]
        self._path = path
        # Without interpolation, a % in a path stays a plain character.
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read as an .ini file: {why}") from None
        sections = [name for name in ("Training", "Predict") if name in parser]
        if not sections:
            raise UserError(
                f"{path} has neither a section [Training] nor [Predict]; give the "
                "train_config.ini of an original setup"
            )
        self._section = parser[sections[0]]

    def read(
        self, key: str, parse: Callable[[str], _T], default: _T | None = None
    ) -> _T:
        """Returns the parsed value; `UserError` if there is no value and no default."""
        text = self._section.get(key, "").strip()
        if not text and default is not None:
            return default
        if not text:
            raise UserError(
                f"{self._path} has no key {key}; add the key with its value in training"
            )
        try:
            return parse(text)
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def error(self, key: str, why: str) -> UserError:
        return UserError(f"{self._path}: {key} = {self._section.get(key)}: {why}")


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise ValueError("a name is empty")
    return words


def _count(text: str) -> int:
    if not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", text, re.ASCII):
        raise ValueError("not a whole number above 0")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _three_counts(text: str) -> tuple[int, ...]:
    counts = _counts(text)
    if len(counts) != 3:
        raise ValueError("not three numbers (z, y, x)")
    return counts


def _triples(text: str) -> tuple[tuple[int, ...], ...]:
    if not re.fullmatch(r"\s*\([^()]*\)(\s*,\s*\([^()]*\))*\s*", text):
        raise ValueError("not a list like (1,2,2), (2,2,2)")
    return tuple(map(_three_counts, re.findall(r"\(([^()]*)\)", text)))


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the network in a checkpoint, by name.

    Floating-point arrays become float32. The arrays of a file in PyTorch's current
    (zip) format are memory-mapped. No code in the file is run, because PyTorch reads
    the file with its reader that accepts only tensors.

    Raises:
      UserError: PyTorch is not installed, the file cannot be read or is damaged, or its
        content is not a state dictionary of tensors.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "importing a PyTorch checkpoint needs PyTorch: "
            "pip install 'synister_jax[torch]'"
        ) from None
    try:
        with open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a broken pickle can raise any error
        raise UserError(
            f"{path} is not a whole PyTorch checkpoint that holds only tensors "
            f"({type(error).__name__}): copy the file again; if it holds other "
            "objects, save the state_dict() of the network instead"
        ) from None
    if isinstance(content, Mapping):
        content = content.get("model_state_dict", content)
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(key, str) for key in content)
        and all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise UserError(
            f"{path} holds no state dictionary: it has no model_state_dict and is not "
            "itself a dictionary of names and tensors; save the state_dict() of the "
            "network"
        )
    state = {}
    for key, value in content.items():
        key = re.sub(r"^((_orig_mod|module)\.)+", "", key)  # compiled or multi-GPU
        if key in state:
            raise UserError(f"{path} has {key} twice: with and without a prefix")
        value = value.detach()
        state[key] = (value.float() if value.is_floating_point() else value).numpy()
    return state


def vgg3d(
    state: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> Variables:
    """Returns the variables of `model.VGG3D` from the original's Vgg3D.

    Args:
      state: the arrays that `load` returns.
      config: the config of the network.

    Raises:
      UserError: an array is missing or unknown, or has another shape than the config
        needs.
    """
    modules = {}
    index = 0  # in the sequence convolution, batch norm, ReLU, …, max-pool
    for level, convolutions in enumerate(config.model.convolutions):
        for i in range(convolutions):
            modules[f"level{level}_conv{i}"] = f"features.{index}"
            modules[f"level{level}_norm{i}"] = f"features.{index + 1}"
            index += 3
        index += 1
    for i, name in enumerate(("dense0", "dense1", "logits")):
        modules[name] = f"classifier.{3 * i}"
    return _convert(state, config, modules, _AXES)


def resnet18(
    state: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> Variables:
    """Returns the variables of `model.ResNet18` from the r3d_18 of BANC.

    BANC's network takes crops [z, x, y]. The imported network takes crops [z, y, x],
    like all our networks.

    Args:
      state: the arrays that `load` returns.
      config: the config of the network.

    Raises:
      UserError: the classes of the config are not in the checkpoint's alphabetical
        order; or an array is missing or unknown, or has another shape than the config
        needs.
    """
    if list(config.classes) != sorted(config.classes):
        raise UserError(
            f"config.classes is {', '.join(config.classes)}; the outputs of a BANC "
            "checkpoint are in alphabetical order: sort the classes"
        )
    modules = {"stem_conv": "stem.0", "stem_norm": "stem.1", "logits": "fc"}
    for layer in range(1, 5):
        for block in range(2):
            ours, theirs = f"layer{layer}_block{block}", f"layer{layer}.{block}"
            for i in range(2):
                modules[f"{ours}.conv{i}"] = f"{theirs}.conv{i + 1}.0"
                modules[f"{ours}.norm{i}"] = f"{theirs}.conv{i + 1}.1"
        if layer > 1:
            modules[f"layer{layer}_block0.shortcut_conv"] = (
                f"layer{layer}.0.downsample.0"
            )
            modules[f"layer{layer}_block0.shortcut_norm"] = (
                f"layer{layer}.0.downsample.1"
            )
    return _convert(state, config, modules, _AXES_ZXY)


def _convert(
    state: Mapping[str, np.ndarray],
    config: ml_collections.ConfigDict,
    modules: Mapping[str, str],
    axes: Mapping[int, tuple[int, ...]],
) -> Variables:
    """Returns the variables of the config's network, with the arrays of `state`.

    Args:
      modules: for each of our modules (its path joined with dots), the name of the
        PyTorch module.
      axes: for each number of dimensions, the order of the axes: axis i of our array is
        axis axes[ndim][i] of the PyTorch array.
    """
    left = {key for key in state if not key.endswith(".num_batches_tracked")}

    def leaf(path: tuple[tree_util.DictKey, ...], ours: np.ndarray) -> np.ndarray:
        _, *parents, name = (part.key for part in path)
        module = ".".join(parents)
        names = _NORM if "norm" in parents[-1] else _LAYER
        key = f"{modules[module]}.{names[name]}"
        if key not in state:
            raise UserError(
                f"the checkpoint has no {key}, but the network of the config needs "
                f"this array ({module}); choose the config of this checkpoint"
            )
        left.remove(key)
        order = axes[ours.ndim]
        needed = tuple(int(n) for n in np.array(ours.shape)[np.argsort(order)])
        if state[key].shape != needed:
            raise UserError(
                f"{key} is {state[key].shape} in the checkpoint, but the network of "
                f"the config needs {needed}; choose the config of this checkpoint"
            )
        return np.ascontiguousarray(state[key].transpose(order))

    variables = tree_util.tree_map_with_path(leaf, inference.abstract_variables(config))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(
            f"the checkpoint has {min(left)}{more}, but the network of the config does "
            "not; choose the config of this checkpoint"
        )
    return variables

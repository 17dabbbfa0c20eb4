# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the original PyTorch systems → variables of our networks.

`load` reads the file, `vgg3d` or `resnet18` sort its arrays into our tree. Every array
must find its place there, and every place its array.
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

# Our axis i is their axis _AXES[ndim][i]: convolutions are [out, in, z, y, x] there and
# [z, y, x, in, out] here, dense weights [out, in] and [in, out].
_AXES = {1: (0,), 2: (1, 0), 5: (2, 3, 4, 1, 0)}
# BANC's crops were (z, x, y): its kernels' last axis is our y.
_AXES_ZXY = _AXES | {5: (2, 4, 3, 1, 0)}

_LAYER = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean"}
_NORM |= {"var": "running_var"}


def read_setup(
    path: pathlib.Path, base: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """`base` with what an original setup says of its data and its network.

    Args:
      path: the setup's folder, or its train_config.ini; a predict_config.ini of the
        generation that repeats the training's keys does as well.
      base: a config of VGG3D; keeps what an .ini does not know, as dense_features
        (4096 in the original's code) and the augmentation.

    Raises:
      UserError: no such file, or a key is missing or malformed.
    """
    setup = _Setup(path)
    config = base.copy_and_resolve_references()
    if setup.read("network", str, "VGG") != "VGG":
        raise setup.error("network", "only VGG can be imported")
    classes = setup.read("synapse_types", _words)
    if setup.read("neither_class", str, "False") == "True":
        classes = (*classes, "neither")
    if len(set(classes)) < len(classes):
        raise setup.error("synapse_types", "a class is there twice")
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
    """The one section of an original .ini that describes a network."""

    def __init__(self, path: pathlib.Path) -> None:
        names = ("train_config.ini", "predict_config.ini")
        if path.is_dir():
            there = [path / name for name in names if (path / name).exists()]
            if not there:
                raise UserError(f"{path} is not a setup: it has no {names[0]}")
            path = there[0]
        self._path = path
        # Values are as they stand: a % in a path is no interpolation.
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read as an .ini file: {why}") from None
        sections = [name for name in ("Training", "Predict") if name in parser]
        if not sections:
            raise UserError(f"{path} has neither a section [Training] nor [Predict]")
        self._section = parser[sections[0]]

    def read(
        self, key: str, parse: Callable[[str], _T], default: _T | None = None
    ) -> _T:
        """The parsed value; `UserError` where the key has neither value nor default."""
        text = self._section.get(key, "").strip()
        if not text and default is not None:
            return default
        if not text:
            raise UserError(f"{self._path} has no key {key}; write it as in training")
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
    """The state of the network in a checkpoint: name → array, float32 where floating.

    Arrays of a file in PyTorch's present (zip) format are mapped, not read. Nothing in
    the file is run: it is unpickled by PyTorch's reader of tensors alone.

    Raises:
      UserError: PyTorch is not installed, or the file is none of its state
        dictionaries, whole and of tensors alone.
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
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(
            f"{path} is not a whole PyTorch checkpoint of tensors alone "
            f"({type(error).__name__}): copy it again; where it holds other objects, "
            "save its state_dict() instead"
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
            f"{path} holds no state dictionary: neither model_state_dict nor names "
            "with tensors alone"
        )
    state = {}
    for key, value in content.items():
        key = re.sub(r"^((_orig_mod|module)\.)+", "", key)  # compiled, or on many GPUs
        if key in state:
            raise UserError(f"{path} has {key} twice, with and without a prefix")
        value = value.detach()
        state[key] = (value.float() if value.is_floating_point() else value).numpy()
    return state


def vgg3d(
    state: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> Variables:
    """Variables of `model.VGG3D` from the original's Vgg3D.

    Raises:
      UserError: a key is missing, unknown, or of another shape than config's.
    """
    modules = {}
    index = 0  # in the sequence of convolution, batch norm, ReLU, …, max-pool
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
    """Variables of `model.ResNet18` from the r3d_18 of BANC.

    That network takes crops [z, x, y]; the imported one takes ours, [z, y, x].

    Raises:
      UserError: config's classes are not in alphabetical order, as the checkpoint's
        are, or a key is missing, unknown, or of another shape than config's.
    """
    if list(config.classes) != sorted(config.classes):
        raise UserError(
            f"config.classes is {', '.join(config.classes)}; the outputs of a BANC "
            "checkpoint are in alphabetical order"
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
    """The tree of config's network, its leaves from `state`.

    Args:
      modules: our module, its path joined with dots → theirs.
      axes: by number of dimensions; our axis i is their axis axes[ndim][i].
    """
    left = {key for key in state if not key.endswith(".num_batches_tracked")}

    def leaf(path: tuple[tree_util.DictKey, ...], ours: np.ndarray) -> np.ndarray:
        _, *parents, name = (part.key for part in path)
        module = ".".join(parents)
        names = _NORM if "norm" in parents[-1] else _LAYER
        key = f"{modules[module]}.{names[name]}"
        if key not in state:
            raise UserError(
                f"the checkpoint has no {key}; config's network needs it ({module})"
            )
        left.remove(key)
        order = axes[ours.ndim]
        needed = tuple(int(n) for n in np.array(ours.shape)[np.argsort(order)])
        if state[key].shape != needed:
            raise UserError(
                f"{key} is {state[key].shape} in the checkpoint, config's network "
                f"needs {needed}"
            )
        return np.ascontiguousarray(state[key].transpose(order))

    variables = tree_util.tree_map_with_path(leaf, inference.abstract_variables(config))
    if left:
        raise UserError(
            f"the checkpoint has {min(left)}, which config's network has not"
            + (f" (nor {len(left) - 1} more)" if len(left) > 1 else "")
        )
    return variables

# SPDX-License-Identifier: Apache-2.0
"""Trained networks as a function from crops to class probabilities."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint, convolution, input_scaling, model, sharding

Variables = dict[str, Any]  # {"params", "batch_stats"}

# Networks can only be averaged if their runs agree in these settings. The scaling of
# the crops is the same for all networks.
_COMMON = ("classes", "crop_shape_zyx", "voxel_size_nm_zyx")


def make_classify(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    views: int = 1,
    temperature: float | None = None,
) -> Callable[[Variables, jax.Array], jax.Array]:
    """Returns a compiled function that classifies a batch of records.

    The function takes the variables and the records, uint8 [batch, *record]. It returns
    the probabilities, float32 [batch, classes]. The batch is split over the mesh. The
    crops are cut from the middle of the records. Every process gets all probabilities.

    Args:
      config: the config of the run.
      mesh: the device mesh.
      views: 1, or 8 for the mean of the probabilities over the 8 symmetries of the
        section plane (mirrored in y, mirrored in x, y and x swapped). The published
        training mirrors every axis and swaps y with x (train_pipeline.py). The 8 views
        keep the label for any thickness of the sections.
      temperature: the number that the logits are divided by (calibration.py). With
        None the logits are not changed.

    Raises:
      UserError: views is neither 1 nor 8, or views is 8 and the crops are not square
        in y and x.
    """
    network = model.from_config(config, sharding.head_input(mesh))
    crop_shape_zyx = tuple(config.crop_shape_zyx)
    if views not in (1, 8):
        raise UserError(f"--tta: the number of views is {views}; choose 1 or 8")
    if views == 8 and crop_shape_zyx[1] != crop_shape_zyx[2]:
        raise UserError(
            "--tta: the number of views is 8, and some of them swap y and x, but y and "
            "x have different sizes in config.crop_shape_zyx = "
            f"{crop_shape_zyx}; choose 1"
        )

    def probabilities(variables: Variables, crops: jax.Array) -> jax.Array:
        logits: Any = network.apply(variables, crops, train=False)
        return jax.nn.softmax(logits if temperature is None else logits / temperature)

    def classify(variables: Variables, records: jax.Array) -> jax.Array:
        crops = input_scaling.centre(records, crop_shape_zyx)
        if views == 1:
            return probabilities(variables, crops)
        # The views are computed one after another. So the network is compiled once, and
        # only the activations of one view are in memory.
        each = jax.lax.map(
            lambda index: probabilities(variables, _view(crops, index)),
            jnp.arange(views),
        )
        return each.mean(axis=0)

    return jax.jit(
        classify,
        in_shardings=(None, sharding.batch(mesh)),
        out_shardings=sharding.replicated(mesh),
        compiler_options=convolution.compiler_options(),
    )


def _view(crops: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one of the 8 views of crops [batch, z, y, x] (see `make_classify`)."""
    crops = jnp.where(index & 1, jnp.flip(crops, 2), crops)
    crops = jnp.where(index & 2, jnp.flip(crops, 3), crops)
    return jnp.where(index & 4, crops.swapaxes(2, 3), crops)


@dataclasses.dataclass(frozen=True)
class _Member:
    """One of the averaged checkpoints, with its variables on every device."""

    workdir: pathlib.Path
    step: int
    classify: Callable[[Variables, jax.Array], jax.Array]
    variables: Variables

    @classmethod
    def load(
        cls,
        workdir: pathlib.Path,
        step: int | None,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        views: int,
        temperature: float | None,
    ) -> "_Member":
        chosen = checkpoint.choose_step(workdir, step)
        classify = make_classify(config, mesh, views, temperature)
        abstract = sharding.abstract(
            abstract_variables(config), sharding.replicated(mesh)
        )
        variables = checkpoint.load_variables(workdir, chosen, abstract, config)
        # The parameters are checked here, because the probabilities can hide a NaN:
        # oneDNN's ReLU turns it into 0.
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
            raise UserError(
                f"{workdir}, step {chosen}: parameters are NaN or infinite; choose "
                "another step"
            )
        return cls(workdir, chosen, classify, variables)


class Classifier:
    """One or several checkpoints that classify crops, with averaged probabilities.

    Args:
      members: (folder of the run, step) of each checkpoint. With the step None, the
        latest checkpoint of the run is used. The network is built from the run's
        config.json. All checkpoints have the same weight in the mean.
      batch_size: number of crops that are classified at once.
      mesh: the device mesh.
      views: number of views of every crop, 1 or 8; see `make_classify`.
      temperature: see `make_classify`; only for one checkpoint and one view.

    Raises:
      UserError: a folder is not a run, or has no such checkpoint; a checkpoint has
        another architecture, or parameters that are not finite; the runs differ in
        classes, crop shape or voxel size; the crops do not have these views; the
        devices do not divide the batch size; or there is a temperature for several
        checkpoints or views.
    """

    def __init__(
        self,
        members: Sequence[tuple[pathlib.Path, int | None]],
        batch_size: int,
        mesh: Mesh,
        views: int = 1,
        temperature: float | None = None,
    ) -> None:
        if temperature is not None:
            require_one(len(members), views)
        sharding.require_divisible(batch_size, mesh)
        configs = [checkpoint.load_config(workdir) for workdir, _ in members]
        for (workdir, _), config in zip(members, configs, strict=True):
            _require_alike(members[0][0], configs[0], workdir, config)
        self.config = configs[0]  # the first run's; other networks may differ
        self.batch_size, self.views = batch_size, views
        self.temperature = temperature
        self._batch_sharding = sharding.batch(mesh)
        self._members = [
            _Member.load(*member, config, mesh, views, temperature)
            for member, config in zip(members, configs, strict=True)
        ]
        self._mean = jax.jit(_mean, out_shardings=sharding.replicated(mesh))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.classes)

    @functools.cached_property
    def members(self) -> list[dict[str, Any]]:
        """Workdir, step and parameters_sha256 of each checkpoint, for provenance."""
        return [
            {
                "workdir": str(member.workdir),
                "step": member.step,
                "parameters_sha256": _sha256_of_leaves(member.variables),
            }
            for member in self._members
        ]

    def __call__(self, records: np.ndarray) -> np.ndarray:
        """Classifies records, uint8 [n, *record]; returns float32 [n, classes]."""
        parts = [np.zeros((0, len(self.classes)), np.float32)]
        for first in range(0, len(records), self.batch_size):
            batch = self.put(records[first : first + self.batch_size])
            parts.append(np.asarray(self.start(batch)))
        return np.concatenate(parts)[: len(records)]

    def put(self, records: Sequence[np.ndarray] | np.ndarray) -> jax.Array:
        """Copies at most `batch_size` uint8 records to the devices.

        Returns uint8 [batch_size, *record] when the transfer is complete. Zeros fill
        the places without a record.
        """
        filled = np.zeros((self.batch_size, *records[0].shape), np.uint8)
        for place, record in enumerate(records):
            filled[place] = record
        return jax.block_until_ready(jax.device_put(filled, self._batch_sharding))

    def start(self, batch: jax.Array) -> jax.Array:
        """Starts to classify a batch that `put` returned.

        Returns the probabilities, float32 [batch_size, classes], without waiting until
        they are computed. Every process gets the probabilities of the whole batch.
        """
        each = [member.classify(member.variables, batch) for member in self._members]
        return each[0] if len(each) == 1 else self._mean(each)


def require_one(members: int, views: int) -> None:
    """Raises `UserError` if there are several networks or views for one temperature."""
    if members > 1 or views > 1:
        raise UserError(
            "--calibrated: the temperature was fitted for one network and one view, "
            f"but {members} network(s) and {views} view(s) are asked for; leave out "
            "--calibrated, or ask for one network and one view"
        )


@contextlib.contextmanager
def told_if_too_large(batch_size: int) -> Iterator[None]:
    """Turns an error about too little memory for a batch into a `UserError`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            raise UserError(
                f"batches of {batch_size:,} crops do not fit into memory; give a "
                "smaller --batch_size"
            ) from None
        raise


def abstract_variables(config: ml_collections.ConfigDict) -> Variables:
    """Returns the shapes and dtypes of the network's variables."""
    network = model.from_config(config)
    crops = jnp.zeros((1, *config.crop_shape_zyx), jnp.float32)
    return jax.eval_shape(
        lambda key: network.init(key, crops, train=False), jax.random.key(0)
    )


def _require_alike(
    first: pathlib.Path,
    first_config: ml_collections.ConfigDict,
    other: pathlib.Path,
    other_config: ml_collections.ConfigDict,
) -> None:
    for name in _COMMON:
        a, b = list(first_config[name]), list(other_config[name])
        if a != b:
            raise UserError(
                f"{first} has {name} {a}, but {other} has {b}; a mean over networks "
                "needs runs with the same value"
            )


def _mean(each: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean. The float32 values are always added in the given order."""
    return sum(each[1:], start=each[0]) / len(each)


def _sha256_of_leaves(variables: Variables) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""A run's folder: config.json, and Orbax checkpoints of state and data position."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import jax
import ml_collections
from orbax.checkpoint import v1 as ocp

from synister_jax import files
from synister_jax.command import UserError

# What may differ between two starts of one run: how long it goes on, what it reports.
_MAY_CHANGE = (
    "shards",
    "num_train_steps",
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "keep_latest",
    "keep_every_steps",
)


def save_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, crops_sha256: str
) -> None:
    """Writes config.json, or raises `UserError` when the run has another one.

    Args:
      crops_sha256: of the training data, kept under that name; where the shards are
        may change from one start to the next, what is in them may not.
    """
    path = workdir / "config.json"
    now = json.loads(config.to_json_best_effort()) | {"crops_sha256": crops_sha256}
    if path.exists():
        before = files.read_json(path)
        may_change = set(_MAY_CHANGE)
        if config.cosine_decay:  # then the length decides every step's rate
            may_change.remove("num_train_steps")
        for key in sorted(before.keys() | now.keys()):
            if key not in may_change and before.get(key) != now.get(key):
                raise UserError(
                    f"{workdir} holds a run with {key} = {before.get(key)}, now "
                    f"{now.get(key)}; choose another --workdir"
                )
    files.write_json(path, now)


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config that a run was started with, from its config.json."""
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json")
    return ml_collections.ConfigDict(files.read_json(workdir / "config.json"))


def steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    folder = (workdir / "checkpoints").resolve()
    if not folder.exists():
        return []
    with ocp.training.Checkpointer(folder) as checkpointer:
        return sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)


def choose_step(workdir: pathlib.Path, step: int | None) -> int:
    """`step`, or the latest; `UserError` lists the checkpoints there are."""
    there = steps(workdir)
    if not there:
        raise UserError(f"{workdir} has no checkpoint; train first")
    if step is not None and step not in there:
        raise UserError(
            f"{workdir} has no checkpoint of step {step}; there are "
            f"{', '.join(map(str, there))}"
        )
    return there[-1] if step is None else step


def parse_steps(workdir: pathlib.Path, texts: Sequence[str] | None) -> list[int] | None:
    """Steps from the flag `--steps`; None, the latest, when it was not given."""
    if texts is None:
        return None
    if texts == ["all"]:
        return steps(workdir)
    if texts == ["best"]:
        return [best_step(workdir)]
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise UserError(
            f"--steps={','.join(texts)}: give numbers, `all` or `best`"
        ) from None


def best_step(workdir: pathlib.Path) -> int:
    """The checkpoint that did best on validation, from its summary.json."""
    path = workdir / "evaluation" / "validation" / "summary.json"
    if not path.exists():
        raise UserError(
            f"no {path} yet: run evaluate --part=validation --steps=all first"
        )
    return files.read_json(path)["best_step"]


def load_variables(
    workdir: pathlib.Path, step: int, abstract: Any, config: ml_collections.ConfigDict
) -> Any:
    """`params` and `batch_stats` alone, for inference.

    Args:
      abstract: {"params", "batch_stats"} of `jax.ShapeDtypeStruct` with shardings.
    """
    path = (workdir / "checkpoints" / str(step)).resolve()  # Orbax wants it absolute
    _require_same(path, abstract, config)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(path, {"state": abstract})["state"]


class Checkpointer:
    """Saves and restores training state and Grain iterator, both at the same step."""

    def __init__(
        self, workdir: pathlib.Path, config: ml_collections.ConfigDict
    ) -> None:
        keep = ocp.training.preservation_policies
        self._folder = (workdir / "checkpoints").resolve()
        self._config = config
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=keep.AnyPreservationPolicy(
                [
                    keep.LatestN(config.keep_latest),
                    keep.EveryNSteps(config.keep_every_steps),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Saves; writing goes on behind."""
        self._orbax.save_checkpointables_async(
            step,
            {"state": state, "data": batches},
            force=True,
            custom_metadata=_about(self._config),
        )

    def restore(
        self, abstract_state: Any, batches: grain.DatasetIterator
    ) -> Any | None:
        """The latest state, with `batches` moved to its step; None if there is none."""
        latest = self._orbax.latest
        if latest is None:
            return None
        path = self._folder / str(latest.step)
        _require_same(path, abstract_state, self._config)
        abstract = {"state": abstract_state, "data": batches}
        return self._orbax.load_checkpointables(latest.step, abstract)["state"]

    def close(self) -> None:
        """Waits for the save in flight."""
        self._orbax.close()


def _about(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Carried by every checkpoint: what its inputs and outputs mean."""
    names = ("classes", "crop_shape_zyx", "voxel_size_nm_zyx")
    return {name: list(config[name]) for name in names}


def _require_same(
    path: pathlib.Path, abstract: Any, config: ml_collections.ConfigDict
) -> None:
    """Orbax's own message for another architecture does not name the array."""
    checkpoint = ocp.metadata(path, checkpointable_name="state")
    for name, value in _about(config).items():
        if checkpoint.custom_metadata.get(name) != value:
            raise UserError(
                f"checkpoint {path} was trained with {name} "
                f"{checkpoint.custom_metadata.get(name)}, config.json says {value}"
            )
    saved = checkpoint.metadata
    saved_shapes = {
        _name(key): leaf.shape for key, leaf in jax.tree.leaves_with_path(saved)
    }
    for key, leaf in jax.tree.leaves_with_path(abstract):
        found = saved_shapes.get(_name(key))
        if found != leaf.shape:
            raise UserError(
                f"checkpoint {path} is of another architecture: {_name(key)} is "
                f"{found or 'not in it'}, the network of config.json needs "
                f"{leaf.shape}"
            )


def _name(key: tuple[Any, ...]) -> str:
    # Attribute, dictionary and sequence keys name the same array in different trees.
    parts = [
        getattr(part, "name", getattr(part, "key", getattr(part, "idx", None)))
        for part in key
    ]
    return ".".join(map(str, parts))

# SPDX-License-Identifier: Apache-2.0
"""A run's folder: config.json, and Orbax checkpoints of its training state."""

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from orbax.checkpoint import v1 as ocp

import synister_jax
from synister_jax.base import files
from synister_jax.base.errors import UserError

# What the best checkpoint is best in, of those that were validated.
BEST_BY = "validation/synapse_mean_class_accuracy"

# What may differ between two starts of one run: how long it goes on, what it reports.
_MAY_CHANGE = (
    "shards",
    "num_train_steps",
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "snapshot_every_steps",
    "early_stop_evals",
    "keep_latest",
    "keep_every_steps",
    "head_devices",
)


def require_same_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, crops_sha256: str
) -> None:
    """Raises `UserError` when the folder's run has another config.

    Before its first checkpoint a run has nothing to lose: then any config will do.
    """
    path = workdir / "config.json"
    if not path.exists() or not steps(workdir):
        return
    before, now = files.read_json(path), _as_json(config, crops_sha256)
    may_change = set(_MAY_CHANGE)
    if config.schedule == "cosine":  # then the length decides every step's rate
        may_change.remove("num_train_steps")
    for key in sorted(before.keys() | now.keys()):
        if key not in may_change and before.get(key) != now.get(key):
            raise UserError(
                f"{workdir} holds a run with {key} = {before.get(key)}, now "
                f"{now.get(key)}; choose another --workdir"
            )


def save_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, crops_sha256: str
) -> None:
    """Writes config.json.

    Args:
      crops_sha256: of the training data, kept under that name; where the shards are
        may change from one start to the next, what is in them may not.
    """
    files.write_json(workdir / "config.json", _as_json(config, crops_sha256))


def _as_json(config: ml_collections.ConfigDict, crops_sha256: str) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort()) | {"crops_sha256": crops_sha256}


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
    """The checkpoint that did best on validation, of those that are there.

    As measured in training, or afterwards by `evaluate --part=validation`.
    """
    with ocp.training.Checkpointer((workdir / "checkpoints").resolve()) as orbax:
        measured = {c.step: (c.metrics or {}).get(BEST_BY) for c in orbax.checkpoints}
    summary = workdir / "evaluation" / "validation" / "summary.json"
    if summary.exists():
        for entry in files.read_json(summary)["checkpoints"]:
            if entry["step"] in measured:
                measured[entry["step"]] = entry["synapse_mean_class_accuracy"]
    measured = {step: value for step, value in measured.items() if value is not None}
    if not measured:
        raise UserError(
            f"no checkpoint of {workdir} was validated in training or since: run "
            "evaluate --part=validation --steps=all first"
        )
    # Of equal ones the latest, as the trainer keeps it.
    return max(measured, key=lambda step: (measured[step], step))


def best_or_latest_step(workdir: pathlib.Path) -> int:
    """The best checkpoint where any was validated, else the latest."""
    latest = choose_step(workdir, None)
    try:
        return best_step(workdir)
    except UserError:
        return latest


def load_variables(
    workdir: pathlib.Path, step: int, abstract: Any, config: ml_collections.ConfigDict
) -> Any:
    """`params` and `batch_stats` alone, for inference.

    Where the run averages them, the averages.

    Args:
      abstract: {"params", "batch_stats"} of `jax.ShapeDtypeStruct` with shardings.
    """
    path = (workdir / "checkpoints" / str(step)).resolve()  # Orbax wants it absolute
    averages = bool(config.get("ema_decay", 0.0))  # a run of version 0.1.0 has no such
    wanted = {"ema": abstract} if averages else abstract
    _require_same(path, wanted, config)
    loaded = load_partly(path, wanted)
    return loaded["ema"] if averages else loaded


def load_partly(path: pathlib.Path, abstract: Any) -> Any:
    """The arrays of `abstract`, of all that a checkpoint holds."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(path, {"state": abstract})["state"]


def load_fitting(
    workdir: pathlib.Path, step: int, fresh: Any, config: ml_collections.ConfigDict
) -> tuple[Any, list[str]]:
    """Variables of another run, to go on from: (variables, names left as they were).

    Args:
      fresh: {"params", "batch_stats"}, arrays; those of the last layer `logits` stay
        where the other run has other classes.

    Raises:
      UserError: any other array differs, or the voxels do.
    """
    other = load_config(workdir)
    if list(other.voxel_size_nm_zyx) != list(config.voxel_size_nm_zyx):
        raise UserError(
            f"config.init_from {workdir} was trained with voxel_size_nm_zyx "
            f"{list(other.voxel_size_nm_zyx)}, not {list(config.voxel_size_nm_zyx)}"
        )
    same_classes = list(other.classes) == list(config.classes)
    kept = [] if same_classes else ["params.logits.bias", "params.logits.kernel"]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        fresh,
    )
    taken = dict(abstract, params=dict(abstract["params"]))
    if not same_classes:
        del taken["params"]["logits"]
    variables = load_variables(workdir, step, taken, other)
    if not same_classes:
        variables["params"]["logits"] = fresh["params"]["logits"]
    return variables, kept


class Checkpointer:
    """Saves and restores the training state."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: ml_collections.ConfigDict,
        crops_sha256: str,
        keep_all: bool = False,
    ) -> None:
        keep = ocp.training.preservation_policies
        policies = [
            keep.LatestN(config.keep_latest),
            keep.EveryNSteps(config.keep_every_steps),
            keep.BestN(
                n=1,
                get_metric_fn=lambda metrics: metrics[BEST_BY],
                keep_checkpoints_without_metrics=False,
            ),
        ]
        if keep_all:
            policies = [keep.PreserveAll()]
        self._folder = (workdir / "checkpoints").resolve()
        self._config = config
        self._about = _about(config) | {
            "code": code_version(),
            "crops_sha256": crops_sha256,
            "config": json.loads(config.to_json_best_effort()),
        }
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=keep.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    def save(
        self, step: int, state: Any, measured: Mapping[str, float] | None = None
    ) -> None:
        """Saves; writing goes on behind.

        Args:
          measured: numbers of the validation part, which decide the best checkpoint.

        Raises:
          UserError: this or the save before it could not be written.
        """
        with self._writing():
            self._orbax.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                metrics=None if measured is None else dict(measured),
                custom_metadata=self._about,
            )

    def restore(self, abstract_state: Any) -> Any | None:
        """The latest state; None if there is none."""
        latest = self._orbax.latest
        if latest is None:
            return None
        path = self._folder / str(latest.step)
        _require_same(path, abstract_state, self._config)
        abstract = {"state": abstract_state}
        return self._orbax.load_checkpointables(latest.step, abstract)["state"]

    def close(self) -> None:
        """Waits for the save in flight; `UserError` when it fails."""
        with self._writing():
            self._orbax.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot write a checkpoint to {self._folder} ({reason}); those "
                "already there are whole: make room or mend the disk, and run the "
                "same command again"
            ) from None


def save_imported(
    workdir: pathlib.Path,
    step: int,
    variables: Mapping[str, Any],
    config: ml_collections.ConfigDict,
) -> None:
    """Makes a workdir of weights from elsewhere, for evaluate and predict.

    Raises:
      UserError: the folder holds another run, or this step.
    """
    workdir = files.make_folder(workdir)
    config = config.copy_and_resolve_references()
    config.ema_decay = 0.0  # nothing of it is in the folder
    require_same_config(workdir, config, "")
    if step in steps(workdir):
        raise UserError(f"{workdir} has a checkpoint of step {step} already")
    save_config(workdir, config, "")
    checkpointer = Checkpointer(workdir, config, "", keep_all=True)
    checkpointer.save(step, dict(variables))
    checkpointer.close()


def code_version() -> str:
    """The package's version, with the commit where it runs from a repository."""
    root = pathlib.Path(synister_jax.__file__).parents[1]
    version = synister_jax.__version__
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}+{described.stdout.strip()}"


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

# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the folder of a run: config.json and the Orbax checkpoints."""

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

# The best checkpoint has the highest value of this number on the validation part.
BEST_BY = "validation/synapse_mean_class_accuracy"

# These settings may change when a run is continued: they say how long the run lasts,
# what it reports and keeps, and where it runs.
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
    """Checks that a run can be continued with this config.

    Before the first checkpoint of the run, every config is accepted, because no result
    can be lost.

    Raises:
      UserError: a setting that must not change has another value in config.json.
    """
    path = workdir / "config.json"
    if not path.exists() or not steps(workdir):
        return
    before, now = files.read_json(path), _as_json(config, crops_sha256)
    may_change = set(_MAY_CHANGE)
    if config.schedule == "cosine":  # the length decides every learning rate
        may_change.remove("num_train_steps")
    for key in sorted(before.keys() | now.keys()):
        if key not in may_change and before.get(key) != now.get(key):
            raise UserError(
                f"{workdir} holds a run with {key} = {before.get(key)}, but "
                f"this command has {now.get(key)}; choose another --workdir"
            )


def save_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, crops_sha256: str
) -> None:
    """Writes config.json.

    Args:
      workdir: the folder of the run.
      config: the config of the run.
      crops_sha256: checksum of the training data, which config.json keeps. The shards
        may be moved between two starts of a run, but their content must not change.
    """
    files.write_json(workdir / "config.json", _as_json(config, crops_sha256))


def _as_json(config: ml_collections.ConfigDict, crops_sha256: str) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort()) | {"crops_sha256": crops_sha256}


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config of a run, from its config.json.

    Raises:
      UserError: the folder has no config.json.
    """
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} is not the folder of a run: it has no config.json; give the "
            "folder of a trained network"
        )
    return ml_collections.ConfigDict(files.read_json(workdir / "config.json"))


def steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints, ascending."""
    folder = (workdir / "checkpoints").resolve()
    if not folder.exists():
        return []
    with ocp.training.Checkpointer(folder) as checkpointer:
        return sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)


def choose_step(workdir: pathlib.Path, step: int | None) -> int:
    """Returns `step`, or the step of the latest checkpoint if `step` is None.

    Raises:
      UserError: the run has no checkpoint, or none of this step.
    """
    there = steps(workdir)
    if not there:
        raise UserError(f"{workdir} has no checkpoint; train the network first")
    if step is not None and step not in there:
        raise UserError(
            f"{workdir} has no checkpoint of step {step}; there are "
            f"{', '.join(map(str, there))}"
        )
    return there[-1] if step is None else step


def parse_steps(workdir: pathlib.Path, texts: Sequence[str] | None) -> list[int] | None:
    """Returns the steps that the flag `--steps` names.

    Args:
      workdir: the folder of the run.
      texts: the words of the flag: numbers, `all` or `best`. With None (no flag) the
        result is None, which stands for the latest checkpoint.

    Raises:
      UserError: a word is not a number, or no checkpoint was validated for `best`.
    """
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
    """Returns the step of the existing checkpoint that is best on validation.

    The accuracy was measured during training, or later by
    `evaluate --part=validation`, which takes precedence.

    Raises:
      UserError: no existing checkpoint was validated.
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
            f"no checkpoint of {workdir} was validated, during training or later; run "
            "evaluate --part=validation --steps=all first"
        )
    # Among equally good checkpoints the latest is chosen, because training keeps that
    # checkpoint.
    return max(measured, key=lambda step: (measured[step], step))


def best_or_latest_step(workdir: pathlib.Path) -> int:
    """Returns the best step if any checkpoint was validated, else the latest step."""
    latest = choose_step(workdir, None)
    try:
        return best_step(workdir)
    except UserError:
        return latest


def load_variables(
    workdir: pathlib.Path, step: int, abstract: Any, config: ml_collections.ConfigDict
) -> Any:
    """Loads only what inference needs: `params` and `batch_stats`.

    If the run averages its parameters (config.ema_decay), the averages are loaded.

    Args:
      workdir: the folder of the run.
      step: the step of the checkpoint.
      abstract: {"params", "batch_stats"} with a `jax.ShapeDtypeStruct` for each array,
        which has a sharding.
      config: the config of the run.

    Raises:
      UserError: the checkpoint does not fit the config or `abstract`.
    """
    path = (workdir / "checkpoints" / str(step)).resolve()  # absolute for Orbax
    averages = bool(config.get("ema_decay", 0.0))  # runs of 0.1.0 lack this setting
    wanted = {"ema": abstract} if averages else abstract
    _require_same(path, wanted, config)
    loaded = load_partly(path, wanted)
    return loaded["ema"] if averages else loaded


def load_partly(path: pathlib.Path, abstract: Any) -> Any:
    """Loads only the arrays of a checkpoint that are in `abstract`."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(path, {"state": abstract})["state"]


def load_fitting(
    workdir: pathlib.Path, step: int, fresh: Any, config: ml_collections.ConfigDict
) -> tuple[Any, list[str]]:
    """Loads the variables of another run, so that a new run can start from them.

    Args:
      workdir: the folder of the other run.
      step: the step of its checkpoint.
      fresh: the new run's {"params", "batch_stats"}, as arrays. If the classes of the
        two runs differ, the arrays of the last layer `logits` are taken from here.
      config: the config of the new run.

    Returns:
      The variables, and the names of the arrays that were taken from `fresh`.

    Raises:
      UserError: the shape of another array differs, or the voxel size differs.
    """
    other = load_config(workdir)
    if list(other.voxel_size_nm_zyx) != list(config.voxel_size_nm_zyx):
        raise UserError(
            f"config.init_from {workdir} was trained with voxel_size_nm_zyx "
            f"{list(other.voxel_size_nm_zyx)}, but this run has "
            f"{list(config.voxel_size_nm_zyx)}; choose a run with the same voxel size"
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
    """Saves and restores the training state of a run.

    Args:
      workdir: the folder of the run.
      config: the config of the run; it says which checkpoints are kept.
      crops_sha256: checksum of the training data, stored with every checkpoint.
      keep_all: keep every checkpoint, whatever the config says.
    """

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
        """Saves the state; the files are written while the program continues.

        Args:
          step: number of updates so far.
          state: the training state.
          measured: the numbers of the validation part, which decide the best
            checkpoint; None if the step was not validated.

        Raises:
          UserError: this checkpoint or the one before could not be written.
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
        """Returns the state of the latest checkpoint, or None without a checkpoint.

        Args:
          abstract_state: shapes, dtypes and shardings of the state's arrays.

        Raises:
          UserError: the checkpoint has another architecture.
        """
        latest = self._orbax.latest
        if latest is None:
            return None
        path = self._folder / str(latest.step)
        _require_same(path, abstract_state, self._config)
        abstract = {"state": abstract_state}
        return self._orbax.load_checkpointables(latest.step, abstract)["state"]

    def close(self) -> None:
        """Waits until the last checkpoint is written; `UserError` if this fails."""
        with self._writing():
            self._orbax.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot write a checkpoint to {self._folder} ({reason}); the "
                "earlier checkpoints are complete: free some space or repair the disk, "
                "and run the same command again"
            ) from None


def save_imported(
    workdir: pathlib.Path,
    step: int,
    variables: Mapping[str, Any],
    config: ml_collections.ConfigDict,
) -> None:
    """Writes weights that were trained elsewhere into a workdir.

    The commands evaluate and predict can then use this workdir.

    Args:
      workdir: the folder; it is created if needed.
      step: the step under which the checkpoint is saved.
      variables: {"params", "batch_stats"}.
      config: the config that describes the network and its data.

    Raises:
      UserError: the folder holds another run, or already has this step.
    """
    workdir = files.make_folder(workdir)
    config = config.copy_and_resolve_references()
    config.ema_decay = 0.0  # the folder has no averages
    require_same_config(workdir, config, "")
    if step in steps(workdir):
        raise UserError(
            f"{workdir} has a checkpoint of step {step} already; choose another folder "
            "or step"
        )
    save_config(workdir, config, "")
    checkpointer = Checkpointer(workdir, config, "", keep_all=True)
    checkpointer.save(step, dict(variables))
    checkpointer.close()


def code_version() -> str:
    """Returns the package's version, and the commit if it runs from a repository."""
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
    """Returns what every checkpoint says about the network's inputs and outputs."""
    names = ("classes", "crop_shape_zyx", "voxel_size_nm_zyx")
    return {name: list(config[name]) for name in names}


def _require_same(
    path: pathlib.Path, abstract: Any, config: ml_collections.ConfigDict
) -> None:
    """Raises `UserError` if the checkpoint does not fit the config or the arrays.

    This check exists because Orbax's own error does not name the array.
    """
    checkpoint = ocp.metadata(path, checkpointable_name="state")
    for name, value in _about(config).items():
        if checkpoint.custom_metadata.get(name) != value:
            raise UserError(
                f"checkpoint {path} was trained with {name} "
                f"{checkpoint.custom_metadata.get(name)}, but config.json says "
                f"{value}; restore the config.json of this run"
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
                f"{found or 'not in it'}, but the network of config.json needs "
                f"{leaf.shape}"
            )


def _name(key: tuple[Any, ...]) -> str:
    # An array has an attribute, dictionary or sequence key, depending on the tree. All
    # three must give the same name.
    parts = [
        getattr(part, "name", getattr(part, "key", getattr(part, "idx", None)))
        for part in key
    ]
    return ".".join(map(str, parts))

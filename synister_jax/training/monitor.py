# SPDX-License-Identifier: Apache-2.0
"""What a run prints and writes while it trains: lines, numbers and pictures."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from synister_jax.base import figures, files, progress
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import metrics
from synister_jax.training import augment, input_pipeline
from synister_jax.training.metrics_log import MetricsLog
from synister_jax.training.validation import SplitPart

_SNAPSHOT_EXAMPLES = 8


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if jax.process_index() == 0:
        progress.say(text)


class Monitor:
    """Prints and writes what happens in a run. Only the first process does so."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        examples: input_pipeline.TrainBatches,
        first_step: int,
    ) -> None:
        self._config, self._workdir, self._examples = config, workdir, examples
        self._is_first = jax.process_index() == 0
        self._log = MetricsLog(workdir, first_step) if self._is_first else None
        settings = augment.AugmentSettings.of(config)
        self._augment = jax.jit(lambda r, k: augment.augment(r, k, settings))
        self._under_way: dict[str, jax.Array] | None = None
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._progress = Progress(
            "train",
            config.num_train_steps * config.batch_size,
            "crops",
            done=first_step * config.batch_size,
            silent=not self._is_first,
        )

    def note(self, step: int, numbers: dict[str, jax.Array]) -> None:
        """Takes the numbers of a step that was started, and waits for the step before.

        So at most two batches are on the devices.
        """
        if self._under_way is not None:
            jax.block_until_ready(self._under_way)
            self._progress.add(self._config.batch_size)
        self._write_pending()
        self._under_way = numbers
        if step % self._config.log_every_steps == 0:
            self._pending = step, numbers

    def settle(self, numbers: dict[str, jax.Array]) -> None:
        """Waits until the step is done.

        Raises:
          UserError: this step or an earlier one gave numbers that are not finite.
        """
        self._write_pending()
        self._require_finite(jax.device_get(numbers))
        if self._under_way is not None:
            self._progress.add(self._config.batch_size)
            self._under_way = None

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        step, numbers = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        self._require_finite(numbers)
        scalars = {f"train/{k}": float(numbers[k]) for k in ("loss", "accuracy")}
        self._progress.note = f"step {step}, loss {scalars['train/loss']:.3f}"
        if self._log:
            self._log.write(step, scalars)

    def _require_finite(self, numbers: dict[str, np.ndarray]) -> None:
        step = int(numbers["bad_after_step"])
        if step < 0:
            return
        saved = ""
        if self._is_first:
            rows = self._examples.rows(step)
            ids = self._examples.shards.index["synapse_id"].to_numpy()[rows]
            batch = self._examples.read(rows) | {"synapse_id": ids}
            batch["augmented"] = self._augmented(step, batch["crop"])
            folder = files.make_folder(self._workdir / "nonfinite")
            path = folder / f"after-step-{step}.npz"
            with files.replacing(path) as partial, partial.open("wb") as file:
                np.savez_compressed(file, **batch)
            saved = f" (saved in {path})"
        raise UserError(
            f"the update after step {step} made the loss or the parameters NaN or "
            f"infinite; its batch{saved} may show why. The last checkpoint is "
            "complete: fix the data, or start in another --workdir with a lower "
            "config.learning_rate or with config.clip_norm"
        )

    def _augmented(self, step: int, records: np.ndarray) -> np.ndarray:
        """Returns the crops of the batch after `step` as the network gets them.

        The function augments a few at a time, because the device has little memory.
        """
        keys = augment.batch_keys(self._config.seed, step, len(records))
        few = _SNAPSHOT_EXAMPLES
        return np.concatenate(
            [
                np.asarray(self._augment(records[i : i + few], keys[i : i + few]))
                for i in range(0, len(records), few)
            ]
        )

    def snapshot(self, step: int) -> None:
        """Writes a picture of the next crops, as they are and augmented."""
        if not self._log:
            return
        rows = self._examples.rows(step)[:_SNAPSHOT_EXAMPLES]
        batch = self._examples.read(rows)
        names = [self._config.classes[label] for label in batch["label"]]
        crops = self._augmented(step, batch["crop"])
        picture = figures.augmented(batch["crop"], crops, names)
        self._log.write_picture(step, "augmented", picture)

    def validate(
        self,
        step: int,
        part: SplitPart,
        classify: Callable[..., jax.Array],
        state: Any,
        mesh: jax.sharding.Mesh,
    ) -> dict[str, float]:
        """Predicts the whole part, writes its numbers and a picture of its confusion.

        Returns the numbers by name, for example `validation/synapse_accuracy`.
        """
        own = {"params": state.params, "batch_stats": state.batch_stats}
        variables = state.ema or own
        table = part.predict(
            functools.partial(classify, variables), self._config.batch_size, mesh, {}
        )
        measured = metrics.measure(table)
        scalars = metrics.scalars(part.name, measured)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scalars.items())
        say(f"step {step}: {shown}")
        if self._log:
            self._log.write(step, scalars)
            counts = np.asarray(measured["synapses"]["confusion"])
            title = f"{part.name}, step {step}: {counts.sum():,} synapses"
            picture = figures.confusion(counts, self._config.classes, title)
            self._log.write_picture(step, f"{part.name}_confusion", picture)
        return scalars

    def close(self) -> None:
        self._progress.close()
        if self._log:
            self._log.close()

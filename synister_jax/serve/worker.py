# SPDX-License-Identifier: Apache-2.0
r"""The worker process, which takes jobs from the store and predicts their synapses.

    python -m synister_jax.serve.worker --models=DIR --state=DIR/service \
        --name=0-1f2e3d4c

The server runs this command; people do not need it. The server starts one worker for
each accelerator and keeps the standard input of the worker open. The standard input
closes when the server ends for any reason. Then the worker puts its job back into the
queue and ends. Each job has an answer folder (see answering.py), so another worker can
continue where this worker stopped. Between two batches of a job, the worker answers
single positions that somebody waits for.
"""

import functools
import os
import pathlib
import sys
import threading
import time
import traceback
from typing import Any

import jax
import numpy as np
from absl import flags
from pyarrow import feather

from synister_jax.base import command, files, output_folders
from synister_jax.base.errors import UserError, redact
from synister_jax.ondemand import answering, sources
from synister_jax.ondemand.questions import Asked
from synister_jax.serve import served_models
from synister_jax.serve.records import StoredJob, StoredPoint
from synister_jax.serve.store import Store

_PAUSE = 0.1  # seconds until a worker without work asks for work again
_TOLD_EVERY = 0.3  # seconds between two reports of the progress of a job
_TRY_AGAIN = 60.0  # seconds until the worker tries again to open a broken model
_GRACE = 5.0  # seconds that a batch has to finish after the server has ended
_NICE = 10
_OPEN_NETWORKS = 4  # the largest published network takes 1.8 GB


class _NotWanted(Exception):
    """The job was cancelled, or another worker has the job now."""


class _Leaving(Exception):
    """The server has ended."""


class Worker:
    """The loop that answers jobs and single positions with the served models.

    Args:
      store: The store that the worker shares with the server.
      found: The served models by name.
      state: The folder of the service, which has the folder `jobs`.
      name: The name of this worker in the store, different for every process.
      batch_size: The number of crops that are classified at once.
      most_synapses: A job fails if its neurons have more synapses than this together.
      credentials: Path of the ini file of the sources, or None.
    """

    def __init__(
        self,
        store: Store,
        found: dict[str, served_models.ServedModel],
        state: pathlib.Path,
        name: str,
        batch_size: int,
        most_synapses: int,
        credentials: str | None,
    ) -> None:
        self._store, self._models, self._state = store, found, state
        self._name, self._batch_size = name, batch_size
        self._most_synapses, self._credentials = most_synapses, credentials
        self._steps: dict[str, int] = {}
        self._tried = 0.0
        self.leaving = threading.Event()
        self._network = functools.lru_cache(maxsize=_OPEN_NETWORKS)(self._open)

    def _open(self, model: str, step: int) -> answering.OpenNetwork:
        chosen = self._models[model]
        return answering.OpenNetwork.open(
            chosen.workdir, step, chosen.volume, self._batch_size, chosen.calibrated
        )

    def open_models(self) -> None:
        """Opens the models that are not open yet, and reports each to the store."""
        self._tried = time.monotonic()
        for name, model in self._models.items():
            if name in self._steps:
                continue
            try:
                step = answering.choose_step(model.workdir, model.step)
                classifier = self._network(name, step).classifier
                # The first call compiles. It happens here, so that nobody who asks for
                # a single position waits for the compiler.
                shape = tuple(classifier.config.crop_shape_zyx)
                classifier(np.zeros((1, *shape), np.uint8))
                self._steps[name] = step
                [member] = classifier.members
                self._store.report_model(
                    name,
                    step,
                    classifier.classes,
                    True,
                    None,
                    f"{member['parameters_sha256']}, {classifier.temperature}",
                )
            except Exception as error:  # the other models may still work
                _tell(error)
                print(f"model {name}: {_one_line(error)}", flush=True)
                # The error may name paths of the server, which users must not see.
                why = "the model cannot be opened; the log of the server says why"
                self._store.report_model(name, None, [], False, why)

    def run(self) -> None:
        """Answers jobs and single positions until the server ends."""
        while not self.leaving.is_set():
            closed = self._models.keys() - self._steps.keys()
            if closed and time.monotonic() - self._tried > _TRY_AGAIN:
                self.open_models()
            # Points and jobs take turns, so that neither waits for ever.
            points = self._answer_points()
            job = self._store.claim(self._name, closed)
            if job is not None:
                self._do(job)
            elif not points:
                self.leaving.wait(_PAUSE)

    def _do(self, job: StoredJob) -> None:
        folder = self._state / "jobs" / job.id
        told_at, told_stage = 0.0, ""

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal told_at, told_stage
            if self.leaving.is_set():
                raise _Leaving
            now = time.monotonic()
            if stage == told_stage and now - told_at < _TOLD_EVERY and done < total:
                return
            told_at, told_stage = now, stage
            if not self._store.tell(job.id, self._name, stage, done, total):
                raise _NotWanted
            self._answer_points()

        try:
            tell("starting", 0, job.rows)
            network = self._network(job.model, self._step(job))
            asked = Asked(
                job.kind, feather.read_table(folder / "asked.feather", memory_map=False)
            )
            settings = self._settings(job.source, self._models[job.model])
            answer = functools.partial(
                answering.answer,
                *(asked, network, settings, folder, tell),
                self._most_synapses,
            )
            try:
                about = answer()
            except output_folders.OtherContents:
                # An earlier attempt used other settings, for example another batch
                # size, temperature or synapse table. Its files cannot be continued.
                for path in folder.iterdir():
                    if path.name != "asked.feather":
                        files.remove(path)
                about = answer()
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            self._store.finish(job.id, self._name, about["rows"], size)
        except _NotWanted:
            pass
        except _Leaving:
            self._store.release(job.id, self._name)
        except UserError as error:
            print(f"job {job.id}: {_one_line(error)}", flush=True)
            self._store.fail(job.id, self._name, self._shown(error))
        except Exception as error:  # the next job may still work
            _tell(error)
            kind = type(error).__name__
            why = f"unexpected error ({kind}); the log of the server says more"
            self._store.fail(job.id, self._name, why)

    def _shown(self, error: UserError) -> str:
        """Returns the message without the path of the service's folder."""
        return _one_line(error).replace(f"{self._state}/", "")

    def _step(self, job: StoredJob) -> int:
        """Returns the step of the request, or the open step if the request has none."""
        if job.model not in self._steps:
            raise UserError(
                f"model {job.model} cannot be used; tell the person who runs the page"
            )
        return self._steps[job.model] if job.step is None else job.step

    def _settings(self, source: str, model: served_models.ServedModel) -> Any:
        return sources.settings(source, self._credentials, synapses=model.synapses)

    def _answer_points(self) -> bool:
        """Answers the waiting points and returns whether there were any."""
        points = self._store.points.claim(self._name)
        groups: dict[tuple[str, str], list[StoredPoint]] = {}
        for point in points:
            groups.setdefault((point.model, point.source), []).append(point)
        for (model, source), group in groups.items():
            try:
                results = self._at_once(model, source, group)
            except Exception as error:  # the job that is running can go on
                _tell(error)
                results = [
                    {"problem": "unexpected error; the log of the server says more"}
                ] * len(group)
                if isinstance(error, UserError):
                    results = [{"problem": self._shown(error)}] * len(group)
            for point, result in zip(group, results, strict=True):
                self._store.points.answer(point.id, self._name, result)
        return bool(points)

    def _at_once(
        self, model: str, source: str, points: list[StoredPoint]
    ) -> list[dict[str, Any]]:
        if model not in self._steps:
            raise UserError(
                f"model {model} cannot be used; tell the person who runs the page"
            )
        network = self._network(model, self._steps[model])
        coordinates = {
            name: np.array([getattr(point, name) for point in points], np.float64)
            for name in "xyz"
        }
        settings = self._settings(source, self._models[model])
        shape = network.volume.shape_zyx
        placed = sources.to_volume_nm_zyx(coordinates, shape, settings)
        probabilities, statuses = answering.at_once(network, placed)
        classes = network.classifier.classes
        results = []
        for values, status in zip(probabilities, statuses, strict=True):
            known = bool(np.isfinite(values).all())
            each = dict(zip(classes, map(float, values), strict=True))
            winner = max(each, key=each.__getitem__) if known else None
            results.append(
                {
                    "neurotransmitter_name": winner,
                    "probabilities": each if known else None,
                    "status": status,
                }
            )
        return results


def _tell(error: Exception) -> None:
    """Prints where the error was raised, without its text.

    The text of an error may contain what users asked for.
    """
    if not isinstance(error, UserError):
        where = traceback.format_list(traceback.extract_tb(error.__traceback__))
        print(f"{''.join(where)}{type(error).__name__}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))


def _watch_server(worker: Worker) -> None:
    """Ends the process after its standard input has closed."""
    sys.stdin.buffer.read()
    worker.leaving.set()
    time.sleep(_GRACE)
    os._exit(0)  # a read or a compilation that still waits would keep the process


def main() -> None:
    folder = flags.DEFINE_string(
        "models",
        None,
        "Serve the models that the file models.toml in this folder names.",
        required=True,
    )
    state = flags.DEFINE_string(
        "state",
        None,
        "Take the jobs from this folder, the --state of the server.",
        required=True,
    )
    name = flags.DEFINE_string(
        "name",
        None,
        "Give this name to the worker; no two workers may have the same name.",
        required=True,
    )
    batch_size = flags.DEFINE_integer(
        "batch_size", 32, "Classify this many crops at once.", lower_bound=1
    )
    most_synapses = flags.DEFINE_integer(
        "most_synapses",
        1_000_000,
        "Let a job fail if its neurons have more synapses than this together.",
        lower_bound=1,
    )
    credentials = flags.DEFINE_string(
        "credentials",
        None,
        "Read the addresses and the tokens of the sources from this ini file. "
        "Environment variables, if they are set, come first.",
    )

    def run() -> None:
        root = files.make_folder(state.value)
        worker = Worker(
            Store(root / "service.sqlite"),
            served_models.load(pathlib.Path(folder.value)),
            root,
            name.value,
            batch_size.value,
            most_synapses.value,
            credentials.value,
        )
        if jax.default_backend() == "cpu":
            # The server uses the same cores, and people wait for its pages.
            os.nice(_NICE)
        threading.Thread(target=_watch_server, args=[worker], daemon=True).start()
        worker.open_models()
        worker.run()

    command.run(run, abandon_threads=True)


if __name__ == "__main__":
    main()

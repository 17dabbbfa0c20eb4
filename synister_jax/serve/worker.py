# SPDX-License-Identifier: Apache-2.0
"""The process that computes: takes jobs from the store, one after the other.

The server starts one for each accelerator and keeps its standard input open; when that
closes, however the server ended, the worker puts its job back and leaves. A job is an
answer folder (answering.py), so another worker goes on where this one stopped. Single
positions that somebody waits for are answered between two batches of a job.
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
from synister_jax.serve.store import Store, StoredJob, StoredPoint

_PAUSE = 0.1  # seconds between two looks for work
_TOLD_EVERY = 0.3  # seconds: how far a job is, and whether it is still wanted
_TRY_AGAIN = 60.0  # seconds until a model that could not be opened is tried again
_GRACE = 5.0  # seconds that a batch has to end in once the server has gone
_NICE = 10
_OPEN_NETWORKS = 4  # of the largest published one, 1.8 GB each


class _NotWanted(Exception):
    """The job was cancelled, or is another worker's by now."""


class _Leaving(Exception):
    """The server has gone."""


class Worker:
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
        """Those that are not open, and tells the store of each."""
        self._tried = time.monotonic()
        for name, model in self._models.items():
            if name in self._steps:
                continue
            try:
                step = answering.choose_step(model.workdir, model.step)
                classifier = self._network(name, step).classifier
                # Compiled now, not while somebody waits for one position.
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
            except Exception as error:  # of one model; others may do
                _tell(error)
                print(f"model {name}: {_one_line(error)}", flush=True)
                # The reason may name paths, which are nobody's business.
                why = "it cannot be opened; the server's log says why"
                self._store.report_model(name, None, [], False, why)

    def run(self) -> None:
        """Until the server goes."""
        while not self.leaving.is_set():
            closed = self._models.keys() - self._steps.keys()
            if closed and time.monotonic() - self._tried > _TRY_AGAIN:
                self.open_models()
            # In turn: neither keeps the other waiting for ever.
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
                # Begun with another batch size, temperature, table or the like.
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
        except Exception as error:  # of one job; the next may well be another matter
            _tell(error)
            kind = type(error).__name__
            why = f"something that nobody foresaw ({kind}); the server's log says more"
            self._store.fail(job.id, self._name, why)

    def _shown(self, error: UserError) -> str:
        """Without the place of the service's folders, which users need not know."""
        return _one_line(error).replace(f"{self._state}/", "")

    def _step(self, job: StoredJob) -> int:
        """What was asked for, or what there is where no worker had said that."""
        if job.model not in self._steps:
            raise UserError(f"model {job.model} cannot be used; tell who runs the page")
        return self._steps[job.model] if job.step is None else job.step

    def _settings(self, source: str, model: served_models.ServedModel) -> Any:
        return sources.settings(source, self._credentials, synapses=model.synapses)

    def _answer_points(self) -> bool:
        """Whether there was any."""
        points = self._store.claim_points(self._name)
        groups: dict[tuple[str, str], list[StoredPoint]] = {}
        for point in points:
            groups.setdefault((point.model, point.source), []).append(point)
        for (model, source), group in groups.items():
            try:
                results = self._at_once(model, source, group)
            except Exception as error:  # a job may be under way, which is not to blame
                _tell(error)
                results = [{"problem": "the server's log says why"}] * len(group)
                if isinstance(error, UserError):
                    results = [{"problem": self._shown(error)}] * len(group)
            for point, result in zip(group, results, strict=True):
                self._store.answer_point(point.id, self._name, result)
        return bool(points)

    def _at_once(
        self, model: str, source: str, points: list[StoredPoint]
    ) -> list[dict[str, Any]]:
        if model not in self._steps:
            raise UserError(f"model {model} cannot be used; tell who runs the page")
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
    """Where it was, not what it says: that may be what people ask."""
    if not isinstance(error, UserError):
        where = traceback.format_list(traceback.extract_tb(error.__traceback__))
        print(f"{''.join(where)}{type(error).__name__}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))


def _watch_server(worker: Worker) -> None:
    """Leaves when standard input closes."""
    sys.stdin.buffer.read()
    worker.leaving.set()
    time.sleep(_GRACE)
    os._exit(0)  # whatever a read or a compilation still waits for


def main() -> None:
    folder = flags.DEFINE_string(
        "models", None, "Folder with models.toml.", required=True
    )
    state = flags.DEFINE_string("state", None, "Folder of the service.", required=True)
    name = flags.DEFINE_string("name", None, "Of this worker.", required=True)
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    most_synapses = flags.DEFINE_integer(
        "most_synapses", 1_000_000, "Of the neurons of a job together.", lower_bound=1
    )
    credentials = flags.DEFINE_string("credentials", None, "Ini file of the sources.")

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
            os.nice(_NICE)  # the page has the same cores, and people wait for it
        threading.Thread(target=_watch_server, args=[worker], daemon=True).start()
        worker.open_models()
        worker.run()

    command.run(run, abandon_threads=True)


if __name__ == "__main__":
    main()

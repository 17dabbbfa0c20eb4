# SPDX-License-Identifier: Apache-2.0
"""Computes work units on a cluster: Dask starts, feeds and replaces the workers.

A work unit is a pure function of small arguments that writes one file. If a worker is
lost, another worker therefore computes its unit again. A unit that is computed twice
gives the same file.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.bulk import execution

Do = Callable[[int], execution.Times]
_LOOK_SECONDS = 30.0
# If this many workers are lost over one unit, Dask may move the unit once more. After
# the next loss, the unit itself is taken to be the cause.
_LOST_WORKERS = 3
_SUBMIT = {"slurm": "sbatch", "lsf": "bsub"}


def check(cluster: str) -> None:
    """Raises `UserError` if this machine cannot start or reach the cluster."""
    if cluster not in ("local", *_SUBMIT) and "://" not in cluster:
        known = ", ".join(["local", *_SUBMIT])
        raise UserError(
            f"--cluster={cluster}: the cluster is unknown; give {known} or the address "
            "of a scheduler, for example tcp://host:8786"
        )
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise UserError(
            "--cluster: Dask is not installed; run pip install 'synister_jax[cluster]'"
        )
    # Without this check, the run would wait for ever for jobs that nobody submitted.
    if cluster in _SUBMIT and shutil.which(_SUBMIT[cluster]) is None:
        raise UserError(
            f"--cluster={cluster}: {_SUBMIT[cluster]} is not on this machine; run the "
            "command on a machine from which jobs are submitted"
        )


def execute(
    do: Do, units: Sequence[int], cluster: str, workers: int, progress: Progress
) -> execution.Times:
    """Calls `do` for every unit on the workers, and returns the sum of their times.

    Args:
      do: computes the unit with the given number and returns its times.
      units: the numbers of the units.
      cluster: `local`, `slurm`, `lsf` or the address of a scheduler. `check` must
        accept it. `slurm` and `lsf` start one job for each worker, and
        ~/.config/dask/jobqueue.yaml describes the jobs.
      workers: the number of workers to start. A scheduler that is given by its address
        has its own workers, so the number is not used.
      progress: counts the synapses of the finished units.

    Raises:
      UserError: the cluster cannot be reached, a unit raised this error, or a unit
        lost several workers. The results of finished units are kept.
    """
    total = execution.Times()
    if not units:
        return total
    # By default, Dask logs every step and also the errors that are raised here.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")
    import dask
    import distributed

    dask.config.set({"distributed.scheduler.allowed-failures": _LOST_WORKERS})
    with _connected(cluster, workers) as client:
        futures = client.map(do, units, pure=False)
        waiting = distributed.as_completed(futures)
        try:
            for future in waiting:
                times = future.result()
                total.add(times)
                progress.add(times.synapses)
        except distributed.KilledWorker as error:
            raise UserError(
                f"{_LOST_WORKERS + 1} workers ended, one after the other, while they "
                f"computed the same work unit ({error.task}); read the logs of the "
                "workers, remove the cause and run the command again"
            ) from None
        finally:
            client.cancel(futures)
    return total


@contextlib.contextmanager
def _connected(cluster: str, workers: int) -> Iterator[Any]:
    import distributed

    with contextlib.ExitStack() as stack:
        try:
            if cluster == "local":
                place: Any = distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    dashboard_address=None,
                )
                stack.enter_context(place)
            elif cluster in _SUBMIT:
                place = stack.enter_context(_queue(cluster))
                place.scale(jobs=workers)
            else:
                place = cluster
            client = stack.enter_context(distributed.Client(place))
            if cluster in _SUBMIT:
                stack.enter_context(_replacing_jobs(place, client, workers))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--cluster={cluster}: {error}") from None
        yield client


@contextlib.contextmanager
def _replacing_jobs(place: Any, client: Any, workers: int) -> Iterator[None]:
    """Submits new jobs for jobs that have ended; Dask replaces only processes."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(_LOOK_SECONDS):
            there = len(client.scheduler_info(n_workers=-1)["workers"])
            if there < workers:
                print(
                    f"waiting for workers: {there} of {workers} are connected",
                    flush=True,
                )
                place.scale(jobs=workers)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _queue(cluster: str) -> Any:
    """Returns a cluster whose workers are jobs; no job is submitted yet."""
    interrupt = signal.getsignal(signal.SIGINT)
    import dask_jobqueue

    # Importing dask_jobqueue changes Ctrl-C: the program would end silently with exit
    # code 0. The old handler is therefore set again.
    signal.signal(signal.SIGINT, interrupt)
    kinds = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}
    # Each job runs one process with one thread, which uses all accelerators of the job.
    return kinds[cluster](processes=1, cores=1)

# SPDX-License-Identifier: Apache-2.0
"""Units on the workers of a cluster: Dask starts them, feeds them and replaces them.

A unit is a pure function of small arguments that writes one file, so a unit of a worker
that is lost is done again by another, and a unit that is done twice is the same.
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
# A unit that has taken this many workers down with it is at fault itself.
_LOST_WORKERS = 3
_SUBMIT = {"slurm": "sbatch", "lsf": "bsub"}


def check(cluster: str) -> None:
    """Raises `UserError` for a cluster that cannot be had from this machine."""
    if cluster not in ("local", *_SUBMIT) and "://" not in cluster:
        known = ", ".join(["local", *_SUBMIT])
        raise UserError(
            f"--cluster={cluster}: give {known} or a scheduler's address, as "
            "tcp://host:8786"
        )
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise UserError("--cluster needs Dask: pip install 'synister_jax[cluster]'")
    # Else a job that cannot be submitted is waited for for ever.
    if cluster in _SUBMIT and shutil.which(_SUBMIT[cluster]) is None:
        raise UserError(
            f"--cluster={cluster}: {_SUBMIT[cluster]} is not on this machine; run the "
            "command where jobs are submitted"
        )


def execute(
    do: Do, units: Sequence[int], cluster: str, workers: int, progress: Progress
) -> execution.Times:
    """Calls `do` for every unit on the workers; the times of all of them together.

    Args:
      cluster: that `check` has passed: `local`, `slurm` or `lsf` (one job a worker, as
        ~/.config/dask/jobqueue.yaml describes it), or the address of a scheduler.
      workers: how many to start; a scheduler's own are its business.

    Raises:
      UserError: the cluster cannot be reached; what a unit raised; workers that were
        lost again and again. Units that are done stay done.
    """
    total = execution.Times()
    if not units:
        return total
    # Else they tell of every step, and of what is raised here anyway.
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
                f"{_LOST_WORKERS + 1} workers were lost over one unit ({error.task}); "
                "see their logs, mend that and rerun"
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
    """Submits jobs for those that have ended; Dask does so for processes only."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(_LOOK_SECONDS):
            there = len(client.scheduler_info(n_workers=-1)["workers"])
            if there < workers:
                print(f"waiting for workers: {there} of {workers} there", flush=True)
                place.scale(jobs=workers)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _queue(cluster: str) -> Any:
    """A cluster whose workers are jobs of a queue, none of them submitted yet."""
    interrupt = signal.getsignal(signal.SIGINT)
    import dask_jobqueue

    # dask_jobqueue makes of Ctrl-C an end without a word, and exit code 0.
    signal.signal(signal.SIGINT, interrupt)
    kinds = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}
    # One process and one thread a job: it has the job's accelerators.
    return kinds[cluster](processes=1, cores=1)

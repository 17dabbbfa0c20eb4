# SPDX-License-Identifier: Apache-2.0
"""Units on the workers of a cluster: Dask starts them, feeds them and replaces them.

A unit is a pure function of small arguments that writes one file, so a unit of a worker
that is lost is done again by another, and a unit that is done twice is the same.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from synister_jax import execution
from synister_jax.command import Progress, UserError

Do = Callable[[int], execution.Times]
# A unit that has taken this many workers down with it is at fault itself.
_LOST_WORKERS = 3


def execute(
    do: Do, units: Sequence[int], cluster: str, workers: int, progress: Progress
) -> execution.Times:
    """Calls `do` for every unit on the workers; the times of all of them together.

    Args:
      cluster: `local`, `slurm` or `lsf` (one job a worker, as
        ~/.config/dask/jobqueue.yaml describes it), or the address of a scheduler.
      workers: how many to start; a scheduler's own are its business.

    Raises:
      UserError: no such cluster; what a unit raised; workers that were lost again and
        again. Units that are done stay done.
    """
    total = execution.Times()
    if not units:
        return total
    try:
        import dask
        import distributed
    except ImportError:
        raise UserError(
            "--cluster needs Dask: pip install 'synister_jax[cluster]'"
        ) from None
    dask.config.set({"distributed.scheduler.allowed-failures": _LOST_WORKERS})
    logging.getLogger("distributed").setLevel(logging.ERROR)  # else of every step
    with _connected(cluster, workers) as client:
        futures = client.map(functools.partial(_quietly, do), units, pure=False)
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


def _quietly(do: Do, unit: int) -> execution.Times:
    logging.getLogger("distributed").setLevel(logging.ERROR)  # of a worker too
    return do(unit)


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
                    silence_logs=logging.ERROR,
                )
            elif cluster in ("slurm", "lsf"):
                import dask_jobqueue

                kinds = {
                    "slurm": dask_jobqueue.SLURMCluster,
                    "lsf": dask_jobqueue.LSFCluster,
                }
                # One process and one thread a job: it has the job's accelerators.
                place = kinds[cluster](processes=1, cores=1)
                place.scale(jobs=workers)
            else:
                place = cluster
            if place is not cluster:
                stack.enter_context(place)
            client = stack.enter_context(distributed.Client(place))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--cluster={cluster}: {error}") from None
        yield client

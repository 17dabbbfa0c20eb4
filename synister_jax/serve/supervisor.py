# SPDX-License-Identifier: Apache-2.0
"""Starts the workers, starts them again when they die, and removes old files.

When a worker dies, its jobs go back into the queue. The standard input of a worker is
a pipe that only the server holds. The pipe closes when the server ends for any reason,
and then the workers end, too. The workers also share a lock on a file in the state
folder (the mark). The next server waits for this lock, so two workers never write the
same answer.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from synister_jax.base.errors import UserError
from synister_jax.serve.store import Store

_TICK_SECONDS = 0.2
_CLEAR_SECONDS = 60.0
_STOP_SECONDS = 10.0
_LEAVE_SECONDS = 60.0
# If a worker lived this long, its death has another cause than the deaths before. The
# supervisor then starts the next worker after the shortest pause.
_HEALTHY_SECONDS = 300.0
_PAUSES = (0.5, 2.0, 5.0, 15.0, 60.0)
# The folder of a failed, cancelled or deleted job is removed after this time. Before,
# its worker may still write into the folder.
_KEPT_SECONDS = 300.0
_PROBE = "import jax; print(jax.default_backend(), jax.local_device_count())"


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[int]:
    """Waits until the workers of an earlier server have ended, and locks the folder.

    Args:
      folder: The state folder of the service.

    Yields:
      The file descriptor of the lock (the mark). The workers must inherit it.

    Raises:
      UserError: Workers of an earlier server are still running after 60 seconds.
    """
    with (folder / ".workers").open("a") as file:
        until = time.monotonic() + _LEAVE_SECONDS
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"workers of an earlier server still use {folder}; end the "
                        "processes synister_jax.serve.worker and start the server again"
                    ) from None
            except OSError:
                break  # the file system has no locks
            if not told:
                print("waiting until the workers of an earlier server end", flush=True)
                told = True
            time.sleep(_TICK_SECONDS)
        yield file.fileno()


def accelerators() -> tuple[str, int]:
    """Returns JAX's backend on this machine and the number of its devices.

    A separate process asks JAX. If the server imported JAX itself, JAX would take the
    memory of the accelerators, and the workers need that memory.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    words = done.stdout.split()
    return (words[-2], int(words[-1])) if len(words) >= 2 else ("cpu", 1)


def environments(
    backend: str, devices: int, workers: int | None, given: Mapping[str, str]
) -> list[dict[str, str]]:
    """Returns for each worker the environment variables that give it an accelerator.

    Args:
      backend: The backend of JAX: "cpu", "gpu" or "tpu".
      devices: The number of accelerators.
      workers: The number of workers. None stands for one worker for each accelerator.
        If there are more workers than accelerators, they share the accelerators.
      given: The environment of the server.

    Returns:
      For each worker, the variables to add to the environment of the server.
    """
    if backend not in ("gpu", "tpu"):
        return [{}] * (workers or 1)
    workers = workers or devices
    each: list[dict[str, str]]
    if devices == 1:
        each = [{}] * workers
    elif backend == "gpu":
        names = given.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(names) < devices:
            names = [str(number) for number in range(devices)]
        each = [{"CUDA_VISIBLE_DEVICES": names[n % devices]} for n in range(workers)]
    else:
        one = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        each = [{"TPU_VISIBLE_CHIPS": str(n % devices)} | one for n in range(workers)]
    # By default, JAX reserves most of the memory of an accelerator. The first of
    # several workers on one accelerator would leave too little for the others.
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if workers > devices else {}
    return [one | share for one in each]


@dataclasses.dataclass
class _Place:
    """A worker process, and the rules for starting its successor."""

    environment: dict[str, str]
    name: str = ""
    process: subprocess.Popen | None = None
    started: float = 0.0
    deaths: int = 0
    next_start: float = 0.0

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """The thread that starts the workers of one server and watches them.

    Args:
      store: The store of the service.
      folder: The state folder of the service.
      arguments: The arguments of the worker's command, except --name.
      workers: The number of workers, or None for one for each accelerator.
      mark: The file descriptor that `alone` yields. The workers inherit it.
      module: The Python module that a worker runs.
    """

    def __init__(
        self,
        store: Store,
        folder: pathlib.Path,
        arguments: Sequence[str],
        workers: int | None,
        mark: int,
        module: str = "synister_jax.serve.worker",
    ) -> None:
        self._store, self._folder, self._mark = store, folder, mark
        self._command = [sys.executable, "-m", module, *arguments]
        self._workers = workers
        self._places: list[_Place] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor")

    def start(self) -> None:
        """Starts the thread, which starts the workers."""
        self._thread.start()

    def alive(self) -> int:
        """Returns the number of workers that are running now."""
        return sum(place.is_alive for place in self._places)

    def stop(self) -> None:
        """Ends the workers and puts their jobs back; the next server continues them."""
        self._stopping.set()
        self._thread.join()
        until = time.monotonic() + _STOP_SECONDS
        running = [p.process for p in self._places if p.process is not None]
        for process in running:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None  # `_start` gives it a pipe
                process.stdin.close()
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._store.start_over()

    def _run(self) -> None:
        backend, devices = accelerators()
        self._places = [
            _Place(environment)
            for environment in environments(backend, devices, self._workers, os.environ)
        ]
        cleared = 0.0
        while not self._stopping.is_set():
            try:
                self._tick()
                if time.monotonic() - cleared > _CLEAR_SECONDS:
                    cleared = time.monotonic()
                    clear(self._store, self._folder)
            except Exception as error:  # the cause may end, for example a full disk
                print(f"supervisor: {type(error).__name__}: {error}", file=sys.stderr)
            self._stopping.wait(_TICK_SECONDS)

    def _tick(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if place.is_alive:
                continue
            if place.process is not None:
                self._bury(place, place.process, now)
            if now >= place.next_start:
                self._start(place, now)

    def _bury(self, place: _Place, process: subprocess.Popen, now: float) -> None:
        code = process.returncode
        assert process.stdin is not None  # `_start` gives it a pipe
        process.stdin.close()
        place.process = None
        place.deaths = 0 if now - place.started > _HEALTHY_SECONDS else place.deaths
        pause = _PAUSES[min(place.deaths, len(_PAUSES) - 1)]
        place.deaths += 1
        place.next_start = now + pause
        names = [other.name for other in self._places if other.is_alive]
        lost = self._store.requeue_lost(names)
        print(
            f"worker {place.name} ended with exit status {code}; {lost} jobs go back "
            f"into the queue; the next worker starts in {pause:g} s",
            file=sys.stderr,
            flush=True,
        )

    def _start(self, place: _Place, now: float) -> None:
        # Every process has a new name. The store then does not confuse a worker with
        # the worker that died in the same place.
        place.name = f"{self._places.index(place)}-{secrets.token_hex(4)}"
        place.process = subprocess.Popen(
            [*self._command, f"--name={place.name}"],
            stdin=subprocess.PIPE,
            env=os.environ | place.environment,
            pass_fds=[self._mark],
            # Ctrl-C must reach only the server. The server then ends the workers.
            start_new_session=True,
        )
        place.started = now


def clear(store: Store, folder: pathlib.Path) -> None:
    """Removes the folders of deleted, failed and cancelled jobs, and old points."""
    states, now = store.states(), time.time()
    for path in (folder / "jobs").iterdir():
        state, finished = states.get(path.name, ("deleted", path.stat().st_mtime))
        if state not in ("deleted", "failed", "cancelled"):
            continue
        assert finished is not None  # the store sets the time when the job ends
        if now - finished > _KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
            store.emptied(path.name)
    store.points.forget()

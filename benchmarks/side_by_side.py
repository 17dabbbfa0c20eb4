# SPDX-License-Identifier: Apache-2.0
"""Measures the rates of several programs that do the same work, in turns.

All benchmarks use this module. A program that is compared is called a side. The speed
of a machine changes over time. So the sides run in turns, and only rates of the same
round are compared. The order of the sides changes from round to round.

A side can need an environment of its own, for example another memory allocator. Such a
side runs in a `Child`, a process that waits until its turn. As a program, this module
prints the result of `about`.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# By default, glibc returns large blocks of memory to the kernel when they are freed.
# Each new block then costs a page fault for every 4 KB. With "huge", glibc asks the
# kernel for pages of 2 MB. This needs glibc 2.35 or later, and the setting
# transparent_hugepage of the kernel must be "madvise" or "always".
ALLOCATORS = {"default": {}, "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
_PACKAGES = (
    *("synister_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *("array_record", "tensorstore", "duckdb", "pyarrow", "numpy", "torch"),
    *("gunpowder", "zarr", "numcodecs", "augment-nd", "scipy"),
)

# Several processes share a GPU. So no process may reserve the memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Returns the rates of all rounds, in items per second, for each side.

    Before these rounds, one round runs as a warm-up and does not count.

    Args:
      sides: functions by the name of the side. Each does one round and returns the
      rate. rounds: the number of rounds that count.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for index, name in in_turns(list(sides), rounds):
        rate = sides[name]()
        note = f"{index} {name} {rate:.4g}/s" + " (warm-up)" * (index < 0)
        print(note, file=sys.stderr, flush=True)
        if index >= 0:
            rates[name].append(rate)
    return rates


def rate(
    run: Callable[[], Any],
    items: int,
    times: int = 1,
    finish: Callable[[Any], Any] = lambda result: None,
) -> Callable[[], float]:
    """Returns a side that calls `run` several times and returns the rate.

    Args:
      run: processes `items` items.
      items: the number of items of one call.
      times: the number of calls in a round.
      finish: waits until the result of the last call is ready.
    """

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = run()
        finish(result)
        return times * items / (time.perf_counter() - start)

    return one_round


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields (round, name) for all rounds; the warm-up is round -1 and comes first.

    The side that begins a round is the last one of the next round. So every side
    comes to every place in the order.
    """
    for index in range(-1, rounds):
        turn = index % len(names)
        for name in [*names[turn:], *names[:turn]]:
            yield index, name


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median of the values of each name."""
    return {name: statistics.median(found) for name, found in values.items()}


def summary(rates: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """Returns the rates, and the ratios of `ours` to every other side.

    Returns:
      {"rates": medians, "rounds": all rates, "ratio": medians of the ratios within each
      round, "ratio_range": smallest and largest ratio of a round}.
    """
    paired = {
        other: [a / b for a, b in zip(rates[ours], values, strict=True)]
        for other, values in rates.items()
        if other != ours
    }
    return {
        "rates": medians(rates),
        "rounds": dict(rates),
        "ratio": medians(paired),
        "ratio_range": {o: [min(found), max(found)] for o, found in paired.items()},
    }


def about() -> dict[str, Any]:
    """Returns the machine, the device, and the versions of the installed packages."""
    import jax  # is missing in the environment of some children

    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {
        "cpu": model[1] if model else platform.machine(),
        "memory_gb": round(memory / 1e9, 1),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Child:
    """A process that waits for requests on its stdin, and answers one at a time.

    The process is the running program with its own flags, followed by the flag of the
    child. It must call `serve`. The constructor returns when the child is ready.
    """

    def __init__(self, flag: str, environment: Mapping[str, str]) -> None:
        self._command = own_command(flag)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self._answer()

    def ask(self, request: str) -> Any:
        """Returns the result of the child's function of this name."""
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(
                f"a process ended with code {code}: {' '.join(self._command)}"
            )
        return json.loads(line)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()  # serve ends
        if error[0] is not None:
            self._process.terminate()
        self._process.wait()
        self._process.stdout.close()


def compare_children(
    child_of: Mapping[str, str],
    rounds: int,
    allocator: str,
    questions: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs sides in turns, each in a child process of the running program.

    A child is the running program with the flag `--side=CHILD`.

    Args:
      child_of: the child of each side. The child answers the name of the side with a
        rate. The first side is ours.
      rounds: the number of rounds that count.
      allocator: a name of `ALLOCATORS`, for all children.
      questions: more requests for each child after the last round. The answers are in
        the result, too.
    """
    print(f"allocator: {allocator}", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(f"--side={name}", ALLOCATORS[allocator]))
            for name in dict.fromkeys(child_of.values())
        }
        before = {name: child.ask("usage") for name, child in children.items()}
        sides = {
            side: functools.partial(children[name].ask, side)
            for side, name in child_of.items()
        }
        found = summary(alternate(sides, rounds), next(iter(child_of)))
        after = {name: child.ask("usage") for name, child in children.items()}
        for question in questions:
            answers = {name: child.ask(question) for name, child in children.items()}
            found[question] = answers
    found["peak_gb"] = {name: gb for name, (gb, _) in after.items()}
    found["page_faults"] = {n: after[n][1] - before[n][1] for n in children}
    return found


def own_command(*flags: str) -> list[str]:
    """Returns the command line of the running program, with more flags at its end."""
    module = f"benchmarks.{pathlib.Path(sys.argv[0]).stem}"
    return [sys.executable, "-m", module, *sys.argv[1:], *flags]


def serve(functions: Mapping[str, Callable[[], Any]]) -> None:
    """Answers requests in a child process until its stdin is closed.

    A request is the name of a function. The answer is its result as a line of JSON.
    """
    answers = dict(functions) | {"usage": _usage}
    # The text that a library prints must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        print(json.dumps("ready"), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), file=out, flush=True)


def _usage() -> tuple[float, int]:
    """Returns the peak memory in GB, and the number of page faults until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_maxrss * 1024 / 1e9, used.ru_minflt


if __name__ == "__main__":
    print(json.dumps(about()))

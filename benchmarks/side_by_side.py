# SPDX-License-Identifier: Apache-2.0
"""Times several ways to do one thing in turns; all benchmarks share this.

A machine's speed drifts, so the sides alternate, in an order that rotates round by
round, and what is compared are rates of one round. A side that needs an environment of
its own (an allocator's, another interpreter's) is a `Child`: a process that is idle
until it is its turn. Run as a program, it prints what `about` returns.
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

# By default glibc gives a large block back to the kernel when it is freed, and each new
# one costs a fault for every 4 KB. "huge": glibc asks the kernel for pages of 2 MB
# (glibc 2.35 or later; the kernel's transparent_hugepage at "madvise" or "always").
ALLOCATORS = {"default": {}, "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
_PACKAGES = (
    *("synister_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *("array_record", "tensorstore", "duckdb", "pyarrow", "numpy", "torch"),
    *("gunpowder", "zarr", "numcodecs", "augment-nd", "scipy"),
)

# Processes share a GPU here: none may take its memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Returns the rates of all rounds, after a round that does not count.

    A side does one round and returns its rate, in items a second.
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
    """Makes a side that does `run` so many times; `finish` waits for the last."""

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = run()
        finish(result)
        return times * items / (time.perf_counter() - start)

    return one_round


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields (round, name) of all rounds, and before them of one to warm up, -1.

    The side that begins a round ends the next one, so each comes in every place and,
    of three or more, none runs twice in a row. Of two, each begins every other round:
    they would keep their places else.
    """
    for index in range(-1, rounds):
        turn = index % len(names)
        for name in [*names[turn:], *names[:turn]]:
            yield index, name


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median of each."""
    return {name: statistics.median(found) for name, found in values.items()}


def summary(rates: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """Returns medians and rounds of the rates, and the ratios of `ours` to others."""
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
    """Returns the machine, the device, and versions of the packages that are there."""
    import jax  # a child in another environment has none

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
    """A process that answers requests, one at a time, and else waits on its stdin.

    It is the running program with its own flags and one after them, and must call
    `serve`. The constructor returns when the child is ready.
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
        """Returns what the child's function of that name returns."""
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"ended with {code}: {' '.join(self._command)}")
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
    """Alternates sides in children of the running program, which get `--side=CHILD`.

    Args:
      child_of: By side, its child, which answers the side's name with a rate. The first
        side is ours.
      questions: What else each child is asked afterwards; the answers are returned too.
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
    """Returns the command of the running program, with these flags after its own."""
    module = f"benchmarks.{pathlib.Path(sys.argv[0]).stem}"
    return [sys.executable, "-m", module, *sys.argv[1:], *flags]


def serve(functions: Mapping[str, Callable[[], Any]]) -> None:
    """Answers in a child, by the names of requests, until its stdin is closed."""
    answers = dict(functions) | {"usage": _usage}
    # Whatever a library prints must not get between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        print(json.dumps("ready"), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), file=out, flush=True)


def _usage() -> tuple[float, int]:
    """Returns the peak memory in GB, and the page faults until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_maxrss * 1024 / 1e9, used.ru_minflt


if __name__ == "__main__":
    print(json.dumps(about()))

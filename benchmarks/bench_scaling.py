# SPDX-License-Identifier: Apache-2.0
"""What a crop costs against batch, crop size and devices, and a row against rows.

    python benchmarks/bench_scaling.py --folder=FOLDER [--config=configs/demo.py] \
        [--plot=FILE.png] [--rounds=5]

The network has random weights, crops are random voxels that lie on the devices; the
inference is that of synister_jax.predict, the training step that of
synister_jax.train, augmentation included. Each curve is measured in a process of its
own in which its points alternate; medians. Crop sizes change y and x alone.
Devices: each number has a process of its own, and they take turns. On a CPU JAX is told
to make several of it. They share the cores, so no gain is to be expected there: what is
lost is what splitting costs, and that XLA then computes convolutions in another way
(convolution.py). Batch and work are the same for any number of devices. Of GPUs as many
are taken as there are. Rows: plan, merge and aggregate of bench_table.py, one process
each, each once. Prints one line of JSON.
"""

import contextlib
import functools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import random_inputs
import side_by_side
from absl import flags
from ml_collections import config_flags

from synister_jax import train
from synister_jax.base import command, files
from synister_jax.network import inference, model, sharding
from synister_jax.training import augment, optimisation

_FOLDER = flags.DEFINE_string("folder", None, "Where it all is made.", required=True)
_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", lock_config=True)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "2", "4", "8", "16"], "Crops.")
_CROP_SIZES = flags.DEFINE_list(
    "crop_sizes", ["32", "48", "64", "96"], "In y and x; some of 16 times a number."
)
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4"], "How many.")
_ROWS = flags.DEFINE_list(
    "rows", ["10000", "100000", "1000000"], "Of bench_table.py's tables."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "For crop sizes and devices.", lower_bound=1
)
_CROPS = flags.DEFINE_integer("crops", 64, "Of a round, about.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_PLOT = flags.DEFINE_string("plot", None, "Draw the curves here (PNG).")
_CURVES = ("batch_size", "crop_size", "devices")
_CURVE = flags.DEFINE_enum("curve", None, _CURVES, "For the script itself.")

_KINDS = ("inference", "training")


def main() -> None:
    config = _CONFIG.value
    if _CURVE.value == "devices":
        _serve(int(_DEVICES.value[0]), config)
        return
    if _CURVE.value:
        print(json.dumps(_curve(_CURVE.value, config)))
        return
    curves = {}
    for name in ("batch_size", "crop_size"):
        # The last --curve counts; the child's JSON is its stdout.
        child = side_by_side.own_command(f"--curve={name}")
        done = subprocess.run(child, stdout=subprocess.PIPE, check=True)
        curves[name] = json.loads(done.stdout)
    curves["devices"] = _devices()
    curves["rows"] = _rows(files.make_folder(_FOLDER.value))
    report = {
        "benchmark": "scaling",
        "curves": curves,
        "unit": "crops/s",
        "config": flags.FLAGS["config"].config_filename,
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "batch_size_elsewhere": _BATCH_SIZE.value,
        "compute_dtype": config.compute_dtype,
        "crops_of_a_round": _CROPS.value,
        "rounds": _ROUNDS.value,
    }
    packages = ("synister_jax", "jax", "jaxlib", "numpy", "duckdb")
    report |= side_by_side.about(*packages)
    if _PLOT.value:
        _plot(curves, pathlib.Path(_PLOT.value))
    print(json.dumps(report))


def _curve(name: str, config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """A point for each value: {name: value, inference, training} in crops/s."""
    _keep_compiled()
    by_batch = name == "batch_size"
    sides = {}
    shared: dict[tuple[int, ...], _Network] = {}
    values = [int(text) for text in (_BATCH_SIZES if by_batch else _CROP_SIZES).value]
    for value in values:
        own = config.copy_and_resolve_references()
        own.batch_size = value if by_batch else _BATCH_SIZE.value
        if not by_batch:
            own.crop_shape_zyx = (config.crop_shape_zyx[0], value, value)
        # One state for all batches: at full size it is 4 GB.
        if own.crop_shape_zyx not in shared:
            shared[own.crop_shape_zyx] = _Network(own, jax.devices()[:1])
        network = shared[own.crop_shape_zyx]
        sides["inference", value] = network.classifying(own.batch_size)
        sides["training", value] = network.training(own)
    return _points(name, values, sides)


def _devices() -> list[dict[str, Any]]:
    """As `_curve`, with a child for each number of devices that there are."""
    with contextlib.ExitStack() as stack:
        sides, values = {}, []
        for text in _DEVICES.value:
            command_line = side_by_side.own_command(
                "--curve=devices", f"--devices={text}"
            )
            child = stack.enter_context(side_by_side.Child(command_line))
            if not child.ask("there"):
                print(f"there are no {text} devices", file=sys.stderr, flush=True)
                continue
            values.append(int(text))
            for kind in _KINDS:
                sides[kind, values[-1]] = functools.partial(child.ask, kind)
        return _points("devices", values, sides)


def _serve(devices: int, config: ml_collections.ConfigDict) -> None:
    """The child of a number of devices."""
    jax.config.update("jax_num_cpu_devices", devices)  # of a CPU alone
    _keep_compiled()
    if jax.device_count() < devices:
        side_by_side.serve({"there": lambda: False})
        return
    own = config.copy_and_resolve_references()
    own.batch_size = _BATCH_SIZE.value
    network = _Network(own, jax.devices()[:devices])
    side_by_side.serve(
        {
            "there": lambda: True,
            "inference": network.classifying(own.batch_size),
            "training": network.training(own),
        }
    )


def _points(
    name: str,
    values: Sequence[int],
    sides: dict[tuple[str, int], Callable[[], float]],
) -> list[dict[str, Any]]:
    named = {f"{kind}, {name} {value}": do for (kind, value), do in sides.items()}
    rates = side_by_side.alternate(named, _ROUNDS.value)
    points: list[dict[str, Any]] = []
    for value in values:
        of = {kind: rates[f"{kind}, {name} {value}"] for kind in _KINDS}
        medians = {kind: statistics.median(found) for kind, found in of.items()}
        points.append({name: value} | medians)
    return points


def _keep_compiled() -> None:
    compiled = files.make_folder(_FOLDER.value) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))


class _Network:
    """Random weights of a configuration on some devices, and what is done with them."""

    def __init__(
        self, config: ml_collections.ConfigDict, devices: Sequence[jax.Device]
    ) -> None:
        self._mesh = sharding.make_mesh(devices)
        self._optimizer = optimisation.make_optimizer(config)
        self._classify = inference.make_classify(config, self._mesh)
        self._margin = augment.Settings.of(config).margin_vx_zyx
        self._crop = tuple(config.crop_shape_zyx)
        self._state = random_inputs.training_state(
            config, self._optimizer, sharding.replicated(self._mesh)
        )

    def classifying(self, batch_size: int) -> Callable[[], float]:
        crops = self._random((batch_size, *self._crop))

        def classify() -> jax.Array:
            variables = {
                "params": self._state.params,
                "batch_stats": self._state.batch_stats,
            }
            return self._classify(variables, crops)

        return functools.partial(_rate, classify, batch_size)

    def training(self, config: ml_collections.ConfigDict) -> Callable[[], float]:
        network = model.from_config(config, sharding.head_input(self._mesh))
        placed = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        step_fn = train.jit_step(config, network, self._optimizer, placed)
        shape = np.add(self._crop, np.multiply(2, self._margin))
        labels = np.arange(config.batch_size, dtype=np.int32) % len(config.classes)
        batch = {
            "crop": self._random((config.batch_size, *shape)),
            "label": jax.device_put(labels, sharding.batch(self._mesh)),
        }

        def step() -> jax.Array:
            self._state, numbers = step_fn(self._state, batch)
            return numbers["loss"]

        return functools.partial(_rate, step, config.batch_size)

    def _random(self, shape: Iterable[int]) -> jax.Array:
        voxels = np.random.default_rng(0).integers(0, 256, tuple(shape), np.uint8)
        return jax.device_put(voxels, sharding.batch(self._mesh))


def _rate(do: Callable[[], jax.Array], batch_size: int) -> float:
    """Crops a second of about `--crops`, batch after batch."""
    batches = math.ceil(_CROPS.value / batch_size)
    start = time.perf_counter()
    for _ in range(batches):
        result = do()
    jax.block_until_ready(result)
    return batches * batch_size / (time.perf_counter() - start)


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    script = pathlib.Path(__file__).with_name("bench_table.py")
    given = [f"--folder={folder / 'table'}", f"--rows={','.join(_ROWS.value)}"]
    # The split does not depend on the rows: a small one.
    given += ["--split_synapses=50000", "--split_neurons=2000"]
    done = subprocess.run(
        [sys.executable, script, *given], stdout=subprocess.PIPE, check=True
    )
    points = []
    for line in done.stdout.splitlines():
        measured = json.loads(line)
        point: dict[str, Any] = {"rows": measured["rows"]}
        for phase in ("plan", "merge", "aggregate"):
            both = {name: measured[phase][name] for name in ("seconds", "peak_gb")}
            point[phase] = both
        points.append(point)
    return points


def _plot(curves: dict[str, Any], path: pathlib.Path) -> None:
    from synister_jax.base import figures  # matplotlib only for who asks for it

    figure, grid = figures.plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for axes, name in zip(grid, _CURVES, strict=False):
        points = curves[name]
        places = [point[name] for point in points]
        for kind, marker in zip(_KINDS, "os", strict=True):
            rates = [point[kind] for point in points]
            axes.plot(places, rates, marker=marker, label=kind)
        axes.set_xscale("log")
        axes.set_xticks(places, [str(place) for place in places])
        axes.set_ylabel("crops/s")
        axes.set_xlabel(name.replace("_", " "))
    grid[1].set_yscale("log")
    grid[1].set_xlabel("crop size in y and x, voxels")
    for phase, marker in zip(("plan", "merge", "aggregate"), "os^", strict=True):
        places = [point["rows"] for point in curves["rows"]]
        seconds = [point[phase]["seconds"] for point in curves["rows"]]
        grid[3].plot(places, seconds, marker=marker, label=phase)
    grid[3].set_xscale("log")
    grid[3].set_yscale("log")
    grid[3].set_xticks(places, [f"{place:,}" for place in places])
    grid[3].set_xlabel("rows of the synapse table")
    grid[3].set_ylabel("seconds")
    for axes in grid:
        axes.minorticks_off()
        if axes.get_yscale() == "log":
            # figures.py has no mathematics in text.
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    files.write_bytes(path, figures.png(figure))


if __name__ == "__main__":
    command.run(main)

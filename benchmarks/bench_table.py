# SPDX-License-Identifier: Apache-2.0
"""Time and memory of planning, merging, aggregating and splitting synapse tables.

    python benchmarks/bench_table.py --folder=FOLDER --rows=10000,1000000,100000000 \
        [--plot=docs/bulk_memory.png]

For each number of rows a Feather table of synapses is made (uniformly random in a
volume as large as FAFB; some 3 % beyond its border, one in a thousand without a
position), planned, planned again (which compares it with the plan), given parts of
made-up probabilities, merged, and aggregated into neurons under every rule that needs
no cleft score. Each of these has a fresh process: its peak memory is that of the phase,
libraries included. Every row of the merged answer is compared with the table and the
probabilities, and every neuron's votes with a count in memory. No network and no voxels
are involved. `split` has a table of its own, in memory, whatever the number of rows:
`--split_synapses` of `--split_neurons` neurons, lognormal in size, with one of six
transmitters each; it is the time of splits.make by neuron, of which no part may share
one.
100 million rows need up to 20 GB of disk, which are free again before the next number
begins. Prints a line of JSON for each.
"""

import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import side_by_side
import tensorstore as ts
from absl import flags

from synister_jax import aggregate, predict
from synister_jax.base import command, files
from synister_jax.base.progress import Progress
from synister_jax.bulk import merging, planning, unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.em import volumes
from synister_jax.evaluation import confusions, rules
from synister_jax.ground_truth import splits
from synister_jax.tables import batches, predictions, synapses
from synister_jax.tables.batches import Source

_FOLDER = flags.DEFINE_string("folder", None, "Where it all is made.", required=True)
_ROWS = flags.DEFINE_list("rows", ["10000", "1000000", "100000000"], "Of each table.")
_CLASSES = flags.DEFINE_integer("classes", 6, "Of a prediction.", lower_bound=1)
_SPLIT_SYNAPSES = flags.DEFINE_integer(
    "split_synapses", 500_000, "In the table that is split.", lower_bound=1
)
_SPLIT_NEURONS = flags.DEFINE_integer(
    "split_neurons", 5_000, "In the table that is split.", lower_bound=1
)
_PLOT = flags.DEFINE_string("plot", None, "Draw the peak memory here (PNG).")
_KEEP = flags.DEFINE_bool("keep", False, "Leave the files where they are.")
_PHASE = flags.DEFINE_string(
    "phase", None, "Do this, of the number of rows given; what the command asks itself."
)

_SHAPE_ZYX = (7062, 136_000, 248_000)
_VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 4.0)
_CHUNK_ZYX = (16, 128, 128)
_CROP_ZYX = (16, 160, 160)
_BATCH_ROWS = 65_536
_BRAIN_ROWS = 244_000_000  # synapses of FAFB that were predicted
_FIRST_NEURON, _NEURONS = 720_575_940_000_000_000, 200_000
# Row r has the probabilities r modulo this, a prime: none twice in a batch, nearly.
_PROBABILITIES = 65_521
_CLASS_SHARES = (0.25, 0.45, 0.15, 0.05, 0.03, 0.07)  # of the neurons that are split


def main() -> None:
    folders = {
        rows: files.make_folder(_FOLDER.value) / f"{rows}-rows"
        for rows in map(int, _ROWS.value)
    }
    if _PHASE.value:
        [(rows, folder)] = folders.items()
        with contextlib.redirect_stdout(sys.stderr):  # progress; stdout is for JSON
            answer = _PHASES[_PHASE.value](folder, rows)
        print(json.dumps(answer))
        return
    reports = []
    for rows, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        files.make_folder(folder)
        try:
            reports.append(_measure(folder, rows))
        finally:
            if not _KEEP.value:
                shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(reports[-1]), flush=True)
    if _PLOT.value:
        _plot(reports, pathlib.Path(_PLOT.value))


def _measure(folder: pathlib.Path, rows: int) -> dict[str, Any]:
    _apart("table", rows)
    planned = _apart("plan", rows)
    replanned = _apart("plan", rows)
    _apart("parts", rows)
    merged = _apart("merge", rows)
    aggregated = _apart("aggregate", rows)
    _apart("check", rows)
    split = _apart("split", rows)
    plan = _opened(folder)[0]
    report = {
        "benchmark": "table",
        "rows": rows,
        "predicted_rows": plan.predicted_rows,
        "units": len(plan),
        "classes": _CLASSES.value,
        "status": merged.pop("status"),
    }
    phases = {"plan": planned, "replan": replanned, "merge": merged}
    for name, phase in (phases | {"aggregate": aggregated}).items():
        seconds = phase["seconds"]
        report[name] = phase | {
            "rows_per_second": rows / seconds,
            "seconds_for_244_million_rows": seconds * _BRAIN_ROWS / rows,
        }
    report["split"] = split
    report["bytes"] = {
        "table": _bytes(folder / "synapses.feather"),
        "plan": _bytes(plan.folder / "units.parquet"),
        "parts": _bytes(plan.folder / "parts"),
        "predictions": _bytes(plan.folder / "predictions.feather"),
    }
    packages = ("synister_jax", "duckdb", "numpy", "pyarrow")
    return report | side_by_side.about(*packages)


def _apart(phase: str, rows: int) -> Any:
    """What the phase returns, in a process of its own."""
    print(f"{rows:,} rows: {phase}", file=sys.stderr, flush=True)
    own = {"folder": _FOLDER.value, "classes": _CLASSES.value}
    own |= {"split_synapses": _SPLIT_SYNAPSES.value}
    own |= {"split_neurons": _SPLIT_NEURONS.value}
    given = own | {"rows": rows, "phase": phase}
    command_line = [sys.executable, __file__]
    command_line += [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(command_line, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _peak_gb() -> float:
    """Of this process's memory so far.

    Not `ru_maxrss`: that begins with what the process had that started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9


# ------------------------------------------------------------------------ what is made


def _make_table(folder: pathlib.Path, rows: int) -> None:
    names = ("synapse_id", "z_nm", "y_nm", "x_nm", "neuron_id")
    kinds = (pa.int64(), pa.float64(), pa.float64(), pa.float64(), pa.int64())
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    length_nm = np.multiply(_SHAPE_ZYX, _VOXEL_SIZE_NM_ZYX)
    rng = np.random.default_rng(0)
    path = folder / "synapses.feather"
    with pa.ipc.new_file(str(path), schema, options=options) as sink:
        for first in range(0, rows, _BATCH_ROWS):
            numbers = np.arange(first, min(first + _BATCH_ROWS, rows), dtype=np.uint64)
            # An odd factor modulo 2^63: no two rows have the same id.
            ids = (numbers * np.uint64(0x9E3779B97F4A7C15)) & np.uint64(2**63 - 1)
            places = rng.uniform(-0.005, 1.005, (len(ids), 3)) * length_nm
            places[rng.random(len(ids)) < 1e-3] = np.nan
            neurons = _FIRST_NEURON + rng.integers(0, _NEURONS, len(ids))
            columns = [ids.astype(np.int64), *places.T, neurons]
            sink.write_batch(pa.record_batch(columns, schema=schema))
    metadata = {
        "dimensions": _SHAPE_ZYX[::-1],
        "blockSize": _CHUNK_ZYX[::-1],
        "dataType": "uint8",
        "compression": {"type": "gzip"},
        "resolution": _VOXEL_SIZE_NM_ZYX[::-1],
        "units": ("nm", "nm", "nm"),
    }
    kvstore = {"driver": "file", "path": f"{folder}/volume.n5/"}
    spec = {"driver": "n5", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result()


def _probabilities(classes: int) -> np.ndarray:
    """float32 [_PROBABILITIES, classes]; each row sums to 1."""
    logits = np.random.default_rng(1).normal(0, 3, (_PROBABILITIES, classes))
    values = np.exp(logits)
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def _write_parts(folder: pathlib.Path, rows: int) -> None:
    plan, _, _ = _opened(folder)
    table = _probabilities(len(plan.about["classes"]))
    progress = Progress("parts", len(plan), "units", every_seconds=30)
    for unit in range(len(plan)):
        numbers, _ = plan.unit(unit)
        whole = np.ones(len(numbers), bool)
        values = table[numbers % _PROBABILITIES]
        unit_results.write(
            plan, unit, unit_results.Part(numbers, whole, values, frozenset())
        )
        progress.add()


# -------------------------------------------------------------------- what is measured


def _opened(folder: pathlib.Path) -> tuple[Plan, Source, volumes.Volume]:
    output = folder / "output"
    plan = Plan(output, files.read_json(output / "plan.json"))
    return plan, *_inputs(folder)


def _inputs(folder: pathlib.Path) -> tuple[Source, volumes.Volume]:
    source = batches.open(folder / "synapses.feather")
    return source, volumes.open(str(folder / "volume.n5"))


def _plan(folder: pathlib.Path, rows: int) -> dict[str, float]:
    start = time.perf_counter()
    source, volume = _inputs(folder)
    made_from = {
        "classes": [f"class{i}" for i in range(_CLASSES.value)],
        "parameters_sha256": [""],
        "views": 1,
        "batch_size": 32,
        "part": None,
    }
    output = files.make_folder(folder / "output")
    planning.make(source, volume, _CROP_ZYX, output, predict.UNIT_ROWS, made_from)
    return {"seconds": time.perf_counter() - start, "peak_gb": _peak_gb()}


def _merge(folder: pathlib.Path, rows: int) -> dict[str, Any]:
    start = time.perf_counter()
    plan, source, volume = _opened(folder)
    merged = merging.Merged()
    about = {"volume": volume.uri, "synapses": source.name}
    answer = merging.tables(plan, source, volume, about, merged)
    merging.write_feather(plan.folder / "predictions.feather", answer)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gb": _peak_gb(), "status": merged.status}


def _aggregate(folder: pathlib.Path, rows: int) -> dict[str, float]:
    start = time.perf_counter()
    output = folder / "output"
    source = predictions.open(output / "predictions.feather")
    tally = aggregate.tally(source, "neuron", output)
    classes = source.classes
    confusion = confusions.Confusion("made up", classes, np.eye(len(classes)))
    names = [name for name in rules.RULES if name != "cleft_weighted"]
    tables = [aggregate.call(tally, name, confusion) for name in names]
    files.write_feather(output / "neurons.feather", aggregate.in_groups(tables))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_gb": _peak_gb(),
        "neurons": len(tables[0]),
        "rules": len(names),
    }


def _split(folder: pathlib.Path, rows: int) -> dict[str, Any]:
    neurons = _SPLIT_NEURONS.value
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1.2, neurons)
    owners = rng.choice(neurons, _SPLIT_SYNAPSES.value, p=weights / weights.sum())
    names = np.array(synapses.NEUROTRANSMITTERS[: len(_CLASS_SHARES)])
    class_of_neuron = rng.choice(len(names), neurons, p=_CLASS_SHARES)
    places = rng.uniform(0, 2e5, (3, len(owners)))
    columns = dict(zip(synapses.POSITION, places, strict=True))
    columns |= {
        "synapse_id": rng.permutation(len(owners)),
        "neuron_id": _FIRST_NEURON + owners,
        "neurotransmitter": names[class_of_neuron[owners]],
    }
    table = synapses.conform(pa.table(columns), "a made-up table")
    start = time.perf_counter()
    split = splits.make(table, "neuron")
    seconds = time.perf_counter() - start
    parts = np.full(neurons, None, object)
    parts[owners] = split.parts
    assert (parts[owners] == split.parts).all(), "a neuron is in two parts"
    return {
        "seconds": seconds,
        "peak_gb": _peak_gb(),
        "synapses": len(owners),
        "neurons": len(np.unique(owners)),
        "classes": len(split.classes),
        "objective": split.objective,
        "bound": split.bound,
        "stopped": split.stopped,
    }


def _check(folder: pathlib.Path, rows: int) -> None:
    """Id and probabilities of each row, or none where none are due; neurons' votes."""
    plan, _, _ = _opened(folder)
    votes = np.zeros((_NEURONS, len(plan.about["classes"])), np.int64)
    values = _probabilities(len(plan.about["classes"]))
    given = _batches(folder / "synapses.feather")
    answered = _batches(plan.folder / "predictions.feather")
    first = predicted = 0
    for before, after in zip(given, answered, strict=True):
        assert before["synapse_id"].equals(after["synapse_id"]), first
        found = predictions.probabilities(after)
        numbers = np.arange(first, first + len(after))
        has_one = np.isin(after["status"].to_numpy(), ["ok", "partly_outside"])
        expected = np.where(has_one[:, None], values[numbers % _PROBABILITIES], np.nan)
        np.testing.assert_array_equal(found, expected)
        neurons = after["neuron_id"].to_numpy()[has_one] - _FIRST_NEURON
        np.add.at(votes, (neurons, found[has_one].argmax(axis=1)), 1)
        first += len(after)
        predicted += int(has_one.sum())
    assert (first, predicted) == (rows, plan.predicted_rows)
    counted = pa.ipc.open_file(str(plan.folder / "neurons.feather")).read_all()
    counted = counted.filter(pc.equal(counted["rule"], "majority"))
    places = counted["neuron_id"].to_numpy() - _FIRST_NEURON
    for label, name in enumerate(plan.about["classes"]):
        column = counted[f"count_{name}"].to_numpy()
        np.testing.assert_array_equal(column, votes[places, label])
    assert votes[places].sum() == predicted


def _batches(path: pathlib.Path) -> Iterator[pa.Table]:
    reader = pa.ipc.open_file(pa.OSFile(str(path)))
    for index in range(reader.num_record_batches):
        yield pa.Table.from_batches([reader.get_batch(index)])


_PHASES = {
    "table": _make_table,
    "plan": _plan,
    "parts": _write_parts,
    "merge": _merge,
    "aggregate": _aggregate,
    "split": _split,
    "check": _check,
}


def _bytes(path: pathlib.Path) -> int:
    found = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in found)


def _plot(reports: list[dict[str, Any]], path: pathlib.Path) -> None:
    from synister_jax.base import figures  # matplotlib only for who asks for it

    figure, axes = figures.plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    rows = [report["rows"] for report in reports]
    for name, marker in (("plan", "o"), ("merge", "s"), ("aggregate", "^")):
        peaks = [report[name]["peak_gb"] for report in reports]
        axes.plot(rows, peaks, marker=marker, label=name)
    axes.set_xscale("log")
    axes.set_xticks(rows, [f"{n:,}" for n in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of the synapse table")
    axes.set_ylabel("peak memory, GB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.write_bytes(figures.png(figure))


if __name__ == "__main__":
    command.run(main)

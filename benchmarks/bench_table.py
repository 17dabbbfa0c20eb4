# SPDX-License-Identifier: Apache-2.0
r"""Measures the time and the memory to plan, merge, aggregate and split tables.

    python -m benchmarks.bench_table --folder=FOLDER --rows=10000,1000000,100000000 \
        --plot=docs/bulk_memory.png

For each number of rows, the program makes a Feather table of synapses. The synapses are
uniformly random in a volume as large as FAFB. About 3 % are outside the border, and one
of a thousand has no position. The phases with this table are:

- plan: makes the plan of a prediction.
- replan: plans again, which compares the table with the plan.
- merge: merges invented probabilities of all work units.
- aggregate: makes the calls of the neurons, under every rule that needs no cleft score.

Each phase runs in a new process, and its peak memory is that of the process. Every row
of the merged table and the votes of every neuron are checked. `split` splits another
table by neuron, with 100 synapses per neuron on average. 100 million rows need up to
20 GB of disk. This space is free again before the next number of rows begins.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorstore as ts
from absl import flags

from benchmarks import side_by_side
from synister_jax.base import command, files
from synister_jax.bulk import merging, options, planning, unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.em import volumes
from synister_jax.evaluation import confusions, group_calls, vote_tallies, voting_rules
from synister_jax.ground_truth import splits
from synister_jax.tables import predictions, reading, synapses
from synister_jax.tables.synapse_stream import SynapseStream

_FOLDER = flags.DEFINE_string(
    "folder", None, "Write the tables of the benchmark into this folder.", required=True
)
_ROWS = flags.DEFINE_list(
    "rows", ["10000", "1000000", "100000000"], "Measure tables of these many rows."
)
_SPLIT_SYNAPSES = flags.DEFINE_integer(
    "split_synapses", 500_000, "Split a table of this many rows.", lower_bound=10_000
)
_PLOT = flags.DEFINE_string("plot", None, "Draw the peak memory into this PNG file.")

_SHAPE_ZYX = (7062, 136_000, 248_000)
_VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 4.0)
_CHUNK_ZYX = (16, 128, 128)
_CROP_ZYX = (16, 160, 160)
_BATCH_ROWS = 65_536
_CLASSES = 6
_BRAIN_ROWS = 244_000_000  # the predicted synapses of FAFB
_FIRST_NEURON, _NEURONS = 720_575_940_000_000_000, 200_000
# Row r has the probabilities with the number r modulo this prime. So almost no two rows
# of a batch have the same probabilities.
_PROBABILITIES = 65_521
_CLASS_SHARES = (
    0.25,
    0.45,
    0.15,
    0.05,
    0.03,
    0.07,
)  # the classes of the neurons in `split`


def main() -> None:
    sizes = []
    for rows in map(int, _ROWS.value):
        folder = files.make_folder(_FOLDER.value) / f"{rows}-rows"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            sizes.append(_measure(files.make_folder(folder), rows))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(sizes[-1]), file=sys.stderr, flush=True)
    split = _apart(_split, _SPLIT_SYNAPSES.value)
    if _PLOT.value:
        from benchmarks import pictures  # only --plot needs matplotlib

        files.write_bytes(pathlib.Path(_PLOT.value), pictures.peak_memory(sizes))
    report = {"benchmark": "table", "unit": "s", "sizes": sizes, "split": split}
    print(json.dumps(report | side_by_side.about()))


def _measure(folder: pathlib.Path, rows: int) -> dict[str, Any]:
    _apart(_make_table, folder, rows)
    found = {"plan": _apart(_plan, folder), "replan": _apart(_plan, folder)}
    _apart(_write_parts, folder)
    found |= {"merge": _apart(_merge, folder), "aggregate": _apart(_aggregate, folder)}
    _apart(_check, folder, rows)
    for phase in found.values():
        phase["rows_per_second"] = rows / phase["seconds"]
        phase["seconds_for_244_million_rows"] = phase["seconds"] * _BRAIN_ROWS / rows
    return {"rows": rows} | found


def _apart(phase: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Runs a phase in a process of its own, and returns the result of `_measured`."""
    print(phase.__name__, *arguments, file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measured, phase, *arguments).result()


def _measured(phase: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Runs a phase, and returns its seconds, its peak memory in GB and its result.

    The peak memory is not `ru_maxrss`, because that includes the memory of the process
    that started this process.
    """
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for JSON only
        answer = phase(*arguments) or {}
    seconds = time.perf_counter() - start
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
    return {"seconds": seconds, "peak_gb": peak} | answer


def _make_table(folder: pathlib.Path, rows: int) -> None:
    places = [(name, pa.float64()) for name in synapses.POSITION]
    ids = (("synapse_id", pa.int64()), ("neuron_id", pa.int64()))
    schema = pa.schema([*ids, *places])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    length_nm = np.multiply(_SHAPE_ZYX, _VOXEL_SIZE_NM_ZYX)
    rng = np.random.default_rng(0)
    path = folder / "synapses.feather"
    with pa.ipc.new_file(str(path), schema, options=options) as sink:
        for first in range(0, rows, _BATCH_ROWS):
            numbers = np.arange(first, min(first + _BATCH_ROWS, rows), dtype=np.uint64)
            # The factor is odd, so no two rows have the same id modulo 2^63.
            ids = (numbers * np.uint64(0x9E3779B97F4A7C15)) & np.uint64(2**63 - 1)
            places = rng.uniform(-0.005, 1.005, (len(ids), 3)) * length_nm
            places[rng.random(len(ids)) < 1e-3] = np.nan
            neurons = _FIRST_NEURON + rng.integers(0, _NEURONS, len(ids))
            columns = [ids.astype(np.int64), neurons, *places.T]
            sink.write_batch(pa.record_batch(columns, schema=schema))
    metadata = {"dimensions": _SHAPE_ZYX[::-1], "blockSize": _CHUNK_ZYX[::-1]}
    metadata |= {"dataType": "uint8", "compression": {"type": "gzip"}}
    metadata |= {"resolution": _VOXEL_SIZE_NM_ZYX[::-1], "units": ["nm"] * 3}
    kvstore = {"driver": "file", "path": f"{folder}/volume.n5/"}
    spec = {"driver": "n5", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result()


def _probabilities() -> np.ndarray:
    """Returns float32 [_PROBABILITIES, _CLASSES]; each row sums to 1."""
    logits = np.random.default_rng(1).normal(0, 3, (_PROBABILITIES, _CLASSES))
    values = np.exp(logits)
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def _write_parts(folder: pathlib.Path) -> None:
    plan, _, _ = _opened(folder)
    table = _probabilities()
    for unit in range(len(plan)):
        numbers, _ = plan.unit(unit)
        whole = np.ones(len(numbers), bool)
        values = table[numbers % _PROBABILITIES]
        result = unit_results.UnitResult(numbers, whole, values, frozenset())
        unit_results.write(plan, unit, result)


def _opened(folder: pathlib.Path) -> tuple[Plan, SynapseStream, volumes.Volume]:
    output = folder / "output"
    plan = Plan(output, files.read_json(output / "plan.json"))
    return plan, *_inputs(folder)


def _inputs(folder: pathlib.Path) -> tuple[SynapseStream, volumes.Volume]:
    source = reading.open(folder / "synapses.feather")
    return source, volumes.open(str(folder / "volume.n5"))


def _plan(folder: pathlib.Path) -> None:
    source, volume = _inputs(folder)
    made_from = {"classes": [f"class{i}" for i in range(_CLASSES)], "views": 1}
    made_from |= {"parameters_sha256": [""], "batch_size": 32, "part": None}
    output = files.make_folder(folder / "output")
    planning.make(source, volume, _CROP_ZYX, output, options.UNIT_ROWS, made_from)


def _merge(folder: pathlib.Path) -> dict[str, Any]:
    plan, source, volume = _opened(folder)
    merged = merging.Merged()
    about = {"volume": volume.uri, "synapses": source.name}
    answer = merging.tables(plan, source, volume, about, merged)
    merging.write_feather(plan.folder / "predictions.feather", answer)
    return {"status": merged.status}


def _aggregate(folder: pathlib.Path) -> dict[str, Any]:
    output = folder / "output"
    source = predictions.open(output / "predictions.feather")
    tally = vote_tallies.of(source, "neuron", output)
    classes = source.classes
    confusion = confusions.Confusion("made up", classes, np.eye(len(classes)))
    names = [name for name in voting_rules.RULES if name != "cleft_weighted"]
    tables = [group_calls.call(tally, name, confusion) for name in names]
    files.write_feather(output / "neurons.feather", group_calls.interleaved(tables))
    return {"neurons": len(tables[0]), "rules": len(names)}


def _split(rows: int) -> dict[str, Any]:
    neurons = rows // 100
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1.2, neurons)
    owners = rng.choice(neurons, rows, p=weights / weights.sum())
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
    split = splits.make(table, splits.Scheme(by="neuron"))
    found = {"seconds": time.perf_counter() - start, "synapses": rows}
    parts = np.full(neurons, None, object)
    parts[owners] = split.parts
    assert (parts[owners] == split.parts).all(), "a neuron is in two parts"
    found |= {"neurons": len(np.unique(owners)), "classes": len(split.classes)}
    found |= {"objective": split.objective, "bound": split.bound}
    return found | {"stopped": split.stopped}


def _check(folder: pathlib.Path, rows: int) -> None:
    """Checks the id and the probabilities of each row, and the votes of each neuron."""
    plan, _, _ = _opened(folder)
    votes = np.zeros((_NEURONS, _CLASSES), np.int64)
    values = _probabilities()
    first = 0
    for before, after in zip(
        _batches(folder / "synapses.feather"),
        _batches(plan.folder / "predictions.feather"),
        strict=True,
    ):
        assert before["synapse_id"].equals(after["synapse_id"]), first
        found = predictions.probabilities(after)
        numbers = np.arange(first, first + len(after))
        has_one = np.isin(after["status"].to_numpy(), ["ok", "partly_outside"])
        expected = np.where(has_one[:, None], values[numbers % _PROBABILITIES], np.nan)
        np.testing.assert_array_equal(found, expected)
        neurons = after["neuron_id"].to_numpy()[has_one] - _FIRST_NEURON
        np.add.at(votes, (neurons, found[has_one].argmax(axis=1)), 1)
        first += len(after)
    assert (first, votes.sum()) == (rows, plan.predicted_rows)
    counted = pa.ipc.open_file(str(plan.folder / "neurons.feather")).read_all()
    counted = counted.filter(pc.equal(counted["rule"], "majority"))
    columns = [counted[f"count_{name}"].to_numpy() for name in plan.about["classes"]]
    places = counted["neuron_id"].to_numpy() - _FIRST_NEURON
    np.testing.assert_array_equal(np.stack(columns, axis=1), votes[places])
    assert votes[places].sum() == votes.sum()


def _batches(path: pathlib.Path) -> Iterator[pa.Table]:
    reader = pa.ipc.open_file(pa.OSFile(str(path)))
    for index in range(reader.num_record_batches):
        yield pa.Table.from_batches([reader.get_batch(index)])


if __name__ == "__main__":
    command.run(main)

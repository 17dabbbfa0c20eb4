# SPDX-License-Identifier: Apache-2.0
"""Reads our exported files as their consumers read them.

The tests repeat the rules of the consumers' public sources in their own code. If
`make consumers` has installed fafbseg-py, one test reads its file with fafbseg-py.
"""

import collections
import csv
import gzip
import json
import pathlib
import re
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax import export
from synister_jax.evaluation import vote_tallies
from synister_jax.exchange.export_files import ExportOptions
from synister_jax.tables import predictions
from tests.helpers import prediction_tables
from tests.helpers.prediction_tables import NEURON, SIX
from tests.helpers.small_data import ROOT

# fafbseg-py's order of the classes differs from the network's order.
TRANSMITTERS = ["gaba", "acetylcholine", "glutamate"]
TRANSMITTERS += ["octopamine", "serotonin", "dopamine"]


def published(tmp_path: pathlib.Path) -> tuple[str, pa.Table]:
    """Writes predictions of eight neurons, and returns the path and the table.

    The transmitters of two of the four cell types are known. About half of the synapses
    are in the test part. The synapses of the last neuron are called at random.
    """
    rng = np.random.default_rng(7)
    sizes = [70, 80, 20, 49, 50, 120, 6, 130]
    usual = ["gaba", "gaba", "gaba", "dopamine", "acetylcholine", "glutamate", "gaba"]
    types = ["A", "A", "A", None, "B", "C", "C", "D"]
    of_row = np.repeat(np.arange(8), sizes)
    calls: list[str | None] = [
        usual[n] if n < 7 and rng.random() < 0.8 else str(rng.choice(SIX))
        for n in of_row
    ]
    calls[::17] = [None] * len(calls[::17])
    scores = rng.integers(0, 200, len(calls)).astype(float)
    scores[of_row == 6] = 0
    known = {"A": "gaba", "C": "glutamate"}
    table = prediction_tables.make(
        [NEURON + int(n) for n in of_row],
        calls,
        cell_type=pa.array([types[n] for n in of_row]),
        neurotransmitter=pa.array([known.get(types[n] or "") for n in of_row]),
        split_skeleton=pa.array(rng.choice(["train", "test"], len(calls))),
        cleft_score=pa.array(scores, pa.float32()),
    )
    return prediction_tables.write(tmp_path, table, rows=50), table


def flyem_names(columns: list[str]) -> dict[str, str]:
    """Returns {column: class} as flyem-snapshot finds its probability columns."""
    names = {}
    for column in columns:
        if re.match("nts|nt_", column):
            name = re.sub(".*[._]", "", re.sub("_prob.*$", "", column))
            names[column] = {"neither": "unknown", "glut": "gluatmate"}.get(name, name)
    return names


def test_flyem_snapshot(tmp_path: pathlib.Path) -> None:
    path, table = published(tmp_path)
    voxel = (40.0, 4.0, 4.0)
    any_confusion = tmp_path / "any.csv"
    lines = [",".join(["", *SIX])]
    lines += [",".join([a, *(str(int(a == b)) for b in SIX)]) for a in SIX]
    any_confusion.write_text("\n".join(lines))
    export.export(
        path, "flyem", tmp_path / "1", ExportOptions(voxel, str(any_confusion))
    )
    made = feather.read_table(tmp_path / "1" / "tbar-neurotransmitters.feather")
    names = flyem_names(made.column_names)
    assert list(names.values()) == list(SIX)

    # The ids of the file equal the ids that the reader makes from the positions.
    z, y, x = (made[axis].to_numpy().astype(np.uint64) for axis in "zyx")
    mask = np.uint64(2**21 - 1)
    ids = (z & mask) << np.uint64(42) | (y & mask) << np.uint64(21) | (x & mask)
    np.testing.assert_array_equal(made["point_id"].to_numpy(), ids)

    # The reader counts its confusion matrix from the T-bars that have a known
    # transmitter and are outside train and validation.
    values = np.stack([made[column].to_numpy() for column in names], axis=1)
    called = np.array(
        [None if np.isnan(row).any() else SIX[row.argmax()] for row in values]
    )
    truth = table["neurotransmitter"].to_numpy(zero_copy_only=False)
    part = made["split"].cast(pa.string()).to_numpy(zero_copy_only=False)
    counts = np.zeros((6, 6))
    for t, c, p in zip(truth, called, part, strict=True):
        if t is not None and c is not None and p not in ("train", "validation"):
            counts[SIX.index(t), SIX.index(c)] += 1
    metrics = tmp_path / "metrics.json"
    content = {"classes": SIX, "synapses": {"confusion": counts.tolist()}}
    metrics.write_text(json.dumps(content))
    rows = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def group(member: np.ndarray) -> tuple[int, str, float]:
        votes = collections.Counter(called[member & (called != None)])  # noqa: E711
        winner = min(votes, key=lambda name: (-votes[name], name))
        of = SIX.index(winner)
        score = sum(n * rows[of, SIX.index(name)] for name, n in votes.items())
        return votes.total(), winner, score / votes.total()

    output = tmp_path / "2"
    export.export(path, "flyem", output, ExportOptions(voxel, str(metrics)))
    bodies = feather.read_table(output / "body-neurotransmitters.feather")
    body, types = made["body"].to_numpy(), table["cell_type"]
    types = types.to_numpy(zero_copy_only=False)
    assert len(bodies) == 8
    unsure = []
    for row in bodies.to_pylist():
        total, winner, confidence = group(body == row["body"])
        assert row["total_nt_predictions"] == total
        assert row["predicted_nt_confidence"] == pytest.approx(confidence, abs=1e-12)
        clear = confidence >= 0.5 and total >= 50
        assert row["predicted_nt"] == (winner if clear else "unclear")
        if row["cell_type"] is None:
            assert row["celltype_predicted_nt"] is None
            assert row["celltype_total_nt_predictions"] == 0
            continue
        member = types == row["cell_type"]
        total, winner, confidence = group(member)
        least = 50 if len(set(body[member])) == 1 else 100
        # FlyEM requires a confidence only for neurons, not for cell types
        # (flyem-snapshot at 003d91e).
        called_ = winner if total >= least else "unclear"
        assert row["celltype_predicted_nt"] == called_
        unsure += [row["cell_type"]] if confidence < 0.5 and total >= least else []
        assert row["celltype_total_nt_predictions"] == total
        assert row["celltype_predicted_nt_confidence"] == pytest.approx(confidence)
        consensus = {"A": "gaba", "B": "unclear", "C": "glutamate"}
        trusted = called_ not in ("dopamine", "octopamine", "serotonin")
        consensus["D"] = called_ if trusted else "unclear"
        assert row["consensus_nt"] == consensus[row["cell_type"]]
    assert unsure == ["D"]
    with (output / "neurotransmitter-confusion.csv").open() as file:
        header, *lines_ = csv.reader(file)
    assert header == ["ground_truth", *SIX]
    np.testing.assert_allclose(np.array(lines_)[:, 1:].astype(float), rows, atol=1e-15)


def fafbseg_file(tmp_path: pathlib.Path) -> tuple[pa.Table, pathlib.Path]:
    """Returns the means of cleft_weighted for each neuron, and the path of the file."""
    path, _ = published(tmp_path)
    export.export(path, "fafbseg", tmp_path / "out", ExportOptions())
    tally = vote_tallies.of(predictions.open(path), "neuron")
    mean = np.where(np.isnan(tally.weighted), tally.mean, tally.weighted)
    # fafbseg-py would fail on a neuron whose weights sum to 0; the export avoids this.
    assert np.isnan(tally.weighted).any()
    columns = {name: mean[:, SIX.index(name)] for name in TRANSMITTERS}
    expected = pa.table({"pre": tally.groups["neuron_id"], **columns})
    return expected, tmp_path / "out" / "synapses.feather"


def test_fafbseg_weighting(tmp_path: pathlib.Path) -> None:
    expected, path = fafbseg_file(tmp_path)
    made = feather.read_table(path)
    values = np.stack([made[name].to_numpy() for name in TRANSMITTERS], axis=1)
    # In `any` of pandas, NaN counts as False.
    kept = (np.nan_to_num(values) != 0).any(axis=1)
    assert 0 < kept.sum() < len(kept)
    for row in expected.to_pylist():
        member = kept & (made["pre"].to_numpy() == row["pre"])
        weights = made["cleft_scores"].to_numpy()[member].astype(np.float64)
        # np.average raises an error if the weights sum to 0.
        mean = np.average(values[member], axis=0, weights=weights)
        np.testing.assert_allclose(mean, [row[n] for n in TRANSMITTERS], rtol=1e-6)


# fafbseg-py needs other packages than this project, so it has its own environment.
CONSUMERS = ROOT / ".venv-consumers"
COLLAPSE = """
import json, sys
import pandas
from fafbseg import synapses
frame = pandas.read_feather(sys.argv[1])
assert str(frame["pre"].dtype) == "int64"
means = synapses.collapse_nt_predictions(frame, id_col="pre")
tops = synapses.collapse_nt_predictions(frame, single_pred=True, id_col="pre")
neurons = {str(n): [means[n].to_dict(), *tops[n]] for n in frame["pre"].unique()}
whole = synapses.collapse_nt_predictions(frame, single_pred=True)
print(json.dumps({"neurons": neurons, "whole": whole.transmitter}, default=float))
"""


def test_fafbseg_itself(tmp_path: pathlib.Path) -> None:
    python = CONSUMERS / "bin" / "python"
    if not python.exists():
        pytest.skip("fafbseg-py is not there; `make consumers` installs it")
    expected, path = fafbseg_file(tmp_path)
    command = [str(python), "-c", COLLAPSE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["whole"] in TRANSMITTERS
    assert set(said["neurons"]) == {str(n) for n in expected["pre"].to_pylist()}
    for row in expected.to_pylist():
        means, transmitter, probability = said["neurons"][str(row["pre"])]
        ours = {name: row[name] for name in TRANSMITTERS}
        assert means == pytest.approx(ours, rel=1e-5)
        assert transmitter == max(ours, key=ours.__getitem__)
        assert probability == pytest.approx(max(ours.values()), rel=1e-5)


def test_r_fafbseg(tmp_path: pathlib.Path) -> None:
    _, path = fafbseg_file(tmp_path)
    names = feather.read_table(path).column_names
    wanted = ["offset", "scores", "cleft_scores", "pre_x", "pre_y", "pre_z"]
    assert set(wanted) | set(TRANSMITTERS) <= set(names)


def test_codex_loader(tmp_path: pathlib.Path) -> None:
    path, _ = published(tmp_path)
    export.export(path, "codex", tmp_path / "out", ExportOptions())
    with gzip.open(tmp_path / "out" / "neurons.csv.gz", "rt") as file:
        header, *rows = csv.reader(file)
    averages = ["da_avg", "ser_avg", "gaba_avg", "glut_avg", "ach_avg", "oct_avg"]
    assert header == ["root_id", "group", "nt_type", "nt_type_score", *averages]
    codes = {"DA", "SER", "GABA", "GLUT", "ACH", "OCT"}
    assert len({int(row[0]) for row in rows}) == len(rows) == 8
    for _, group, code, score, *means in rows:
        assert group == "" and code in codes
        assert float(score) == max(map(float, means))
        assert averages[np.argmax([*map(float, means)])] == f"{code.lower()}_avg"
        assert sum(map(float, means)) == pytest.approx(1)


def test_neo4j_importer(tmp_path: pathlib.Path) -> None:
    path, _ = published(tmp_path)
    output = tmp_path / "out"
    export.export(path, "neuprint", output, ExportOptions((40.0, 4.0, 4.0)))
    kinds = {"int": int, "long": int, "float": float, "string": str}
    ids = []
    for name in ("Neuprint_Neurons.csv", "Neuprint_Synapses.csv"):
        with (output / name).open() as file:
            header, *rows = csv.reader(file)
        for row in rows:
            assert len(row) == len(header)
            for column, value in zip(header, row, strict=True):
                key, kind = column.split(":", 1)
                if kind.startswith("ID("):
                    ids.append(int(value))
                elif kind.startswith("point"):
                    assert re.fullmatch(r"\{x:\d+, y:\d+, z:\d+\}", value)
                else:
                    assert re.fullmatch("[a-z][A-Za-z]*", key)
                    kinds[kind](value or 0)
        assert [c for c in header if re.fullmatch("nt[A-Z][a-z]+Prob:float", c)] == [
            f"nt{name.capitalize()}Prob:float" for name in SIX
        ]
    assert len(set(ids)) == len(ids)


def test_hemibrainr(tmp_path: pathlib.Path) -> None:
    path, table = published(tmp_path)
    options = ExportOptions((40.0, 4.0, 4.0), predict=8)
    export.export(path, "synister", tmp_path / "out", options)
    made = feather.read_table(tmp_path / "out" / "synapses.feather")
    names = [re.sub(r"nts_8\.", "", name) for name in made.column_names]
    names = ["connector_id" if name == "id" else name for name in names]
    assert names == ["connector_id", "body", "x", "y", "z", *SIX]
    # hemibrainr joins on voxels, so the voxels must be unique whole numbers.
    voxels = set(zip(*(made[axis].to_pylist() for axis in "xyz"), strict=True))
    assert len(voxels) == len(table)
    assert all(isinstance(v, int) for voxel in voxels for v in voxel)

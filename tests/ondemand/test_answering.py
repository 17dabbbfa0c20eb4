# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.ondemand import answering, questions, sources
from synister_jax.ondemand.sources import credentials
from synister_jax.tables import predictions, synapses

VOXEL_NM_ZYX = np.array([40.0, 4.0, 4.0])


@pytest.fixture(scope="module")
def network(
    trained_run: pathlib.Path, volume_path: pathlib.Path
) -> answering.OpenNetwork:
    step = answering.choose_step(trained_run, "best")
    return answering.OpenNetwork.open(trained_run, step, str(volume_path), 8)


def nothing(stage: str, done: int, total: int) -> None:
    pass


def neurons(ids: list[int]) -> questions.Asked:
    return questions.Asked(
        "neurons", pa.table({"neuron_id": pa.array(ids, pa.int64())})
    )


def positions(rows: list[tuple]) -> questions.Asked:
    ids, owners, x, y, z = zip(*rows, strict=True)
    columns = {
        "position_id": pa.array(ids, pa.int64()),
        "neuron_id": pa.array(owners, pa.int64()),
        **{n: pa.array(v, pa.float64()) for n, v in zip("xyz", (x, y, z), strict=True)},
    }
    return questions.Asked("positions", pa.table(columns))


def of_table(path: pathlib.Path | None = None) -> credentials.SourceSettings:
    return sources.settings("none", synapses=path)


def test_every_synapse_of_the_neurons_in_the_order_asked(
    network: answering.OpenNetwork,
    table_path: pathlib.Path,
    synapse_table: pa.Table,
    tmp_path: pathlib.Path,
) -> None:
    there = synapse_table["neuron_id"].unique().to_pylist()
    asked = [there[5], 42, there[0]]
    about = answering.answer(
        neurons(asked), network, of_table(table_path), tmp_path, nothing
    )
    table = predictions.load(tmp_path / "predictions.feather")
    expected = [
        (neuron, id_)
        for neuron in (there[5], there[0])
        for id_, owner in sorted(
            zip(
                synapse_table["synapse_id"].to_pylist(),
                synapse_table["neuron_id"].to_pylist(),
                strict=True,
            )
        )
        if owner == neuron
    ]
    found = zip(
        table["neuron_id"].to_pylist(), table["synapse_id"].to_pylist(), strict=True
    )
    assert list(found) == expected
    assert about["unknown_neurons"] == ["42"]
    assert about["neurons_without_synapses"] == []
    assert about["rows"] == len(expected) == sum(about["status"].values())
    assert json.loads((tmp_path / "answer.json").read_text()) == about


def test_rows_are_those_of_their_positions_whatever_lies_outside(
    network: answering.OpenNetwork, volume_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Rows keep their place. In the original, a dropped position moved later rows."""
    inside = [(40 * z, 4 * y, 4 * x) for z, y, x in [(4, 40, 40), (12, 80, 90)]]
    rows = []
    for place in range(12):
        z, y, x = inside[place % 2]
        if place % 3 == 0:
            z = -10_000.0  # the crop is outside the volume
        if place % 5 == 4:
            z = np.nan
        rows.append((100 - place, 7, x, y, z))
    answering.answer(positions(rows), network, of_table(), tmp_path, nothing)
    table = predictions.load(tmp_path / "predictions.feather")
    assert table["synapse_id"].to_pylist() == [row[0] for row in rows]
    values = predictions.probabilities(table)
    volume = volumes.open(str(volume_path))
    for place, status in enumerate(table["status"].to_pylist()):
        if place % 5 == 4:
            expected = "bad_position"
        else:
            expected = "outside" if place % 3 == 0 else "ok"
        assert status == expected
        if status != "ok":
            assert np.isnan(values[place]).all()
            continue
        at = np.array(inside[place % 2]) / VOXEL_NM_ZYX
        start = (at - np.array([2, 8, 8])).astype(int)
        crop = volume.read(start, start + np.array([4, 16, 16]))
        [alone] = network.classifier(crop[None])
        np.testing.assert_allclose(values[place], alone, atol=1e-6)


def test_shared_connector_keeps_every_neuron(
    network: answering.OpenNetwork, tmp_path: pathlib.Path
) -> None:
    rows = [(9, 1, 160.0, 160.0, 160.0), (9, 2, 160.0, 160.0, 160.0)]
    answering.answer(positions(rows), network, of_table(), tmp_path, nothing)
    table = predictions.load(tmp_path / "predictions.feather")
    assert table["neuron_id"].to_pylist() == [1, 2]
    first, second = predictions.probabilities(table)
    np.testing.assert_array_equal(first, second)


def test_csv_has_the_columns_of_the_original(
    network: answering.OpenNetwork, tmp_path: pathlib.Path
) -> None:
    rows = [(3, None, 200.0, 164.0, 160.0), (1, 5, np.nan, 164.0, 160.0)]
    answering.answer(positions(rows), network, of_table(), tmp_path, nothing)
    table = csv.read_csv(tmp_path / "predictions.csv")
    classes = list(network.classifier.classes)
    expected = ["position_id", "skid", "x", "y", "z", *classes, "status"]
    assert table.column_names == expected
    assert table["position_id"].to_pylist() == [3, 1]
    assert table["skid"].to_pylist() == [-1, 5]
    assert table["x"].to_pylist() == [200.0, None]
    assert table["z"].to_pylist() == [160.0, 160.0]
    assert table[classes[0]][1].as_py() is None
    feather = predictions.load(tmp_path / "predictions.feather")
    sums = sum(table[name][0].as_py() for name in classes)
    assert sums == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(
        [table[name][0].as_py() for name in classes],
        predictions.probabilities(feather)[0],
        rtol=1e-6,
    )


class _Enough(Exception):
    pass


def _stop_after(calls: int) -> Callable[[str, int, int], None]:
    left = [calls]

    def tell(stage: str, done: int, total: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _Enough

    return tell


@pytest.mark.long
def test_stopped_anywhere_and_started_again_is_the_same(
    network: answering.OpenNetwork,
    table_path: pathlib.Path,
    synapse_table: pa.Table,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "UNIT_ROWS", 16)
    monkeypatch.setattr(answering, "_GROUP", {"neurons": 4, "positions": 7})
    asked = neurons(synapse_table["neuron_id"].unique().to_pylist())
    settings = of_table(table_path)
    whole = tmp_path / "whole"
    answering.answer(asked, network, settings, whole, nothing)
    names = ["predictions.feather", "predictions.csv", "report.html", "answer.json"]
    stopped = 0
    for calls in range(0, 40, 3):
        folder = tmp_path / f"stopped-{calls}"
        try:
            answering.answer(asked, network, settings, folder, _stop_after(calls))
        except _Enough:
            stopped += 1
            assert not (folder / "answer.json").exists()
        answering.answer(asked, network, settings, folder, nothing)
        for name in names:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
        shutil.rmtree(folder)
    assert stopped > 5


def test_no_synapse_at_all_is_an_answer(
    network: answering.OpenNetwork, table_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    about = answering.answer(
        neurons([1, 2]), network, of_table(table_path), tmp_path, nothing
    )
    assert about["rows"] == 0
    assert about["unknown_neurons"] == ["1", "2"]
    assert len(predictions.load(tmp_path / "predictions.feather")) == 0
    assert (tmp_path / "report.html").exists()


def test_too_many_synapses_are_refused_before_any_work(
    network: answering.OpenNetwork,
    table_path: pathlib.Path,
    synapse_table: pa.Table,
    tmp_path: pathlib.Path,
) -> None:
    asked = neurons(synapse_table["neuron_id"].unique().to_pylist())
    settings = of_table(table_path)
    with pytest.raises(UserError, match="more than 89 synapses"):
        answering.answer(asked, network, settings, tmp_path, nothing, 89)
    assert not (tmp_path / "plan.json").exists()
    about = answering.answer(
        asked, network, settings, tmp_path, nothing, len(synapse_table)
    )
    assert about["rows"] == len(synapse_table)


def test_folder_of_another_request_is_refused(
    network: answering.OpenNetwork, tmp_path: pathlib.Path
) -> None:
    rows = [(3, 4, 200.0, 164.0, 160.0)]
    answering.answer(positions(rows), network, of_table(), tmp_path, nothing)
    rows = [(3, 4, 204.0, 164.0, 160.0)]
    with pytest.raises(UserError, match="made with other arguments"):
        answering.answer(positions(rows), network, of_table(), tmp_path, nothing)


def test_other_table_of_the_same_name_is_refused(
    network: answering.OpenNetwork, synapse_table: pa.Table, tmp_path: pathlib.Path
) -> None:
    asked = neurons(synapse_table["neuron_id"].unique().to_pylist())
    path = tmp_path / "table.feather"
    table = synapses.conform(synapse_table, "table")
    synapses.write(table, path)
    folder = tmp_path / "answer"
    with pytest.raises(_Enough):
        answering.answer(asked, network, of_table(path), folder, _stop_after(3))
    synapses.write(table.slice(5), path)
    with pytest.raises(UserError, match="asked_of was"):
        answering.answer(asked, network, of_table(path), folder, nothing)


@pytest.mark.long
def test_damaged_sites_are_asked_for_again(
    network: answering.OpenNetwork,
    table_path: pathlib.Path,
    synapse_table: pa.Table,
    tmp_path: pathlib.Path,
) -> None:
    asked = neurons(synapse_table["neuron_id"].unique().to_pylist())
    settings = of_table(table_path)
    answering.answer(asked, network, settings, tmp_path, nothing)
    before = (tmp_path / "synapses.feather").read_bytes()
    for path in (tmp_path / "sites").iterdir():
        path.write_bytes(b"nothing")
    (tmp_path / "synapses.feather").write_bytes(b"nothing")
    answering.answer(asked, network, settings, tmp_path, nothing)
    assert (tmp_path / "synapses.feather").read_bytes() == before


def test_at_once_is_what_a_request_answers(
    network: answering.OpenNetwork, tmp_path: pathlib.Path
) -> None:
    rows = [(1, 1, 160.0, 164.0, 160.0), (2, 1, -9e9, 0.0, 0.0), (3, 1, 0.0, 0.0, 0.0)]
    answering.answer(positions(rows), network, of_table(), tmp_path, nothing)
    table = predictions.load(tmp_path / "predictions.feather")
    at = np.array([(z, y, x) for *_, x, y, z in rows])
    values, statuses = answering.at_once(network, at)
    assert statuses == table["status"].to_pylist()
    assert statuses == ["ok", "outside", "partly_outside"]
    np.testing.assert_allclose(values, predictions.probabilities(table), atol=1e-6)

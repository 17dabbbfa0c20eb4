# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import time
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tensorstore as ts
from pyarrow import csv, feather, parquet

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.bulk import execution, merging, planning, unit_results, worker_inputs
from synister_jax.em import crops, volumes
from synister_jax.evaluation import calibration
from synister_jax.network import calibrating, inference, sharding
from synister_jax.tables import predictions, reading, synapse_stream, synapses
from synister_jax.training import checkpoint_evaluation
from tests.helpers import commands
from tests.helpers.predict_command import output_files, run_command
from tests.helpers.small_data import CLASSES, shared_data


def classifier(
    trained_run: pathlib.Path, batch_size: int = 8, devices: int = 1
) -> inference.Classifier:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return inference.Classifier([(trained_run, None)], batch_size, mesh)


def source_of(table: pa.Table) -> synapse_stream.SynapseStream:
    return synapse_stream.SynapseStream("table", lambda: iter(table.to_batches()))


def predict_all(
    model: inference.Classifier,
    table: pa.Table | pathlib.Path,
    volume: volumes.Volume,
    output: pathlib.Path,
    unit_rows: int = 10,
    retry_missing: bool = False,
) -> pa.Table:
    """Predicts as the command does, in this process."""
    if isinstance(table, pathlib.Path):
        source = reading.open(table)
    else:
        source = source_of(table)
    plan = planning.of_classifier(model, source, volume, output, unit_rows)
    left = list(unit_results.unfinished(plan, range(len(plan)), retry_missing))
    execution.execute(plan, left, model, volume, retry_missing=retry_missing)
    record = merging.finish(plan, model, source, volume)
    return predictions.load(output / record["file"])


@pytest.fixture
def awkward(tmp_path: pathlib.Path, synapse_table: pa.Table) -> pathlib.Path:
    """The table in random order. Some rows are outside, at the border or nowhere."""
    order = np.random.default_rng(3).permutation(len(synapse_table))
    rows = synapse_table.take(pa.array(order)).to_pylist()
    rows[0]["x_nm"], rows[3]["x_nm"] = 1e7, 0.0
    rows[5]["z_nm"], rows[8]["y_nm"] = None, float("inf")
    rows[9]["x_nm"], rows[11]["z_nm"] = -1e300, -1e6
    path = tmp_path / "table.feather"
    schema = pa.schema([f.with_nullable(True) for f in synapse_table.schema])
    feather.write_feather(pa.Table.from_pylist(rows, schema=schema), str(path))
    return path


EXPECTED_STATUS = {
    0: "outside",
    3: "partly_outside",
    5: "bad_position",
    8: "bad_position",
    9: "bad_position",
    11: "outside",
}


@pytest.mark.long
def test_every_row_has_a_row_in_order(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    awkward: pathlib.Path,
) -> None:
    table = feather.read_table(awkward)
    volume = volumes.open(str(volume_path))
    saved = predict_all(classifier(trained_run), awkward, volume, tmp_path / "out")
    assert saved["synapse_id"].to_pylist() == table["synapse_id"].to_pylist()
    starting_with_nt = [n for n in saved.column_names if n.startswith("nt")]
    assert starting_with_nt == [f"nt_{name}_prob" for name in CLASSES]
    assert {saved.schema.field(n).type for n in starting_with_nt} == {pa.float32()}
    status = saved["status"].to_pylist()
    # Other rows of the table are at the volume's faces, and partly outside too.
    for row, expected in EXPECTED_STATUS.items():
        assert status[row] == expected, row
    probabilities = predictions.probabilities(saved)
    predicted = np.isin(status, ["ok", "partly_outside"])
    assert np.isnan(probabilities[~predicted]).all()
    np.testing.assert_allclose(probabilities[predicted].sum(axis=1), 1, rtol=1e-5)

    # The independent check cuts each crop by plain indexing and classifies it alone.
    array = np.pad(volume.read((0, 0, 0), volume.shape_zyx), 16)
    positions = synapses.positions_nm_zyx(saved) / (40, 4, 4)
    one = classifier(trained_run, batch_size=1)
    for row in np.flatnonzero(predicted)[::5]:
        z, y, x = positions[row].astype(int) + 16
        crop = array[z - 2 : z + 2, y - 8 : y + 8, x - 8 : x + 8]
        np.testing.assert_allclose(one(crop[None])[0], probabilities[row], atol=1e-5)

    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["rows"] == 90 and sum(record["status"].values()) == 90
    assert record["members"][0]["step"] == 40 and record["classes"] == list(CLASSES)
    assert record["file"] == "predictions.feather" and record["unreadable_chunks"] == 0


@pytest.mark.long
def test_result_does_not_depend_on_batch_units_or_devices(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    awkward: pathlib.Path,
) -> None:
    volume = volumes.open(str(volume_path))
    results = [
        predict_all(
            classifier(trained_run, batch, devices),
            awkward,
            volume,
            tmp_path / str(i),
            unit,
        )
        for i, (batch, devices, unit) in enumerate(
            [(8, 1, 10), (7, 1, 100), (8, 4, 33)]
        )
    ]
    first = predictions.probabilities(results[0])
    for other in results[1:]:
        np.testing.assert_allclose(predictions.probabilities(other), first, atol=1e-5)
        assert other["status"].equals(results[0]["status"])


@pytest.mark.long
def test_missing_chunk_is_a_status(
    tmp_path: pathlib.Path, trained_run: pathlib.Path, synapse_table: pa.Table
) -> None:
    path = tmp_path / "raw.n5"
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (24, 160, 160), dtype=np.uint8)
    volumes.write_n5(path, array, (40, 4, 4), (0, 0, 0), (8, 32, 32))
    chunk = path / "2" / "2" / "1"  # x 64..96, y 64..96, z 8..16
    content = chunk.read_bytes()
    chunk.unlink()
    arguments = (classifier(trained_run), synapse_table)
    out, listed = tmp_path / "out", tmp_path / "out" / "unreadable_chunks.csv"
    result = predict_all(*arguments, volumes.open(str(path)), out)
    position = synapses.positions_nm_zyx(synapse_table) / (40, 4, 4)
    half = np.array((2, 8, 8))
    touches = (position + half > (8, 64, 64)) & (position - half < (16, 96, 96))
    missing = np.array(result["status"].to_pylist()) == "missing_data"
    assert missing.sum() > 1
    np.testing.assert_array_equal(missing, touches.all(axis=1))
    nan = np.isnan(predictions.probabilities(result)).all(axis=1)
    np.testing.assert_array_equal(nan, missing)
    assert listed.read_text() == "z_vx,y_vx,x_vx\n8,64,64\n"

    chunk.write_bytes(content[:50])  # cut short, and as unreadable as if missing
    broken = predict_all(*arguments, volumes.open(str(path)), tmp_path / "broken")
    assert broken["status"].equals(result["status"])

    chunk.write_bytes(content)  # restored: read again only on request
    volume = volumes.open(str(path))
    same = predict_all(*arguments, volume, out)
    assert same["status"].equals(result["status"])

    # Only rows without a prediction are read again: their crops touch the chunk.
    class Reading(volumes.Volume):
        def start_reading(
            self, start: np.ndarray, stop: np.ndarray, fresh: bool = False
        ) -> Any:
            low, high = np.asarray(start) - (16, 96, 96), np.asarray(stop) - (8, 64, 64)
            assert (low < 0).all() and (high > 0).all(), "a crop that was there"
            return super().start_reading(start, stop, fresh)

    fields = {f.name: getattr(volume, f.name) for f in dataclasses.fields(volume)}
    full = predict_all(*arguments, Reading(**fields), out, retry_missing=True)
    assert "missing_data" not in full["status"].to_pylist()
    assert not np.isnan(predictions.probabilities(full)).any()
    assert not listed.exists()
    np.testing.assert_array_equal(
        predictions.probabilities(full)[~missing],
        predictions.probabilities(result)[~missing],
    )
    fresh = predict_all(*arguments, volume, tmp_path / "fresh")
    np.testing.assert_allclose(
        predictions.probabilities(full), predictions.probabilities(fresh), atol=1e-6
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "damage", ["another", "empty", "changed", "cut", "no checksum"]
)
def test_a_damaged_part_is_done_again(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
    damage: str,
) -> None:
    arguments = (classifier(trained_run), synapse_table, volumes.open(str(volume_path)))
    predict_all(*arguments, tmp_path, unit_rows=30)
    expected = output_files(tmp_path)
    first, second, _ = sorted((tmp_path / "parts").iterdir())
    content = first.read_bytes()
    if damage == "another":
        first.write_bytes(second.read_bytes())
    elif damage == "empty":
        first.write_bytes(b"")
    elif damage == "cut":
        first.write_bytes(content[: len(content) // 2])
    else:
        table = feather.read_table(first, memory_map=False)
        if damage == "changed":
            metadata = table.schema.metadata
            values = table[CLASSES[0]].to_numpy().copy()
            values[7] += 1e-6
            place = table.column_names.index(CLASSES[0])
            table = table.set_column(place, CLASSES[0], pa.array(values))
            table = table.replace_schema_metadata(metadata)
        else:
            table = table.replace_schema_metadata(None)
        feather.write_feather(table, str(first))
    plan = planning.of_classifier(
        arguments[0],
        source_of(synapse_table),
        arguments[2],
        tmp_path,
        30,
    )
    assert list(unit_results.unfinished(plan, range(3), False)) == [0]
    predict_all(*arguments, tmp_path, unit_rows=30)
    assert output_files(tmp_path) == expected


# For each stage of the command, files that appear in the folder, and seconds. The test
# waits for one of the files, and kills the command within so many seconds.
STAGES = (
    (("query.tmp", "units.parquet.partial"), 0.2),  # plan
    (tuple(f"parts/part-{i:06d}-of-000030.feather" for i in range(0, 24, 2)), 0.05),
    (tuple(f"parts/part-{i:06d}-of-000030.feather" for i in range(24, 30)), 0.05),
    (("predictions.feather.partial",), 0.3),  # merge
    (("predictions.feather.partial",), 1.0),  # the end of the merge
)


@pytest.mark.slow
def test_killed_in_every_stage_and_rerun_gives_the_same_bytes(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    # Many more rows, all outside the volume, make planning and merging take a while.
    empty = synapse_table.slice(0, 1).to_pylist()[0] | {"z_nm": 1e7}
    ids = np.arange(150_000)
    columns = {name: pa.array([value]).take(ids * 0) for name, value in empty.items()}
    many = pa.table(columns | {"synapse_id": ids}, schema=synapse_table.schema)
    table = tmp_path / "table.feather"
    mixed = [many.slice(0, 60_000), synapse_table, many.slice(60_000)]
    feather.write_feather(pa.concat_tables(mixed), str(table), chunksize=5_000)

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    command = run_command(trained_run, table, volume_path, whole)
    commands.run(*command, check=True)
    expected = output_files(whole)
    command[-3] = f"--output={folder}"
    random = np.random.default_rng(0)
    stage_reached = []
    for _ in range(2):
        for events, seconds in STAGES:
            event = folder / events[random.integers(len(events))]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while not event.exists() and process.poll() is None:
                time.sleep(0.0002)
            time.sleep(random.uniform(0, seconds))
            process.kill()
            stage_reached.append(process.wait() == -signal.SIGKILL)
        commands.run(*command, check=True)
        assert output_files(folder) == expected
        shutil.rmtree(folder)
    # A process that ended before the signal was not killed.
    assert len(stage_reached) == 10 and sum(stage_reached) >= 8


def test_only_what_is_lost_is_done_again(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    awkward: pathlib.Path,
) -> None:
    arguments = (
        classifier(trained_run),
        awkward,
        volumes.open(str(volume_path)),
        tmp_path,
    )
    predict_all(*arguments)
    expected = output_files(tmp_path)
    lost = sorted(tmp_path.glob("parts/*"))[2]
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("parts/*")}
    lost.unlink()
    predict_all(*arguments)
    again = {p: p.stat().st_mtime_ns for p in tmp_path.glob("parts/*")}
    assert [p for p in times if times[p] != again[p]] == [lost]
    assert output_files(tmp_path) == expected


def test_mistaken_units_stop_cutting_and_warn_in_prediction(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    rows = synapse_table.to_pylist()
    for row in rows:  # as if the nm were voxels
        row["z_nm"] *= 40
        row["y_nm"] *= 4
        row["x_nm"] *= 4
    table = tmp_path / "twice.feather"
    feather.write_feather(pa.Table.from_pylist(rows), str(table))
    out = tmp_path / "out"
    command = run_command(trained_run, table, volume_path, out)
    finished = commands.run(*command)
    assert finished.returncode == 0, finished.stderr
    assert "warning: 90 of 90 positions lie outside" in finished.stderr
    assert len(predictions.load(out / "predictions.feather")) == 90
    command = ["tools/shard_crops.py", "--config=configs/demo.py"]
    command += [f"--synapses={table}", f"--volume={volume_path}", f"--output={out}"]
    finished = commands.run(*command)
    assert finished.returncode == 1 and len(finished.stderr.splitlines()) == 1
    assert "multiplied by the voxel size once more" in finished.stderr


@pytest.mark.long
def test_other_arguments_in_the_same_folder_are_refused(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    volume = volumes.open(str(volume_path))
    model = classifier(trained_run)
    predict_all(model, synapse_table, volume, tmp_path)
    with pytest.raises(UserError, match="rows was 90, now 89"):
        predict_all(model, synapse_table.slice(1), volume, tmp_path)
    moved = synapse_table.set_column(1, "z_nm", pc.add(synapse_table["z_nm"], 40))
    with pytest.raises(UserError, match="synapses_sha256 was"):
        predict_all(model, moved, volume, tmp_path)
    with pytest.raises(UserError, match="batch_size was 8, now 7"):
        predict_all(classifier(trained_run, 7), synapse_table, volume, tmp_path)
    mesh = sharding.make_mesh(jax.devices()[:1])
    for other, differs in (
        (inference.Classifier([(trained_run, 20)], 8, mesh), "parameters_sha256 was"),
        (inference.Classifier([(trained_run, None)], 8, mesh, 8), "views was 1, now 8"),
    ):
        with pytest.raises(UserError, match=differs):
            predict_all(other, synapse_table, volume, tmp_path)
    # The prediction does not depend on the label. The answer has the new label.
    place = synapse_table.column_names.index("neuron_id")
    ids = pc.add(synapse_table["neuron_id"], 1)
    renamed = synapse_table.set_column(place, "neuron_id", ids)
    answer = predict_all(model, renamed, volume, tmp_path)
    assert answer["neuron_id"].equals(ids)


def test_an_empty_table_has_an_empty_answer(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    volume = volumes.open(str(volume_path))
    files.write_feather(tmp_path / "none.feather", synapse_table.slice(0, 0))
    model, out = classifier(trained_run), tmp_path / "out"
    answer = predict_all(model, tmp_path / "none.feather", volume, out)
    assert len(answer) == 0 and predictions.classes(answer) == CLASSES
    assert json.loads((out / "predictions.json").read_text())["status"] == {}


def test_one_synapse_and_none_in_the_volume(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    volume, model = volumes.open(str(volume_path)), classifier(trained_run)
    one = predict_all(model, synapse_table.slice(5, 1), volume, tmp_path / "one")
    assert one["status"].to_pylist() == ["ok"]
    place = synapse_table.column_names.index("y_nm")
    far = synapse_table.set_column(place, "y_nm", pc.add(synapse_table["y_nm"], 1e6))
    none = predict_all(model, far, volume, tmp_path / "none")
    assert set(none["status"].to_pylist()) == {"outside"} and len(none) == 90
    assert np.isnan(predictions.probabilities(none)).all()


def test_an_id_that_is_there_twice_is_answered_twice(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    twice = pa.concat_tables([synapse_table.slice(0, 3), synapse_table.slice(1, 4)])
    volume = volumes.open(str(volume_path))
    answer = predict_all(classifier(trained_run), twice, volume, tmp_path)
    ids = synapse_table["synapse_id"].to_pylist()
    assert answer["synapse_id"].to_pylist() == [*ids[:3], *ids[1:5]]
    values = predictions.probabilities(answer)
    np.testing.assert_allclose(values[1:3], values[3:5], atol=1e-6)


def test_checkpoint_of_another_architecture(
    tmp_path: pathlib.Path, trained_run: pathlib.Path
) -> None:
    config = json.loads((trained_run / "config.json").read_text())
    config["model"]["dense_features"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints").symlink_to(trained_run / "checkpoints")
    with pytest.raises(UserError, match=r"another architecture: params.dense0.bias is"):
        classifier(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 41; there are 20, 40"):
        inference.Classifier([(trained_run, 41)], 4, sharding.make_mesh())
    with pytest.raises(UserError, match="not the folder of a run"):
        classifier(tmp_path / "nothing")


def test_real_volume_at_its_real_synapses(
    tmp_path: pathlib.Path, trained_run: pathlib.Path
) -> None:
    """Larval VNC, 50×4.6×4.6 nm, 20 sections: all 13 synapses lie in section 2."""
    folder = shared_data("larval_vnc_sstem")
    text = (folder / "stack1_synapses.csv").read_text().splitlines()[1:]
    lines = ["synapse_id,z_nm,y_nm,x_nm"]
    for line in text:
        i, z, y, x, _ = map(int, line.split(","))
        lines.append(f"{i},{z * 50},{y * 4.6},{x * 4.6}")
    (tmp_path / "real.csv").write_text("\n".join(lines) + "\n")
    command = run_command(
        trained_run,
        tmp_path / "real.csv",
        folder / "stack1.n5" / "volumes" / "raw" / "s0",
        tmp_path / "out",
    )
    refused = commands.run(*command)
    assert refused.returncode == 1
    assert "50×4.6×4.6 nm" in refused.stderr and "Traceback" not in refused.stderr
    command.append("--voxel_size_nm_zyx=50,4.6,4.6")
    commands.run(*command, check=True)
    result = predictions.load(tmp_path / "out" / "predictions.feather")
    assert result["synapse_id"].to_pylist() == list(range(1, 14))
    # A crop of 4 sections around section 2 is inside the volume.
    assert set(result["status"].to_pylist()) == {"ok"}
    # The published crop has 16 sections, and is partly outside for all synapses.
    table = reading.load(tmp_path / "real.csv")
    volume = volumes.open(str(folder / "stack1.n5" / "volumes" / "raw" / "s0"))
    shape = (16, 160, 160)
    starts = crops.starts_vx_zyx(synapses.positions_nm_zyx(table), shape, volume)
    assert set(crops.border_status(starts, shape, volume)) == {"partly_outside"}


def run(command: list[str], *options: str) -> subprocess.CompletedProcess:
    return commands.run(*command, *options)


def refusals(command: list[str], cases: list[tuple[list[str], str]]) -> None:
    """Asserts that each command ends with one line of error and exit code 1."""
    for options, message in cases:
        refused = run(command, *options)
        assert refused.returncode == 1, options
        assert len(refused.stderr.splitlines()) == 1 and message in refused.stderr


@pytest.mark.long
def test_a_dry_run_says_what_it_will_take(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    awkward: pathlib.Path,
) -> None:
    out = tmp_path / "out"
    command = run_command(trained_run, awkward, volume_path, out)
    finished = run(command, "--dry_run")
    assert finished.returncode == 0, finished.stderr
    found = finished.stdout
    assert "rows: 90 (3 bad_position, " in found and "5 without a crop" in found
    assert "units: 29 of up to 3 synapses" in found
    assert "bytes needed: 87 kB in crops of 4×16×16" in found
    assert "chunk bytes to decode: about " in found and "crops/s on " in found
    # The plan stays in the folder, and the next command executes it.
    assert list(out.glob("parts/*")) == []
    written = (out / "units.parquet").stat().st_mtime_ns
    assert run(command).returncode == 0
    assert (out / "units.parquet").stat().st_mtime_ns == written
    assert len(list(out.glob("parts/*"))) == 29


@pytest.mark.long
def test_one_part_of_a_split_as_parquet(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    table = tmp_path / "table.parquet"
    parquet.write_table(synapse_table, table, row_group_size=7)
    command = run_command(trained_run, table, volume_path, tmp_path / "out")
    finished = run(command, "--part=test", "--format=parquet")
    assert finished.returncode == 0, finished.stderr
    answer = parquet.read_table(tmp_path / "out" / "predictions.parquet")
    predictions.check(answer.schema, "answer")
    chosen = synapses.in_part(synapse_table, "skeleton", "test")
    assert answer["synapse_id"].to_pylist() == (
        synapse_table["synapse_id"].filter(pa.array(chosen)).to_pylist()
    )
    assert 0 < len(answer) < 90
    volume = volumes.open(str(volume_path))
    model = classifier(trained_run, 4)
    whole = predict_all(model, synapse_table, volume, tmp_path / "all")
    np.testing.assert_allclose(
        predictions.probabilities(answer),
        predictions.probabilities(whole)[chosen],
        atol=1e-6,
    )
    refusals(
        command,
        [
            (["--part=test", "--split=lobes", f"--output={tmp_path}/new"], "no split"),
            (["--part=validation"], "part was ['skeleton', 'test']"),
        ],
    )


@pytest.mark.long
def test_a_grid_is_a_volume_of_probabilities(
    tmp_path: pathlib.Path, trained_run: pathlib.Path, volume_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    command = run_command(trained_run, tmp_path, volume_path, out)
    command = [x for x in command if not x.startswith(("--synapses", "--unit_rows"))]
    command.append("--unit_rows=50")
    roi = "--roi_nm_zyx=160:800,64:600,-200:560"
    finished = run(command, roi, "--step_nm_zyx=160,64,40")
    assert finished.returncode == 0, finished.stderr
    kvstore = {"driver": "file", "path": f"{out}/predictions.zarr/0/"}
    values = ts.open({"driver": "zarr", "kvstore": kvstore}).result().read().result()
    assert values.shape == (3, 4, 9, 19) and values.dtype == np.float32
    z, y, x = np.indices((4, 9, 19)).reshape(3, -1) * [[160], [64], [40]]
    rows = np.stack([z + 160, y + 64, x - 200], axis=1).astype(float)
    columns = dict(zip(synapses.POSITION, rows.T, strict=True))
    table = pa.table({"synapse_id": np.arange(len(rows)), **columns})
    volume = volumes.open(str(volume_path))
    model = classifier(trained_run, 4, devices=4)  # the command has 4 too
    answer = predict_all(model, table, volume, tmp_path / "table", 50)
    expected = predictions.probabilities(answer).T.reshape(values.shape)
    np.testing.assert_array_equal(values, expected)
    assert np.isnan(values[..., 0]).all() and np.isfinite(values[..., -1]).all()
    attributes = json.loads((out / "predictions.zarr/0/.zattrs").read_text())
    assert attributes["resolution"] == [160, 64, 40]
    assert attributes["offset"] == [160, 64, -200]
    record = json.loads((out / "predictions.json").read_text())
    assert record["file"] == "predictions.zarr" and record["rows"] == 4 * 9 * 19
    refusals(
        command,
        [
            ([roi, "--synapses=x.csv"], "either --synapses, or both --roi_nm_zyx"),
            ([roi, "--step_nm_zyx=160,64,20"], "rows was 684, now"),
        ],
    )


@pytest.mark.long
def test_views_and_several_checkpoints(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    table = tmp_path / "table.csv"
    csv.write_csv(synapse_table.select(["synapse_id", *synapses.POSITION]), table)
    command = run_command(trained_run, table, volume_path, tmp_path / "out")
    finished = run(command, "--step=20,40", "--tta=8")
    assert finished.returncode == 0, finished.stderr
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [m["step"] for m in record["members"]] == [20, 40]
    assert record["views"] == 8
    answer = predictions.load(tmp_path / "out" / "predictions.feather")
    mesh = sharding.make_mesh(jax.devices()[:4])  # the command has 4 too
    members = [(trained_run, 20), (trained_run, 40)]
    model = inference.Classifier(members, 4, mesh, views=8)
    volume = volumes.open(str(volume_path))
    same = predict_all(model, synapse_table, volume, tmp_path / "same", 3)
    np.testing.assert_array_equal(
        predictions.probabilities(answer), predictions.probabilities(same)
    )


def test_a_volume_that_vanishes_stops_the_command(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    copy = shutil.copytree(volume_path, tmp_path / "raw.n5")
    model = classifier(trained_run)
    expected = predict_all(
        model, synapse_table, volumes.open(str(copy)), tmp_path / "a"
    )
    volume = volumes.open(str(copy), cache_bytes=0)
    source = source_of(synapse_table)
    plan = planning.of_classifier(model, source, volume, tmp_path / "b", 10)
    execution.execute(plan, range(4), model, volume)
    copy.rename(tmp_path / "elsewhere.n5")
    with pytest.raises(UserError, match="no longer there"):
        execution.execute(plan, range(4, 9), model, volume)
    assert len(list((tmp_path / "b" / "parts").iterdir())) == 4
    (tmp_path / "elsewhere.n5").rename(copy)
    volume = volumes.open(str(copy))
    answer = predict_all(model, synapse_table, volume, tmp_path / "b")
    assert answer.equals(expected)


def test_a_damaged_plan_is_made_again(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    arguments = (classifier(trained_run), synapse_table, volumes.open(str(volume_path)))
    predict_all(*arguments, tmp_path)
    expected = output_files(tmp_path)
    units = tmp_path / "units.parquet"
    units.write_bytes(units.read_bytes()[:100])
    predict_all(*arguments, tmp_path)
    assert output_files(tmp_path) == expected
    (tmp_path / "plan.json").unlink()
    predict_all(*arguments, tmp_path)
    assert output_files(tmp_path) == expected
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UserError, match="plan.json was changed; remove it"):
        predict_all(*arguments, tmp_path)


def test_voxels_in_place_of_nm_are_doubted(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    many = pa.concat_tables([synapse_table] * 2)  # the check needs 100 rows
    for size, name in zip((40, 4, 4), synapses.POSITION, strict=True):
        place = many.column_names.index(name)
        many = many.set_column(place, name, pc.divide(many[name], size))
    volume, model = volumes.open(str(volume_path)), classifier(trained_run)
    source = source_of(many)
    plan = planning.of_classifier(model, source, volume, tmp_path)
    assert "all 180 positions are in the corner" in plan.about["doubt"]
    assert "check that they are in nm" in plan.about["doubt"]


def test_what_another_process_has_done_is_not_done_again(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    volume, model = volumes.open(str(volume_path)), classifier(trained_run)
    source = source_of(synapse_table)
    plan = planning.of_classifier(model, source, volume, tmp_path, 30)
    assert execution.execute(plan, [1], model, volume).synapses == 30
    assert execution.execute(plan, [0, 1, 2], model, volume).synapses == 60


def test_a_batch_that_does_not_fit_is_told(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    volume, model = volumes.open(str(volume_path)), classifier(trained_run, 10**12)
    with pytest.raises(UserError, match="1,000,000,000,000 crops do not fit"):
        predict_all(model, synapse_table, volume, tmp_path)


@pytest.fixture(scope="module")
def calibrated_run(
    tmp_path_factory: pytest.TempPathFactory, trained_run: pathlib.Path
) -> pathlib.Path:
    """A copy of `trained_run` with a fitted temperature for its latest checkpoint."""
    run = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(trained_run, run)
    checkpoint_evaluation.evaluate(run, "validation", [40], batch_size=8)
    calibrating.fit(run, 40, 0.6)
    return run


@pytest.mark.long
def test_calibrated_is_the_temperature_of_the_plain_answer(
    tmp_path: pathlib.Path,
    calibrated_run: pathlib.Path,
    volume_path: pathlib.Path,
    awkward: pathlib.Path,
) -> None:
    fitted = json.loads((calibrated_run / "calibration/step-40.json").read_text())
    out = tmp_path / "out"
    command = run_command(calibrated_run, awkward, volume_path, out)
    finished = run(command, "--calibrated")
    assert finished.returncode == 0, finished.stderr
    answer = predictions.load(out / "predictions.feather")
    record = json.loads((out / "predictions.json").read_text())
    for about in (predictions.about(answer), record):
        assert about["temperature"] == fitted["temperature"] != 1
        assert about["abstain_below"] == fitted["abstain_below"] is not None
    volume = volumes.open(str(volume_path))
    plain_out = tmp_path / "plain"
    plain = predict_all(classifier(calibrated_run, 4, 4), awkward, volume, plain_out)
    record = json.loads((plain_out / "predictions.json").read_text())
    for about in (predictions.about(plain), record):
        assert not {"temperature", "abstain_below"} & about.keys()
    values = predictions.probabilities(plain)
    expected = calibration.apply(values, fitted["temperature"])
    found = predictions.probabilities(answer)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.nanmax(np.abs(found - values)) > 1e-3
    assert answer["status"].equals(plain["status"])


@pytest.mark.long
def test_calibrated_and_plain_parts_do_not_mix(
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    volume, mesh = volumes.open(str(volume_path)), sharding.make_mesh()

    def at(temperature: float | None) -> inference.Classifier:
        members = [(trained_run, 40)]
        return inference.Classifier(members, 8, mesh, temperature=temperature)

    def planned(temperature: float | None, folder: str) -> planning.Plan:
        source = source_of(synapse_table)
        model = at(temperature)
        return planning.of_classifier(model, source, volume, tmp_path / folder, 30)

    planned(None, "plain")
    with pytest.raises(UserError, match="temperature was None, now 1.5; choose an"):
        planned(1.5, "plain")
    plan = planned(1.5, "sharp")
    for other in (None, 1.6):
        with pytest.raises(UserError, match=f"temperature was 1.5, now {other}"):
            planned(other, "sharp")
    # A worker on another machine gets the temperature from the job.
    job = worker_inputs.Inputs(
        ((str(trained_run), 40),),
        8,
        1,
        str(volume_path),
        None,
        str(plan.folder),
        False,
        temperature=1.5,
    ).elsewhere(plan)
    assert [worker_inputs.execute_unit(job, unit).synapses for unit in range(3)] == [
        30
    ] * 3
    source, model = source_of(synapse_table), at(1.5)
    record = merging.finish(plan, model, source, volume, abstain_below=0.7)
    assert (record["temperature"], record["abstain_below"]) == (1.5, 0.7)
    answer = predictions.load(plan.folder / record["file"])
    plain = predict_all(at(None), synapse_table, volume, tmp_path / "plain", 30)
    expected = calibration.apply(predictions.probabilities(plain), 1.5)
    found = predictions.probabilities(answer)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_calibrated_without_what_it_needs(
    tmp_path: pathlib.Path,
    calibrated_run: pathlib.Path,
    volume_path: pathlib.Path,
    awkward: pathlib.Path,
) -> None:
    command = run_command(calibrated_run, awkward, volume_path, tmp_path / "out")
    refusals(
        [*command, "--calibrated"],
        [(["--step=20"], "calibrate --workdir=")],
    )
    assert not (tmp_path / "out").exists()

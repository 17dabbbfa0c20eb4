# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import json
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather

from synister_jax.base import sql
from synister_jax.base.errors import UserError
from synister_jax.bulk import planning
from synister_jax.bulk.planning import Plan
from synister_jax.em import crops, volumes
from synister_jax.em.volumes import Volume
from synister_jax.tables import file_formats, reading, synapse_stream, synapses
from synister_jax.tables.synapse_stream import SynapseStream
from tests.helpers.plans import (
    CHUNK_ZYX,
    CROP_ZYX,
    MADE_FROM,
    OFFSET_NM_ZYX,
    SHAPE_ZYX,
    VOXEL_NM_ZYX,
    expected_rows,
    make_plan,
    make_volume,
    names_in,
    positions_in_and_out,
    source_of,
    table_of,
)


def contents(plan: Plan) -> list[tuple[list[int], list[list[int]]]]:
    units = map(plan.unit, range(len(plan)))
    return [(rows.tolist(), starts.tolist()) for rows, starts in units]


PLANNED = {"parts", "plan.json", "units.parquet", ".lock"}


@pytest.fixture
def volume(tmp_path: pathlib.Path) -> Volume:
    return make_volume(tmp_path / "volume.zarr")


def test_every_row_with_a_crop_is_in_one_unit_and_no_other_row_is(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    positions = positions_in_and_out(1234)
    plan = make_plan(table_of(positions), volume, tmp_path / "out")
    found: dict[int, tuple[int, ...]] = {}
    sizes = []
    for unit in range(len(plan)):
        rows, starts = plan.unit(unit)
        assert rows.dtype == starts.dtype == np.int64
        assert plan.size(unit) == len(rows) == len(starts)
        assert not found.keys() & set(rows.tolist())
        found |= zip(rows.tolist(), map(tuple, starts.tolist()), strict=True)
        sizes.append(len(rows))
    expected = expected_rows(positions)
    assert 600 < len(expected) < 1100 and found == expected
    assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    assert plan.predicted_rows == len(expected)
    assert names_in(tmp_path / "out") == PLANNED


def test_the_plan_says_how_many_rows_have_which_status(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    positions = positions_in_and_out(1000)
    plan = make_plan(source_of(table_of(positions), 77), volume, tmp_path / "out")
    counts = dict.fromkeys(("bad_position", "ok", "outside", "partly_outside"), 0)
    crop_starts = expected_rows(positions)
    for row, position in enumerate(positions):
        if not (np.abs(position) < 1e9).all():
            counts["bad_position"] += 1
        elif row not in crop_starts:
            counts["outside"] += 1
        else:
            start = np.array(crop_starts[row])
            whole = (start >= 0).all() and (start + CROP_ZYX <= SHAPE_ZYX).all()
            counts["ok" if whole else "partly_outside"] += 1
    assert min(counts.values()) > 10
    assert plan.about["status_by_position"] == counts
    assert plan.about["rows"] == 1000
    said = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert said == plan.about and said["classes"] == MADE_FROM["classes"]
    found = synapse_stream.checksum(source_of(table_of(positions)))
    assert said["synapses_sha256"] == found.hexdigest()


def test_a_plan_does_not_depend_on_batches(
    tmp_path: pathlib.Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(positions_in_and_out(1500))
    first = make_plan(table, volume, tmp_path / "first")
    for rows in (13, 64, 1499):
        plan = make_plan(source_of(table, rows), volume, tmp_path / str(rows))
        assert contents(plan) == contents(first) and plan.about == first.about
        assert plan.fingerprint == first.fingerprint

    feather.write_feather(table, str(tmp_path / "t.feather"))
    monkeypatch.setattr(file_formats, "BATCH_ROWS", 100)
    source = reading.open(tmp_path / "t.feather")
    assert len(list(source.tables())) == 15
    plan = make_plan(source, volume, tmp_path / "file")
    assert contents(plan) == contents(first) and plan.about == first.about
    plans = [tmp_path / name / "units.parquet" for name in ("first", "13", "file")]
    assert len({path.read_bytes() for path in plans}) == 1


def test_rows_at_one_place_are_in_the_order_of_the_table(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    positions = np.tile(np.array(OFFSET_NM_ZYX) + 800, (1000, 1))
    plan = make_plan(source_of(table_of(positions), 30), volume, tmp_path / "out", 300)
    rows = np.concatenate([plan.unit(unit)[0] for unit in range(len(plan))])
    assert rows.tolist() == list(range(1000))


def test_rows_of_a_unit_lie_together(tmp_path: pathlib.Path) -> None:
    shape, chunk, crop = (256, 1024, 1024), (16, 64, 64), (4, 16, 16)
    volume = make_volume(tmp_path / "v", shape, chunk, (1, 1, 1), (0, 0, 0))
    rng = np.random.default_rng(0)
    positions = rng.random((64_000, 3)) * shape
    plan = make_plan(table_of(positions), volume, tmp_path / "out", 8_000, crop)
    units = [plan.unit(unit)[1] for unit in range(len(plan))]
    assert len(units) == 8
    together = np.concatenate(units)
    shuffled = np.split(rng.permutation(together), 8)

    def extent(groups: list[np.ndarray]) -> float:
        return float(np.mean([np.ptp(starts, axis=0).prod() for starts in groups]))

    assert extent(units) < extent(shuffled) / 4

    def chunks(groups: list[np.ndarray]) -> int:
        return sum(crops.count_chunks(starts, crop, volume) for starts in groups)

    every = crops.count_chunks(together, crop, volume)
    assert every == 16 * 16 * 16  # the crops touch every chunk
    assert chunks(units) < 1.5 * every < chunks(shuffled) / 4


def test_the_next_unit_goes_on_beside_the_last(tmp_path: pathlib.Path) -> None:
    shape, chunk, crop = (128, 1024, 1024), (16, 64, 64), (4, 16, 16)
    volume = make_volume(tmp_path / "v", shape, chunk, (1, 1, 1), (0, 0, 0))
    positions = np.random.default_rng(0).random((20_000, 3)) * shape
    plan = make_plan(table_of(positions), volume, tmp_path / "out", 1_000, crop)
    units = [plan.unit(unit)[1] for unit in range(len(plan))]
    codes = [crops.chunk_codes(starts, crop, volume) for starts in units]
    for unit, following in zip(codes, codes[1:], strict=False):
        assert unit.max() <= following.min()
        assert (np.diff(unit) >= 0).all()


@pytest.mark.long
def test_a_sort_that_spills_gives_the_same_units(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, batch = 1_000_000, 100_000
    shape = (400, 4000, 4000)
    volume = make_volume(tmp_path / "v", shape, CHUNK_ZYX, (1, 1, 1), (0, 0, 0))
    rng = np.random.default_rng(0)
    positions = (rng.random((batch, 3)) * (400, 4000, 4000)).astype(np.int32)
    spilled = []

    def batches(out: pathlib.Path) -> Iterator[pa.RecordBatch]:
        for first in range(0, rows, batch):
            moved = (positions * (7, 11, 13) + first) % shape
            columns = dict(zip(synapses.POSITION, moved.T.astype(float), strict=True))
            ids = {"synapse_id": np.arange(first, first + batch)}
            yield pa.RecordBatch.from_pydict(ids | columns)
            found = (out / "query.tmp").glob("*")
            spilled.append(sum(path.stat().st_size for path in found))

    # DuckDB needs memory for every thread, so the test uses one on every machine.
    connect = duckdb.connect
    monkeypatch.setattr(
        duckdb, "connect", lambda config: connect(config=config | {"threads": 1})
    )
    plans = []
    for memory in ("1GB", "40MB"):
        monkeypatch.setattr(sql, "MEMORY", memory)
        out = tmp_path / memory
        spilled.clear()
        source = SynapseStream("table", lambda out=out: batches(out))
        plans.append(make_plan(source, volume, out, 50_000))
        assert (max(spilled) > 1 << 20) == (memory == "40MB")
        assert names_in(out) == PLANNED
    in_memory, on_disk = plans
    assert on_disk.predicted_rows == rows and len(on_disk) == 20
    for unit in range(20):
        for a, b in zip(in_memory.unit(unit), on_disk.unit(unit), strict=True):
            np.testing.assert_array_equal(a, b)
    assert in_memory.fingerprint == on_disk.fingerprint


CHANGES: dict[str, dict[str, Sequence[float]]] = {
    "volume_shape_zyx": {"shape_zyx": (60, 500, 701)},
    "chunk_shape_zyx": {"chunk_zyx": (8, 64, 64)},
    "voxel_size_nm_zyx": {"voxel_nm_zyx": (40.0, 4.0, 4.0)},
    "offset_nm_zyx": {"offset_nm_zyx": (400.0, -80.0, 0.0)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_volume_that_became_another_is_refused(
    tmp_path: pathlib.Path, what: str
) -> None:
    table, path = table_of(positions_in_and_out(200)), tmp_path / "v"
    make_plan(table, make_volume(path), tmp_path / "out")
    before = (tmp_path / "out" / "plan.json").read_bytes()
    with pytest.raises(UserError, match=rf"other arguments: {what} was \[.*, now \["):
        make_plan(table, make_volume(path, **CHANGES[what]), tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_bytes() == before
    make_plan(table, make_volume(path), tmp_path / "out")


def test_other_arguments_are_refused_and_named(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    table, out = table_of(positions_in_and_out(200)), tmp_path / "out"
    plan = make_plan(table, volume, out)
    elsewhere = make_volume(tmp_path / "elsewhere")
    for call, message in [
        (lambda: make_plan(table, elsewhere, out), "volume was .*elsewhere; choose"),
        (lambda: make_plan(table, volume, out, 99), "unit_rows was 100, now 99"),
        (
            lambda: make_plan(table, volume, out, crop_zyx=(4, 16, 16)),
            r"crop_shape_zyx was \[4, 16, 18\], now \[4, 16, 16\]",
        ),
        (lambda: make_plan(table, volume, out, classes=["a"]), "classes was"),
        (lambda: make_plan(table, volume, out, views=8), "views was None, now 8"),
        (lambda: make_plan(table.slice(1), volume, out), "rows was 200, now 199"),
        (
            lambda: make_plan(
                table.take(pa.array([1, 0, *range(2, 200)])), volume, out
            ),
            "synapses_sha256 was",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    again = make_plan(source_of(table, 9), volume, out)
    assert again.about == plan.about and contents(again) == contents(plan)


def test_a_label_may_change(tmp_path: pathlib.Path, volume: Volume) -> None:
    table, out = table_of(positions_in_and_out(200)), tmp_path / "out"
    plan = make_plan(table, volume, out)
    labelled = table.append_column("cell_type", pa.array(["KC"] * 200))
    assert make_plan(labelled, volume, out).about == plan.about


RIGHT = np.random.default_rng(5).random((1000, 3)) * np.multiply(
    SHAPE_ZYX, VOXEL_NM_ZYX
)
# In a volume like a cube, positions in the order x, y, z would also be inside.
LONG_ZYX, FAR_NM_ZYX = (60, 500, 7000), (40_000.0, 50_000.0, 60_000.0)


@pytest.mark.parametrize("sample", [100_000, 100])
@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ((1, 1, 1), None),
        (VOXEL_NM_ZYX, "they look like nm multiplied by the voxel size once more"),
        ((1000, 1000, 1000), "they look like thousandths of nm"),
        ("xyz", "they look like x, y, z in place of z, y, x"),
        ((1e6, 1e6, 1e6), None),  # no simple explanation fits
    ],
)
def test_positions_of_another_unit_are_doubted_with_the_one_that_fits(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    sample: int,
    change: tuple[float, ...] | str,
    doubt: str | None,
) -> None:
    monkeypatch.setattr(planning, "_SAMPLE_ROWS", sample)
    volume = make_volume(tmp_path / "v", LONG_ZYX, offset_nm_zyx=FAR_NM_ZYX)
    right = RIGHT * (1, 1, 10) + FAR_NM_ZYX
    positions = right[:, ::-1] if change == "xyz" else right * change
    plan = make_plan(source_of(table_of(positions), 64), volume, tmp_path / "out")
    if doubt is None:
        assert plan.about["doubt"] is None
        return
    assert plan.about["doubt"].endswith(doubt)
    # Of 1,000 rows, every 8th row is more than 100 rows, so every 16th row is taken.
    start = "in a sample of every 16th row, " if sample == 100 else ""
    assert plan.about["doubt"].startswith(start)
    of = "of 63 positions" if sample == 100 else "of 1,000 positions"
    assert of in plan.about["doubt"] and volume.uri in plan.about["doubt"]


def test_x_y_z_in_a_brain_that_begins_at_0_are_not_taken_for_another_unit(
    tmp_path: pathlib.Path,
) -> None:
    """In FAFB, even wrong positions are inside when divided by the voxel size."""
    shape, voxel = (7_063, 133_717, 248_156), (40.0, 4.0, 4.0)
    volume = make_volume(tmp_path / "v", shape, (64, 64, 64), voxel, (0, 0, 0))
    positions = np.random.default_rng(5).random((1000, 3)) * np.multiply(shape, voxel)
    plan = make_plan(table_of(positions[:, ::-1]), volume, tmp_path / "out")
    assert plan.about["doubt"].endswith("they look like x, y, z in place of z, y, x")


def test_what_is_doubted_does_not_depend_on_batches(
    tmp_path: pathlib.Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_SAMPLE_ROWS", 100)
    table = table_of((RIGHT + OFFSET_NM_ZYX) * VOXEL_NM_ZYX)
    plans = [
        make_plan(source_of(table, rows), volume, tmp_path / str(rows))
        for rows in (10, 64, 300, 1000)
    ]
    assert all("once more" in plan.about["doubt"] for plan in plans)
    assert len({plan.about["doubt"] for plan in plans}) == 1
    assert len({plan.fingerprint for plan in plans}) == 1


def test_a_table_without_rows_has_a_plan_without_units(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    csv.write_csv(table_of(np.zeros((0, 3))), tmp_path / "none.csv")
    source = reading.open(tmp_path / "none.csv")
    for _ in range(2):  # makes the plan, then compares it
        plan = make_plan(source, volume, tmp_path / "out")
        assert len(plan) == plan.predicted_rows == plan.about["rows"] == 0
        assert plan.about["status_by_position"] == {} and plan.about["doubt"] is None


def test_a_table_outside_the_volume_has_a_plan_without_units(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    positions = np.full((30, 3), 1e8)
    positions[3] = np.nan
    plan = make_plan(source_of(table_of(positions), 7), volume, tmp_path / "out")
    assert len(plan) == plan.predicted_rows == 0 and plan.about["rows"] == 30
    assert plan.about["status_by_position"] == {"bad_position": 1, "outside": 29}
    assert names_in(tmp_path / "out") == PLANNED


def test_an_error_in_the_last_batch_of_the_table_is_that_error(
    tmp_path: pathlib.Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "BATCH_ROWS", 100)
    good = table_of(positions_in_and_out(1000))
    labels: list[str | None] = [None] * 1000
    good = good.append_column("neurotransmitter", pa.array(labels, pa.string()))
    labels[998] = "nonsense"
    bad = good.set_column(4, "neurotransmitter", pa.array(labels))
    path, out = tmp_path / "t.feather", tmp_path / "out"
    feather.write_feather(bad, str(path))
    message = rf"^{path}: unknown neurotransmitter 'nonsense' .*row 998 \('nonsense'\)"
    with pytest.raises(UserError, match=message) as caught:
        make_plan(reading.open(path), volume, out)
    assert "duckdb" not in str(caught.value).lower()
    assert names_in(out) == {"parts", ".lock"}
    feather.write_feather(good, str(path))  # the corrected table
    plan = make_plan(reading.open(path), volume, out)
    assert contents(plan) == contents(make_plan(good, volume, tmp_path / "other"))


def test_a_file_that_breaks_off_is_the_error_of_the_file(
    tmp_path: pathlib.Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 4096)
    path, out = tmp_path / "t.csv", tmp_path / "out"
    csv.write_csv(table_of(positions_in_and_out(1000)), path)
    path.write_text(path.read_text() + "1000,2\n")
    with pytest.raises(UserError, match=f"cannot read synapse table {path}: .*column"):
        make_plan(reading.open(path), volume, out)
    assert names_in(out) == {"parts", ".lock"}


def test_what_a_killed_planner_left_does_not_disturb(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    table, out = table_of(positions_in_and_out(500)), tmp_path / "out"
    expected = make_plan(table, volume, tmp_path / "undisturbed")
    (out / "query.tmp" / "deeper").mkdir(parents=True)
    (out / "query.tmp" / "duckdb_temp_storage_DEFAULT-0.tmp").write_bytes(b"x" * 999)
    (out / "query.tmp" / "deeper" / "file").write_text("old")
    (out / "units.parquet.partial").write_bytes(b"PAR1 and then nothing")
    (out / "units.parquet").write_bytes(b"of a run that had no time for plan.json")
    (out / "plan.json.partial").write_text('{"rows": 1')
    plan = make_plan(table, volume, out)
    assert plan.about == expected.about and contents(plan) == contents(expected)
    assert names_in(out) == PLANNED
    whole = (tmp_path / "undisturbed" / "units.parquet").read_bytes()
    assert (out / "units.parquet").read_bytes() == whole


@pytest.mark.long
def test_some_that_plan_at_once_have_one_plan(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    """Threads share a process id, as can happen to jobs in several containers."""
    table = table_of(positions_in_and_out(150))
    expected = make_plan(table, volume, tmp_path / "alone")
    for each in range(25):
        started = threading.Barrier(4, timeout=30)
        plans: list[Plan] = []

        def plan(out: pathlib.Path, started: Any = started, to: list = plans) -> None:
            started.wait()
            to.append(make_plan(source_of(table, 20), volume, out))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(plan, tmp_path / str(each)) for _ in range(4)]
            for future in running:
                future.result(30)
        assert {found.fingerprint for found in plans} == {expected.fingerprint}
        assert all(contents(found) == contents(expected) for found in plans)
        assert names_in(tmp_path / str(each)) == PLANNED


def test_fingerprint_is_of_all_that_the_plan_was_made_from(
    tmp_path: pathlib.Path, volume: Volume
) -> None:
    table = table_of(positions_in_and_out(200))
    shifted = table_of(positions_in_and_out(200, seed=1))
    elsewhere = make_volume(tmp_path / "elsewhere")
    plans = [
        make_plan(table, volume, tmp_path / "a"),
        make_plan(shifted, volume, tmp_path / "b"),
        make_plan(table, elsewhere, tmp_path / "c"),
        make_plan(table, volume, tmp_path / "d", 50),
        make_plan(table, volume, tmp_path / "e", parameters_sha256=["1"]),
    ]
    assert len({plan.fingerprint for plan in plans}) == 5
    again = make_plan(source_of(table, 9), volume, tmp_path / "f")
    assert again.fingerprint == plans[0].fingerprint


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """A volume with the most chunks per axis that fit into a code: 2^21."""
    path = tmp_path_factory.mktemp("huge") / "volume.zarr"
    return make_volume(path, (2**23, 2**24, 2**25 - 3), (4, 8, 16))


def interleaved(cell: Sequence[int]) -> int:
    """Returns the interleaved bits of z, y and x; the first bit is from z."""
    z, y, x = (f"{int(n):021b}" for n in cell)
    return int("".join(a + b + c for a, b, c in zip(z, y, x, strict=True)), 2)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(
    starts=st.lists(
        st.tuples(
            st.integers(-40, 2**23 + 40),
            st.integers(-40, 2**24 + 40),
            st.integers(-40, 2**25 + 40),
        )
        | st.tuples(*[st.integers(-40, 99)] * 3),
        min_size=1,
        max_size=20,
    ),
    shape=st.tuples(*[st.integers(1, 31)] * 3),
)
def test_a_code_is_the_interleaved_bits_of_the_chunk_of_the_centre(
    huge: Volume, starts: list[tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    cells = []
    for start in starts:
        axes = zip(start, shape, huge.shape_zyx, (4, 8, 16), strict=True)
        cells.append([min(max(s + n // 2, 0), b - 1) // c for s, n, b, c in axes])
    array = np.array(starts)
    codes = crops.chunk_codes(array, shape, huge)
    assert codes.dtype == np.int64
    assert codes.tolist() == list(map(interleaved, cells))
    order = crops.order(array, shape, huge).tolist()
    assert sorted(order) == list(range(len(starts)))
    by_hand = [(interleaved(cells[i]), *starts[i]) for i in order]
    assert by_hand == sorted(by_hand)


def test_crops_of_one_chunk_have_one_code_also_where_a_volume_is_cut_out(
    tmp_path: pathlib.Path,
) -> None:
    """The part of a volume begins in the middle of a chunk."""
    make_volume(tmp_path / "whole")
    kvstore = {"driver": "file", "path": f"{tmp_path}/whole/"}
    cut = {"input_inclusive_min": [3, 5, 40], "input_shape": [50, 400, 600]}
    spec = {"driver": "zarr", "kvstore": kvstore, "transform": cut}
    volume = volumes.open(json.dumps(spec))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, (50, 400, 600), (3000, 3))
    chunk_of = (starts + (3, 5, 40)) // CHUNK_ZYX  # in the whole volume
    codes = crops.chunk_codes(starts, (1, 1, 1), volume)
    seen = dict(zip(map(tuple, chunk_of.tolist()), codes.tolist(), strict=True))
    for chunk, code in zip(map(tuple, chunk_of.tolist()), codes.tolist(), strict=True):
        assert seen[chunk] == code
    assert len(set(seen.values())) == len(seen)


def test_locate_answers_every_row(volume: Volume) -> None:
    positions = positions_in_and_out(500)
    _, status = planning.locate(table_of(np.nan_to_num(positions)), CROP_ZYX, volume)
    assert len(status) == 500
    [table] = source_of(table_of(positions)).tables()
    starts, status = planning.locate(table, CROP_ZYX, volume)
    found = np.flatnonzero(planning.has_crop(status)).tolist()
    expected = expected_rows(positions)
    assert found == list(expected)
    assert list(map(tuple, starts[found].tolist())) == list(expected.values())
    # `locate` does not change the table.
    assert np.isnan(synapses.positions_nm_zyx(table)[7, 1])

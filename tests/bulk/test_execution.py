# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import dataclasses
import functools
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.bulk import execution, planning, unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.em import crops, volumes
from synister_jax.em.volumes import Volume
from synister_jax.network import inference, sharding
from tests.helpers.plans import source_of, table_of
from tests.helpers.random_run import make_workdir

CROP_ZYX = (4, 16, 16)
BATCH = 8
UNIT_ROWS = 20
T = TypeVar("T")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_workdir(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def classifier(workdir: pathlib.Path) -> inference.Classifier:
    mesh = sharding.make_mesh(jax.devices()[:1])
    return inference.Classifier([(workdir, None)], BATCH, mesh)


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, 255, (24, 160, 160), dtype=np.uint8)


@pytest.fixture(scope="module")
def volume_path(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray
) -> pathlib.Path:
    path = tmp_path_factory.mktemp("volume") / "raw.n5"
    volumes.write_n5(path, array, (40, 4, 4), (0, 0, 0), (8, 32, 32))
    return path


@pytest.fixture(scope="module")
def volume(volume_path: pathlib.Path) -> Volume:
    return volumes.open(str(volume_path))


@pytest.fixture(scope="module")
def table() -> pa.Table:
    positions = np.random.default_rng(2).random((170, 3)) * (960, 640, 640)
    return table_of(positions)


def plan_in(
    folder: pathlib.Path,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
) -> Plan:
    source = source_of(table)
    return planning.of_classifier(classifier, source, volume, folder, UNIT_ROWS)


def content(plan: Plan) -> dict[str, bytes]:
    found = sorted((plan.folder / "parts").iterdir())
    return {path.name: path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
) -> Plan:
    """A plan with all parts, for which every unit was computed alone."""
    plan = plan_in(tmp_path_factory.mktemp("alone"), table, classifier, volume)
    for unit in range(len(plan)):
        execution.execute(plan, [unit], classifier, volume)
    return plan


def within(seconds: float, function: Callable[[], T]) -> T:
    """Calls the function, and fails if it takes longer; returns its result."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    before = threading.active_count()
    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    finally:
        until = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.01)
        assert threading.active_count() <= before, "threads are left"


def as_kind(kind: type[T], volume: Volume) -> T:
    fields = {f.name: getattr(volume, f.name) for f in dataclasses.fields(volume)}
    return kind(**fields)


def test_parts_are_what_the_network_says_of_each_crop(
    reference: Plan, classifier: inference.Classifier, array: np.ndarray
) -> None:
    padded = np.pad(array, 16)
    assert len(reference) == 9 and reference.predicted_rows == 170
    for unit in range(len(reference)):
        part = unit_results.read(reference, unit)
        assert part is not None and part.whole.all() and not part.unreadable
        rows, starts = reference.unit(unit)
        np.testing.assert_array_equal(part.rows, rows)
        found = []
        for z, y, x in starts + 16:
            crop = padded[z : z + 4, y : y + 16, x : x + 16]
            found.append(classifier(crop[None])[0])
        np.testing.assert_allclose(part.probabilities, found, atol=1e-5)
        # All predictions differ, so the test would notice swapped rows.
        assert len(np.unique(part.probabilities, axis=0)) == len(rows)
        assert np.ptp(part.probabilities, axis=0).min() > 1e-3


@pytest.mark.parametrize(
    "groups",
    [
        [range(9)],
        [range(8, -1, -1)],
        [[4, 0, 8, 2], [7, 1, 3, 6, 5]],
        [range(0, 5), range(5, 9)],
        [[1, 3], [], [0, 8, 2, 4, 5, 6, 7]],
        [range(9), [3, 3, 5]],
    ],
)
def test_parts_do_not_depend_on_the_order_and_the_company_of_units(
    tmp_path: pathlib.Path,
    reference: Plan,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
    groups: Sequence[Sequence[int]],
) -> None:
    plan = plan_in(tmp_path, table, classifier, volume)
    for units in groups:
        execution.execute(plan, units, classifier, volume)
    assert content(plan) == content(reference)


def test_two_that_execute_the_same_units_at_once_write_the_same(
    tmp_path: pathlib.Path,
    reference: Plan,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
) -> None:
    plan = plan_in(tmp_path, table, classifier, volume)

    def run() -> None:
        # Every thread opens its own plan, as threads cannot share open Arrow files.
        own = planning.open(tmp_path)
        execution.execute(own, range(9), classifier, volume)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run), pool.submit(run)]:
            future.result(60)
    assert content(plan) == content(reference)


def test_no_units_take_no_time(
    tmp_path: pathlib.Path,
    reference: Plan,
    classifier: inference.Classifier,
    volume: Volume,
) -> None:
    times = within(20, lambda: execution.execute(reference, [], classifier, volume))
    assert times.synapses == 0 and times.compute == times.read == times.write == 0
    assert "0 synapses in 0.0 s" in times.text()


class Failing(Volume):
    """A volume that raises from call `at` on (counted from 0 over the whole class)."""

    calls = 0
    at = 0
    error: BaseException = UserError("cannot read volume: out of reach")

    def start_reading(
        self, start: np.ndarray, stop: np.ndarray, fresh: bool = False
    ) -> Any:
        kind = type(self)
        kind.calls += 1
        if kind.calls > kind.at:
            raise kind.error
        return super().start_reading(start, stop, fresh)


@pytest.mark.parametrize("at", [0, 19, 20, 90, 169])
@pytest.mark.parametrize(
    "error", [UserError("cannot read volume: out of reach"), RuntimeError("odd")]
)
def test_an_error_of_the_volume_comes_out_and_parts_stay(
    tmp_path: pathlib.Path,
    reference: Plan,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
    at: int,
    error: Exception,
) -> None:
    plan = plan_in(tmp_path, table, classifier, volume)
    Failing.calls, Failing.at, Failing.error = 0, at, error
    broken = as_kind(Failing, volume)
    with pytest.raises(type(error)) as caught:
        within(60, lambda: execution.execute(plan, range(9), classifier, broken))
    assert caught.value is error
    there, whole = content(plan), content(reference)
    assert there.items() <= whole.items()
    # Only the work in progress is lost: four batches, which belong to two units.
    assert len(there) >= at // UNIT_ROWS - 2
    left = list(unit_results.unfinished(plan, range(9), False))
    assert len(left) == 9 - len(there) > 0
    execution.execute(plan, left, classifier, volume)
    assert content(plan) == whole


class Denied(Volume):
    """A volume whose store refuses access when the data of one crop is read."""

    calls = 0

    def start_reading(
        self, start: np.ndarray, stop: np.ndarray, fresh: bool = False
    ) -> Any:
        kind = type(self)
        kind.calls += 1
        if kind.calls != 71:
            return super().start_reading(start, stop, fresh)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_exception(ValueError("PERMISSION_DENIED: no"))
        return future


def test_an_error_of_the_store_is_told_as_one_of_the_volume(
    tmp_path: pathlib.Path,
    reference: Plan,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
) -> None:
    plan = plan_in(tmp_path, table, classifier, volume)
    Denied.calls = 0
    broken = as_kind(Denied, volume)
    with pytest.raises(UserError, match="cannot read volume .*raw.n5: PERMISSION_DEN"):
        within(60, lambda: execution.execute(plan, range(9), classifier, broken))
    assert content(plan).items() <= content(reference).items()


def test_a_part_that_cannot_be_written_comes_out(
    tmp_path: pathlib.Path,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
) -> None:
    plan = plan_in(tmp_path, table, classifier, volume)
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "parts").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write .*/parts/part-0000"):
        within(60, lambda: execution.execute(plan, range(9), classifier, volume))


class Recording(Volume):
    starts: list[tuple[int, ...]] = []

    def start_reading(
        self, start: np.ndarray, stop: np.ndarray, fresh: bool = False
    ) -> Any:
        type(self).starts.append(tuple(int(v) for v in start))
        return super().start_reading(start, stop, fresh)


def test_retry_missing_touches_only_rows_that_are_not_whole(
    tmp_path: pathlib.Path,
    table: pa.Table,
    classifier: inference.Classifier,
    reference: Plan,
    volume_path: pathlib.Path,
) -> None:
    own = shutil.copytree(volume_path, tmp_path / "raw.n5")
    # These chunks have the voxels x 64..96 and 96..128, y 64..96 and z 8..16.
    chunks = [own / "2" / "2" / "1", own / "3" / "2" / "1"]
    for number, chunk in enumerate(chunks):
        chunk.rename(tmp_path / f"away{number}")
    plan = plan_in(tmp_path / "out", table, classifier, volumes.open(str(own)))
    execution.execute(plan, range(9), classifier, volumes.open(str(own)))
    before = [unit_results.read(plan, unit) for unit in range(9)]
    first = content(plan)
    expected, touched = set(), []
    for unit, part in enumerate(before):
        assert part is not None
        _, starts = plan.unit(unit)
        stops = starts + CROP_ZYX
        corners = np.array([(8, 64, 64), (8, 64, 96)])
        low, high = corners[:, None], corners[:, None] + (8, 32, 32)
        each = ((starts < high) & (stops > low)).all(axis=2)
        touches = each.any(axis=0)
        np.testing.assert_array_equal(part.whole, ~touches)
        assert not part.probabilities[touches].any()
        assert part.unreadable == set(map(tuple, corners[each.any(axis=1)].tolist()))
        expected |= set(map(tuple, np.maximum(starts[touches], 0).tolist()))
        touched += [unit] if touches.any() else []
    assert len(expected) > 5 and 1 < len(touched) < 9
    assert list(unit_results.unfinished(plan, range(9), True)) == touched
    assert list(unit_results.unfinished(plan, range(9), False)) == []

    # The data is still missing, so the parts stay the same.
    opened = volumes.open(str(own))
    execution.execute(plan, touched, classifier, opened, retry_missing=True)
    assert content(plan) == first

    for number, chunk in enumerate(chunks):
        (tmp_path / f"away{number}").rename(chunk)
    Recording.starts.clear()
    recording = as_kind(Recording, volumes.open(str(own)))
    execution.execute(plan, range(9), classifier, recording, retry_missing=True)
    assert set(Recording.starts) == expected
    assert len(Recording.starts) == sum((~part.whole).sum() for part in before)
    for unit, part in enumerate(before):
        found, fresh = unit_results.read(plan, unit), unit_results.read(reference, unit)
        assert found.whole.all() and not found.unreadable
        np.testing.assert_array_equal(
            found.probabilities[part.whole], part.probabilities[part.whole]
        )
        np.testing.assert_allclose(found.probabilities, fresh.probabilities, atol=1e-6)
    assert list(unit_results.unfinished(plan, range(9), True)) == []

    # All rows are predicted, so nothing is written.
    written = {
        path: path.stat().st_mtime_ns for path in (plan.folder / "parts").iterdir()
    }
    Recording.starts.clear()
    within(
        60,
        lambda: execution.execute(
            plan, range(9), classifier, recording, retry_missing=True
        ),
    )
    assert not Recording.starts
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())


def test_retry_missing_without_a_part_does_the_whole_unit(
    tmp_path: pathlib.Path,
    reference: Plan,
    table: pa.Table,
    classifier: inference.Classifier,
    volume: Volume,
) -> None:
    plan = plan_in(tmp_path, table, classifier, volume)
    unit_results.path_of(plan, 2).write_bytes(b"damaged")
    execution.execute(plan, range(9), classifier, volume, retry_missing=True)
    assert content(plan) == content(reference)


def test_times_add_up(
    tmp_path: pathlib.Path,
    table: pa.Table,
    classifier: inference.Classifier,
    volume_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    volume = volumes.open(str(volume_path))  # its cache is empty
    plan = plan_in(tmp_path, table, classifier, volume)
    progress = Progress("predict", 170, "synapses")
    start = time.perf_counter()
    times = execution.execute(plan, range(9), classifier, volume, progress)
    took = time.perf_counter() - start
    assert times.synapses == 170
    assert "predict: 170/170 synapses" in capsys.readouterr().out
    assert took * 0.8 < times.wall <= took
    assert 0 < times.compute <= times.wall * 1.05
    assert 0 < times.write <= times.wall * 1.05
    assert 0 < times.read + times.put <= times.wall * 1.05
    assert times.storage >= 0  # in whole ms per read, so mostly 0 here
    for unit in (0, 8):
        unit_results.path_of(plan, unit).unlink()
    again = execution.execute(plan, [0, 8], classifier, volume)
    assert again.synapses == plan.size(0) + plan.size(8)
    total = execution.Times()
    for each in (times, again):
        total.add(each)
    for field in dataclasses.fields(total):
        both = getattr(times, field.name) + getattr(again, field.name)
        assert getattr(total, field.name) == pytest.approx(both)


def test_text_of_times_tells_all_of_them() -> None:
    times = execution.Times(
        12_345, read=1.25, put=2.5, compute=75, write=4, storage=5.5, wall=100
    )
    assert times.text(" of all workers together") == (
        "12,345 synapses in 100.0 s of all workers together (123.5/s): reading and "
        "decoding 1.2 s (storage 5.5 s over parallel reads), to the device 2.5 s, "
        "computing 75.0 s, writing 4.0 s; device busy 75% of the time"
    )
    assert "0 synapses in 0.0 s (0.0/s)" in execution.Times().text()


class Slow(inference.Classifier):
    """A slow classifier that counts the batches that are put on the devices."""

    puts = 0

    def put(self, records: Sequence[np.ndarray]) -> jax.Array:
        self.puts += 1
        return super().put(records)

    def start(self, batch: jax.Array) -> jax.Array:
        time.sleep(0.01)
        return super().start(batch)


@pytest.mark.parametrize("unit_rows", [UNIT_ROWS, 170])
def test_reading_is_never_more_than_a_few_batches_ahead(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    workdir: pathlib.Path,
    table: pa.Table,
    volume: Volume,
    unit_rows: int,
) -> None:
    # Within one unit, the reads in progress may take 256 MB; here, four crops.
    four = functools.partial(crops.read, bytes_in_flight=4 * 4 * 16 * 16)
    monkeypatch.setattr(crops, "read", four)
    mesh = sharding.make_mesh(jax.devices()[:1])
    slow = Slow([(workdir, None)], BATCH, mesh)
    Recording.starts.clear()
    recording = as_kind(Recording, volume)
    source = source_of(table)
    plan = planning.of_classifier(slow, source, recording, tmp_path, unit_rows)
    done, most_crops, most_batches = 0, 0, 0

    class Counting(Progress):
        def add(self, count: int = 1) -> None:
            nonlocal done, most_crops, most_batches
            most_crops = max(most_crops, len(Recording.starts) - done)
            done += count
            finished = -(-done // BATCH) if unit_rows == 170 else 0
            most_batches = max(most_batches, slow.puts - finished)

    progress = Counting("predict", None, "synapses")
    execution.execute(plan, range(len(plan)), slow, recording, progress)
    assert done == 170 and len(Recording.starts) == 170
    # Two batches wait, one is being read, two are computed and one is being written.
    assert most_crops <= 6 * BATCH + 4
    if unit_rows == 170:
        assert most_batches <= 6
    assert most_crops >= 2 * BATCH  # it reads ahead

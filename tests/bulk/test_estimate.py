# SPDX-License-Identifier: Apache-2.0
import json
import math
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from synister_jax.bulk import estimate, planning
from synister_jax.em import crops, volumes
from synister_jax.em.volumes import Volume
from synister_jax.network import inference, sharding
from tests.helpers.plans import make_plan, make_volume, source_of, table_of
from tests.helpers.random_run import make_workdir
from tests.helpers.volume_formats import (
    CHUNK_ZYX,
    MAKERS,
    SHAPE_ZYX,
    make_n5,
    make_zarr,
)

CROP_ZYX = (4, 16, 16)


def cells_of(
    starts: np.ndarray,
    shape: Sequence[int],
    bounds: Sequence[int],
    chunk: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
) -> set[tuple[int, ...]]:
    """Returns the chunks of all crop voxels in the volume; `shift` moves the grid."""
    found = set()
    for start in starts:
        axes = []
        for s, n, bound, c, by in zip(start, shape, bounds, chunk, shift, strict=True):
            inside = range(max(0, int(s)), min(bound, int(s) + n))
            axes.append(sorted({(voxel + by) // c for voxel in inside}))
        found |= {(z, y, x) for z in axes[0] for y in axes[1] for x in axes[2]}
    return found


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 9, 7), (17, 20, 33), (40, 60, 80)])
def test_chunks_are_counted_as_one_would_by_hand(
    tmp_path: pathlib.Path, kind: str, shape: tuple[int, ...]
) -> None:
    MAKERS[kind](tmp_path / "v")
    volume = volumes.open(str(tmp_path / "v"))
    rng = np.random.default_rng(0)
    for count in (0, 1, 3, 12):
        low = 1 - np.array(shape)
        starts = rng.integers(low, SHAPE_ZYX, (count, 3))
        cells = cells_of(starts, shape, SHAPE_ZYX, CHUNK_ZYX)
        assert crops.count_chunks(starts, shape, volume) == len(cells)


def cut_out(path: pathlib.Path, driver: str, begin: Sequence[int]) -> Volume:
    """Opens the part of a volume from `begin` on, without its last two voxels."""
    size = [n - b - 2 for n, b in zip(SHAPE_ZYX, begin, strict=True)]
    turn = -1 if driver == "n5" else 1
    cut = {"input_inclusive_min": list(begin)[::turn], "input_shape": size[::turn]}
    kvstore = {"driver": "file", "path": f"{path}/"}
    spec = {"driver": driver, "kvstore": kvstore, "transform": cut}
    return volumes.open(json.dumps(spec))


@pytest.mark.parametrize("driver", ["n5", "zarr"])
@pytest.mark.parametrize("begin", [(3, 5, 2), (8, 16, 16), (9, 1, 21)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 9, 7), (17, 20, 33)])
def test_chunks_are_counted_where_the_grid_does_not_start_at_0(
    tmp_path: pathlib.Path,
    driver: str,
    begin: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    (make_n5 if driver == "n5" else make_zarr)(tmp_path / "v")
    volume = cut_out(tmp_path / "v", driver, begin)
    bounds = volume.shape_zyx
    starts = np.random.default_rng(0).integers(1 - np.array(shape), bounds, (9, 3))
    for some in (starts, starts[:1], starts[:3]):
        cells = cells_of(some, shape, bounds, CHUNK_ZYX, begin)
        assert crops.count_chunks(some, shape, volume) == len(cells)


@pytest.mark.parametrize("start", [(-4, 0, 0), (20, 0, 0), (0, 31, 0), (0, 0, 900)])
def test_a_crop_outside_needs_no_chunk(
    tmp_path: pathlib.Path, start: tuple[int, ...]
) -> None:
    make_n5(tmp_path / "v")
    volume = volumes.open(str(tmp_path / "v"))
    assert crops.count_chunks(np.array([start]), (4, 4, 4), volume) == 0
    both = np.array([start, (0, 0, 0)])
    assert crops.count_chunks(both, (4, 4, 4), volume) == 1


def positions(count: int) -> np.ndarray:
    return np.random.default_rng(3).random((count, 3)) * (2400, 2000, 5600)


def test_decoded_bytes_are_those_of_all_chunks_of_all_units(
    tmp_path: pathlib.Path,
) -> None:
    volume = make_volume(tmp_path / "v", offset_nm_zyx=(0, 0, 0))
    plan = make_plan(table_of(positions(900)), volume, tmp_path / "out", 50)
    assert len(plan) == 18
    chunks = 0
    for unit in range(18):
        _, starts = plan.unit(unit)
        crop = plan.about["crop_shape_zyx"]
        cells = cells_of(starts, crop, volume.shape_zyx, volume.chunk_shape_zyx)
        chunks += len(cells)
    expected = chunks * math.prod(volume.chunk_shape_zyx)
    assert estimate.decoded_bytes(plan, volume) == expected


def test_decoded_bytes_of_many_units_are_told_from_some(tmp_path: pathlib.Path) -> None:
    volume = make_volume(tmp_path / "v", offset_nm_zyx=(0, 0, 0))
    plan = make_plan(table_of(positions(4000)), volume, tmp_path / "out", 10)
    assert len(plan) == 400
    crop = plan.about["crop_shape_zyx"]
    chunks = sum(crops.count_chunks(plan.unit(u)[1], crop, volume) for u in range(400))
    expected = chunks * math.prod(volume.chunk_shape_zyx)
    assert estimate.decoded_bytes(plan, volume) == pytest.approx(expected, rel=0.2)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> inference.Classifier:
    workdir = make_workdir(tmp_path_factory.mktemp("run") / "run")
    mesh = sharding.make_mesh(jax.devices()[:1])
    return inference.Classifier([(workdir, None)], 8, mesh)


@pytest.mark.long
def test_text_tells_rows_units_bytes_and_time(
    tmp_path: pathlib.Path,
    classifier: inference.Classifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "_SECONDS_TIMED", 0.05)
    volume = make_volume(tmp_path / "v", offset_nm_zyx=(0, 0, 0))
    given = positions(1234)
    given[:100] += 1e7
    given[100:103] = np.nan
    table = table_of(given)
    plan = planning.of_classifier(
        classifier, source_of(table), volume, tmp_path / "o", 100
    )
    text = estimate.text(plan, classifier, volume)
    rows, units, needed, decoded, seconds = text.splitlines()
    counts = plan.about["status_by_position"]
    assert rows.startswith("rows: 1,234 (3 bad_position, ")
    assert f"{counts['ok']:,} ok" in rows and "100 outside" in rows
    assert rows.endswith("; 103 without a crop in the volume")
    assert units == "units: 12 of up to 100 synapses"
    kilobytes = 1131 * 4 * 16 * 16 / 1e6
    assert needed == f"bytes needed: {kilobytes:.3g} MB in crops of 4×16×16"
    bytes_there = estimate.decoded_bytes(plan, volume)
    assert decoded.startswith(
        f"chunk bytes to decode: about {bytes_there / 1e6:.3g} MB"
    )
    pattern = (
        r"time: about \d+:\d\d for the network at ([\d,.]+) crops/s on 4 cpu device"
    )
    found = re.match(pattern, seconds)
    assert found and float(found[1].replace(",", "")) > 0
    # The estimate computes no unit.
    assert not list((tmp_path / "o" / "parts").iterdir())


def test_text_of_a_table_without_rows(
    tmp_path: pathlib.Path,
    classifier: inference.Classifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "_SECONDS_TIMED", 0.01)
    volume = make_volume(tmp_path / "v")
    source = source_of(table_of(np.zeros((0, 3))))
    plan = planning.of_classifier(classifier, source, volume, tmp_path / "out")
    text = estimate.text(plan, classifier, volume)
    first = "rows: 0 (none); 0 without a crop in the volume\nunits: 0 of up to"
    assert text.startswith(first)
    assert "bytes needed: 0 B in" in text and "about 0 B, if each unit" in text
    assert "time: about 0:00 for the network" in text


def test_rate_is_of_crops_and_not_of_batches(
    classifier: inference.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_SECONDS_TIMED", 0.3)
    found = estimate.crops_per_second(classifier)
    batch = classifier.put(np.zeros((8, *CROP_ZYX), np.uint8))
    rates = []
    for _ in range(5):
        start = estimate.time.perf_counter()
        for _ in range(20):
            jax.block_until_ready(classifier.start(batch))
        rates.append(160 / (estimate.time.perf_counter() - start))
    assert min(rates) / 4 < found < max(rates) * 4

# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes
from synister_jax.tables import reading, synapses
from synister_jax.training import pseudo_classes, shards
from tests.helpers import commands

CLASSES = ("gaba", "acetylcholine", "dopamine", "unknown", "neither")
VOXEL_SIZE_NM_ZYX = (40.0, 50.0, 64.0)
OFFSET_NM_ZYX = (400.0, -500.0, 0.0)
RECORD_SHAPE_ZYX = (6, 11, 8)
FACTS = ("neuron_id", "hemilineage", "brain_region", "cell_type")


@pytest.fixture(scope="module")
def cube_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A volume of noise, about 8 µm per axis, so that moves of 2 to 4 µm fit in it."""
    array = np.random.default_rng(0).integers(0, 256, (190, 160, 130), dtype=np.uint8)
    path = tmp_path_factory.mktemp("cube") / "raw.n5"
    volumes.write_n5(path, array, VOXEL_SIZE_NM_ZYX, OFFSET_NM_ZYX, (32, 64, 64))
    return path


@pytest.fixture(scope="module")
def cube(cube_path: pathlib.Path) -> volumes.Volume:
    return volumes.open(str(cube_path))


@pytest.fixture(scope="module")
def table(cube: volumes.Volume) -> pa.Table:
    """300 synapses in the cube; some have no class or no part of a split."""
    rng = np.random.default_rng(1)
    voxels = rng.integers(0, cube.shape_zyx, (300, 3))
    return synapse_table(voxels * VOXEL_SIZE_NM_ZYX + np.array(OFFSET_NM_ZYX))


def synapse_table(positions_nm_zyx: np.ndarray) -> pa.Table:
    rng = np.random.default_rng(2)
    count = len(positions_nm_zyx)
    names = ["gaba", "acetylcholine", "dopamine", "gaba+dopamine", "glutamate", None]
    columns = dict(zip(synapses.POSITION, positions_nm_zyx.T, strict=True))
    columns |= {
        "synapse_id": 10 + 7 * rng.permutation(count),
        "neuron_id": np.arange(count) // 4,
        "neurotransmitter": rng.choice(
            names, count, p=[0.3, 0.5, 0.05, 0.05, 0.05, 0.05]
        ),
        "hemilineage": ["H"] * count,
        "brain_region": ["AL"] * count,
        "cell_type": ["T"] * count,
        "split_skeleton": parts(rng, count, [0.6, 0.15, 0.2, 0.05]),
        "split_region": parts(rng, count, [0.3, 0.0, 0.5, 0.2]),
    }
    return synapses.conform(pa.table(columns), "here")


def parts(rng: np.random.Generator, count: int, shares: list[float]) -> np.ndarray:
    return rng.choice(np.array([*synapses.PARTS, None], object), count, p=shares)


def extra_rows(
    table: pa.Table, volume: volumes.Volume, change: dict[str, Any] | None = None
) -> pa.Table:
    """Returns the added rows, and checks that the other rows are unchanged."""
    options = {"classes": CLASSES, "split": "skeleton", "seed": 0}
    options |= {"record_shape_zyx": RECORD_SHAPE_ZYX}
    options |= {"neither_crops": 50, "unknown_per_class": 20} | (change or {})
    both = pseudo_classes.with_extra_classes(table, volume, **options)
    assert both.slice(0, len(table)).equals(table, check_metadata=True)
    return both.slice(len(table))


def test_neither_is_anywhere_and_shared_among_the_parts(
    table: pa.Table, cube: volumes.Volume
) -> None:
    rows = extra_rows(table, cube, {"neither_crops": 4_001})
    rows = rows.filter(pc.equal(rows["neurotransmitter"], "neither"))
    assert rows["synapse_id"].to_pylist() == [-1 - i for i in range(4_001)]
    assert all(rows[name].null_count == len(rows) for name in FACTS)
    voxels = (synapses.positions_nm_zyx(rows) - OFFSET_NM_ZYX) / VOXEL_SIZE_NM_ZYX
    assert (voxels == voxels.round()).all()
    # The records are uniform over all places at which they are inside the volume.
    starts = (voxels - np.array(RECORD_SHAPE_ZYX) // 2).astype(int)
    room = np.array(cube.shape_zyx) - RECORD_SHAPE_ZYX + 1
    for axis, length in enumerate(room):
        counts = np.bincount(starts[:, axis], minlength=length)
        assert len(counts) == length
        assert ((counts - 4_001 / length) ** 2 / (4_001 / length)).sum() < 2 * length
    labelled = synapses.labels(table, CLASSES) >= 0
    for split in ("skeleton", "region"):
        of_all = [synapses.in_part(table, split, part) for part in synapses.PARTS]
        wanted = np.array([(is_in & labelled).sum() for is_in in of_all])
        found = [synapses.in_part(rows, split, part).sum() for part in synapses.PARTS]
        assert sum(found) == len(rows)
        np.testing.assert_allclose(found, 4_001 * wanted / wanted.sum(), atol=1)


def test_unknown_is_a_synapse_moved(tmp_path: pathlib.Path) -> None:
    """Synapses are 10 µm apart, so a moved synapse is nearest to the original one."""
    coarse = (500.0, 500.0, 500.0)
    array = np.zeros((230, 230, 230), np.uint8)
    volumes.write_n5(tmp_path / "raw.n5", array, coarse, (0, 0, 0), (64, 64, 64))
    cube = volumes.open(str(tmp_path / "raw.n5"))
    grid = np.stack(np.meshgrid(*[np.arange(1, 11) * 10_000.0] * 3), axis=-1)
    table = synapse_table(grid.reshape(-1, 3))
    options = {"neither_crops": 0, "unknown_per_class": 70, "classes": CLASSES[:4]}
    rows = extra_rows(table, cube, options)
    assert set(rows["neurotransmitter"].to_pylist()) == {"unknown"}
    assert rows["synapse_id"].to_pylist() == [-1 - i for i in range(len(rows))]
    assert all(rows[name].null_count == len(rows) for name in FACTS)
    moved = synapses.positions_nm_zyx(rows)
    there = synapses.positions_nm_zyx(table)
    steps = moved[:, None] - there[None]
    distance = np.linalg.norm(steps, axis=2)
    parents = distance.argmin(axis=1)
    assert len(np.unique(parents)) == len(parents)
    radius = distance.min(axis=1)
    np.testing.assert_allclose(radius, radius.round(), atol=1e-6)
    assert radius.round().min() >= 2_000 and radius.round().max() < 4_000
    assert np.histogram(radius, 4, (2_000, 4_000))[0].min() > len(rows) / 6
    towards = steps[np.arange(len(rows)), parents] / radius[:, None]
    # For uniform directions, each coordinate is uniform in [-1, 1].
    for axis in range(3):
        assert np.histogram(towards[:, axis], 4, (-1, 1))[0].min() > len(rows) / 6
    for split in ("split_skeleton", "split_region"):
        assert rows[split].equals(table[split].take(pa.array(parents)))
    for name in CLASSES[:3]:
        of_class = synapses.labels(table, [name]) == 0
        number = [
            (synapses.in_part(table, "skeleton", part) & of_class).sum()
            for part in synapses.PARTS
        ]
        found = [
            synapses.in_part(table, "skeleton", part)[parents[of_class[parents]]].sum()
            for part in synapses.PARTS
        ]
        share = min(70 / number[0], 1)
        assert found[0] == min(70, number[0])
        assert found[1:] == [np.ceil(share * n) for n in number[1:]]
    assert (synapses.labels(table, CLASSES[:3])[parents] >= 0).all()


def test_the_same_rows_from_the_same_arguments(
    table: pa.Table, cube: volumes.Volume
) -> None:
    rows = extra_rows(table, cube)
    decisive = ["synapse_id", *synapses.POSITION, "neurotransmitter"]
    order = np.random.default_rng(3).permutation(len(table))
    assert extra_rows(table.take(pa.array(order)), cube).equals(rows)
    more = extra_rows(table.append_column("split_new", table["split_region"]), cube)
    assert more.drop_columns("split_new").equals(rows)
    for change in ({"seed": 1}, {"neither_crops": 51}, {"split": "region"}):
        other = extra_rows(table, cube, change)
        assert not other.select(decisive).equals(rows.select(decisive)), change


def test_nothing_asked_for_nothing_added(table: pa.Table, cube: volumes.Volume) -> None:
    none = {"neither_crops": 0, "unknown_per_class": 0}
    real = none | {"classes": CLASSES[:3]}
    assert len(extra_rows(table, cube, real)) == 0
    own = pa.array(["neither"] + table["neurotransmitter"].to_pylist()[1:])
    place = table.column_names.index("neurotransmitter")
    with_its_own = table.set_column(place, table.schema.field(place), own)
    own_classes = none | {"classes": (*CLASSES[:3], "neither")}
    assert len(extra_rows(with_its_own, cube, own_classes)) == 0


def negative_ids(table: pa.Table) -> pa.Table:
    ids = pc.negate(table["synapse_id"])
    return table.set_column(0, table.schema.field(0), ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("neither", "gaba", "unknown")}, "'neither' must be the last"),
        ({"classes": CLASSES[:4]}, "neither_crops is 50, but 'neither' is not one"),
        ({"classes": ("gaba", "neither")}, "unknown_per_class is 20, but 'unknown'"),
        ({"neither_crops": 0}, "names 'neither', .* config.neither_crops is 0"),
        ({"unknown_per_class": 0}, "names 'unknown', .* config.unknown_per_class"),
        ({"unknown_per_class": -3}, "unknown_per_class is -3; give 0 or more"),
        ({"split": "cell_type"}, "no split 'cell_type' here; the table has skeleton"),
        ({"classes": ("histamine", *CLASSES[3:])}, "no synapse in the train part of"),
    ],
)
def test_options_that_do_not_fit(
    table: pa.Table, cube: volumes.Volume, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        extra_rows(table, cube, change)


def test_places_near_the_border_are_not_used(
    table: pa.Table, cube: volumes.Volume
) -> None:
    fewer = extra_rows(table, cube, {"record_shape_zyx": (100, 100, 100)})
    names = fewer["neurotransmitter"].to_pylist()
    more = extra_rows(table, cube)["neurotransmitter"].to_pylist()
    assert names.count("neither") == more.count("neither") == 50
    assert 0 < names.count("unknown") < more.count("unknown")
    with pytest.raises(UserError, match="random or moved crops do not fit"):
        extra_rows(table, cube, {"record_shape_zyx": (191, 1, 1)})


def test_ids_that_are_taken(table: pa.Table, cube: volumes.Volume) -> None:
    with pytest.raises(UserError, match="neither_crops is 50: .* row 0 of the synapse"):
        extra_rows(negative_ids(table), cube)
    none = {"neither_crops": 0, "unknown_per_class": 0, "classes": CLASSES[:3]}
    assert len(extra_rows(negative_ids(table), cube, none)) == 0


def test_the_command_cuts_them(
    tmp_path: pathlib.Path, table: pa.Table, cube: volumes.Volume
) -> None:
    (tmp_path / "config.py").write_text(f"""
from configs import skeleton

def get_config():
    config = skeleton.get_config()
    config.classes = {CLASSES}
    config.crop_shape_zyx = (4, 8, 8)
    config.voxel_size_nm_zyx = {VOXEL_SIZE_NM_ZYX}
    config.neither_crops = 40
    config.unknown_per_class = 30
    return config
""")
    folder = tmp_path / "shards"

    def shard_crops(table: pa.Table, *overrides: str) -> subprocess.CompletedProcess:
        files.write_feather(tmp_path / "table.feather", table)
        command = ["tools/shard_crops.py", "--verify"]
        command += [f"--config={tmp_path}/config.py", f"--volume={cube.uri}"]
        command += [f"--synapses={tmp_path}/table.feather", f"--output={folder}"]
        command += overrides
        return commands.run(*command)

    finished = shard_crops(table)
    assert finished.returncode == 0, finished.stderr
    written = shards.open(folder)
    assert written.classes[-1] == "neither"
    options = {"neither_crops": 40, "unknown_per_class": 30, "seed": 0}
    assert {name: written.manifest[name] for name in options} == options
    record_shape = {"record_shape_zyx": written.record_shape_zyx}
    wanted = extra_rows(table, cube, options | record_shape)
    wanted = {row["synapse_id"]: row for row in wanted.to_pylist()}

    shape = np.array(written.record_shape_zyx)
    array = np.pad(cube.read((0, 0, 0), cube.shape_zyx), [(n, n) for n in shape])
    counts = dict.fromkeys(CLASSES, 0)
    for row, record in zip(written.index.to_pylist(), written.source(), strict=True):
        synapse_id, crop = written.decode(record)
        counts[row["neurotransmitter"]] += 1
        if synapse_id < 0:
            expected = wanted.pop(synapse_id)
            assert {name: row[name] for name in expected} == expected
        position = np.array([row[name] for name in synapses.POSITION])
        middle = np.rint((position - OFFSET_NM_ZYX) / VOXEL_SIZE_NM_ZYX).astype(int)
        start = middle - shape // 2 + shape  # in the padded array
        box = [slice(a, a + n) for a, n in zip(start, shape, strict=True)]
        np.testing.assert_array_equal(crop, array[tuple(box)])
        # Without a black border, the network cannot recognise an added crop by it.
        if synapse_id < 0:
            assert (start >= shape).all() and (start <= shape + cube.shape_zyx).all()
            assert row["status"] == crops.OK
    assert counts["neither"] == 40 and counts["unknown"] > 5
    assert not wanted

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert shard_crops(table).returncode == 0
    for override, reason in [
        ("--config.neither_crops=41", "neither_crops was 40, now 41"),
        ("--config.seed=1", "seed was 0, now 1"),
    ]:
        refused = shard_crops(table, override)
        assert refused.returncode == 1 and reason in refused.stderr
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    more = table.append_column("split_new", table["split_region"])
    assert shard_crops(more).returncode == 0
    changed = [p.name for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert changed == ["index.feather"]
    index = shards.open(folder).index
    assert index["split_new"].equals(index["split_region"])


def test_unknown_in_a_table_is_no_class(tmp_path: pathlib.Path) -> None:
    """`unknown` is an output of networks. A table must leave the cell empty instead."""
    synapses.check_classes(CLASSES)
    assert synapses.CLASSES[:-1] == synapses.NEUROTRANSMITTERS
    text = "synapse_id,z_nm,y_nm,x_nm,neurotransmitter\n1,0,0,0,unknown\n"
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match="unknown neurotransmitter 'unknown'"):
        reading.load(tmp_path / "table.csv")

# SPDX-License-Identifier: Apache-2.0
import hashlib
import pathlib
import subprocess

import numpy as np
import pytest

from synister_jax.em import volumes
from synister_jax.tables import reading, synapses
from tests.helpers import commands
from tests.helpers.small_data import shared_data

pytestmark = pytest.mark.long

SMALL = ["--synapses=150", "--neurons=40", "--shape_zyx=25,600,650"]


def make(output: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    return commands.run("tools/make_demo.py", f"--output={output}", *options)


def checksums(folder: pathlib.Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    finished = make(folder, *SMALL)
    assert finished.returncode == 0, finished.stderr
    return folder


def test_the_importers_read_it(demo: pathlib.Path) -> None:
    table = reading.load(demo)
    volume = volumes.open(str(demo / "volume.n5" / "volumes" / "raw" / "s0"))
    assert len(table) == 150 and volume.shape_zyx == (25, 600, 650)
    assert volume.voxel_size_nm_zyx == (40, 4, 4)
    inside = synapses.positions_nm_zyx(table) / volume.voxel_size_nm_zyx
    assert (inside >= 0).all() and (inside < volume.shape_zyx).all()
    # At each synapse is a T-bar, which is darker than the mean of its section.
    image = volume.read((0, 0, 0), volume.shape_zyx).astype(float)
    z, y, x = inside.astype(int).T
    brightness = image.mean(axis=(1, 2))[z]
    assert np.mean(image[z, y, x] < brightness) > 0.9


def test_every_class_has_neurons_for_three_parts(demo: pathlib.Path) -> None:
    table = reading.load(demo)
    assert synapses.split_columns(table) == []  # tools/make_splits.py makes them
    neurons: dict[str, set] = {}
    for row in table.to_pylist():
        neurons.setdefault(row["neurotransmitter"], set()).add(row["neuron_id"])
    alone = [n for name, n in neurons.items() if name and "+" not in name]
    assert len(alone) == 6 and min(map(len, alone)) >= 3
    assert len(neurons) == 8  # also unknown and gaba+octopamine


def test_same_seed_same_bytes(demo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert make(tmp_path / "again", *SMALL).returncode == 0
    assert checksums(tmp_path / "again") == checksums(demo)
    assert make(tmp_path / "other", *SMALL, "--seed=1").returncode == 0
    assert checksums(tmp_path / "other") != checksums(demo)


def test_mistakes(demo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = checksums(demo)
    again = make(demo, *SMALL)
    assert again.returncode == 0 and "exists already" in again.stdout
    assert checksums(demo) == before
    for folder, options in (
        (demo, ["--seed=5", *SMALL]),
        (tmp_path / "a", [*SMALL, "--synapses=3000"]),
        (tmp_path / "b", [*SMALL, "--background=nowhere"]),
    ):
        finished = make(folder, *options)
        assert finished.returncode == 1
        assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_real_background(tmp_path: pathlib.Path) -> None:
    real = shared_data("larval_vnc_sstem") / "stack1.n5" / "volumes" / "raw" / "s0"
    finished = make(tmp_path / "demo", f"--background={real}", *SMALL)
    assert finished.returncode == 0, finished.stderr
    made = volumes.open(str(tmp_path / "demo" / "volume.n5" / "volumes" / "raw" / "s0"))
    tissue = volumes.open(str(real)).read((0, 0, 0), (20, 600, 650))
    same = made.read((0, 0, 0), (20, 600, 650)) == tissue
    assert 0.5 < same.mean() < 0.99  # real tissue except at the synapses

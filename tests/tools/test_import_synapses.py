# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import numpy as np
import pytest
from pyarrow import feather

from synister_jax.em import volumes
from synister_jax.tables import reading, synapses
from tests.helpers import commands
from tests.helpers.export_v3 import write_export
from tests.helpers.small_data import ROOT, shared_data


def run(*options: str, tool: str = "tools/import_synapses.py") -> tuple[int, str, str]:
    done = commands.run(tool, *options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def mine(tmp_path: pathlib.Path) -> pathlib.Path:
    """A CSV file of 200 synapses, with its own column names and positions in voxels.

    The voxels have 40×4×4 nm.
    """
    rng = np.random.default_rng(0)
    lines = ["id,body,nt,x,y,z"]
    for i in range(200):
        x, y, z = (int(rng.integers(size)) for size in (300, 200, 60))
        lines.append(f"{i},{i % 7},{'gaba' if i % 7 else 'glutamate'},{x},{y},{z}")
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines))
    return path


COLUMNS = "--columns=synapse_id=id,neuron_id=body,neurotransmitter=nt"
SMALL = ("--minimum_synapses=1", "--minimum_neurons=1")


def test_own_table_checked_against_its_volume(
    tmp_path: pathlib.Path, mine: pathlib.Path
) -> None:
    volume = tmp_path / "raw.n5"
    volumes.write_n5(volume, np.zeros((60, 200, 300), np.uint8), (40, 4, 4))
    output = tmp_path / "out" / "mine.feather"
    options = ["--source=table", f"--input={mine}", f"--output={output}", COLUMNS]
    options += [*SMALL, f"--volume={volume}"]
    code, _, said = run(*options)
    assert code == 0 and "warning: all positions would also be inside" in said
    code, said, _ = run(*options, "--scale_nm_zyx=40,4,4")
    assert code == 0 and "200 synapses of 7 neurons" in said and "glutamate" in said
    table = reading.load(output)
    positions = synapses.positions_nm_zyx(table)
    first = [float(cell) for cell in mine.read_text().split("\n")[1].split(",")[3:]]
    assert positions[0].tolist() == [first[2] * 40, first[1] * 4, first[0] * 4]
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert report["outside_volume"] == 0 and report["synapses"] == 200
    assert len(feather.read_table(output.with_suffix(".dropped.feather"))) == 0
    code, _, said = run(*options, "--scale_nm_zyx=1600,16,16")
    assert code == 1 and "multiplied by the voxel size once more" in said
    assert said.count("\n") == 1


def test_rows_of_another_unit_are_named(
    tmp_path: pathlib.Path, mine: pathlib.Path
) -> None:
    volume = tmp_path / "raw.n5"
    volumes.write_n5(volume, np.zeros((60, 200, 300), np.uint8), (40, 4, 4))
    lines = mine.read_text().split("\n")
    for at in (7, 31, 90):  # three rows in nm, the others in voxels
        cells = lines[at].split(",")
        cells[3:] = [
            str(int(c) * f + f) for c, f in zip(cells[3:], (4, 4, 40), strict=True)
        ]
        lines[at] = ",".join(cells)
    mine.write_text("\n".join(lines))
    output = tmp_path / "mine.feather"
    options = ["--source=table", f"--input={mine}", f"--output={output}", COLUMNS]
    options += [*SMALL, f"--volume={volume}", "--scale_nm_zyx=40,4,4"]
    code, _, said = run(*options)
    assert code == 1 and "multiplied by the voxel size once more" in said
    assert "synapse_id 6, 30, 89" in said and not output.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([COLUMNS], 1, "only 171 synapses of 6 neurons (needed: 1,000 of 3)"),
        ([COLUMNS, "--columns=neuron_id"], 1, "pairs ours=theirs"),
        (["--columns=neuron=body"], 1, "neuron is not a column"),
        (["--columns=x=px"], 1, "has no column synapse_id"),
        ([COLUMNS, "--scale_nm_zyx=4,4"], 1, "takes three numbers"),
        ([COLUMNS, "--scale_nm_zyx=4,4,4", "--space=banc"], 1, "not both"),
        ([COLUMNS, "--space=hemibrain-neuprint"], 1, "--volume"),
        (["--source=tables"], 2, "source"),
        (["--source=export-v3"], 1, "is not a folder"),
        (["--source=export-v3", "--space=banc"], 1, "--space does nothing"),
        (["--input="], 1, "--input is empty"),
        ([COLUMNS, "--scale_nm_zyx=0,4,4"], 1, "give positive numbers"),
        (["--columns=x=y,x=z"], 1, "twice"),
        (["--columns=hemilineage=typo"], 1, "no column"),
        ([COLUMNS, "--output=a.csv"], 1, "name a .feather or .parquet"),
        (["--source=fafb"], 1, "has no column connector_id"),
        (["--source=fafb", "--scale_nm_zyx=4,4,4"], 1, "are for --source=table"),
        ([COLUMNS, "--input=absent.csv"], 1, "absent.csv does not exist"),
        ([COLUMNS, "--volume=absent.n5"], 1, "absent.n5"),
        (["extra"], 2, "unexpected argument"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: pathlib.Path,
    mine: pathlib.Path,
    options: list[str],
    code: int,
    message: str,
) -> None:
    output = tmp_path / "a.feather"
    given = ["--source=table", f"--input={mine}", f"--output={output}", *options]
    found, _, said = run(*given)
    assert (found, said.count("\n")) == (code, 1) and message in said
    assert not output.exists()


def test_export_v3_and_whether_it_is_the_published_one(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    write_export(folder)
    output = tmp_path / "table.parquet"
    options = ["--source=export-v3", f"--input={folder}", f"--output={output}"]
    code, _, said = run(*options)
    assert code == 0 and said.count("differs from the published one") == 3
    assert reading.load(output).equals(reading.load(folder))
    synapse = {"skeleton_id": 16, "x": 1, "y": 2, "z": 3}
    (folder / "synapses_v3.json").write_text(json.dumps({"5": synapse}))
    published = shared_data("fafb_v3")
    for name in ("skeletons_v3.json", "hemi_lineages_v3.json"):
        (folder / name).write_bytes((published / name).read_bytes())
    code, _, said = run(*options)
    assert code == 0 and said.count("differs from the published one") == 1


def test_check_of_the_published_files() -> None:
    code, said, wrong = run(tool="data/fafb_v3/check.py")
    there = (ROOT / "data/fafb_v3/synapses_v3.json").exists()
    assert (code == 0) == there and (there or "synapses_v3.json: missing" in said)
    assert there or "README" in wrong

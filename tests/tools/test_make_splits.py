# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.ground_truth import dialects, importing
from synister_jax.tables import reading, synapses
from tests.helpers import commands
from tests.helpers.small_data import ROOT, shared_data


def run(*options: str) -> tuple[int, str, str]:
    done = commands.run("tools/make_splits.py", *options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """600 synapses of 60 neurons in random order; some neurons have no known class."""
    rng = np.random.default_rng(0)
    neuron = rng.integers(0, 60, 600)
    known = np.array(["gaba", "acetylcholine", "dopamine"])[neuron % 3]
    columns = {"synapse_id": 2**60 + rng.permutation(600)}
    columns |= {name: rng.uniform(0, 2e4, 600) for name in synapses.POSITION}
    columns |= {"neuron_id": 10**17 + neuron}
    columns |= {"neurotransmitter": pa.array(known, mask=neuron >= 54)}
    columns |= {"hemilineage": np.char.add("H", (neuron % 18).astype(str))}
    path = tmp_path_factory.mktemp("table") / "table.feather"
    synapses.write(synapses.conform(pa.table(columns), "made here"), path)
    return path


@pytest.mark.long
def test_split_report_and_second_split(
    tmp_path: pathlib.Path, table: pathlib.Path
) -> None:
    output, report = tmp_path / "out.feather", tmp_path / "report"
    options = [f"--synapses={table}", "--name=skeleton", f"--output={output}"]
    code, said, wrong = run(*options, "--by=neuron", f"--report={report}")
    assert code == 0, wrong
    assert "optimal" in said and "neuron_id: 0 in several parts" in said
    before, after = reading.load(table), reading.load(output)
    assert after.drop_columns(["split_skeleton"]).equals(before)
    parts: dict[int, set] = {}
    for row in after.to_pylist():
        parts.setdefault(row["neuron_id"], set()).add(row["split_skeleton"])
        assert (row["split_skeleton"] is None) == (row["neurotransmitter"] is None)
    assert all(len(found) == 1 for found in parts.values())
    found = json.loads((report / "report.json").read_text())
    assert found["made"]["by"] == "neuron" and found["made"]["objective"] == 0
    counted = after.group_by(["neurotransmitter", "split_skeleton"]).aggregate(
        [("synapse_id", "count"), ("neuron_id", "count_distinct")]
    )
    for row in counted.to_pylist():
        if row["split_skeleton"]:
            cell = found["classes"][row["neurotransmitter"]][row["split_skeleton"]]
            assert cell["synapses"] == row["synapse_id_count"]
            assert cell["neurons"] == row["neuron_id_count_distinct"]
    assert (report / "balance.png").read_bytes().startswith(b"\x89PNG")

    # The same command writes the same bytes. A second split goes into the same file.
    content = output.read_bytes()
    assert run(*options, "--by=neuron")[0] == 0 and output.read_bytes() == content
    options = [f"--synapses={output}", "--name=hemi", f"--output={output}"]
    code, _, wrong = run(*options, "--by=hemilineage")
    assert code == 0, wrong
    both = reading.load(output)
    assert both["split_skeleton"].equals(after["split_skeleton"])
    metadata = json.loads(both.schema.metadata[b"synister_jax"])
    assert set(metadata["splits"]) == {"skeleton", "hemi"}
    assert metadata["source"] == "made here"
    code, said, _ = run(f"--synapses={output}", "--name=hemi", f"--report={report}")
    assert code == 0 and "hemilineage: 0 in several parts" in said


def test_hold_out(tmp_path: pathlib.Path, table: pathlib.Path) -> None:
    ids = reading.load(table)["synapse_id"].to_pylist()[:40]
    held = tmp_path / "held.csv"
    held.write_text("synapse_id\n" + "\n".join(map(str, ids)))
    for wanted in ("none", "train"):
        output = tmp_path / f"{wanted}.parquet"
        code, _, wrong = run(
            f"--synapses={table}",
            "--by=neuron",
            "--name=production",
            "--fractions=.8,.2,0",
            f"--hold_out={held}",
            f"--hold_out_part={wanted}",
            f"--output={output}",
        )
        assert code == 0, wrong
        rows = reading.load(output).to_pylist()
        kept = {row["split_production"] for row in rows[:40] if row["neurotransmitter"]}
        assert kept == ({"train"} if wanted == "train" else {None})
        assert {row["split_production"] for row in rows[40:]} >= {"train", "validation"}
        assert "test" not in {row["split_production"] for row in rows}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--by=body"], 2, "by"),
        (["--by=neuron"], 1, "give --output"),
        ([], 1, "give --by"),
        (["--by=neuron", "--output=a.csv"], 1, "name a .feather or .parquet"),
        (["--by=neuron", "--output=a.feather", "--fractions=1,1,1"], 1, "add up to 3"),
        (
            ["--by=neuron", "--output=a.feather", "--fractions=.5,.5"],
            1,
            "three numbers",
        ),
        (["--by=cell_type", "--output=a.feather"], 1, "no row has a cell_type"),
        (["--by=neuron", "--output=a.feather", "--classes=gabba"], 1, "'gabba'"),
        (["--by=neuron", "--output=a.feather", "--name=a b"], 1, "letters, digits"),
        (["--by=neuron", "--output=a.feather", "--hold_out=no.csv"], 1, "no.csv does"),
        (["--report=r"], 1, "no split 'skeleton'"),
        (["--by=neuron", "--output=a.feather", "--synapses=no.csv"], 1, "no.csv does"),
    ],
)
def test_mistakes_are_one_line(
    table: pathlib.Path, options: list[str], code: int, message: str
) -> None:
    found, _, said = run(f"--synapses={table}", "--name=skeleton", *options)
    assert (found, said.count("\n")) == (code, 1) and message in said, said
    assert not (ROOT / "a.feather").exists() and not (ROOT / "r").exists()


def test_columns_of_ones_own_are_not_written_over(
    tmp_path: pathlib.Path, table: pathlib.Path
) -> None:
    own = feather.read_table(table).append_column("my_note", pa.array(["a"] * 600))
    path = tmp_path / "own.feather"
    feather.write_feather(own, str(path))
    options = [f"--synapses={path}", "--by=neuron", "--name=skeleton"]
    code, _, said = run(*options, f"--output={path}")
    assert code == 1 and "my_note" in said and feather.read_table(path).equals(own)
    assert run(*options, f"--output={tmp_path / 'other.feather'}")[0] == 0


@pytest.mark.long
def test_male_vnc(tmp_path: pathlib.Path) -> None:
    folder = shared_data("malevnc_tbars")
    paths = [folder / f"{n}.csv.gz" for n in ("acetylcholine", "gaba", "glutamate")]
    found = importing.read(paths, dialects.DIALECTS["malevnc"])
    source, output = tmp_path / "source.feather", tmp_path / "split.feather"
    synapses.write(found.table, source)
    options = [f"--synapses={source}", "--by=neuron", "--name=skeleton"]
    code, said, wrong = run(*options, f"--output={output}")
    assert code == 0, wrong
    assert "sum of relative deviations 0, optimal" in said
    code, _, wrong = run(f"--synapses={output}", *options[1:], f"--output={output}")
    assert code == 1 and "has a split skeleton already" in wrong
    table = reading.load(output)
    for name in ("acetylcholine", "gaba", "glutamate"):
        of_class = np.array(table["neurotransmitter"]) == name
        for part, fraction in zip(synapses.PARTS, (0.64, 0.16, 0.2), strict=True):
            share = synapses.in_part(table, "skeleton", part)[of_class].mean()
            assert abs(share - fraction) < 0.01

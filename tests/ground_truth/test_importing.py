# SPDX-License-Identifier: Apache-2.0
"""Checks the dialects with rows written by hand, and with 300 damaged files."""

import csv
import gzip
import io
import json
import math
import pathlib
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.em import spaces, volumes
from synister_jax.ground_truth import dialects, importing
from synister_jax.tables import synapses
from tests.helpers.small_data import shared_data

FAFB = dialects.DIALECTS["fafb"]
ALL = {"minimum_synapses": 0, "minimum_neurons": 0}
FAFB_COLUMNS = (
    "skid",
    "connector_id",
    "known.classic.transmitter",
    "known.other.transmitter",
    "ItoLee.Hemilineage",
    "ItoLee.Lineage",
    "inside",
    "x",
    "y",
    "z",
)


def write_csv(path: pathlib.Path, columns: tuple[str, ...], *rows: tuple) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def fafb(path: pathlib.Path, *rows: tuple, **options: object) -> dict:
    """Writes a FAFB file with these rows, and returns the import as {id: row}."""
    write_csv(path, FAFB_COLUMNS, *rows)
    found = importing.read([path], FAFB, **(ALL | options))
    return {row["synapse_id"]: row for row in found.table.to_pylist()}


def test_fafb_rules(tmp_path: pathlib.Path) -> None:
    found = fafb(
        tmp_path / "a.csv",
        (16, 5, "acetylcholine", "dopamine", "ALad1", "L", "AL", 1.5, 2, 240.25),
        (27, 6, "unknown", "Octopamine", "NA", "L", "unknown", 4, 5, 6),
        (28, 7, "KC_acetylcholine", "unknown", "unknown", "L", "MB", 4, 5, 600),
        (29, 8, "unknown", "unknown", "", "L", "MB", 4, 5, 600),
        (28, "unknown", "kc_acetylcholine", "NA", "", "L", "MB", 40.9, 15, 600),
    )
    assert len(found) == 4
    assert found[5] == {
        "synapse_id": 5,
        "z_nm": 200.25,  # one section (40 nm) less than in CATMAID
        "y_nm": 2.0,
        "x_nm": 1.5,
        "neuron_id": 16,
        "neurotransmitter": "acetylcholine",
        "hemilineage": "ALad1",
        "brain_region": "AL",
        "cell_type": None,
    }
    other = found[6]
    assert other["neurotransmitter"] == "octopamine"
    assert (other["hemilineage"], other["brain_region"]) == (None, None)
    assert found[7]["neurotransmitter"] == "acetylcholine"
    # A row without a connector id gets the Cantor number of its voxel, which is
    # (560/40, 15//4, 40//4) = (14, 3, 10).
    s, t = 27, 17
    assert s * (s + 1) * (s + 2) // 6 + t * (t + 1) // 2 + 14 + 1 in found


def test_flywire_column_and_single_transmitter_column(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "flywire.csv"
    columns = ("flywire.id", "connector_id", "transmitter", "x", "y", "z")
    columns += ("neurotransmitter.verified",)
    write_csv(
        path,
        columns,
        (720575940612345678, 1, "gaba", 1, 2, 43, "TRUE"),
        (720575940612345679, 2, "gaba", 1, 2, 43, "FALSE"),
    )
    found = importing.read([path], FAFB, **ALL)
    assert found.table["neuron_id"].to_pylist() == [720575940612345678]
    assert found.report["absent_columns"] == {
        str(path): ["ItoLee.Hemilineage", "inside"]
    }
    assert found.report["dropped"] == {"no known neurotransmitter": 1}
    metadata = json.loads(found.table.schema.metadata[b"synister_jax"])
    assert metadata["made_by"]["offset_nm_zyx"] == [-40, 0, 0]


def test_hemibrain_is_turned(tmp_path: pathlib.Path) -> None:
    volumes.write_n5(tmp_path / "v.n5", np.zeros((50, 20, 30), np.uint8), (8, 8, 8))
    volume = volumes.open(str(tmp_path / "v.n5"))
    columns = ("bodyid", "connector_id", *FAFB_COLUMNS[2:5], "inside", "x", "y", "z")
    row = (1, 2, "gaba", "unknown", "NA", "AL", 11, 12, 13)
    write_csv(tmp_path / "a.csv", columns, row)
    dialect = dialects.DIALECTS["hemibrain"]
    with pytest.raises(UserError, match="--volume"):
        importing.read([tmp_path / "a.csv"], dialect, **ALL)
    found = importing.read([tmp_path / "a.csv"], dialect, volume=volume, **ALL)
    position = synapses.positions_nm_zyx(found.table).tolist()
    assert position == [[(50 - 1 - 11) * 8, 13 * 8, 12 * 8]]


def test_consolidated_json_is_not_moved_again(tmp_path: pathlib.Path) -> None:
    row = {"connector_id": 9, "x": 1.5, "y": 2.0, "z": 3.0, "hemilineage": None}
    row |= {"lineage": None, "compartment": "axon", "region": "AL"}
    row |= {"neurotransmitter": "gaba"}
    rows = [row | {"skid": 16, "flywire_id": None}]
    rows += [row | {"skid": None, "flywire_id": 720575940612345678, "connector_id": 10}]
    path = tmp_path / "consolidated.csv"  # the original's name for this JSON
    path.write_text(json.dumps(rows))
    dialect = dialects.DIALECTS["consolidated"]
    table = importing.read([path], dialect, **ALL).table
    assert synapses.positions_nm_zyx(table).tolist() == [[3, 2, 1.5]] * 2
    assert table["neuron_id"].to_pylist() == [16, 720575940612345678]
    assert table["brain_region"].to_pylist() == ["AL", "AL"]


def test_banc(tmp_path: pathlib.Path) -> None:
    table = pa.table(
        {
            "body": [720575941473083712, 2],
            "nt_name": ["histamine", "gaba"],
            "id": [4, 5],
            "x": [10.7, 1],
            "y": [20.0, 1],
            "z": [30.0, 1],
            "cell_type": ["R1-6", None],
            "size": [5, 4],
        }
    )
    feather.write_feather(table, str(tmp_path / "gt.feather"))
    found = importing.read([tmp_path / "gt.feather"], dialects.DIALECTS["banc"], **ALL)
    assert found.dropped["reason"].to_pylist() == ["size below 5 or missing"]
    [row] = found.table.to_pylist()
    assert (row["z_nm"], row["y_nm"], row["x_nm"]) == (30 * 45, 80, 40)
    assert (row["neuron_id"], row["cell_type"]) == (720575941473083712, "R1-6")


def test_own_columns_splits_and_ids_of_voxels(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.csv"
    columns = ("id", "body", "px", "y", "z", "neurotransmitter", "split_a")
    write_csv(
        path,
        columns,
        (1, 7, 3, 2, 1, "ach", "train"),
        (2, "", 3, 2, 1, "gaba + dopamine", ""),
        ("NA", 8, 3, 2, 1, "", "test"),
    )
    mapping = {"synapse_id": "id", "neuron_id": "body", "x": "px"}
    dialect = dialects.of_table(mapping)
    scaled = spaces.Space("mine", (40, 4, 4), (100, 0, 0))
    options = ALL | {"space": scaled, "keep_unknown": True}
    with pytest.raises(UserError, match="no synapse id.*row 2.*"):
        importing.read([path], dialect, **options)
    dialect = dialects.dataclasses.replace(dialect, voxel_size_nm_zyx=(40, 4, 4))
    found = importing.read([path], dialect, **options).table
    assert found["synapse_id"].to_pylist()[:2] == [1, 2]
    known = ["acetylcholine", "dopamine+gaba", None]
    assert found["neurotransmitter"].to_pylist() == known
    assert found["neuron_id"].to_pylist() == [7, None, 8]
    assert found["split_a"].to_pylist() == ["train", None, "test"]
    assert synapses.positions_nm_zyx(found)[0].tolist() == [140, 8, 12]
    with pytest.raises(UserError, match="neuron is not a column"):
        dialects.of_table({"neuron": "body"})


def test_a_table_is_never_moved_twice(tmp_path: pathlib.Path) -> None:
    columns = (*FAFB_COLUMNS, "size")
    write_csv(
        tmp_path / "a.csv",
        columns,
        (16, 5, "gaba", "unknown", "", "", "", 1, 2, 100, 3),
    )
    table = importing.read([tmp_path / "a.csv"], FAFB, **ALL).table
    synapses.write(table, tmp_path / "a.feather")
    again = dialects.of_table({axis: f"{axis}_nm" for axis in "xyz"})
    options = ALL | {"space": spaces.SPACES["fafb-catmaid"]}
    with pytest.raises(UserError, match="are already in the volume frame"):
        importing.read([tmp_path / "a.feather"], again, **options)
    same = importing.read([tmp_path / "a.feather"], again, **ALL).table
    assert synapses.positions_nm_zyx(same).tolist() == [[60, 2, 1]]


def test_duplicates(tmp_path: pathlib.Path) -> None:
    row = (16, 5, "gaba", "unknown", "ALad1", "", "AL", 1, 2, 100)
    write_csv(
        tmp_path / "a.csv",
        FAFB_COLUMNS,
        row,
        (16, 6, *row[2:]),
        row,
        (16, 6, *row[2:-1], 101),
        (16, 7, *row[2:]),
        (16, 6, *row[2:]),
    )
    found = importing.read([tmp_path / "a.csv"], FAFB, **ALL)
    assert found.table["synapse_id"].to_pylist() == [5, 7]
    listed = found.dropped.select(["row", "synapse_id", "reason"]).to_pylist()
    conflict = "conflicting rows of one synapse id"
    assert [tuple(line.values()) for line in listed] == [
        (1, 6, conflict),
        (2, 5, "repeats an identical row"),
        (3, 6, conflict),
        (5, 6, conflict),
    ]


def test_small_classes_are_left_out_with_their_numbers(tmp_path: pathlib.Path) -> None:
    rows = [(16 + i % 3, i, "gaba", "unknown", "", "", "", i, 2, 100) for i in range(9)]
    rows += [(30, 9, "glutamate", "unknown", "", "", "", 1, 2, 100)] * 2
    write_csv(tmp_path / "a.csv", FAFB_COLUMNS, *rows)
    options = {"minimum_synapses": 2, "minimum_neurons": 1}
    found = importing.read([tmp_path / "a.csv"], FAFB, **options)
    # The class is counted after the identical row is removed.
    assert found.report["dropped"] == {
        "repeats an identical row": 1,
        "glutamate: only 1 synapses of 1 neurons (needed: 2 of 1)": 1,
    }
    with_three = importing.read(
        [tmp_path / "a.csv"], FAFB, minimum_synapses=9, minimum_neurons=3
    )
    assert len(with_three.table) == 9


GOOD = (16, 5, "gaba", "unknown", "", "", "AL", 1, 2, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "12a"}, "coordinate is missing or not a number.*row 1"),
        ({"z": ""}, "coordinate is missing or not a number.*row 1"),
        ({"skid": "1.2e18"}, "neuron id is not a whole number.*row 1"),
        ({"skid": ""}, "neuron id is not a whole number.*row 1"),
        ({"connector_id": "5.0"}, "synapse id is not a whole number.*row 1"),
        ({"known.classic.transmitter": "gabba"}, "'gabba'.*row 1"),
        ({"known.classic.transmitter": "dopamine"}, "name another tr.*row 0.*row 1"),
        ({"connector_id": "unknown", "x": "-9"}, "its voxel is negative or too.*row 1"),
    ],
)
def test_bad_rows_are_named_or_listed(
    tmp_path: pathlib.Path, change: dict, message: str
) -> None:
    bad = dict(zip(FAFB_COLUMNS, (16, 6, *GOOD[2:]), strict=True)) | change
    good = (17, 7, *GOOD[2:])
    write_csv(tmp_path / "a.csv", FAFB_COLUMNS, GOOD, tuple(bad.values()), good)
    with pytest.raises(UserError, match=message) as error:
        importing.read([tmp_path / "a.csv"], FAFB, **ALL)
    assert "a.csv" in str(error.value) and "--drop_bad_rows" in str(error.value)
    options = ALL | {"drop_bad_rows": True}
    found = importing.read([tmp_path / "a.csv"], FAFB, **options)
    assert len(found.table) + len(found.dropped) == 3
    assert 0 not in found.dropped["synapse_id"].to_pylist()
    assert 7 in found.table["synapse_id"].to_pylist()
    assert 1 in found.dropped["row"].to_pylist()


def test_partly_unknown_neurons_go_whole(tmp_path: pathlib.Path) -> None:
    rows = GOOD, (16, 6, "unknown", *GOOD[3:]), (17, 7, "unknown", *GOOD[3:])
    write_csv(tmp_path / "a.csv", FAFB_COLUMNS, *rows, (18, 8, *GOOD[2:]))
    found = importing.read([tmp_path / "a.csv"], FAFB, **ALL)
    assert found.table["neuron_id"].to_pylist() == [18]
    partly = "a row of its neuron has no transmitter"
    known = ["no known neurotransmitter"]
    assert found.dropped["reason"].to_pylist() == [partly, partly, *known]
    options = ALL | {"keep_unknown": True}
    found = importing.read([tmp_path / "a.csv"], FAFB, **options)
    assert found.table["neuron_id"].to_pylist() == [17, 18]


def test_row_names_of_r_and_pandas_are_no_column(tmp_path: pathlib.Path) -> None:
    write_csv(tmp_path / "a.csv", ("", *FAFB_COLUMNS), ("1", *GOOD))
    [row] = importing.read([tmp_path / "a.csv"], FAFB, **ALL).table.to_pylist()
    assert (row["cell_type"], row["neurotransmitter"]) == (None, "gaba")


def test_first_hemilineage_of_a_neuron_is_that_of_all_its_rows(
    tmp_path: pathlib.Path,
) -> None:
    rows = [list(GOOD) for _ in range(4)]
    for at, name in enumerate(("NA", "LHl1", "ALad1", "")):
        rows[at][1], rows[at][4] = at, name
    write_csv(tmp_path / "a.csv", FAFB_COLUMNS, *rows)
    found = importing.read([tmp_path / "a.csv"], FAFB, **ALL)
    assert found.table["hemilineage"].to_pylist() == ["LHl1"] * 4
    assert found.report["first_value_taken"] == {"hemilineage": 1}


def test_own_table_with_ids_and_coordinates_alone(tmp_path: pathlib.Path) -> None:
    write_csv(tmp_path / "a.csv", ("synapse_id", "x", "y", "z"), (5, 1, 2, 3))
    options = ALL | {"keep_unknown": True}
    found = importing.read([tmp_path / "a.csv"], dialects.of_table({}), **options)
    assert found.table["synapse_id"].to_pylist() == [5]
    mapped = dialects.of_table({"neuron_id": "body"})
    with pytest.raises(UserError, match="no column body"):
        importing.read([tmp_path / "a.csv"], mapped, **options)


def test_odd_cells_are_named(tmp_path: pathlib.Path) -> None:
    rows = [{"synapse_id": 1, "x": 1, "y": 2, "z": 3, "neurotransmitter": ["gaba"]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="unknown neurotransmitter.*a.json row 0"):
        importing.read([tmp_path / "a.json"], dialects.of_table({}), **ALL)
    columns = ("synapse_id", "x", "y", "z", "split_a")
    write_csv(tmp_path / "b.csv", columns, (1, 1, 2, 3, "train"), (2, 1, 2, 3, "tset"))
    options = ALL | {"keep_unknown": True}
    with pytest.raises(UserError, match="split_a is not train, .*b.csv row 1"):
        importing.read([tmp_path / "b.csv"], dialects.of_table({}), **options)


def test_quoted_line_breaks_in_a_long_file(tmp_path: pathlib.Path) -> None:
    rows = [(16, i, *GOOD[2:6], "A\nL", 1, 2, 100 + i) for i in range(60_000)]
    write_csv(tmp_path / "a.csv", FAFB_COLUMNS, *rows)
    found = importing.read([tmp_path / "a.csv"], FAFB, **ALL)
    assert found.table["brain_region"].unique().to_pylist() == ["A\nL"]
    assert len(found.table) == 60_000


def tbars() -> list[pathlib.Path]:
    folder = shared_data("malevnc_tbars")
    names = ("acetylcholine", "gaba", "glutamate", "others")
    return [folder / f"{name}.csv.gz" for name in names]


def test_male_vnc() -> None:
    found = importing.read(tbars(), dialects.DIALECTS["malevnc"])
    assert found.report["classes"] == {
        "acetylcholine": {"synapses": 47_471, "neurons": 67},
        "gaba": {"synapses": 21_606, "neurons": 55},
        "glutamate": {"synapses": 10_869, "neurons": 65},
    }
    assert (found.report["synapses"], found.report["neurons"]) == (79_946, 187)
    assert found.report["dropped"] == {"no known neurotransmitter": 7_457}
    with gzip.open(tbars()[1], "rt") as file:
        first = next(csv.DictReader(file))
    at = found.table["synapse_id"].index(int(first["syn_id"])).as_py()
    row = found.table.slice(at, 1).to_pylist()[0]
    assert row["neuron_id"] == int(first["body"])
    assert row["neurotransmitter"] == "gaba"
    for axis in "xyz":
        assert row[f"{axis}_nm"] == 8 * int(first[axis])


def test_male_vnc_id_that_lost_digits(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "gaba.csv"
    row = (10425, 26587, 22247, 6587, 0.9, 28969979024009179)
    columns = ("body", "x", "y", "z", "conf", "syn_id")
    rounded = int(float(row[-1]))
    assert rounded != row[-1]
    write_csv(path, columns, row, (*row[:-1], rounded))
    with pytest.raises(UserError, match="digits were lost: .*gaba.csv row 1"):
        importing.read([path], dialects.DIALECTS["malevnc"], **ALL)


# --- damaged files --------------------------------------------------------------------

NEURONS = ("16", "27", "720575940612345678", "43", "58", "61")
UNKNOWN = {"", "na", "nan", "none", "null", "unknown"}
BROKEN = "broken"


def fafb_lines(rng: np.random.Generator) -> list[list[str]]:
    known = ("gaba", "gaba", "KC_acetylcholine", "glutamate", "unknown", "gaba")
    lines = [list(FAFB_COLUMNS)]
    for i in range(40):
        n = int(rng.integers(len(NEURONS)))
        xyz = [f"{v:.2f}" for v in rng.uniform(100, 9e5, 3)]
        connector = "unknown" if i % 9 == 4 else str(1000 + i)
        other = "Dopamine" if NEURONS[n] == "58" else "unknown"
        region = ("AL", "MB", "unknown")[i % 3]
        lines.append(
            [NEURONS[n], connector, known[n], other, "ALad1", "NA", region, *xyz]
        )
    lines.append(list(lines[-1]))
    return lines


CELLS = ("", "NA", "unknown", "1.2e18", "16.0", "abc", "-5", " 12 ", "GABA", "9" * 19)
CELLS += ("9" * 18, "kc_acetylcholine", "acetylcholin", "nan", "1e400", "16", "1_0")
CELLS += ("gaba+dopamine", "others", "0x10", "1,5", "é", '"quoted"', "2E+05", ".5")


def damage(lines: list[list[str]], rng: np.random.Generator) -> bytes:
    def some(sequence: list | tuple) -> int:
        return int(rng.integers(len(sequence)))

    for _ in range(int(rng.integers(1, 4))):
        row = lines[1 + some(lines[1:])] if len(lines) > 1 else lines[0]
        kind = int(rng.integers(12))
        if kind < 6:
            row[some(row)] = CELLS[some(CELLS)]
        elif kind == 6:
            lines.append(list(row))
        elif kind == 7:
            lines.append(list(row))
            lines[-1][some(row)] = CELLS[some(CELLS)]
        elif kind == 8 and len(lines) > 2:
            lines.remove(row)
        elif kind == 9:
            lines[0][some(lines[0])] += "x"
        elif kind == 10:
            row.append("9") if rng.integers(2) else row.pop()
        else:
            a, b = some(row), some(row)
            row[a], row[b] = row[b], row[a]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(lines)
    content = file.getvalue().encode()
    if rng.random() < 0.1:
        content = content[: int(rng.integers(len(content)))]
    if rng.random() < 0.03:
        at = int(rng.integers(len(content) + 1))
        content = content[:at] + b"\xff" + content[at:]
    return content


def by_the_rules(content: bytes) -> tuple[list[dict], int, bool] | str:
    """Applies the rules of the import row by row, in plain Python.

    Returns:
      The rows of the table, the number of rows read, and whether any row is bad. BROKEN
      if the file cannot be read at all.
    """
    try:
        lines = list(csv.reader(io.StringIO(content.decode(), newline="")))
    except UnicodeDecodeError:
        return BROKEN
    lines = [line for line in lines if line]
    if not lines or any(len(line) != len(lines[0]) for line in lines):
        return BROKEN
    header = lines[0]
    needed = {*FAFB_COLUMNS} - {"ItoLee.Hemilineage", "ItoLee.Lineage", "inside"}
    if len(set(header)) < len(header) or not needed <= set(header):
        return BROKEN
    bad = False
    rows: list[dict] = []
    for line in lines[1:]:
        cell = {
            k: None if clean(v) is None else v.strip()
            for k, v in zip(header, line, strict=True)
        }
        label = cell["known.classic.transmitter"] or cell["known.other.transmitter"]
        parts = sorted(part_of(label)) if label else [None]
        row = {
            "id": cell["connector_id"],
            "neuron": whole(cell["skid"]),
            "label": None if None in parts else "+".join(parts),
            "hemilineage": cell.get("ItoLee.Hemilineage"),
            "region": cell.get("inside"),
            "xyz": [decimal(cell[axis]) for axis in "xyz"],
        }
        if row["neuron"] is None:
            bad = True
            continue
        if row["label"] and not set(parts) <= set(synapses.NEUROTRANSMITTERS):
            bad = True
            continue
        rows.append(row)
    labels: dict[int, set] = {}
    for row in rows:
        labels.setdefault(row["neuron"], set()).add(row["label"])
    two = {n for n, found in labels.items() if None not in found and len(found) > 1}
    bad |= bool(two)
    rows = [
        r for r in rows if None not in labels[r["neuron"]] and r["neuron"] not in two
    ]
    kept = []
    for row in rows:
        if None in row["xyz"]:
            bad = True
            continue
        x, y, z = row["xyz"]
        z -= 40.0
        if row["id"] is None:
            index = [math.trunc(z) // 40, math.trunc(y) // 4, math.trunc(x) // 4]
            if min(index) < 0 or sum(index) > 2_000_000:
                bad = True
                continue
            s, t = sum(index), index[0] + index[1]
            number = s * (s + 1) * (s + 2) // 6 + t * (t + 1) // 2 + index[0] + 1
        else:
            number = whole(row["id"])
            if number is None:
                bad = True
                continue
        values = (number, z, y, x, row["neuron"], row["label"], row["hemilineage"])
        kept.append((*values, row["region"], None))
    contents: dict[int, set] = {}
    for row in kept:
        contents.setdefault(row[0], set()).add(row)
    kept = [row for row in dict.fromkeys(kept) if len(contents[row[0]]) == 1]
    counts = Counter(row[5] for row in kept)
    neurons = {name: {r[4] for r in kept if r[5] == name} for name in counts}
    small = {n for n in counts if counts[n] < 4 or len(neurons[n]) < 2}
    table = [row for row in kept if row[5] not in small]
    lineage: dict[int, str] = {}
    for row in table:
        if row[6] is not None:
            lineage.setdefault(row[4], row[6])
    table = [(*row[:6], lineage.get(row[4]), *row[7:]) for row in table]
    names = synapses.SCHEMA.names
    listed = [dict(zip(names, row, strict=True)) for row in table]
    return listed, len(lines) - 1, bad


def clean(text: str) -> str | None:
    return None if text.strip().lower() in UNKNOWN else text


def part_of(label: str) -> list[str | None]:
    synonyms = {"kc_acetylcholine": "acetylcholine", "others": None, "unclear": None}
    synonyms |= {"ach": "acetylcholine", "da": "dopamine"}
    parts = [part.strip() for part in label.lower().split("+")]
    found = {synonyms.get(part, part) for part in parts}
    return [None] if None in found else [*found]


def whole(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        return None
    return int(text) if -(2**63) <= int(text) < 2**63 else None


def decimal(text: str | None) -> float | None:
    pattern = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    if text is None or not re.fullmatch(pattern, text):
        return None
    return float(text) if math.isfinite(float(text)) else None


@pytest.mark.long
def test_hundreds_of_damaged_files(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(19120623)
    path = tmp_path / "damaged.csv"
    outcomes = Counter()
    for _ in range(300):
        content = damage(fafb_lines(rng), rng)
        path.write_bytes(content)
        expected = by_the_rules(content)
        options = {"minimum_synapses": 4, "minimum_neurons": 2}
        try:
            lenient = importing.read([path], FAFB, drop_bad_rows=True, **options)
        except UserError as error:
            assert expected == BROKEN and "damaged.csv" in str(error), content
            outcomes["broken"] += 1
            continue
        assert expected != BROKEN, content
        rows, read, bad = expected
        assert lenient.table.to_pylist() == rows, content
        assert len(lenient.table) + len(lenient.dropped) == read
        try:
            strict = importing.read([path], FAFB, **options)
        except UserError as error:
            assert bad and re.search(r"damaged.csv row \d", str(error)), content
            outcomes["bad rows named"] += 1
            continue
        assert not bad and strict.table.equals(lenient.table), content
        outcomes["right"] += 1
    assert len(outcomes) == 3 and min(outcomes.values()) > 30, outcomes

# SPDX-License-Identifier: Apache-2.0
"""Tests `compare` against counts made with NumPy, and its answers to mistakes."""

import pathlib
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax import compare
from synister_jax.base import figures, files
from synister_jax.base.errors import UserError
from synister_jax.exchange import published
from tests.helpers import commands, pictures

A = ("gaba", "acetylcholine", "dopamine")
B = ("dopamine", "neither", "gaba", "acetylcholine")
CLASSES = ("gaba", "acetylcholine", "dopamine", "neither")
COUNT = 400
BODY = 720_575_940_600_000_000


def write(path: pathlib.Path, columns: Mapping[str, Any]) -> pathlib.Path:
    feather.write_feather(pa.table(dict(columns)), str(path))
    return path


def ours(ids: np.ndarray, p: np.ndarray, **columns: Any) -> dict[str, Any]:
    """Returns columns as in our tables: classes A, and nm that depend on the id."""
    made = {"synapse_id": ids, "z_nm": ids * 40.0, "y_nm": ids * 8.0, "x_nm": ids * 4.0}
    made["neuron_id"] = BODY + ids % 37
    made |= {f"nt_{n}_prob": x for n, x in zip(A, p.T.astype(np.float32), strict=True)}
    return made | columns


def theirs(ids: np.ndarray, p: np.ndarray, **columns: Any) -> dict[str, Any]:
    """Returns columns as in the files on Zenodo: classes B, and voxels."""
    made = {f"nts_8.{n}": x for n, x in zip(B, p.T.astype(np.float32), strict=True)}
    made |= {"body": BODY + ids % 37, "x": ids, "y": ids, "z": ids, "id": ids}
    return made | columns


VOXEL = (40.0, 8.0, 4.0)


class Case:
    """Two shuffled tables with 300 common rows.

    Each table also has rows that the other table lacks, ties, and rows without a
    prediction.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        rng = np.random.default_rng(0)
        self.ids_a = rng.permutation(COUNT) + 1000
        self.ids_b = rng.permutation(COUNT) + 1100
        # Multiples of 1/8 are exact, and often equal.
        self.p = rng.multinomial(8, [0.4, 0.4, 0.2], COUNT) / 8
        self.q = rng.multinomial(8, [0.2, 0.1, 0.4, 0.3], COUNT) / 8
        self.p[::20], self.q[7::20, 1], self.q[3::50] = np.nan, np.nan, 0
        self.a = write(folder / "ours.feather", ours(self.ids_a, self.p))
        self.b = write(folder / "theirs.feather", theirs(self.ids_b, self.q))

    def compare(self, output: pathlib.Path, **options: Any) -> dict[str, Any]:
        a, b = published.open(self.a, VOXEL), published.open(self.b, VOXEL)
        return compare.compare(a, b, output, **options)

    def reference(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns (p, q) over CLASSES for each id that both tables predict."""
        p = {i: np.append(x, 0) for i, x in zip(self.ids_a, self.p, strict=True)}
        q = {
            i: np.array([x[B.index(c)] for c in CLASSES])
            for i, x in zip(self.ids_b, self.q, strict=True)
        }
        return {
            i: (p[i], q[i])
            for i in sorted(p.keys() & q.keys())
            if np.isfinite([p[i], q[i]]).all() and q[i].any()
        }


@pytest.fixture
def case(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The tables, without pictures.

    A picture takes longer than all the rest. Only the test of the command draws one.
    """
    monkeypatch.setattr(figures, "confusion", lambda *_: None)
    monkeypatch.setattr(figures, "png", lambda _: b"")
    return Case(tmp_path)


def calls(reference: dict[int, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.array([(p.argmax(), q.argmax()) for p, q in reference.values()])


@pytest.mark.parametrize("by", [None, "position"])
def test_numbers_are_those_of_numpy(
    tmp_path: pathlib.Path, case: Case, by: str | None
) -> None:
    result = case.compare(tmp_path / "out", by=by)
    reference = case.reference()
    p, q = (np.array(x) for x in zip(*reference.values(), strict=True))
    called = calls(reference)
    confusion = np.zeros((4, 4), int)
    for first, second in called:
        confusion[first, second] += 1
    numbers = result["synapses"]
    assert result["joined"]["by"] == by or (by is None and "id")
    assert result["joined"]["rows"] == 300
    assert result["joined"]["predicted"]["both"] == numbers["count"] == len(reference)
    assert result["classes"] == list(CLASSES) and result["common_classes"] == list(A)
    assert numbers["confusion"] == confusion.tolist() and confusion[:, 3].any()
    assert numbers["agreement"] == pytest.approx((called[:, 0] == called[:, 1]).mean())
    assert numbers["per_class"]["gaba"]["of_b"] == pytest.approx(
        (called[called[:, 1] == 0, 0] == 0).mean()
    )
    np.testing.assert_allclose(
        numbers["confusion_by_row"][:3],
        confusion[:3] / confusion[:3].sum(axis=1, keepdims=True),
    )
    assert numbers["confusion_by_row"][3] == [None] * 4
    assert result["b"]["called_by_own_classes"] == {"neither": confusion[:, 3].sum()}
    distance = np.abs(p - q).sum(axis=1) / 2
    assert numbers["mean_total_variation"] == pytest.approx(distance.mean())
    assert result["probabilities"].keys() == set(A)
    for index, name in enumerate(A):
        found = result["probabilities"][name]
        rho = np.corrcoef(p[:, index], q[:, index])[0, 1]
        assert found["correlation"] == pytest.approx(rho)
        assert found["mean_absolute_difference"] == pytest.approx(
            np.abs(p - q)[:, index].mean()
        )
    for side, examples in (("a", [1000, 1001, 1002]), ("b", [1400, 1401, 1402])):
        alone = result[side]["only_here"]
        assert result[side]["rows"] == COUNT and alone["rows"] == 100
        assert [x["id"] for x in alone["examples"]] == examples
    assert result["positions"]["count"] == 300
    assert not result["positions"]["apart"]["count"]
    assert files.read_json(tmp_path / "out" / "comparison.json") == result
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "comparison.json",
        "confusion.png",
        "disagreements.feather",
        "neurons.feather",
    }


def test_neurons_are_called_by_the_majority_of_common_synapses(
    tmp_path: pathlib.Path, case: Case
) -> None:
    numbers = case.compare(tmp_path / "out")["neurons"]
    reference = case.reference()
    called, neuron = calls(reference), np.array([i % 37 for i in reference])
    votes = np.zeros((37, 2, 4), int)
    for of, pair in zip(neuron, called, strict=True):
        votes[of, [0, 1], pair] += 1
    winner, synapses = votes.argmax(axis=2), votes[:, 0].sum(axis=1)
    confusion = np.zeros((4, 4), int)
    for first, second in winner:
        confusion[first, second] += 1
    assert numbers["confusion"] == confusion.tolist()
    assert numbers["count"] == 37 and numbers["ids_of"] == "a"
    assert numbers["ids_differ"] == 0
    table = feather.read_table(tmp_path / "out" / "neurons.feather")
    different = [n for n in range(37) if winner[n, 0] != winner[n, 1]]
    different.sort(key=lambda n: (-synapses[n], n))
    assert table["neuron_id"].to_pylist() == [BODY + n for n in different]
    for row, n in zip(table.to_pylist(), different, strict=True):
        assert row["synapses"] == synapses[n]
        for index, side in enumerate("ab"):
            most = winner[n, index]
            assert row[f"called_{side}"] == CLASSES[most]
            share = votes[n, index, most] / synapses[n]
            assert row[f"fraction_{side}"] == pytest.approx(share)


def test_rows_that_differ_most_come_first(tmp_path: pathlib.Path, case: Case) -> None:
    case.compare(tmp_path / "out", largest=20)
    table = feather.read_table(tmp_path / "out" / "disagreements.feather")
    reference = case.reference()
    distance = {i: np.abs(p - q).sum() / 2 for i, (p, q) in reference.items()}
    order = sorted(distance, key=lambda i: (-distance[i], i))[:20]
    assert table["id_a"].to_pylist() == table["id_b"].to_pylist() == order
    assert not [name for name in table.column_names if name.startswith("nt")]
    assert "a_neither_prob" not in table.column_names
    for row, i in zip(table.to_pylist(), order, strict=True):
        p, q = reference[i]
        assert row["total_variation"] == pytest.approx(distance[i])
        assert (row["called_a"], row["called_b"]) == (
            CLASSES[p.argmax()],
            CLASSES[q.argmax()],
        )
        assert [row[f"b_{name}_prob"] for name in CLASSES] == q.tolist()
        assert [row[f"a_{name}_prob"] for name in A] == p[:3].tolist()
        assert row["x_nm"] == i * 4 and row["neuron_id"] == BODY + i % 37


def test_a_table_agrees_with_itself(tmp_path: pathlib.Path, case: Case) -> None:
    a = published.open(case.a)
    result = compare.compare(a, a, tmp_path / "out")
    assert result["synapses"]["agreement"] == result["neurons"]["agreement"] == 1
    assert result["synapses"]["count"] == 380
    assert result["synapses"]["mean_total_variation"] == 0
    assert result["a"]["only_here"] == {"rows": 0, "examples": []}
    for name in ("neurons", "disagreements"):
        assert not len(feather.read_table(tmp_path / "out" / f"{name}.feather"))


def test_neuron_ids_come_from_the_other_table_where_a_has_none(
    tmp_path: pathlib.Path, case: Case
) -> None:
    expected = case.compare(tmp_path / "out")["neurons"]
    columns = ours(case.ids_a, case.p, neuron_id=pa.nulls(COUNT, pa.int64()))
    write(case.a, columns)
    numbers = case.compare(tmp_path / "out")["neurons"]
    assert numbers == expected | {"ids_of": "b"}
    write(case.b, theirs(case.ids_b, case.q, body=[0] * COUNT))
    assert case.compare(tmp_path / "out")["neurons"] is None


def test_other_neurons_and_places_of_the_same_ids_are_told(
    tmp_path: pathlib.Path, case: Case
) -> None:
    moved = ours(case.ids_a, case.p, z_nm=case.ids_a * 40.0 + 40, neuron_id=case.ids_a)
    write(case.a, moved)
    result = case.compare(tmp_path / "out")
    assert result["neurons"]["ids_differ"] == 300
    assert result["positions"]["mean_difference_nm_zyx"] == [-40, 0, 0]
    assert result["positions"]["apart"]["count"] == 0  # 40 nm is one voxel
    result = case.compare(tmp_path / "out", tolerance_nm=39)
    assert result["positions"]["apart"] == {
        "count": 300,
        "mean_difference_nm_zyx": [-40, 0, 0],
        "mean_distance_nm_zyx": [40, 0, 0],
    }
    line = "300 lie elsewhere in B (on average -40, 0, 0 nm zyx away)"
    assert line in compare.summary(result)


def test_duplicates_are_left_out_and_told(tmp_path: pathlib.Path, case: Case) -> None:
    expected = case.compare(tmp_path / "out")
    table = feather.read_table(case.a)
    twice = pa.concat_tables([table, table.slice(5, 9)])
    write(case.a, dict(zip(twice.column_names, twice.columns, strict=True)))
    result = case.compare(tmp_path / "out")
    assert result["a"]["duplicates"]["rows"] == 9
    assert result["synapses"] == expected["synapses"]
    assert "9 duplicates left out" in compare.summary(result)


def message(folder: pathlib.Path, case: Case, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        case.compare(folder / "out", **options)
    record = folder / "out" / "comparison.json"
    assert not record.exists() or not files.read_json(record)["finished"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_of_another_set_are_joined_by_position(
    tmp_path: pathlib.Path, case: Case
) -> None:
    write(case.b, theirs(case.ids_b, case.q, id=case.ids_b + 10**15))
    result = case.compare(tmp_path / "out")
    assert result["joined"]["by"] == "position" and result["joined"]["rows"] == 300
    assert result["joined"]["grid_nm_zyx"] == list(VOXEL)
    text = message(tmp_path, case, by="id")
    assert "0 ids in common" in text and "ours.feather has 400, as 1000, 1001" in text


def test_shuffled_ids_are_of_another_set(tmp_path: pathlib.Path, case: Case) -> None:
    expected = case.compare(tmp_path / "out", by="position")
    shuffled = np.random.default_rng(1).permutation(case.ids_b)
    write(case.b, theirs(case.ids_b, case.q, id=shuffled))
    result = case.compare(tmp_path / "out")
    assert result["joined"] == expected["joined"]
    assert result["synapses"] == expected["synapses"]
    result = case.compare(tmp_path / "out", by="id")
    assert result["joined"]["by"] == "id" and result["joined"]["rows"] == 300
    text = compare.summary(result)
    found = re.search(r"of these, (\d+) lie elsewhere in B \(typically (\d+)", text)
    # The tables extend over 16,000 nm.
    assert found and int(found[1]) > 290 and int(found[2]) > 4000
    assert "nm zyx away, in no one direction): do the files use" in text
    # Now the positions do not match either.
    columns = theirs(case.ids_b, case.q, id=shuffled)
    columns |= {axis: case.ids_b % 7 + 10**6 for axis in "xyz"}
    columns["z"] = np.where(case.ids_b % 2, case.ids_b * 9 - 10_000, case.ids_b - 900)
    write(case.b, columns | {"x": shuffled, "y": shuffled})
    text = message(tmp_path, case)
    assert "by id: 300 ids in common, but of their synapses " in text
    assert (
        "other synapses; --by=id compares these 300 all the same; by position" in text
    )


def test_a_folder_of_others_is_refused(tmp_path: pathlib.Path, case: Case) -> None:
    output = tmp_path / "out"
    case.compare(output)
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    assert files.read_json(output / "comparison.json")["files"] == list(compare.FILES)
    (output / "neurons.feather.partial").write_text("of a run that was killed")
    case.compare(output)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    a = published.open(case.a)
    with pytest.raises(UserError, match=r"tables was .*theirs.* now .*--output"):
        compare.compare(a, a, output)
    (output / "comparison.json").unlink()
    with pytest.raises(
        UserError, match="has confusion.png already, but no comparison.json"
    ):
        case.compare(output)
    before.pop("comparison.json")
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    case.b.rename(tmp_path / "neurons.feather")
    case.b = tmp_path / "neurons.feather"
    with pytest.raises(UserError, match="neurons.feather is the input"):
        case.compare(tmp_path)


def test_voxels_for_nm_are_recognised(tmp_path: pathlib.Path, case: Case) -> None:
    ids = case.ids_b
    columns = theirs(ids, case.q, id=ids + 10**15, x_nm=ids, y_nm=ids, z_nm=ids)
    write(case.b, columns)
    text = message(tmp_path, case)
    assert "by id: 0 ids in common" in text and "1000000000001100" in text
    assert "by position: 0 positions" in text and "(1100, 1100, 1100)" in text
    assert "theirs.feather look like voxels of about 37.3" in text


def test_a_shift_is_recognised(tmp_path: pathlib.Path, case: Case) -> None:
    write(case.a, ours(case.ids_a, case.p, x_nm=case.ids_a * 4.0 + 10**7))
    text = message(tmp_path, case, by="position")
    assert "ours.feather lies in z 40000 to 55960, y 8000" in text
    assert "do both use the same coordinates?" in text


def test_few_in_common_are_compared_when_asked(
    tmp_path: pathlib.Path, case: Case
) -> None:
    count = 5000
    far = np.arange(count) + 10**6
    far[0] = min(case.reference())
    p = np.tile([0.5, 0.25, 0.25], (count, 1))
    write(case.a, ours(far, p))
    q = np.tile([0.5, 0, 0.25, 0.25], (count, 1))
    write(case.b, theirs(np.append(far[0], far[1:] + count), q))
    assert "--by=id compares these 1 all the same" in message(tmp_path, case)
    result = case.compare(tmp_path / "out", by="id")
    assert result["joined"]["rows"] == 1


def test_a_voxel_size_is_asked_for(tmp_path: pathlib.Path, case: Case) -> None:
    a, b = published.open(case.a), published.open(case.b)
    result = compare.compare(a, b, tmp_path / "out")
    assert result["joined"]["by"] == "id" and result["positions"] is None
    with pytest.raises(
        UserError, match="same synapses in both: positions of .*theirs.* are vox"
    ):
        compare.compare(a, b, tmp_path / "out", by="position")
    write(case.b, theirs(case.ids_b, case.q, id=case.ids_b + 10**15))
    with pytest.raises(UserError, match="0 ids in common; .*give --voxel_size_nm_zyx"):
        compare.compare(a, published.open(case.b), tmp_path / "out")


def test_what_cannot_be_compared_is_told(tmp_path: pathlib.Path, case: Case) -> None:
    write(case.a, ours(case.ids_a, np.full_like(case.p, np.nan)))
    text = message(tmp_path, case)
    assert (
        "none of the 300 synapses that are in both tables has a prediction in both"
        in text
    )
    write(case.a, ours(case.ids_a[:0], case.p[:0]))
    assert message(tmp_path, case) == f"{case.a} has no rows"
    with pytest.raises(UserError, match="z of 55960 nm is too large for a grid of 1e-"):
        write(case.a, ours(case.ids_a, case.p))
        case.compare(tmp_path / "out", by="position", tolerance_nm=1e-300)
    other = {"id": [1], "serotonin": [0.5], "octopamine": [0.5]}
    write(case.a, other)
    assert "no class in common: " in message(tmp_path, case)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.run("-m", "synister_jax.compare", *arguments)


def test_a_grid_too_fine(tmp_path: pathlib.Path, case: Case) -> None:
    given = [str(case.a), str(case.b), f"--output={tmp_path}/out"]
    done = command(*given, "--tolerance_nm=1e-300")
    assert done.returncode == 2 and "--tolerance_nm" in done.stderr


def test_the_command(tmp_path: pathlib.Path) -> None:
    """The command also takes file names that matplotlib would read as formulas."""
    case = Case(tmp_path)
    case.a = case.a.rename(tmp_path / r"a$\frac{$.feather")
    done = command(
        str(case.a),
        str(case.b),
        f"--output={tmp_path}/out",
        "--voxel_size_nm_zyx=40,8,4",
    )
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} rows, 100 only here" in done.stdout
    assert "joined by id: 300, " in done.stdout
    assert f"{tmp_path}/out/comparison.json" in done.stdout
    picture = pictures.pixels((tmp_path / "out" / "confusion.png").read_bytes())
    assert picture.shape[2] == 3 and picture.std() > 10

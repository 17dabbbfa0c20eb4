# SPDX-License-Identifier: Apache-2.0
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.bulk import unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.bulk.unit_results import UnitResult
from tests.helpers.plans import make_plan, make_volume, positions_in_and_out, table_of

CORNERS = frozenset({(8, 64, 0), (0, 0, 0), (2**40, 1, 2)})


@pytest.fixture
def plan(tmp_path: pathlib.Path) -> Plan:
    volume = make_volume(tmp_path / "volume")
    return make_plan(table_of(positions_in_and_out(300)), volume, tmp_path / "out", 40)


def made_up(plan: Plan, unit: int, seed: int = 0) -> UnitResult:
    rng = np.random.default_rng([unit, seed])
    rows, _ = plan.unit(unit)
    whole = rng.random(len(rows)) < 0.8
    probabilities = rng.random((len(rows), 3)).astype(np.float32)
    probabilities[~whole] = 0
    return UnitResult(rows, whole, probabilities, CORNERS if unit == 1 else frozenset())


def same(a: UnitResult, b: UnitResult) -> bool:
    pairs = ((a.rows, b.rows), (a.whole, b.whole), (a.probabilities, b.probabilities))
    equal = (x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
    return all(equal) and a.unreadable == b.unreadable


def test_a_part_comes_back(plan: Plan) -> None:
    assert len(plan) > 4
    for unit in range(len(plan)):
        assert unit_results.read(plan, unit) is None
        unit_results.write(plan, unit, made_up(plan, unit))
    for unit in range(len(plan)):
        found = unit_results.read(plan, unit)
        assert found is not None and same(found, made_up(plan, unit))
    found = unit_results.read(plan, 1)
    assert found is not None and found.unreadable == CORNERS
    names = sorted(path.name for path in (plan.folder / "parts").iterdir())
    assert names == [
        f"part-{unit:06d}-of-{len(plan):06d}.feather" for unit in range(len(plan))
    ]


def test_a_part_is_a_table_of_its_rows(plan: Plan) -> None:
    part = made_up(plan, 1)
    unit_results.write(plan, 1, part)
    table = feather.read_table(unit_results.path_of(plan, 1), memory_map=False)
    assert table.column_names == ["row", "whole", *plan.about["classes"]]
    kinds = [pa.int64(), pa.bool_(), *[pa.float32()] * 3]
    assert table.schema.types == kinds
    assert table["gaba"].to_pylist() == part.probabilities[:, 0].tolist()


def test_the_same_part_is_the_same_bytes(plan: Plan) -> None:
    unit_results.write(plan, 1, made_up(plan, 1))
    first = unit_results.path_of(plan, 1).read_bytes()
    turned = made_up(plan, 1)
    # The array is in Fortran order, and the corners are in another order.
    values = np.asfortranarray(turned.probabilities)
    corners = frozenset(sorted(CORNERS, reverse=True))
    unit_results.write(plan, 1, UnitResult(turned.rows, turned.whole, values, corners))
    assert unit_results.path_of(plan, 1).read_bytes() == first


@pytest.mark.long
def test_any_byte_that_changed_is_noticed_or_changes_nothing(plan: Plan) -> None:
    part = made_up(plan, 1)
    unit_results.write(plan, 1, part)
    path = unit_results.path_of(plan, 1)
    content = path.read_bytes()
    noticed = 0
    # Every byte of the end is tested, as the end describes the bytes before.
    every = [*range(0, len(content) - 300, 7), *range(len(content) - 300, len(content))]
    for place in every:
        for flip in (0xFF, 1 << place % 8):
            damaged = bytearray(content)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            found = unit_results.read(plan, 1)
            noticed += found is None
            assert found is None or same(found, part), place
    # There are two flips per place. Those in padding, for example, change nothing.
    assert noticed > len(every)
    path.write_bytes(content)
    assert unit_results.read(plan, 1) is not None


def test_a_part_cut_short_anywhere_is_none(plan: Plan) -> None:
    unit_results.write(plan, 1, made_up(plan, 1))
    path = unit_results.path_of(plan, 1)
    content = path.read_bytes()
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        assert unit_results.read(plan, 1) is None, length
    path.write_bytes(bytes(len(content)))
    assert unit_results.read(plan, 1) is None
    path.unlink()
    path.mkdir()
    assert unit_results.read(plan, 1) is None


def test_a_value_changed_with_the_file_whole_is_noticed(plan: Plan) -> None:
    part = made_up(plan, 1)
    for change in ("row", "whole", "probability", "unreadable", "order", "classes"):
        unit_results.write(plan, 1, part)
        path = unit_results.path_of(plan, 1)
        table = feather.read_table(path, memory_map=False)
        about = table.schema.metadata
        if change == "order":
            table = table.take(pa.array(np.arange(len(table))[::-1]))
        elif change == "unreadable":
            (key, value), *_ = about.items()
            about = {key: value.replace(b"[8, 64, 0]", b"[8, 64, 8]")}
            assert about[key] != value
        elif change == "classes":
            names = table.column_names
            names[2:4] = names[3], names[2]
            table = table.rename_columns(names)
        else:
            name = {"row": "row", "whole": "whole"}.get(change, "dopamine")
            values = table[name].to_numpy().copy()
            if change == "probability":
                values[5] = np.nextafter(values[5], np.float32(2))
            else:
                values[5] ^= True
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values))
        files.write_feather(path, table.replace_schema_metadata(about))
        assert unit_results.read(plan, 1) is None, change


@pytest.mark.parametrize("kind", [pa.uint64(), pa.float64(), pa.timestamp("s")])
def test_the_same_bytes_read_as_another_type_are_noticed(
    plan: Plan, kind: pa.DataType
) -> None:
    """A flipped bit in the schema of the file can change a type like this."""
    unit_results.write(plan, 1, made_up(plan, 1))
    path = unit_results.path_of(plan, 1)
    table = feather.read_table(path, memory_map=False)
    about = table.schema.metadata
    rows = table["row"].combine_chunks().view(kind)
    table = table.set_column(0, "row", rows).replace_schema_metadata(about)
    files.write_feather(path, table)
    assert unit_results.read(plan, 1) is None


def test_the_part_of_another_unit_or_plan_is_none(
    plan: Plan, tmp_path: pathlib.Path
) -> None:
    for unit in (0, 1):
        unit_results.write(plan, unit, made_up(plan, unit))
    shutil.copy(unit_results.path_of(plan, 0), unit_results.path_of(plan, 1))
    assert unit_results.read(plan, 0) is not None and unit_results.read(plan, 1) is None

    # This plan has the same rows in the same units, but a network of other weights.
    volume = make_volume(tmp_path / "volume")
    table = table_of(positions_in_and_out(300))
    other = make_plan(table, volume, tmp_path / "other", 40, parameters_sha256=["1"])
    assert other.unit(0)[0].tolist() == plan.unit(0)[0].tolist()
    shutil.copy(unit_results.path_of(plan, 0), unit_results.path_of(other, 0))
    assert unit_results.read(other, 0) is None

    again = make_plan(table, volume, tmp_path / "out", 40)
    found = unit_results.read(again, 0)
    assert found is not None and same(found, made_up(plan, 0))


def test_unfinished_are_those_without_a_part_in_the_order_given(plan: Plan) -> None:
    count = len(plan)
    assert list(unit_results.unfinished(plan, range(count), False)) == list(
        range(count)
    )
    for unit in range(count):
        unit_results.write(plan, unit, made_up(plan, unit))
    assert list(unit_results.unfinished(plan, range(count), False)) == []
    unit_results.path_of(plan, 3).unlink()
    unit_results.path_of(plan, 1).write_bytes(b"damaged")
    assert list(unit_results.unfinished(plan, range(count), False)) == [1, 3]
    assert list(unit_results.unfinished(plan, [4, 3, 2, 1], False)) == [3, 1]
    # Every part has rows whose crop could not be read.
    assert list(unit_results.unfinished(plan, range(count), True)) == list(range(count))
    rows, _ = plan.unit(2)
    whole = made_up(plan, 2)
    unit_results.write(
        plan,
        2,
        UnitResult(rows, np.ones_like(whole.whole), whole.probabilities, frozenset()),
    )
    left = list(unit_results.unfinished(plan, range(count), True))
    assert left == [unit for unit in range(count) if unit != 2]


def test_a_part_that_cannot_be_written_is_told(plan: Plan) -> None:
    unit_results.write(plan, 0, made_up(plan, 0))
    shutil.rmtree(plan.folder / "parts")
    (plan.folder / "parts").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write .*part-000000-of-"):
        unit_results.write(plan, 0, made_up(plan, 0))


def test_leftovers_of_a_killed_writer_are_no_part(plan: Plan) -> None:
    unit_results.write(plan, 0, made_up(plan, 0))
    path = unit_results.path_of(plan, 0)
    leftover = path.with_name(f"{path.name}.0123.partial")
    path.rename(leftover)
    assert unit_results.read(plan, 0) is None
    assert list(unit_results.unfinished(plan, [0], False)) == [0]
    unit_results.write(plan, 0, made_up(plan, 0))
    assert unit_results.read(plan, 0) is not None and leftover.exists()

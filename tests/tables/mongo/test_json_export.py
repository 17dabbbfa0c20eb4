# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess

from synister_jax.tables.mongo import documents, json_export
from tests.helpers.export_v3 import write_export
from tests.helpers.small_data import shared_data


def test_documents_are_complete_as_the_original_writes_them(
    tmp_path: pathlib.Path,
) -> None:
    write_export(tmp_path)
    found = json_export.collections(tmp_path)
    assert list(found) == list(documents.COLLECTIONS)
    assert found["hemi_lineages"][0] == {
        "hemi_lineage_id": 1,
        "hemi_lineage_name": "ALad1",
        "nt_guess": None,
    }
    assert found["skeletons"][0] == {
        "skeleton_id": 16,
        "hemi_lineage_id": 1,
        "nt_known": ["acetylcholine"],
    }
    assert found["synapses"][0] == {
        "synapse_id": 9,
        "x": 400,
        "y": 80,
        "z": 40,
        "skeleton_id": 16,
        "splits": {"skeleton": "train", "brain_region": "test"},
        "prepost": None,
        "meta_id": None,
        "brain_region": "AL",
    }


def test_published_files_are_recognised(tmp_path: pathlib.Path) -> None:
    published = shared_data("fafb_v3")
    for name in ("skeletons_v3.json", "hemi_lineages_v3.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    assert json_export.unpublished(tmp_path) == {"synapses_v3.json": "missing"}
    with open(tmp_path / "skeletons_v3.json", "a") as file:
        file.write("\n")
    (tmp_path / "synapses_v3.json").write_text("{}")
    assert json_export.unpublished(tmp_path) == {
        "skeletons_v3.json": "differs",
        "synapses_v3.json": "differs",
    }


def test_blob_id_is_that_of_git(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\0some bytes\n" * 1000)
    told = subprocess.run(
        ["git", "hash-object", str(path)], capture_output=True, text=True, check=True
    )
    assert json_export.git_blob(path) == told.stdout.strip()

# SPDX-License-Identifier: Apache-2.0
"""The published JSON export v3: three files of documents keyed by id.

See data/fafb_v3/README.md for where the published ones come from.
"""

import hashlib
import pathlib
from typing import Any

import pyarrow as pa

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.tables.mongo import documents

# Git blob ids of the published files (github.com/funkelab/synister, data/fafb_v3).
PUBLISHED = {
    "hemi_lineages_v3.json": "325cc55265fa38f72c6d3979e570c69da2f2c4d5",
    "skeletons_v3.json": "bd822c6efce9c79c21c138751b4cd6b90dfb6683",
    "synapses_v3.json": "a9ba7a330bcd52307097c1fdfe4715426c3d74c3",
}


def read(folder: pathlib.Path, schema: pa.Schema) -> pa.Table:
    """The synapse table of the export, its columns those of `schema` and the splits.

    Raises:
      UserError: a file is missing, is not JSON, or a synapse is not usable.
    """
    content = collections(folder)
    by_id = {
        name: {document[documents.ID_FIELDS[name]]: document for document in listed}
        for name, listed in content.items()
        if name != "synapses"
    }
    schemes: dict[str, None] = {}
    for synapse in content["synapses"]:
        if isinstance(synapse.get("splits"), dict):
            schemes.update(dict.fromkeys(synapse["splits"]))
    fields = [pa.field(f"split_{name}", pa.string()) for name in sorted(schemes)]
    # Nullable, so that a missing coordinate is named like any other bad row.
    schema = pa.schema([field.with_nullable(True) for field in schema] + fields)
    try:
        batches = documents.to_batches(
            content["synapses"], by_id["skeletons"], by_id["hemi_lineages"], schema
        )
        return pa.Table.from_batches(batches, schema)
    except UserError as error:
        raise UserError(f"{folder}/synapses_v3.json, {error}") from None


def collections(folder: pathlib.Path) -> dict[str, list[documents.Document]]:
    """The documents of each collection, complete, as the original's import writes them.

    Raises:
      UserError: a file is missing, is not JSON, or is not an object by integer id.
    """
    return {name: _documents(folder, name) for name in documents.COLLECTIONS}


def _documents(folder: pathlib.Path, collection: str) -> list[documents.Document]:
    path = folder / f"{collection}_v3.json"
    content: Any = files.read_json(path, unique_keys=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: the files of an export v3 are objects by id")
    result = []
    for key, fields in content.items():
        if not isinstance(fields, dict):
            raise UserError(f"{path}, id {key}: {fields!r} is not an object")
        try:
            document = documents.complete(collection, int(key), fields)
        except ValueError:
            raise UserError(f"{path}: id {key!r} is not an integer") from None
        if document[documents.ID_FIELDS[collection]] != int(key):
            raise UserError(f"{path}, id {key}: another id is inside")
        result.append(document)
    return result


def unpublished(folder: pathlib.Path) -> dict[str, str]:
    """The files of the folder that are not the published ones: "missing", "differs"."""
    found = {}
    for name, blob in PUBLISHED.items():
        path = folder / name
        if not path.is_file():
            found[name] = "missing"
        elif git_blob(path) != blob:
            found[name] = "differs"
    return found


def git_blob(path: pathlib.Path) -> str:
    """The id that git gives the content: SHA-1 of a header with its size, and it."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

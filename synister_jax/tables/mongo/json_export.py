# SPDX-License-Identifier: Apache-2.0
"""Reads the published JSON export v3: three files that hold documents by id.

data/fafb_v3/README.md says where the published files come from.
"""

import hashlib
import pathlib
from typing import Any

import pyarrow as pa

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.tables.mongo import documents

# The git blob ids of the published files (github.com/funkelab/synister, data/fafb_v3).
PUBLISHED = {
    "hemi_lineages_v3.json": "325cc55265fa38f72c6d3979e570c69da2f2c4d5",
    "skeletons_v3.json": "bd822c6efce9c79c21c138751b4cd6b90dfb6683",
    "synapses_v3.json": "a9ba7a330bcd52307097c1fdfe4715426c3d74c3",
}


def read(folder: pathlib.Path, schema: pa.Schema) -> pa.Table:
    """Returns the synapse table of the export.

    Args:
      folder: the folder with the three files.
      schema: the columns of the table. A column for each split is added.

    Raises:
      UserError: a file is missing or not JSON, or a synapse is not usable.
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
    # A position may be null here, so that the check of the table names its row.
    schema = pa.schema([field.with_nullable(True) for field in schema] + fields)
    try:
        batches = documents.to_batches(
            content["synapses"], by_id["skeletons"], by_id["hemi_lineages"], schema
        )
        return pa.Table.from_batches(batches, schema)
    except UserError as error:
        raise UserError(f"{folder}/synapses_v3.json, {error}") from None


def collections(folder: pathlib.Path) -> dict[str, list[documents.Document]]:
    """Returns the documents of each collection with all their fields.

    The import of the original writes the same documents.

    Raises:
      UserError: a file is missing or not JSON, its content is not an object, or a key
        of this object is not an integer id.
    """
    return {name: _documents(folder, name) for name in documents.COLLECTIONS}


def _documents(folder: pathlib.Path, collection: str) -> list[documents.Document]:
    path = folder / f"{collection}_v3.json"
    content: Any = files.read_json(path, unique_keys=True)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a JSON object; the files of an export v3 are objects by id"
        )
    result = []
    for key, fields in content.items():
        if not isinstance(fields, dict):
            raise UserError(f"{path}, id {key}: {fields!r} is not an object")
        try:
            document = documents.complete(collection, int(key), fields)
        except ValueError:
            raise UserError(f"{path}: id {key!r} is not an integer") from None
        if document[documents.ID_FIELDS[collection]] != int(key):
            raise UserError(f"{path}, id {key}: the document has another id")
        result.append(document)
    return result


def unpublished(folder: pathlib.Path) -> dict[str, str]:
    """Returns the files that are not the published ones, as "missing" or "differs"."""
    found = {}
    for name, blob in PUBLISHED.items():
        path = folder / name
        if not path.is_file():
            found[name] = "missing"
        elif git_blob(path) != blob:
            found[name] = "differs"
    return found


def git_blob(path: pathlib.Path) -> str:
    """Returns the blob id that git gives the file, as hexadecimal text.

    The id is the SHA-1 of a header, which holds the size, and the content.
    """
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

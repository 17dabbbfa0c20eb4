# SPDX-License-Identifier: Apache-2.0
"""What a table says about itself: JSON under one key of the metadata of its schema."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_KEY = b"synister_jax"


def described(table: pa.Table, about: Mapping[str, Any]) -> pa.Table:
    """Returns the table with `about` as its only metadata."""
    return table.replace_schema_metadata(entry(about))


def entry(about: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Returns the metadata of a schema that says `about`."""
    return {_KEY: json.dumps(about).encode()}


def of(table: pa.Table | pa.Schema) -> dict[str, Any]:
    """Returns what the table says about itself, or an empty dictionary.

    A table that went through pandas or polars has lost its metadata.
    """
    schema = table if isinstance(table, pa.Schema) else table.schema
    found = (schema.metadata or {}).get(_KEY)
    return {} if found is None else json.loads(found)

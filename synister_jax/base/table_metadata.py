# SPDX-License-Identifier: Apache-2.0
"""What a table says of itself: JSON under one key of its schema's metadata."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_KEY = b"synister_jax"


def described(table: pa.Table, about: Mapping[str, Any]) -> pa.Table:
    """The table with `about`, and no other metadata."""
    return table.replace_schema_metadata(entry(about))


def entry(about: Mapping[str, Any]) -> dict[bytes, bytes]:
    """The metadata of a schema that says `about`."""
    return {_KEY: json.dumps(about).encode()}


def of(table: pa.Table | pa.Schema) -> dict[str, Any]:
    """What the table says of itself; empty where it says nothing.

    Tables that went through pandas or polars have lost it.
    """
    schema = table if isinstance(table, pa.Schema) else table.schema
    found = (schema.metadata or {}).get(_KEY)
    return {} if found is None else json.loads(found)

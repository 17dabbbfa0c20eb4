# SPDX-License-Identifier: Apache-2.0
"""A server that speaks MongoDB's wire protocol, for the tests to talk to over TCP.

The server is the PyPI package nx-27017, which keeps its data in SQLite.
"""

import pathlib
import re
import socket
import subprocess
import sys
import time

import pyarrow as pa

from synister_jax.base import files
from synister_jax.tables.mongo import databases, documents


def start(folder: pathlib.Path) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a server without databases, and returns its process and its URI.

    The server writes its log into `folder`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = pathlib.Path(sys.executable).with_name("nx-27017")
    flags = {"host": "127.0.0.1", "port": port, "data-dir": "memory"}
    flags |= {"log-file": folder / "log", "pid-file": folder / "pid"}
    with open(folder / "output", "wb") as output:
        server = subprocess.Popen(
            [program, *(f"--{k}={v}" for k, v in flags.items())],
            stdout=output,
            stderr=output,
        )
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"mongodb://127.0.0.1:{port}"
        if server.poll() is not None:
            break
        time.sleep(0.1)
    server.kill()
    server.wait()
    raise RuntimeError((folder / "output").read_text())


def with_database(server_uri: str, name: str) -> str:
    """Returns the URI of a database. The URI of its server may end in options."""
    address, _, options = server_uri.partition("?")
    address = re.sub(r"(?<=[^/])/[^/]*$", "", address)
    return f"{address}/{name}" + (f"?{options}" if options else "")


def load_table(uri: str, table: pa.Table, overwrite: bool = False) -> bool:
    sha256 = files.sha256_of_columns(table, table.column_names)
    with databases.connect(uri) as database:
        found = documents.from_table(table)
        return databases.write(database, found, table, sha256, overwrite)

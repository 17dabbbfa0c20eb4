# SPDX-License-Identifier: Apache-2.0
"""The SQLite file of the service: its tables, and access from threads and processes.

If a process is killed, everything that was committed is kept. A power cut may lose the
last commits, but it does not damage the file (`synchronous=NORMAL`).
"""

import contextlib
import os
import pathlib
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

from synister_jax.base.errors import UserError

_BUSY_SECONDS = 20
_VERSION = 1

_SCHEMA = """
CREATE TABLE tokens (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
  created REAL NOT NULL, revoked REAL);
CREATE UNIQUE INDEX tokens_by_name ON tokens (name) WHERE revoked IS NULL;
CREATE TABLE sessions (
  hash TEXT PRIMARY KEY, token_id INTEGER NOT NULL REFERENCES tokens (id),
  csrf TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
  token_id INTEGER NOT NULL REFERENCES tokens (id),
  model TEXT NOT NULL, source TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'queued', stage TEXT NOT NULL DEFAULT '',
  done INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0,
  rows INTEGER NOT NULL, message TEXT, created REAL NOT NULL, started REAL,
  finished REAL, worker TEXT, attempts INTEGER NOT NULL DEFAULT 0,
  view_key TEXT NOT NULL UNIQUE, request_key TEXT, bytes INTEGER NOT NULL, step INTEGER,
  since REAL, since_done INTEGER NOT NULL DEFAULT 0, claimed REAL);
CREATE UNIQUE INDEX jobs_by_request ON jobs (token_id, request_key)
  WHERE state IN ('queued', 'running', 'done');
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE INDEX jobs_by_token ON jobs (token_id, state);
CREATE TABLE points (
  id INTEGER PRIMARY KEY, token_id INTEGER NOT NULL REFERENCES tokens (id),
  model TEXT NOT NULL, source TEXT NOT NULL, x REAL NOT NULL, y REAL NOT NULL,
  z REAL NOT NULL, step INTEGER, state TEXT NOT NULL, worker TEXT, result TEXT,
  asked REAL NOT NULL, UNIQUE (token_id, model, source, x, y, z));
CREATE INDEX points_by_state ON points (state, asked);
CREATE TABLE models (
  name TEXT PRIMARY KEY, step INTEGER, classes TEXT NOT NULL, ready INTEGER NOT NULL,
  problem TEXT, parameters TEXT) WITHOUT ROWID;
"""


class Database:
    """The SQLite file, with one connection for each thread.

    Args:
      path: The file. It is created if it does not exist.

    Raises:
      UserError: Another release of synister_jax wrote the file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._thread = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        # The file will hold hashes of tokens and the requests of users. So it gets its
        # permissions before anything is written.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with self.transaction() as connection:
            [[version]] = connection.execute("PRAGMA user_version").fetchall()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise UserError(
                    f"{path} was written by another release of synister_jax; use that "
                    "release, or give another folder as --state"
                )

    def close(self) -> None:
        """Closes the connections of all threads; the file cannot be used afterwards."""
        with self._lock:
            for connection in self._all:
                connection.close()
            self._all.clear()

    def run(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        """Runs one statement as one transaction and returns all of its rows."""
        # All rows are read at once, because a statement that is not read to its end
        # keeps its lock.
        return self._connection().execute(statement, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yields a connection whose statements form one transaction.

        No other thread or process can write to the file meanwhile. An exception undoes
        all statements.
        """
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._thread, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,  # another thread calls `close`
            )
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            self._thread.connection = connection
            with self._lock:
                self._all.append(connection)
        return connection

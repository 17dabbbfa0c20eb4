# SPDX-License-Identifier: Apache-2.0
"""The memory of the service for points: single positions that somebody waits for."""

import json
import time
from typing import Any

from synister_jax.serve import tokens
from synister_jax.serve.database import Database
from synister_jax.serve.records import LimitReached, StoredPoint

# No worker computes a point that was last asked for longer ago than this. The server
# itself waits 10 seconds for a point (points.py); the rest is for repeated requests.
POINT_SECONDS = 30
# SQLite may return a whole number as an integer. Adding 0.0 makes it a float.
_POINT = "id, model, source, x + 0.0 AS x, y + 0.0 AS y, z + 0.0 AS z"


class PointStore:
    """The points in the file of the service.

    Args:
      database: the file.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._run = database.run

    def ask(
        self,
        token_id: int,
        model: str,
        source: str,
        x: float,
        y: float,
        z: float,
        most: int = 64,
    ) -> int:
        """Asks for the prediction at a point and returns the id of the point.

        `result` returns the answer for this id. A stored answer of the same
        request is used again if it comes from the current step of the model.

        Args:
          token_id: The token that asks.
          model: The name of the model.
          source: The source, which defines the coordinates.
          x: The first coordinate, in the units of the source.
          y: The second coordinate, in the units of the source.
          z: The third coordinate, in the units of the source.
          most: The number of points that a token may wait for.

        Raises:
          LimitReached: The token already waits for `most` points.
          Revoked: The token is revoked.
        """
        now = time.time()
        with self._database.transaction() as connection:
            tokens.require(connection, token_id)
            there = connection.execute(
                "UPDATE points SET asked = ?1 WHERE token_id = ?2 AND model = ?3 AND "
                "source = ?4 AND x = ?5 AND y = ?6 AND z = ?7 AND state = 'done' AND "
                "step IS (SELECT step FROM models WHERE name = ?3) AND "
                "result ->> 'problem' IS NULL RETURNING id",
                (now, token_id, model, source, x, y, z),
            ).fetchall()
            if there:
                return there[0]["id"]
            [[waiting]] = connection.execute(
                "SELECT count(*) FROM points WHERE token_id = ? AND state != 'done' "
                "AND asked > ?",
                (token_id, now - POINT_SECONDS),
            ).fetchall()
            if waiting >= most:
                raise LimitReached(
                    f"{waiting} points of your token wait for an answer already; try "
                    "again when they are answered"
                )
            # If a worker already computes this point, the point stays in the state
            # running. Its answer serves this request, too.
            [[point_id]] = connection.execute(
                "INSERT INTO points (token_id, model, source, x, y, z, state, asked) "
                "VALUES (?, ?, ?, ?, ?, ?, 'queued', ?) ON CONFLICT DO UPDATE SET "
                "asked = excluded.asked, result = NULL, "
                "state = iif(state = 'running', 'running', 'queued') RETURNING id",
                (token_id, model, source, x, y, z, now),
            ).fetchall()
            return point_id

    def claim(self, worker: str, most: int = 64) -> list[StoredPoint]:
        """Gives a worker at most `most` points that are waited for, oldest first."""
        rows = self._run(
            "UPDATE points SET state = 'running', worker = ? WHERE id IN (SELECT id "
            "FROM points WHERE state = 'queued' AND asked > ? ORDER BY asked LIMIT ?) "
            f"RETURNING {_POINT}",
            *(worker, time.time() - POINT_SECONDS, most),
        )
        return [StoredPoint(**row) for row in rows]

    def answer(self, point_id: int, worker: str, result: dict[str, Any]) -> bool:
        """Stores the answer of a point.

        An answer with the key `problem` is not used again for later requests. Returns
        False, without a change, if the point belongs to another worker now.
        """
        return bool(
            self._run(
                "UPDATE points SET state = 'done', result = ?, step = (SELECT step "
                "FROM models WHERE name = model) WHERE id = ? AND worker = ? AND "
                "state = 'running' RETURNING id",
                *(json.dumps(result), point_id, worker),
            )
        )

    def result(self, point_id: int) -> dict[str, Any] | None:
        """Returns the answer of a point, or None if the point has no answer yet."""
        rows = self._run(
            "SELECT result FROM points WHERE id = ? AND state = 'done'", point_id
        )
        return json.loads(rows[0]["result"]) if rows else None

    def forget(self, older_than_seconds: float = 24 * 3600) -> None:
        """Deletes the points that nobody asked for in the given time."""
        self._run(
            "DELETE FROM points WHERE asked < ?", time.time() - older_than_seconds
        )

# SPDX-License-Identifier: Apache-2.0
"""Everything that the service remembers: jobs, points, and what workers say.

One SQLite file (database.py), which the server and its workers open alike. The table of
jobs is the queue: a worker claims by one UPDATE that names itself, so a job that it
leaves behind is known for what it is and goes back. The queues on SQLite that we know
(huey among them) take a task off the table when it starts, and lose it with its worker.
"""

import dataclasses
import json
import pathlib
import secrets
import sqlite3
import time
from collections.abc import Collection, Sequence
from typing import Any

from synister_jax.serve.database import Database
from synister_jax.serve.records import (
    LimitReached,
    NewJob,
    Report,
    Revoked,
    StoredJob,
    StoredPoint,
)

# A job that stopped so many workers is not given to a fourth.
MOST_ATTEMPTS = 3
# Nobody waits for a point longer than the server does, with some room for its retries.
POINT_SECONDS = 30

_JOB = ", ".join(field.name for field in dataclasses.fields(StoredJob))
# SQLite keeps a whole number as an integer, whatever the column.
_POINT = "id, model, source, x + 0.0 AS x, y + 0.0 AS y, z + 0.0 AS z"
_USED = (
    "SELECT count(*) FILTER (WHERE state IN ('queued', 'running')), "
    "coalesce(sum(bytes), 0) FROM jobs WHERE token_id = ?"
)


def _require_token(connection: sqlite3.Connection, token_id: int) -> None:
    there = "SELECT 1 FROM tokens WHERE id = ? AND revoked IS NULL"
    if not connection.execute(there, [token_id]).fetchall():
        raise Revoked


class Store:
    """The service's memory in a file; any number of threads and processes share it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.database = Database(path)
        self._run = self.database.run

    def close(self) -> None:
        """It is of no use afterwards."""
        self.database.close()

    # Jobs, as the server sees them.

    def submit(
        self,
        new: NewJob,
        most_jobs: int,
        most_bytes: int,
        fresh: bool = False,
    ) -> tuple[StoredJob, bool]:
        """(the job, whether it is new): the token's own of this request if it has one.

        Args:
          most_jobs: unfinished ones that a token may have.
          most_bytes: that the jobs of a token may take.
          fresh: a finished one of the same request does not count.

        Raises:
          LimitReached: too many unfinished jobs, or too many bytes kept.
          Revoked: the token ended while its request was read.
        """
        with self.database.transaction() as connection:
            _require_token(connection, new.token_id)
            if fresh:
                connection.execute(
                    "UPDATE jobs SET request_key = NULL WHERE token_id = ? AND "
                    "request_key = ? AND state = 'done'",
                    (new.token_id, new.request_key),
                )
            there = connection.execute(
                f"SELECT {_JOB} FROM jobs WHERE token_id = ? AND request_key = ? AND "
                "state IN ('queued', 'running', 'done')",
                (new.token_id, new.request_key),
            ).fetchall()
            if there:
                return StoredJob(**there[0]), False
            [[jobs, kept]] = connection.execute(_USED, [new.token_id]).fetchall()
            if jobs >= most_jobs:
                raise LimitReached(
                    f"{jobs:,} jobs are unfinished, {most_jobs:,} may be: wait for one "
                    "or cancel it"
                )
            if kept + new.size > most_bytes:
                raise LimitReached(
                    f"your jobs take {kept:,} bytes of {most_bytes:,}: delete some"
                )
            [row] = connection.execute(
                # As `NewJob` has its fields, then ours.
                "INSERT INTO jobs (id, token_id, model, source, kind, name, rows, "
                "bytes, step, request_key, view_key, created) VALUES "
                f"(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_JOB}",
                (
                    *dataclasses.astuple(new),
                    *(secrets.token_urlsafe(16), time.time()),
                ),
            ).fetchall()
            return StoredJob(**row), True

    def used(self, token_id: int) -> tuple[int, int]:
        """(unfinished jobs, bytes kept) of a token."""
        [row] = self._run(_USED, token_id)
        return tuple(row)

    def job(self, job_id: str, token_id: int) -> StoredJob | None:
        """None where there is no such job of this token."""
        rows = self._run(
            f"SELECT {_JOB} FROM jobs WHERE id = ? AND token_id = ?", job_id, token_id
        )
        return StoredJob(**rows[0]) if rows else None

    def job_to_view(self, view_key: str) -> StoredJob | None:
        """The finished job of a key, whoever asks: the key is the permission."""
        rows = self._run(
            f"SELECT {_JOB} FROM jobs WHERE view_key = ? AND state = 'done' AND "
            "token_id IN (SELECT id FROM tokens WHERE revoked IS NULL)",
            view_key,
        )
        return StoredJob(**rows[0]) if rows else None

    def jobs(self, token_id: int, most: int = 1000) -> list[StoredJob]:
        """A token's, newest first."""
        rows = self._run(
            f"SELECT {_JOB} FROM jobs WHERE token_id = ? ORDER BY number DESC LIMIT ?",
            token_id,
            most,
        )
        return [StoredJob(**row) for row in rows]

    def queue(self) -> list[int]:
        """Numbers of the queued jobs of all, oldest first."""
        rows = self._run(
            "SELECT number FROM jobs WHERE state = 'queued' ORDER BY number"
        )
        return [row["number"] for row in rows]

    def cancel(self, job_id: str, token_id: int) -> StoredJob | None:
        """The job afterwards: cancelled, unless it was over; None: no such job."""
        self._run(
            "UPDATE jobs SET state = 'cancelled', finished = ?, stage = '' WHERE "
            "id = ? AND token_id = ? AND state IN ('queued', 'running')",
            time.time(),
            job_id,
            token_id,
        )
        return self.job(job_id, token_id)

    def delete(self, job_id: str, token_id: int) -> bool:
        """False where there is no such job of this token, or it is running."""
        return bool(
            self._run(
                "DELETE FROM jobs WHERE id = ? AND token_id = ? AND state != 'running' "
                "RETURNING id",
                job_id,
                token_id,
            )
        )

    def seconds_a_row(self, model: str) -> float | None:
        """The pace of the model's last jobs, None before the first is done."""
        [row] = self._run(
            "SELECT sum(finished - started) / sum(rows) AS pace FROM (SELECT * FROM "
            "jobs WHERE model = ? AND state = 'done' AND rows > 0 "
            "ORDER BY finished DESC LIMIT 5)",
            model,
        )
        return row["pace"]

    def states(self) -> dict[str, tuple[str, float | None]]:
        """(state, when finished) of every job, by its id."""
        rows = self._run("SELECT id, state, finished FROM jobs")
        return {row["id"]: (row["state"], row["finished"]) for row in rows}

    def emptied(self, job_id: str) -> None:
        """Nothing is kept any more of a job that came to nothing."""
        self._run(
            "UPDATE jobs SET bytes = 0 WHERE id = ? AND bytes > 0 AND "
            "state IN ('failed', 'cancelled')",
            job_id,
        )

    # Jobs, as a worker sees them.

    def claim(self, worker: str, closed: Collection[str] = ()) -> StoredJob | None:
        """Takes the next job, token by token in turn.

        Of the token with the fewest running; of these, the one whose turn was longest
        ago; of its jobs, the oldest.

        Args:
          closed: models that cannot be used now, whose jobs wait.
        """
        rows = self._run(
            "UPDATE jobs SET state = 'running', worker = ?1, attempts = attempts + 1, "
            "started = coalesce(started, ?2), claimed = ?2, since = NULL, "
            "since_done = 0, stage = '' WHERE number = (SELECT number FROM jobs AS q "
            "WHERE state = 'queued' AND model NOT IN (SELECT value FROM json_each(?3)) "
            "ORDER BY (SELECT count(*) FROM jobs AS r WHERE r.token_id = q.token_id "
            "AND r.state = 'running'), (SELECT max(claimed) FROM jobs AS r "
            "WHERE r.token_id = q.token_id), number LIMIT 1) AND state = 'queued' "
            f"RETURNING {_JOB}",
            *(worker, time.time(), json.dumps(list(closed))),
        )
        return StoredJob(**rows[0]) if rows else None

    def tell(self, job_id: str, worker: str, stage: str, done: int, total: int) -> bool:
        """Progress; False: stop, the job is cancelled or no longer this worker's."""
        now = time.time()
        return bool(
            self._run(
                "UPDATE jobs SET "
                "since = CASE WHEN since IS NULL OR stage != ?1 THEN ?2 ELSE since END,"
                "since_done = CASE WHEN since IS NULL OR stage != ?1 THEN ?3 "
                "ELSE since_done END, "
                "stage = ?1, done = ?3, total = ?4 "
                "WHERE id = ?5 AND worker = ?6 AND state = 'running' RETURNING id",
                stage,
                now,
                done,
                total,
                job_id,
                worker,
            )
        )

    def finish(self, job_id: str, worker: str, rows: int, size: int) -> bool:
        """Its answer folder is whole; False as of `tell`.

        Args:
          size: bytes of the folder.
        """
        return bool(
            self._run(
                "UPDATE jobs SET state = 'done', finished = ?, rows = ?, bytes = ?, "
                "stage = '', done = total WHERE id = ? AND worker = ? AND "
                "state = 'running' RETURNING id",
                *(time.time(), rows, size, job_id, worker),
            )
        )

    def fail(self, job_id: str, worker: str, message: str) -> bool:
        """It cannot be done, and why; False as of `tell`."""
        return bool(
            self._run(
                "UPDATE jobs SET state = 'failed', finished = ?, message = ?, "
                "stage = '' WHERE id = ? AND worker = ? AND state = 'running' "
                "RETURNING id",
                *(time.time(), message, job_id, worker),
            )
        )

    def release(self, job_id: str, worker: str) -> bool:
        """Back into the queue, as the worker is told to end; not counted against it."""
        return bool(
            self._run(
                "UPDATE jobs SET state = 'queued', worker = NULL, stage = '', "
                "attempts = attempts - 1 WHERE id = ? AND worker = ? AND "
                "state = 'running' RETURNING id",
                *(job_id, worker),
            )
        )

    def requeue_lost(self, workers_alive: Collection[str]) -> int:
        """Jobs and points of workers that are no more go back; how many jobs did.

        A job that stopped `MOST_ATTEMPTS` workers has failed.
        """
        alive = json.dumps(list(workers_alive))
        lost = "state = 'running' AND worker NOT IN (SELECT value FROM json_each(?))"
        self._run(
            "UPDATE jobs SET state = 'failed', finished = ?, stage = '', message = "
            f"'stopped the worker three times' WHERE attempts >= ? AND {lost}",
            *(time.time(), MOST_ATTEMPTS, alive),
        )
        self._run(
            f"UPDATE points SET state = 'queued', worker = NULL WHERE {lost}", alive
        )
        return len(
            self._run(
                "UPDATE jobs SET state = 'queued', worker = NULL, stage = '' "
                f"WHERE {lost} RETURNING id",
                alive,
            )
        )

    def start_over(self) -> int:
        """As the server starts, nobody works: how many jobs were running.

        They go on without this attempt being counted, for it was not they who stopped
        the server; and models are not ready until a worker says so.
        """
        self._run("DELETE FROM models")
        self._run(
            "UPDATE points SET state = 'queued', worker = NULL WHERE result IS NULL"
        )
        return len(
            self._run(
                "UPDATE jobs SET state = 'queued', worker = NULL, stage = '', "
                "attempts = attempts - 1 WHERE state = 'running' RETURNING id"
            )
        )

    # Points.

    def ask_point(
        self,
        token_id: int,
        model: str,
        source: str,
        x: float,
        y: float,
        z: float,
        most: int = 64,
    ) -> int:
        """The id under which the answer will be; perhaps it is there already.

        Raises:
          LimitReached: the token waits for `most` points.
          Revoked: the token has ended.
        """
        now = time.time()
        with self.database.transaction() as connection:
            _require_token(connection, token_id)
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
                raise LimitReached(f"{waiting} points wait for an answer already")
            # One that is under way stays so: its answer is that of this request too.
            [[point_id]] = connection.execute(
                "INSERT INTO points (token_id, model, source, x, y, z, state, asked) "
                "VALUES (?, ?, ?, ?, ?, ?, 'queued', ?) ON CONFLICT DO UPDATE SET "
                "asked = excluded.asked, result = NULL, "
                "state = iif(state = 'running', 'running', 'queued') RETURNING id",
                (token_id, model, source, x, y, z, now),
            ).fetchall()
            return point_id

    def claim_points(self, worker: str, most: int = 64) -> list[StoredPoint]:
        """Takes points that somebody still waits for, the oldest first."""
        rows = self._run(
            "UPDATE points SET state = 'running', worker = ? WHERE id IN (SELECT id "
            "FROM points WHERE state = 'queued' AND asked > ? ORDER BY asked LIMIT ?) "
            f"RETURNING {_POINT}",
            *(worker, time.time() - POINT_SECONDS, most),
        )
        return [StoredPoint(**row) for row in rows]

    def answer_point(self, point_id: int, worker: str, result: dict[str, Any]) -> bool:
        """Keeps the answer; one with the key `problem` is not given out again."""
        return bool(
            self._run(
                "UPDATE points SET state = 'done', result = ?, step = (SELECT step "
                "FROM models WHERE name = model) WHERE id = ? AND worker = ? AND "
                "state = 'running' RETURNING id",
                *(json.dumps(result), point_id, worker),
            )
        )

    def point_result(self, point_id: int) -> dict[str, Any] | None:
        """None: not answered yet."""
        rows = self._run(
            "SELECT result FROM points WHERE id = ? AND state = 'done'", point_id
        )
        return json.loads(rows[0]["result"]) if rows else None

    def forget_points(self, older_than_seconds: float = 24 * 3600) -> None:
        """Answers that nobody asked for lately are not kept."""
        self._run(
            "DELETE FROM points WHERE asked < ?", time.time() - older_than_seconds
        )

    # Models.

    def report_model(
        self,
        name: str,
        step: int | None,
        classes: Sequence[str],
        ready: bool,
        problem: str | None,
        parameters: str | None = None,
    ) -> None:
        """A worker opened a model, or could not and says why.

        Args:
          parameters: SHA-256 of the checkpoint's, which tells two of one step apart.
        """
        self._run(
            "INSERT INTO models (name, step, classes, ready, problem, parameters) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET step = excluded.step, "
            "classes = excluded.classes, ready = excluded.ready, "
            "problem = excluded.problem, parameters = excluded.parameters",
            *(name, step, json.dumps(list(classes)), ready, problem, parameters),
        )

    def reports(self) -> dict[str, Report]:
        """What workers said of the models since the server started, by name."""
        rows = self._run("SELECT * FROM models")
        return {
            row["name"]: Report(
                **dict(row)
                | {"classes": tuple(json.loads(row["classes"]))}
                | {"ready": bool(row["ready"])}
            )
            for row in rows
        }

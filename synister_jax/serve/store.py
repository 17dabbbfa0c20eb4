# SPDX-License-Identifier: Apache-2.0
"""The memory of the service: jobs, and reports on models.

The memory is one SQLite file (database.py), which the server and its workers open. The
table of jobs is the queue. A worker claims a job with one UPDATE that writes the name
of the worker. If the worker dies, its name shows which jobs must go back into the
queue. Known queues on SQLite (for example huey) remove a task from the table when the
task starts, so they lose the task when its worker dies.
"""

import dataclasses
import json
import pathlib
import secrets
import time
from collections.abc import Collection, Sequence

from synister_jax.serve import tokens
from synister_jax.serve.database import Database
from synister_jax.serve.point_store import PointStore
from synister_jax.serve.records import (
    LimitReached,
    NewJob,
    Report,
    StoredJob,
)

# A job that stopped this many workers is not given to another worker.
MOST_ATTEMPTS = 3

_JOB = ", ".join(field.name for field in dataclasses.fields(StoredJob))
_USED = (
    "SELECT count(*) FILTER (WHERE state IN ('queued', 'running')), "
    "coalesce(sum(bytes), 0) FROM jobs WHERE token_id = ?"
)


class Store:
    """The store in one file, which many threads and processes can use together.

    Args:
      path: The SQLite file. It is created if it does not exist.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.database = Database(path)
        self._run = self.database.run
        self.points = PointStore(self.database)

    def close(self) -> None:
        """Closes all connections; the store cannot be used afterwards."""
        self.database.close()

    # Methods that the server calls for jobs.

    def submit(
        self,
        new: NewJob,
        most_jobs: int,
        most_bytes: int,
        fresh: bool = False,
    ) -> tuple[StoredJob, bool]:
        """Puts a job into the queue, unless the token has a job of the same request.

        Args:
          new: The request.
          most_jobs: The number of unfinished jobs that a token may have.
          most_bytes: The number of bytes that the jobs of a token may take.
          fresh: Make a new job even if a finished job of the same request exists.

        Returns:
          The new or the existing job, and whether the job is new.

        Raises:
          LimitReached: The token has too many unfinished jobs or too many stored bytes.
          Revoked: The token was revoked while the server read the request.
        """
        with self.database.transaction() as connection:
            tokens.require(connection, new.token_id)
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
                    f"you have {jobs:,} unfinished jobs and may have {most_jobs:,}; "
                    "wait until a job has finished, or cancel a job"
                )
            if kept + new.size > most_bytes:
                raise LimitReached(
                    f"your jobs take {kept:,} bytes and may take {most_bytes:,}; "
                    "delete jobs that you do not need"
                )
            [row] = connection.execute(
                # The first columns are in the order of the fields of `NewJob`.
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
        """Returns the number of unfinished jobs of a token, and its stored bytes."""
        [row] = self._run(_USED, token_id)
        return tuple(row)

    def job(self, job_id: str, token_id: int) -> StoredJob | None:
        """Returns the job, or None if this token has no job with this id."""
        rows = self._run(
            f"SELECT {_JOB} FROM jobs WHERE id = ? AND token_id = ?", job_id, token_id
        )
        return StoredJob(**rows[0]) if rows else None

    def job_to_view(self, view_key: str) -> StoredJob | None:
        """Returns the finished job of a view key, or None if there is none.

        No token is needed, because the key itself is the permission. The jobs of a
        revoked token cannot be viewed.
        """
        rows = self._run(
            f"SELECT {_JOB} FROM jobs WHERE view_key = ? AND state = 'done' AND "
            "token_id IN (SELECT id FROM tokens WHERE revoked IS NULL)",
            view_key,
        )
        return StoredJob(**rows[0]) if rows else None

    def jobs(self, token_id: int, most: int = 1000) -> list[StoredJob]:
        """Returns at most `most` jobs of a token, newest first."""
        rows = self._run(
            f"SELECT {_JOB} FROM jobs WHERE token_id = ? ORDER BY number DESC LIMIT ?",
            token_id,
            most,
        )
        return [StoredJob(**row) for row in rows]

    def queue(self) -> list[int]:
        """Returns the numbers of the queued jobs of all tokens, oldest first."""
        rows = self._run(
            "SELECT number FROM jobs WHERE state = 'queued' ORDER BY number"
        )
        return [row["number"] for row in rows]

    def cancel(self, job_id: str, token_id: int) -> StoredJob | None:
        """Cancels a job that is queued or running, and returns the job.

        A job that has ended stays as it is. The result is None if this token has no job
        with this id.
        """
        self._run(
            "UPDATE jobs SET state = 'cancelled', finished = ?, stage = '' WHERE "
            "id = ? AND token_id = ? AND state IN ('queued', 'running')",
            time.time(),
            job_id,
            token_id,
        )
        return self.job(job_id, token_id)

    def delete(self, job_id: str, token_id: int) -> bool:
        """Deletes a job from the store and returns True.

        Returns False if this token has no job with this id, or if the job is running.
        """
        return bool(
            self._run(
                "DELETE FROM jobs WHERE id = ? AND token_id = ? AND state != 'running' "
                "RETURNING id",
                job_id,
                token_id,
            )
        )

    def seconds_a_row(self, model: str) -> float | None:
        """Returns how many seconds the last five jobs of a model took for each row.

        Returns None if no job of this model has finished.
        """
        [row] = self._run(
            "SELECT sum(finished - started) / sum(rows) AS pace FROM (SELECT * FROM "
            "jobs WHERE model = ? AND state = 'done' AND rows > 0 "
            "ORDER BY finished DESC LIMIT 5)",
            model,
        )
        return row["pace"]

    def states(self) -> dict[str, tuple[str, float | None]]:
        """Returns the state and the end time (or None) of every job, by job id."""
        rows = self._run("SELECT id, state, finished FROM jobs")
        return {row["id"]: (row["state"], row["finished"]) for row in rows}

    def emptied(self, job_id: str) -> None:
        """Records that the folder of a failed or cancelled job has been removed."""
        self._run(
            "UPDATE jobs SET bytes = 0 WHERE id = ? AND bytes > 0 AND "
            "state IN ('failed', 'cancelled')",
            job_id,
        )

    # Methods that a worker or the supervisor calls for jobs.

    def claim(self, worker: str, closed: Collection[str] = ()) -> StoredJob | None:
        """Gives the next queued job to a worker; returns None if no job is ready.

        The tokens take turns. The token with the fewest running jobs comes first. Among
        equal tokens, the token whose last turn was longest ago comes first. Within a
        token, the oldest job comes first.

        Args:
          worker: The name of the worker.
          closed: The models that cannot be used now. Their jobs wait.
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
        """Records the progress of a job: `done` of `total` units of a stage.

        Returns False if the worker must stop, because the job is cancelled or belongs
        to another worker now.
        """
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
        """Records that the answer of a job is complete.

        Args:
          job_id: The id of the job.
          worker: The name of the worker.
          rows: The number of rows of the answer.
          size: The size of the answer folder in bytes.

        Returns:
          False, without a change, if the job is cancelled or belongs to another worker
          now. Otherwise True.
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
        """Records that a job failed, with the reason for the user.

        Returns False, without a change, if the job is cancelled or belongs to another
        worker now.
        """
        return bool(
            self._run(
                "UPDATE jobs SET state = 'failed', finished = ?, message = ?, "
                "stage = '' WHERE id = ? AND worker = ? AND state = 'running' "
                "RETURNING id",
                *(time.time(), message, job_id, worker),
            )
        )

    def release(self, job_id: str, worker: str) -> bool:
        """Puts a job back into the queue, because the worker was told to end.

        This attempt is not counted. Returns False, without a change, if the job is
        cancelled or belongs to another worker now.
        """
        return bool(
            self._run(
                "UPDATE jobs SET state = 'queued', worker = NULL, stage = '', "
                "attempts = attempts - 1 WHERE id = ? AND worker = ? AND "
                "state = 'running' RETURNING id",
                *(job_id, worker),
            )
        )

    def requeue_lost(self, workers_alive: Collection[str]) -> int:
        """Puts the jobs and points of dead workers back into their queues.

        A job that stopped `MOST_ATTEMPTS` workers fails instead.

        Args:
          workers_alive: The names of the workers that are running.

        Returns:
          The number of jobs that went back into the queue.
        """
        alive = json.dumps(list(workers_alive))
        lost = "state = 'running' AND worker NOT IN (SELECT value FROM json_each(?))"
        self._run(
            "UPDATE jobs SET state = 'failed', finished = ?, stage = '', message = "
            f"'this job stopped its worker three times' WHERE attempts >= ? AND {lost}",
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
        """Puts all running jobs and points back, because no worker is running.

        The server calls this method when it starts and when it stops. The attempts of
        these jobs are not counted, because the jobs did not stop the server. The
        reports on the models are deleted, so a model is not ready until a worker
        reports it again.

        Returns:
          The number of jobs that went back into the queue.
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

    # Reports on models.

    def report_model(
        self,
        name: str,
        step: int | None,
        classes: Sequence[str],
        ready: bool,
        problem: str | None,
        parameters: str | None = None,
    ) -> None:
        """Stores a worker's report that a model is open or cannot be opened.

        Args:
          name: The name of the model.
          step: The step of the checkpoint, or None if the model cannot be opened.
          classes: The classes of the network.
          ready: Whether the model can be used.
          problem: The reason why the model cannot be used, for users.
          parameters: The SHA-256 of the parameters and the temperature. They separate
            two checkpoints of the same step.
        """
        self._run(
            "INSERT INTO models (name, step, classes, ready, problem, parameters) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET step = excluded.step, "
            "classes = excluded.classes, ready = excluded.ready, "
            "problem = excluded.problem, parameters = excluded.parameters",
            *(name, step, json.dumps(list(classes)), ready, problem, parameters),
        )

    def reports(self) -> dict[str, Report]:
        """Returns the last report on each model since the server started, by name."""
        rows = self._run("SELECT * FROM models")
        return {
            row["name"]: Report(
                **dict(row)
                | {"classes": tuple(json.loads(row["classes"]))}
                | {"ready": bool(row["ready"])}
            )
            for row in rows
        }

# SPDX-License-Identifier: Apache-2.0
"""Decides who may use the service: by a token, or by the session of a browser.

A user signs a browser in with a token, and the browser gets a session. Tokens and
session ids are 32 random bytes each. The store keeps only their SHA-256, so nobody who
reads the file can use a token or a session. A slow hash, as for passwords, is not
needed, because nobody can guess 32 random bytes.
"""

import dataclasses
import hashlib
import hmac
import secrets
import sqlite3
import time

from synister_jax.base.errors import UserError
from synister_jax.serve.database import Database
from synister_jax.serve.records import Revoked

SESSION_SECONDS = 12 * 3600.0
# A session is prolonged only when this much of its time has passed. Then not every
# request writes to the file.
_PROLONG_SECONDS = 300.0
_LONGEST_NAME = 64


@dataclasses.dataclass(frozen=True)
class User:
    """The token that sends a request, directly or in the session of a browser."""

    token_id: int
    name: str
    csrf: str | None  # of the session; None if the request has the token itself


@dataclasses.dataclass(frozen=True)
class Token:
    """The public facts about a token; times are in seconds since 1970."""

    name: str
    created: float
    revoked: float | None
    jobs: int


def add(database: Database, name: str) -> str:
    """Makes a token with a name and returns the token.

    The store keeps only a hash, so the token cannot be shown again later.

    Raises:
      UserError: Another valid token has the name, or the name is empty, too long or not
        printable.
    """
    if not (name.isprintable() and 0 < len(name.strip()) <= _LONGEST_NAME):
        raise UserError(
            f"the token name {name!r} is not valid; give 1 to {_LONGEST_NAME} "
            "printable characters"
        )
    token = secrets.token_urlsafe(32)
    try:
        database.run(
            "INSERT INTO tokens (name, hash, created) VALUES (?, ?, ?)",
            *(name, _hash(token), time.time()),
        )
    except sqlite3.IntegrityError:
        raise UserError(
            f"a token {name!r} exists already; choose another name, or revoke this "
            "token first"
        ) from None
    return token


def revoke(database: Database, name: str) -> int:
    """Revokes a token, ends its sessions and cancels its unfinished jobs.

    Returns:
      The number of jobs that are cancelled.

    Raises:
      UserError: No valid token has this name.
    """
    now = time.time()
    with database.transaction() as connection:
        rows = connection.execute(
            "UPDATE tokens SET revoked = ? WHERE name = ? AND revoked IS NULL "
            "RETURNING id",
            (now, name),
        ).fetchall()
        if not rows:
            raise UserError(
                f"no valid token has the name {name!r}; --list_tokens prints the tokens"
            )
        token_id = rows[0]["id"]
        connection.execute("DELETE FROM sessions WHERE token_id = ?", (token_id,))
        return len(
            connection.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ?, stage = '' WHERE "
                "token_id = ? AND state IN ('queued', 'running') RETURNING id",
                (now, token_id),
            ).fetchall()
        )


def listing(database: Database) -> list[Token]:
    """Returns all tokens, also the revoked ones, oldest first."""
    rows = database.run(
        "SELECT name, created, revoked, (SELECT count(*) FROM jobs WHERE "
        "token_id = tokens.id) AS jobs FROM tokens ORDER BY id"
    )
    return [Token(**row) for row in rows]


def by_token(database: Database, token: str) -> User | None:
    """Returns the user of a token, or None if the token is unknown or revoked."""
    rows = database.run(
        "SELECT id, name, hash FROM tokens WHERE hash = ? AND revoked IS NULL",
        _hash(token),
    )
    if not rows or not same(rows[0]["hash"], _hash(token)):
        return None
    return User(rows[0]["id"], rows[0]["name"], None)


def open_session(database: Database, user: User) -> tuple[str, str]:
    """Opens a session for a user.

    Returns:
      The id of the session, which only the cookie may hold, and the CSRF token, which
      the page sends with its requests.
    """
    session, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    now = time.time()
    database.run("DELETE FROM sessions WHERE expires < ?", now)
    database.run(
        "INSERT INTO sessions VALUES (?, ?, ?, ?)",
        *(_hash(session), user.token_id, csrf, now + SESSION_SECONDS),
    )
    return session, csrf


def by_session(database: Database, session: str) -> User | None:
    """Returns the user of a session, and prolongs the session.

    Returns None if the session is unknown or has expired, or if its token is revoked.
    """
    now = time.time()
    rows = database.run(
        "SELECT sessions.hash, token_id, name, csrf, expires FROM sessions "
        "JOIN tokens ON tokens.id = token_id "
        "WHERE sessions.hash = ? AND expires > ? AND revoked IS NULL",
        *(_hash(session), now),
    )
    if not rows or not same(rows[0]["hash"], _hash(session)):
        return None
    if rows[0]["expires"] < now + SESSION_SECONDS - _PROLONG_SECONDS:
        database.run(
            "UPDATE sessions SET expires = ? WHERE hash = ?",
            *(now + SESSION_SECONDS, _hash(session)),
        )
    return User(rows[0]["token_id"], rows[0]["name"], rows[0]["csrf"])


def close_session(database: Database, session: str) -> None:
    """Deletes a session, because the browser signed out."""
    database.run("DELETE FROM sessions WHERE hash = ?", _hash(session))


def same(given: str, secret: str) -> bool:
    """Returns whether two strings are equal.

    The time of the comparison does not show how many characters are right.
    """
    return hmac.compare_digest(given.encode(), secret.encode())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def require(connection: sqlite3.Connection, token_id: int) -> None:
    """Raises `Revoked` if the token is revoked. Call it inside a transaction."""
    there = "SELECT 1 FROM tokens WHERE id = ? AND revoked IS NULL"
    if not connection.execute(there, [token_id]).fetchall():
        raise Revoked

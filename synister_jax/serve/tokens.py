# SPDX-License-Identifier: Apache-2.0
"""Who may use the service: tokens, and the sessions of browsers that showed one.

A token is 32 random bytes and a session's id too, so what is kept is their plain
SHA-256: there is nothing to guess that a slow hash would protect, as there is in a
password. Whoever reads the file can use neither.
"""

import dataclasses
import hashlib
import hmac
import secrets
import sqlite3
import time

from synister_jax.base.errors import UserError
from synister_jax.serve.database import Database

SESSION_SECONDS = 12 * 3600.0
# A session is prolonged when so much of its time has gone, not at every request.
_PROLONG_SECONDS = 300.0
_LONGEST_NAME = 64


@dataclasses.dataclass(frozen=True)
class User:
    """Who asks: a token, by itself or in a browser's session."""

    token_id: int
    name: str
    csrf: str | None  # of the session; None where the token itself was shown


@dataclasses.dataclass(frozen=True)
class Token:
    """What may be told of a token."""

    name: str
    created: float
    revoked: float | None
    jobs: int


def add(database: Database, name: str) -> str:
    """A new token of that name; only now is it known.

    Raises:
      UserError: a token has the name already, or it cannot be one.
    """
    if not (name.isprintable() and 0 < len(name.strip()) <= _LONGEST_NAME):
        raise UserError(
            f"token name {name!r}: give 1 to {_LONGEST_NAME} printable characters"
        )
    token = secrets.token_urlsafe(32)
    try:
        database.run(
            "INSERT INTO tokens (name, hash, created) VALUES (?, ?, ?)",
            *(name, _hash(token), time.time()),
        )
    except sqlite3.IntegrityError:
        raise UserError(
            f"there is a token {name!r}; choose another name or revoke it first"
        ) from None
    return token


def revoke(database: Database, name: str) -> int:
    """Ends a token, its sessions and its unfinished jobs; how many of these there were.

    Raises:
      UserError: there is no such token.
    """
    now = time.time()
    with database.transaction() as connection:
        rows = connection.execute(
            "UPDATE tokens SET revoked = ? WHERE name = ? AND revoked IS NULL "
            "RETURNING id",
            (now, name),
        ).fetchall()
        if not rows:
            raise UserError(f"there is no token {name!r}; --list_tokens says which are")
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
    """Every token that there is or was, oldest first."""
    rows = database.run(
        "SELECT name, created, revoked, (SELECT count(*) FROM jobs WHERE "
        "token_id = tokens.id) AS jobs FROM tokens ORDER BY id"
    )
    return [Token(**row) for row in rows]


def by_token(database: Database, token: str) -> User | None:
    """None: there is no such token, or no more."""
    rows = database.run(
        "SELECT id, name, hash FROM tokens WHERE hash = ? AND revoked IS NULL",
        _hash(token),
    )
    if not rows or not same(rows[0]["hash"], _hash(token)):
        return None
    return User(rows[0]["id"], rows[0]["name"], None)


def open_session(database: Database, user: User) -> tuple[str, str]:
    """(id, for the cookie alone; CSRF token, for the page)."""
    session, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    now = time.time()
    database.run("DELETE FROM sessions WHERE expires < ?", now)
    database.run(
        "INSERT INTO sessions VALUES (?, ?, ?, ?)",
        *(_hash(session), user.token_id, csrf, now + SESSION_SECONDS),
    )
    return session, csrf


def by_session(database: Database, session: str) -> User | None:
    """None: there is no such session, or it lasted its time without being used."""
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
    """The browser signed out."""
    database.run("DELETE FROM sessions WHERE hash = ?", _hash(session))


def same(given: str, secret: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(), secret.encode())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()

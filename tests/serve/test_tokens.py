# SPDX-License-Identifier: Apache-2.0
"""Tokens and sessions are stored as hashes, and end at once when they are revoked."""

import pathlib
import subprocess
import time
from collections.abc import Iterator

import pytest

from synister_jax.base.errors import UserError
from synister_jax.serve import tokens
from synister_jax.serve.limits import Rate
from synister_jax.serve.records import NewJob
from synister_jax.serve.store import Store
from tests.helpers import commands, serving


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    store = Store(tmp_path / "service.sqlite")
    yield store
    store.close()


def test_a_token_is_known_by_its_hash_alone(
    store: Store, tmp_path: pathlib.Path
) -> None:
    token = tokens.add(store.database, "ann")
    user = tokens.by_token(store.database, token)
    assert (user.name, user.csrf) == ("ann", None)
    for wrong in ("", token[:-1], token + " ", token.upper(), "\udcff", "ann"):
        assert tokens.by_token(store.database, wrong) is None
    session, csrf = tokens.open_session(store.database, user)
    assert tokens.by_session(store.database, session).csrf == csrf
    assert tokens.by_session(store.database, token) is None
    assert tokens.by_token(store.database, session) is None
    for path in tmp_path.iterdir():
        kept = path.read_bytes()
        assert token.encode() not in kept and session.encode() not in kept
        assert path.stat().st_mode & 0o077 == 0


def test_revoking_ends_all_of_it(store: Store) -> None:
    token = tokens.add(store.database, "ann")
    other = tokens.add(store.database, "bob")
    user = tokens.by_token(store.database, token)
    session, _ = tokens.open_session(store.database, user)
    jobs = [
        store.submit(
            NewJob(
                *(f"{n:016x}", user.token_id, "m", "none", "positions", "", 1, 1, 3),
                str(n),
            ),
            most_jobs=9,
            most_bytes=1000,
        )[0]
        for n in range(3)
    ]
    store.claim("w")
    store.finish(jobs[0].id, "w", 1, 10)
    store.claim("w")
    assert store.job_to_view(jobs[0].view_key) is not None
    assert tokens.revoke(store.database, "ann") == 2
    assert tokens.by_token(store.database, token) is None
    assert tokens.by_session(store.database, session) is None
    assert store.job_to_view(jobs[0].view_key) is None
    assert not store.tell(jobs[1].id, "w", "predicting", 1, 2)
    states = [state for state, _ in store.states().values()]
    assert states == ["done", "cancelled", "cancelled"]
    assert tokens.by_token(store.database, other).name == "bob"
    with pytest.raises(UserError, match="no valid token has the name 'ann'"):
        tokens.revoke(store.database, "ann")
    tokens.add(store.database, "ann")  # the name can be used again
    listed = [
        (t.name, t.revoked is None, t.jobs) for t in tokens.listing(store.database)
    ]
    assert listed == [("ann", False, 3), ("bob", True, 0), ("ann", True, 0)]


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 65, "\x1b[31m"])
def test_names_that_cannot_be_shown(store: Store, name: str) -> None:
    with pytest.raises(UserError, match="printable"):
        tokens.add(store.database, name)


def test_a_name_is_given_once(store: Store) -> None:
    tokens.add(store.database, "ann")
    with pytest.raises(UserError, match="a token 'ann' exists already"):
        tokens.add(store.database, "ann")


@pytest.mark.long
def test_sessions_end_when_they_are_not_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tokens.by_token(store.database, tokens.add(store.database, "ann"))
    session, _ = tokens.open_session(store.database, user)
    start, hour = time.time(), 3600.0
    for hours, there in ((11, True), (22, True), (33, True), (45.1, False)):
        now = start + hours * hour
        monkeypatch.setattr(tokens.time, "time", lambda now=now: now)
        assert (tokens.by_session(store.database, session) is not None) == there
    session, _ = tokens.open_session(store.database, user)
    tokens.close_session(store.database, session)
    assert tokens.by_session(store.database, session) is None


def test_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("synister_jax.serve.limits.time.monotonic", lambda: now[0])
    rate = Rate(60, 3)
    assert [rate.wait("a") for _ in range(5)] == [0, 0, 0, 1, 1]
    assert rate.wait("b") == 0
    now[0] += 1.5
    assert [rate.wait("a") for _ in range(2)] == [0, 0.5]
    now[0] += 1000
    assert [rate.wait("a") for _ in range(4)] == [0, 0, 0, 1]


def test_the_command_line(tmp_path: pathlib.Path) -> None:
    serving.write_models(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        module = "synister_jax.serve"
        return commands.run("-m", module, f"--models={tmp_path}", *arguments)

    made = run("--add_token=ann")
    assert made.returncode == 0
    store = Store(tmp_path / "service" / "service.sqlite")
    assert tokens.by_token(store.database, made.stdout.strip()).name == "ann"
    listed = run("--list_tokens")
    assert listed.stdout.startswith("ann\tin use\tmade ")
    assert made.stdout.strip() not in listed.stdout
    ended = run("--revoke_token=ann")
    assert "0 unfinished jobs" in ended.stdout
    assert tokens.by_token(store.database, made.stdout.strip()) is None
    store.close()
    again = run("--revoke_token=ann")
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert run("--port=99999").returncode == 2
    assert (tmp_path / "service").stat().st_mode & 0o077 == 0

# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or absent: write under another name, then rename."""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import csv, feather

from synister_jax.base.errors import UserError


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], several_writers: bool = False
) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`, and renames it to `path` at the end.

    A killed process leaves its file under the temporary name. The next process
    overwrites that file.

    Args:
      several_writers: other processes may write the same file at the same time. Then
        each uses its own temporary name, and what killed processes leave stays.

    Raises:
      UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    own = f".{uuid.uuid4().hex}" if several_writers else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        if several_writers and isinstance(error, FileNotFoundError) and path.exists():
            return  # another process wrote it and removed the temporary files
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise _not_written(path, error) from None


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty folder next to `path`, and renames it to `path` at the end.

    Until then the old folder stays. What a killed process left is removed.

    Raises:
      UserError: the folder cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    replaced = path.with_name(path.name + ".replaced")
    make_folder(path.parent)
    try:
        if replaced.exists() and not path.exists():  # killed between the two renames
            replaced.rename(path)
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        yield partial
        os.sync()  # the files must be on the disk before their names
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise _not_written(path, error) from None


def _not_written(path: pathlib.Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write {path} ({reason}); fix that and run it again")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], unique_keys: bool = False) -> Any:
    """Returns the content of a JSON file.

    Args:
      unique_keys: refuse an object that has a key twice. Otherwise the last one counts.

    Raises:
      UserError: the file does not exist or is not JSON.
    """
    hook = _unique if unique_keys else None
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=hook)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is there twice")
    return content


def write_feather(
    path: str | os.PathLike[str], table: pa.Table, several_writers: bool = False
) -> None:
    with replacing(path, several_writers) as partial:
        feather.write_feather(table, str(partial), compression="zstd")


@contextlib.contextmanager
def locked(folder: pathlib.Path, wait: bool = False) -> Iterator[None]:
    """Locks the folder for this process. A killed process loses its lock, too.

    Args:
      wait: wait while another process holds the lock.

    Raises:
      UserError: another process holds the lock, or the lock cannot be opened.
    """
    path = folder / ".lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise _not_written(path, error) from None
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise UserError(
                        f"another process is at work in {folder}: wait for it, or "
                        "choose another folder"
                    ) from None
                print(f"waiting for another process in {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # this file system has no locks
        yield


def sha256_of_columns(table: pa.Table, names: Sequence[str]) -> str:
    """Returns the sha256 of the rows as text. Chunks and file formats do not matter."""
    sink = pa.BufferOutputStream()
    csv.write_csv(table.select(names), sink)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def scratch(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields an empty folder next to `path` for temporary files, and removes it.

    A killed process leaves the folder. The next process removes it.
    """
    path = pathlib.Path(path)
    folder = path.with_name(path.name + ".tmp")
    make_folder(path.resolve().parent)
    remove(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_other(
    output: str | os.PathLike[str], source: str | os.PathLike[str]
) -> None:
    """Raises `UserError` if `output` would replace the file that it is made from."""
    if pathlib.Path(output).resolve() == pathlib.Path(source).resolve():
        raise UserError(f"--output={output} is the input; name another file")


def remove(path: pathlib.Path) -> None:
    """Removes a file, or a folder with everything in it. It may be absent."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Creates the folder, checks that files can be written there, and returns it.

    Raises:
      UserError: the folder cannot be created or written to.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        # A process on another host may have the same number and have removed it.
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}); choose another folder"
        ) from None
    return path

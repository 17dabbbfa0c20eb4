# SPDX-License-Identifier: Apache-2.0
"""Tests what a user sees of a command: flags, exit codes, one line for a mistake."""

import os
import pathlib
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from tests.helpers import commands
from tests.helpers.small_data import ROOT

TRAIN = ["-m", "synister_jax.train", "--config=configs/demo.py"]
SHARD = ["tools/shard_crops.py", "--config=configs/demo.py"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command.

    `train` runs in a new process, because a mistake in it ends the whole process.
    """
    if "synister_jax.train" not in arguments or "--help" in arguments:
        return commands.run(*arguments)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*TRAIN, "--workdir=HERE/w", "--config.learning_rat=1"], 2, "learning_rat"),
        ([*TRAIN, "--workdir=HERE/w", "--config.batch_size=many"], 2, "batch_size"),
        ([*TRAIN], 2, "flags: --workdir is missing; --help explains it"),
        ([*TRAIN, "--workdir=HERE/w", "extra"], 2, "unexpected argument 'extra'"),
        (
            ["-m", "synister_jax.train", "--config=no.py", "--workdir=HERE/w"],
            2,
            "no.py",
        ),
        ([*TRAIN, "--workdir=HERE/w"], 1, "give --config.shards=FOLDER"),
        (
            [*TRAIN, "--workdir=HERE/w", "--config.shards=no"],
            1,
            "shards no are not there",
        ),
        ([*SHARD, "--synapses=no", "--volume=v", "--output=o"], 1, "no does not exist"),
        (["-m", "synister_jax.evaluate", "--workdir=no"], 1, "not the folder of a run"),
        (["-m", "synister_jax.report", "--output=o.html"], 1, "give --workdir"),
        ([*TRAIN[:2], f"--config={__file__}", "--workdir=HERE/w"], 2, "get_config"),
        (
            [
                "-m",
                "synister_jax.aggregate",
                "--predictions=no.feather",
                "--output=o.feather",
            ],
            1,
            "cannot read predictions no.feather",
        ),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: pathlib.Path, arguments: list[str], code: int, message: str
) -> None:
    finished = run(*(text.replace("HERE", str(tmp_path)) for text in arguments))
    assert finished.returncode == code, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("train", "--workdir"),
        ("evaluate", "--part"),
        ("predict", "--volume"),
        ("aggregate", "--by"),
        ("report", "--predictions"),
        ("compare", "--tolerance_nm"),
    ],
)
def test_help_lists_the_flags(module: str, flag: str) -> None:
    finished = run("-m", f"synister_jax.{module}", "--help")
    assert flag in finished.stdout and "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "flags: A B missing; give A B"),
        (["a"], "flags: B missing; give A B"),
        (["a", "b", "c"], "flags: unexpected argument 'c'; options start with --"),
    ],
)
def test_arguments_without_a_flag_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *given])
    with pytest.raises(SystemExit) as caught:
        command.run(pytest.fail, positional=("A", "B"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"program: {message}\n"


def test_arguments_without_a_flag_are_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "a", "--verbosity=0", "b"])
    found = []
    with pytest.raises(SystemExit) as caught:
        command.run(lambda *given: found.append(given), positional=("A", "B"))
    assert not caught.value.code and found == [("a", "b")]


def test_files_are_whole_or_absent(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "before")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    files.write_text(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "after"


def test_unwritable_output_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file/folder"):
        files.make_folder(tmp_path / "file" / "folder")


@pytest.mark.long
def test_progress_tells_rate_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("work", 1_000, "things", every_seconds=0)
    time.sleep(1)  # like a compilation, which must not spoil the ETA
    progress.add()
    progress.add(99)
    progress.note = "nearly"
    progress.add(900)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "work: 1/1,000 things, ETA not known yet"
    assert re.fullmatch(r"work: 100/1,000 things, [\d,.]+/s, ETA 0:0\d", second)
    assert re.fullmatch(r"work: 1,000/1,000 things, .*/s, in 0:01, nearly", last)


def test_progress_without_a_total_ends_with_all_that_was_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("read", None, "rows", silent=True) as silent:
        silent.add(3)
    with Progress("read", None, "rows") as progress:
        progress.add(3)
    assert re.fullmatch(r"read: 3 rows, .*/s, in 0:00\n", capsys.readouterr().out)


def test_progress_is_a_bar_on_a_terminal() -> None:
    code = """if True:
        from synister_jax.base import progress
        work = progress.Progress("work", 4, "things")
        work.add()
        progress.say("a line")
        work.add(3)
    """
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 80))
    subprocess.run([sys.executable, "-c", code], stdout=child, check=True)
    os.close(child)
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert "█████                work: 1/4 things" in shown
    assert "a line" in shown.replace("\r", "\n").splitlines()
    assert "████████████████████ work: 4/4 things" in shown

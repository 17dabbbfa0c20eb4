# SPDX-License-Identifier: Apache-2.0
"""Runs a command as a user types it, inside the process of the tests.

A new process would import JAX again, which takes seconds. Tests that kill a command,
run two commands at once, or count imports start a new process instead.
"""

import contextlib
import importlib.util
import io
import pathlib
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping

import pytest
from absl import app
from absl.testing import flagsaver

_ROOT = pathlib.Path(__file__).resolve().parents[2]

app.define_help_flags()  # absl does this only in its first run


def run(
    *arguments: str, check: bool = False, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`: `-m MODULE` or a script of the repository, and flags.

    Args:
      arguments: the words after `python`. The path of the interpreter may come first,
        as in a list for `subprocess`.
      check: fail unless the exit code is 0.
      environment: variables that the command gets besides those of this process.
    """
    given = [text for text in arguments if text != sys.executable]
    if given[0] == "-m":
        spec = importlib.util.find_spec(given[1])
        if spec is not None and spec.submodule_search_locations:  # a package
            spec = importlib.util.find_spec(f"{given[1]}.__main__")
        assert spec is not None and spec.origin is not None
        path, given = spec.origin, given[2:]
    else:
        path, given = str(_ROOT / given[0]), given[1:]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(_ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        flagsaver.flagsaver(),  # forgets the flags that the command defines
    ):
        patch.setattr(sys, "argv", [path, *given])
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(pathlib.Path(path).parent))  # tools import each other
        code = _exit_code(path)
    if check:
        assert code == 0, err.getvalue()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def _exit_code(path: str) -> int:
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        return 0 if error.code is None else int(error.code)
    except Exception:
        traceback.print_exc()
        return 1
    return 0

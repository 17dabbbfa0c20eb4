# SPDX-License-Identifier: Apache-2.0
"""Tests that commands import heavy packages only when they need them.

An import can cost seconds at every start of a command, in every test and every job.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.helpers.prediction_tables import drawn, write
from tests.helpers.small_data import CLASSES, ROOT

# The import of each takes from a quarter of a second to five seconds.
HEAVY = (
    *("array_record", "distributed", "fastapi", "flax", "grain", "jax", "matplotlib"),
    *("optax", "orbax", "pandas", "scipy", "tensorboard", "torch", "uvicorn"),
)
COMMANDS = sorted(
    f"synister_jax.{path.stem}"
    for path in (ROOT / "synister_jax").glob("*.py")
    if path.stem != "__init__"
)
TOOLS = sorted(
    f"tools/{path.name}"
    for path in (ROOT / "tools").glob("*.py")
    if "command.run(" in path.read_text(encoding="utf-8")
)
# The first argument is the path of the program. The last line that is printed lists the
# packages that the program has imported.
_RUN = """
import json, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    assert error.code in (0, 1), error.code  # absl exits with 1 after --help
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
_COMMANDS_ON_TABLES = """
import json, sys
from tests.helpers import commands
for arguments in json.loads(sys.argv[1]):
    commands.run(*arguments, check=True)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
_EVERY_MODULE = """
import importlib, json, pkgutil, sys
import synister_jax

for found in pkgutil.walk_packages(synister_jax.__path__, "synister_jax."):
    if found.name != "synister_jax.network.torch_weights":
        importlib.import_module(found.name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def _imported(code: str, *arguments: str) -> set[str]:
    """The packages that a new process has imported after it ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_command_is_here() -> None:
    assert len(COMMANDS) >= 10 and len(TOOLS) >= 8


@pytest.mark.parametrize("name", [*COMMANDS, "synister_jax.serve", *TOOLS])
def test_help_imports_nothing_heavy(name: str) -> None:
    path = pathlib.Path(name)
    if path.suffix != ".py":
        path = pathlib.Path(*name.split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    subcommand = ["load"] if path.stem == "import_mongo" else []
    found = _imported(_RUN, str(ROOT / path), *subcommand, "--help")
    assert "absl" in found and found.isdisjoint(HEAVY), found & set(HEAVY)


def test_commands_on_tables_need_neither_jax_nor_torch(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, drawn(2_000, neurons=30), rows=500)
    confusion = tmp_path / "metrics.json"
    counts = [[90, 6, 4], [5, 85, 10], [8, 2, 90]]
    levels = {"synapses": {"confusion": counts}, "neurons": {"confusion": counts}}
    correlation = {"synapses_within_neurons": 0.1}
    content = {"classes": CLASSES, "correlation": correlation, **levels}
    confusion.write_text(json.dumps(content))
    given, using = f"--predictions={path}", f"--confusion={confusion}"

    def command(name: str, *more: str) -> list[str]:
        output = f"--output={tmp_path}/{name}.feather"
        return ["-m", f"synister_jax.{name}", *more, output]

    done = [
        command("aggregate", given, "--rule=flyem", using),
        command("one_transmitter", given, using, "--draws=99"),
        command("export", given, "--to=flyem", using, "--voxel_size_nm_zyx=40,4,4"),
        command("compare", path, path),
        command("evaluate", given),
    ]
    found = _imported(_COMMANDS_ON_TABLES, json.dumps(done))
    assert "pyarrow" in found and found.isdisjoint({"jax", "torch"})


def test_only_the_import_of_weights_needs_torch() -> None:
    found = _imported(_EVERY_MODULE)
    assert "jax" in found and "torch" not in found

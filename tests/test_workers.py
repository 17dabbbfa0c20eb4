# SPDX-License-Identifier: Apache-2.0
"""Units on real worker processes; one of them is killed."""

import os
import pathlib
import subprocess
import time

import psutil
import pyarrow as pa
import pytest
from pyarrow import feather
from test_predict import output_files, run_command


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> pathlib.Path:
    """The answer of one process; `table.feather` beside it is the question."""
    folder = tmp_path_factory.mktemp("alone")
    feather.write_feather(synapse_table, str(folder / "table.feather"))
    command = run_command(
        trained_run, folder / "table.feather", volume_path, folder / "out"
    )
    subprocess.run(command, check=True, capture_output=True)
    return folder / "out"


def command_like(
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume: pathlib.Path,
    out: pathlib.Path,
) -> list[str]:
    return run_command(trained_run, alone.parent / "table.feather", volume, out)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The Python processes that a command's cluster has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # has just ended
            pass
    return found


@pytest.mark.slow
def test_a_worker_killed_in_a_unit_changes_nothing(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
) -> None:
    command = command_like(alone, trained_run, volume_path, tmp_path)
    process = subprocess.Popen(
        [*command, "--cluster=local", "--workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(list(tmp_path.glob("parts/*.feather"))) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    killed = workers_of(process)[0]
    killed.kill()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output_files(tmp_path) == output_files(alone)


@pytest.mark.slow
def test_what_a_unit_raises_is_one_line(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
) -> None:
    """A part that cannot be written, as on a full disk."""
    in_the_way = tmp_path / "parts" / "part-000007-of-000030.feather"
    in_the_way.mkdir(parents=True)
    command = command_like(alone, trained_run, volume_path, tmp_path)
    command += ["--cluster=local", "--workers=1"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "cannot write" in finished.stderr and in_the_way.name in finished.stderr
    assert "Traceback" not in finished.stderr
    in_the_way.rmdir()
    subprocess.run(command, check=True, capture_output=True)
    assert output_files(tmp_path) == output_files(alone)


@pytest.mark.slow
def test_jobs_of_a_queue(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
) -> None:
    """dask-jobqueue itself; its sbatch starts the job's script on this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f"#!/bin/sh\nsetsid sh $1 > {tmp_path}/$$.log 2>&1 & \n"
        'echo "Submitted batch job $!"\n'
    )
    (tools / "scancel").write_text('#!/bin/sh\nkill -TERM -- "-$1"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"DASK_JOBQUEUE__SLURM__MEMORY": "2GB"}
    out = tmp_path / "out"
    command = [*command_like(alone, trained_run, volume_path, out), "--cluster=slurm"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "sbatch is not" in refused.stderr
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert output_files(out) == output_files(alone)
    assert len(list(tmp_path.glob("*.log"))) == 2  # of --workers


@pytest.mark.slow
def test_an_array_of_jobs(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
) -> None:
    """Three processes at once, none of which has a plan to begin with."""
    command = command_like(alone, trained_run, volume_path, tmp_path)
    early = subprocess.run([*command, "--units=2/3"], capture_output=True, text=True)
    assert early.returncode == 0, early.stderr
    assert len(list(tmp_path.glob("parts/*.feather"))) == 10
    assert "without --units" in early.stdout
    assert not (tmp_path / "predictions.feather").exists()
    jobs = [subprocess.Popen([*command, f"--units={i}/3"]) for i in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert len(list(tmp_path.glob("parts/*.feather"))) == 30
    subprocess.run(command, check=True, capture_output=True)
    assert output_files(tmp_path) == output_files(alone)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--units=3/3", "I from 0 to N - 1"),
        ("--units=one", "I from 0 to N - 1"),
        ("--cluster=pbs", "--cluster=pbs"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    option: str,
    message: str,
) -> None:
    command = [*command_like(alone, trained_run, volume_path, tmp_path), option]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1 and message in finished.stderr

# SPDX-License-Identifier: Apache-2.0
"""Units are computed by real worker processes, and one of these is killed."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import psutil
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.bulk import dask_cluster, planning, prediction, worker_inputs
from tests.helpers import commands
from tests.helpers.predict_command import output_files, run_command


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> pathlib.Path:
    """The answer of one process, next to the table it is for, `table.feather`."""
    folder = tmp_path_factory.mktemp("alone")
    feather.write_feather(synapse_table, str(folder / "table.feather"))
    command = run_command(
        trained_run, folder / "table.feather", volume_path, folder / "out"
    )
    commands.run(*command, check=True)
    return folder / "out"


def command_like(
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume: pathlib.Path,
    out: pathlib.Path,
) -> list[str]:
    return run_command(trained_run, alone.parent / "table.feather", volume, out)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns the Python processes that a command's cluster has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # the process has just ended
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
    """A part cannot be written, as on a full disk; the error is one line."""
    in_the_way = tmp_path / "parts" / "part-000007-of-000030.feather"
    in_the_way.mkdir(parents=True)
    command = command_like(alone, trained_run, volume_path, tmp_path)
    command += ["--cluster=local", "--workers=1"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "cannot write" in finished.stderr and in_the_way.name in finished.stderr
    assert "Traceback" not in finished.stderr
    in_the_way.rmdir()
    commands.run(*command, check=True)
    assert output_files(tmp_path) == output_files(alone)


@pytest.fixture
def queue(tmp_path: pathlib.Path) -> dict[str, str]:
    """An environment with a queue, whose `sbatch` runs the jobs on this machine.

    The file `jobs` in `tmp_path` lists the process groups of the jobs.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f"#!/bin/sh\ncp $1 {tmp_path}/$$.job\n"  # the script may be deleted
        f"setsid sh {tmp_path}/$$.job > {tmp_path}/$$.log 2>&1 &\n"
        f'echo $! >> {tmp_path}/jobs\necho "Submitted batch job $!"\n'
    )
    (tools / "scancel").write_text('#!/bin/sh\nkill -TERM -- "-$1"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    return os.environ | {"DASK_JOBQUEUE__SLURM__MEMORY": "2GB", "PATH": path}


def wait_for_part(out: pathlib.Path, process: subprocess.Popen) -> None:
    while not any(out.glob("parts/*.feather")):
        assert process.poll() is None
        time.sleep(0.001)


@pytest.mark.slow
def test_a_job_that_is_lost_is_replaced(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    queue: dict[str, str],
) -> None:
    """With the real dask-jobqueue, the command is stopped and later a job is killed."""
    out = tmp_path / "out"
    command = command_like(alone, trained_run, volume_path, out)
    command += ["--cluster=slurm", "--workers=1"]
    # The command looks at the workers every half minute, which is too slow for a test.
    # In the background of a shell, SIGINT is ignored, so its handler is set here.
    runner = (
        "import runpy, signal, sys; from synister_jax.bulk import dask_cluster; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "dask_cluster._LOOK_SECONDS = 1; sys.argv = sys.argv[1:]; "
        "runpy.run_module('synister_jax.predict', run_name='__main__', alter_sys=True)"
    )
    command[1:3] = ["-c", runner, "predict"]
    elsewhere = [*command, f"--output={tmp_path}/stopped", "--unit_rows=1"]
    process = subprocess.Popen(elsewhere, env=queue, stdout=subprocess.DEVNULL)
    wait_for_part(tmp_path / "stopped", process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130

    process = subprocess.Popen(
        command, env=queue, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_part(out, process)
    jobs = (tmp_path / "jobs").read_text().split()
    os.killpg(int(jobs[-1]), signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert len((tmp_path / "jobs").read_text().split()) > len(jobs)
    assert output_files(out) == output_files(alone)


@pytest.mark.long
def test_a_plan_made_anew_is_not_the_old_one(
    tmp_path: pathlib.Path, alone: pathlib.Path, trained_run: pathlib.Path
) -> None:
    """A worker that is older than a plan notices that the plan was replaced."""
    record = json.loads((alone / "predictions.json").read_text())
    job = worker_inputs.Inputs(
        ((str(trained_run), 40),),
        4,
        1,
        record["volume"],
        None,
        str(shutil.copytree(alone, tmp_path / "copy")),
        False,
    )
    plan = planning.open(tmp_path / "copy")
    there = job.elsewhere(plan)
    assert worker_inputs.execute_unit(there, 0).synapses == 0  # its part exists
    changed = json.loads((tmp_path / "copy" / "plan.json").read_text())
    changed["synapses_sha256"] = "another table"
    (tmp_path / "copy" / "plan.json").write_text(json.dumps(changed))
    anew = planning.open(tmp_path / "copy")
    with pytest.raises(UserError, match="the plan was replaced"):
        worker_inputs.execute_unit(dataclasses.replace(there, batch_size=8), 0)
    assert worker_inputs.execute_unit(job.elsewhere(anew), 0).synapses == 3


@pytest.mark.long
def test_an_array_of_jobs(
    tmp_path: pathlib.Path,
    alone: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
) -> None:
    """Three jobs of an array share the units; no plan exists when they start."""
    command = command_like(alone, trained_run, volume_path, tmp_path)
    early = commands.run(*command, "--units=2/3")
    assert early.returncode == 0, early.stderr
    assert len(list(tmp_path.glob("parts/*.feather"))) == 10
    assert "without --units" in early.stdout
    assert not (tmp_path / "predictions.feather").exists()
    jobs = [subprocess.Popen([*command, f"--units={i}/3"]) for i in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert len(list(tmp_path.glob("parts/*.feather"))) == 30
    commands.run(*command, check=True)
    assert output_files(tmp_path) == output_files(alone)


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--units=one", "I from 0 to N - 1"),
        ("--cluster=slurm", "sbatch is not on this machine"),
        ("--step_nm_zyx=1,1,1", "--step_nm_zyx means nothing with the other"),
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
    finished = commands.run(*command)
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1 and message in finished.stderr


def test_what_the_flags_may_say(trained_run: pathlib.Path) -> None:
    run = str(trained_run)
    assert prediction.members_of([run], []) == [(run, 40)]
    assert prediction.members_of([run, run], ["20", "40"]) == [(run, 20), (run, 40)] * 2
    for workdirs, steps, message in (
        ([run], ["21"], "no checkpoint of step 21"),
        ([run], ["best", "last"], "--step=last: give a number or `best`"),
        ([run], ["all"], "--step=all"),
        ([], [], "--workdir is empty"),
        (["/nowhere"], ["best"], "/nowhere is not the folder of a run"),
    ):
        with pytest.raises(UserError, match=message):
            prediction.members_of(workdirs, steps)
    assert prediction.units_of(None, 7) == range(7)
    shares = [prediction.units_of(f"{i}/3", 7) for i in range(3)]
    assert [unit for share in shares for unit in share] == list(range(7))
    for text in ("3/3", "3", "-1/3", "a/b"):
        with pytest.raises(UserError, match="I from 0 to N - 1"):
            prediction.units_of(text, 7)
    dask_cluster.check("local")
    dask_cluster.check("tcp://host:8786")
    message = "--cluster=pbs: the cluster is unknown; give local, slurm, lsf or"
    with pytest.raises(UserError, match=message):
        dask_cluster.check("pbs")

# SPDX-License-Identifier: Apache-2.0
"""Tests training in several processes, which have their own devices and use TCP."""

import pathlib
import signal
import socket
import subprocess
import time

import ml_collections
import numpy as np
import pytest

from synister_jax.network import checkpoint
from synister_jax.training import metrics_log
from tests.helpers import runs
from tests.helpers.small_data import tiny_config


@pytest.fixture
def config(shards_folder: pathlib.Path) -> ml_collections.ConfigDict:
    """A configuration without warp and rotation, which test_train tests on devices."""
    config = tiny_config()
    config.shards = str(shards_folder)
    config.learning_rate = 1e-4
    config.batch_size = 24
    config.accumulate_steps = 2
    config.ema_decay = 0.9
    return config


def start_all(command: list[str], processes: int, devices: int) -> list:
    """Starts the command in several processes with `devices` devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
    return [
        runs.start([*command, *together, f"--process_index={i}"], devices)
        for i in range(processes)
    ]


def assert_agree(workdirs: list[pathlib.Path], step: int, config: object) -> None:
    """Asserts that arrays differ by at most 3 % of their largest number.

    Adam divides by the size of gradients, which enlarges the rounding errors of small
    gradients. A bias before a batch norm has gradient 0, so that its steps are nothing
    but rounding errors. Such biases are not compared.
    """
    first, second = (runs.saved_state(workdir, step, config) for workdir in workdirs)
    assert first.keys() == second.keys() and first[".step"] == second[".step"] == step
    for name, values in first.items():
        if "_conv" in name and "bias" in name:
            continue
        atol = 0.03 * np.abs(values).max()
        np.testing.assert_allclose(second[name], values, 0, atol, err_msg=name)


def finish(started: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=400)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.mark.slow
def test_two_processes_equal_one(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    """Two processes with two devices each train like one process with four devices.

    In the run of two processes, groups of two devices share the head. Afterwards one
    process continues this run, as when a run is resumed.
    """
    config.num_train_steps = 8
    one = runs.command(tmp_path, config, tmp_path / "one")
    [output] = finish([runs.start(one, 4)])
    assert "4 cpu device(s) in 1 process(es)" in output
    config.num_train_steps = 6
    config.head_devices = 2
    two = runs.command(tmp_path, config, tmp_path / "two")
    outputs = finish(start_all(two, 2, 2))
    assert "4 cpu device(s) in 2 process(es)" in outputs[0]
    assert "step 6" in outputs[0] and "step" not in outputs[1]  # only one prints
    logs = [metrics_log.read(tmp_path / name) for name in ("one", "two")]
    assert logs[1][-1]["step"] == 6
    first = [line for line in logs[0] if line["step"] <= 6]
    for a, b in zip(first, logs[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_agree([tmp_path / "one", tmp_path / "two"], 6, config)

    config.head_devices = 1
    config.num_train_steps = 8
    finish([runs.start(runs.command(tmp_path, config, tmp_path / "two"))])
    assert_agree([tmp_path / "one", tmp_path / "two"], 8, config)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_in_both(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 100_000
    config.checkpoint_every_steps = config.eval_every_steps = 100_000
    command = runs.command(tmp_path, config, tmp_path / "run")
    started = start_all(command, 2, 2)
    while len(metrics_log.read(tmp_path / "run")) < 5:
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    outputs = finish(started)
    [step] = checkpoint.steps(tmp_path / "run")
    assert f"SIGTERM: saved at step {step}" in outputs[0]

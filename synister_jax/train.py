# SPDX-License-Identifier: Apache-2.0
r"""Trains a network on shards.

    python -m synister_jax.train --config=configs/skeleton.py --workdir=runs/skeleton \
        --config.shards=/data/fafb/shards

The same command continues a run that was stopped, exactly from its last checkpoint.
After the signal SIGTERM the run saves a checkpoint and ends. To train on several
machines, start the command on each of them: with `--coordinator=auto` under Slurm, Open
MPI or on a TPU pod, otherwise with `--coordinator=HOST:PORT --processes=N
--process_index=I`. All machines must see the same --workdir.
"""

from absl import flags
from ml_collections import config_flags

from synister_jax.base import command
from synister_jax.base.errors import UserError


def main() -> None:
    config = config_flags.DEFINE_config_file(
        "config",
        lock_config=True,
        help_string="Train with the settings of this Python file, for example "
        "configs/skeleton.py. --config.NAME=VALUE changes one of them.",
    )
    flags.mark_flag_as_required("config")
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Write the run (checkpoints, logs, its settings) into this folder. If the "
        "folder holds this run already, continue it.",
        required=True,
    )
    coordinator = flags.DEFINE_string(
        "coordinator",
        None,
        "Train together with other processes that find each other at this address: the "
        "HOST:PORT of process 0, or `auto` to ask Slurm, Open MPI or the TPU pod.",
    )
    processes = flags.DEFINE_integer(
        "processes",
        None,
        "Train on this many processes together. Every process gets the same number.",
        lower_bound=1,
    )
    index = flags.DEFINE_integer(
        "process_index",
        None,
        "Start the process with this number, from 0 to --processes - 1.",
        lower_bound=0,
    )

    def run() -> None:
        many = processes.value is not None or index.value is not None
        if many and coordinator.value is None:
            raise UserError("--processes and --process_index need --coordinator")
        # JAX takes seconds to import: --help and wrong flags answer without it.
        from synister_jax.training import training_run

        training_run.start(
            config.value, workdir.value, coordinator.value, processes.value, index.value
        )

    command.run(run, abandon_threads=True)


if __name__ == "__main__":
    main()

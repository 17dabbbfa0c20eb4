# SPDX-License-Identifier: Apache-2.0
"""A training run: from its first step, or its last checkpoint, to its end."""

import math
import pathlib

import grain
import jax
import jax.numpy as jnp
import ml_collections
import optax

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint, convolution, inference, model, sharding
from synister_jax.training import (
    input_pipeline,
    loss_and_optimizer,
    metrics_log,
    monitor,
    stopping,
    train_step,
)
from synister_jax.training.validation import SplitPart


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the numbers of the config.

    Raises:
      UserError: a number that makes no sense, such as a batch size of 0.
    """
    for name, value in config.items():
        counted = name.endswith("_every_steps") or name in (
            "num_train_steps",
            "accumulate_steps",
            "batch_size",
            "keep_latest",
        )
        if counted and value < 1:
            raise UserError(f"config.{name} is {value}; it must be at least 1")
    for name in ("seed", "early_stop_evals"):
        if config[name] < 0:
            raise UserError(f"config.{name} is {config[name]}; it must not be negative")
    loss_and_optimizer.check(config)


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains until `config.num_train_steps`, from the last checkpoint if there is one.

    Args:
      config: the settings; configs/skeleton.py explains each of them.
      workdir: the folder of the run.

    Raises:
      UserError: the settings, the shards or the folder cannot be used; the numbers
        diverge; or a file cannot be read or written. The last checkpoint is complete.
    """
    check(config)
    # ---------------------------------------------------------------- mesh
    mesh = sharding.make_mesh(head_devices=config.head_devices)
    sharding.require_divisible(config.batch_size, mesh, config.accumulate_steps)

    # ---------------------------------------------------------------- data
    shards = input_pipeline.open_shards(config)
    examples = input_pipeline.TrainBatches.of(shards, config)
    validation = SplitPart.of(shards, config.split, "validation")

    # ---------------------------------------------------------------- model and state
    network = model.from_config(config, sharding.head_input(mesh))
    tx = loss_and_optimizer.make_optimizer(config)
    init_key = jax.random.key(config.seed)
    abstract = sharding.abstract_state(
        jax.eval_shape(lambda key: train_step.create_state(key, config, tx), init_key),
        mesh,
    )
    placed = sharding.shardings(abstract)
    step_fn = train_step.jit_step(config, network, tx, placed)

    # ---------------------------------------------------------------- restore
    workdir = files.make_folder(workdir).resolve()
    config.shards = str(shards.folder.resolve())
    crops_sha256 = shards.sha256(config.split)
    checkpoint.require_same_config(workdir, config, crops_sha256)
    checkpointer = checkpoint.Checkpointer(workdir, config, crops_sha256)
    state = checkpointer.restore(abstract)
    if state is None:
        state = _first_state(config, tx, init_key, placed)
    first_step = int(state.step)  # the only time that the step leaves the device
    if first_step > config.num_train_steps:
        raise UserError(
            f"{workdir} is at step {first_step} already, beyond "
            f"config.num_train_steps = {config.num_train_steps}; set a larger number, "
            "or choose another --workdir"
        )
    if jax.process_index() == 0:
        checkpoint.save_config(workdir, config, crops_sha256)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    monitor.say(
        f"{parameters:,} parameters, {len(shards.index):,} crops, "
        f"{mesh.size} {jax.default_backend()} device(s) in {jax.process_count()} "
        f"process(es), step {first_step} of {config.num_train_steps}"
    )

    # ---------------------------------------------------------------- loop
    patience = stopping.Patience(
        config.early_stop_evals, _validated(workdir, first_step)
    )
    log = monitor.Monitor(config, workdir, examples, first_step)
    classify = inference.make_classify(config, mesh)
    batches = examples.stream(first_step, sharding.batch(mesh))

    def validate(step: int) -> dict[str, float]:
        measured = log.validate(step, validation, classify, state, mesh)
        patience.add(step, measured[checkpoint.BEST_BY])
        return measured

    try:
        if (
            first_step % config.eval_every_steps == 0
            and patience.last_step < first_step
        ):
            validate(first_step)  # the run was stopped before it could validate
        with stopping.StopRequest() as stop:
            for step in range(first_step, config.num_train_steps):
                if patience.is_over:
                    monitor.say(
                        f"stopped early at step {step}: {checkpoint.BEST_BY} has not "
                        f"risen for {config.early_stop_evals} evaluations"
                    )
                    break
                if step % config.snapshot_every_steps == 0:
                    log.snapshot(step)
                batch = _next(batches, shards.folder)
                with jax.transfer_guard("disallow"):
                    state, numbers = step_fn(state, batch)
                done, measured = step + 1, None
                log.note(done, numbers)
                is_stopped = stop.reached(done)
                is_last = is_stopped or done == config.num_train_steps
                if done % config.eval_every_steps == 0 and not is_stopped:
                    log.settle(numbers)
                    measured = validate(done)
                if is_last or measured or done % config.checkpoint_every_steps == 0:
                    log.settle(numbers)  # stops before ruined numbers are saved
                    checkpointer.save(done, state, measured)
                if is_stopped:
                    monitor.say(
                        f"SIGTERM: saved at step {done}; the same command continues"
                    )
                    break
    finally:
        batches.close()
        log.close()
        checkpointer.close()


def _first_state(
    config: ml_collections.ConfigDict,
    tx: optax.GradientTransformation,
    key: jax.Array,
    placed: train_step.TrainState,
) -> train_step.TrainState:
    """Returns the state of a new run. `config.init_from` may give its weights."""
    # This runs once. With little optimisation it compiles 7 to 12 s faster on a CPU.
    # With no optimisation the published network takes 20 s longer.
    init = jax.jit(
        lambda key: train_step.create_state(key, config, tx),
        out_shardings=placed,
        compiler_options={"xla_backend_optimization_level": 1},
    )
    state = init(key)
    if config.init_from is None:
        return state
    other = pathlib.Path(config.init_from)
    step = checkpoint.best_or_latest_step(other)
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    variables, left = checkpoint.load_fitting(other, step, fresh, config)
    reset = f"; new: {', '.join(left)} (other classes)" if left else ""
    monitor.say(f"weights of {other}, step {step}{reset}")
    # The step donates the state, so no array may be in it twice.
    ema = jax.tree.map(jnp.copy, variables) if config.ema_decay else {}
    return state.replace(**variables, ema=ema)


def _validated(workdir: pathlib.Path, first_step: int) -> list[tuple[int, float]]:
    """Returns (step, number that decides the best checkpoint) of every validation."""
    return [
        (int(line["step"]), line[checkpoint.BEST_BY])
        for line in metrics_log.read(workdir)
        if line["step"] <= first_step and checkpoint.BEST_BY in line
    ]


def _next(batches: grain.DatasetIterator, folder: pathlib.Path) -> input_pipeline.Batch:
    try:
        return next(batches)
    except (UserError, OSError, RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"cannot read a batch from shards {folder} "
            f"({' '.join(str(error).split())[:300]}); the last checkpoint is complete: "
            "restore the shards and run the same command again"
        ) from None


def start(
    config: ml_collections.ConfigDict,
    workdir: str,
    coordinator: str | None = None,
    processes: int | None = None,
    process_index: int | None = None,
) -> None:
    """Joins the other processes, if there are any, and trains in the folder.

    Args:
      coordinator: `auto`, or host:port of process 0. None: this process trains alone.
      processes: how many processes train together.
      process_index: the number of this process, from 0.

    Raises:
      UserError: another process trains in the folder, or see `train`.
    """
    folder = files.make_folder(workdir).resolve()
    if coordinator is not None:
        sharding.join_processes(coordinator, processes, process_index)
    dtype = model.compute_dtype(config)
    # JAX adds the attributes of its options while it runs, so mypy does not know them.
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if cache is None and not convolution.calls_library(dtype):
        # So a run that was stopped does not compile again when it continues.
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    if jax.process_index() > 0:
        train(config, folder)
        return
    with files.locked(folder):
        train(config, folder)

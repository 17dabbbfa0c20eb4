# SPDX-License-Identifier: Apache-2.0
"""Trains a network on shards.

    python -m synister_jax.train --config=configs/skeleton.py --workdir=runs/skeleton \
        --config.shards=/data/fafb/shards

The same command resumes a run that was stopped, exactly where its last checkpoint is;
SIGTERM makes one before the run ends. On several machines start it on each, with
`--coordinator=auto` under Slurm, Open MPI or on a TPU pod, else with
`--coordinator=HOST:PORT --processes=N --process_index=I` and a workdir that all share.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from ml_collections import config_flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint, convolution, inference, model, sharding
from synister_jax.training import (
    augment,
    input_pipeline,
    loss_and_optimizer,
    metrics_log,
    monitor,
    stopping,
)
from synister_jax.training.validation import SplitPart


class Window(flax.struct.PyTreeNode):
    """Sums since the last line of the log; saved, so that a resumed run logs alike."""

    steps: jax.Array  # int32
    loss: jax.Array  # float32, of the steps' means
    correct: jax.Array  # int32, examples
    bad_after_step: jax.Array  # int32, before the first ruined update; -1: none


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes."""

    step: jax.Array  # int32, updates done
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict  # averages of params and batch_stats; empty when config.ema_decay is 0
    window: Window


def create_state(
    key: jax.Array, config: ml_collections.ConfigDict, tx: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; a pure function of the key."""
    crops = jnp.zeros((1, *config.crop_shape_zyx), jnp.float32)
    variables = model.from_config(config).init(key, crops, train=False)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=dict(variables) if config.ema_decay else {},
        window=Window(zero, jnp.zeros(()), zero, zero - 1),
    )


def train_step(
    config: ml_collections.ConfigDict,
    network: nn.Module,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: input_pipeline.Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; all randomness is a function of (seed, step, example).

    Returns the new state and the numbers since the last line of the log.
    """
    settings = augment.AugmentSettings.of(config)
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    dropout_key = jax.random.fold_in(dropout_key, state.step)
    keys = augment.batch_keys(config.seed, state.step, len(batch["label"]))
    batch = batch | {"key": keys}
    parts = config.accumulate_steps
    # Every device keeps its examples: part i takes each `parts`-th of them.
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def of_part(
        number: jax.Array | int, examples: input_pipeline.Batch, batch_stats: dict
    ) -> tuple[dict, dict, jax.Array, jax.Array]:
        """Gradients, batch statistics, mean loss, examples called right."""
        crops = augment.augment(examples["crop"], examples["key"], settings)
        dropout = jax.random.fold_in(dropout_key, number)

        def loss_fn(params: dict) -> tuple[jax.Array, tuple[jax.Array, dict]]:
            logits, updated = network.apply(
                {"params": params, "batch_stats": batch_stats},
                crops,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout},
            )
            value = loss_and_optimizer.losses(logits, examples["label"], config).mean()
            return value, (logits, updated["batch_stats"])

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, updated)), grads = grad_fn(state.params)
        right = (logits.argmax(axis=-1) == examples["label"]).sum(dtype=jnp.int32)
        return grads, updated, loss, right

    def add_part(sums: tuple, part: tuple[jax.Array, input_pipeline.Batch]) -> tuple:
        grads, batch_stats, loss, correct = sums
        more, batch_stats, value, right = of_part(*part, batch_stats)
        grads = jax.tree.map(lambda a, b: a + b / parts, grads, more)
        return (grads, batch_stats, loss + value / parts, correct + right), None

    if parts == 1:  # sums would be another copy of the gradients
        sums = of_part(0, jax.tree.map(lambda x: x[0], batch), state.batch_stats)
    else:
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        sums = (zeros, state.batch_stats, jnp.zeros(()), jnp.zeros((), jnp.int32))
        sums, _ = jax.lax.scan(add_part, sums, (jnp.arange(parts), batch))
    grads, batch_stats, loss, correct = sums
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema:
        variables = {"params": params, "batch_stats": batch_stats}
        ema = loss_and_optimizer.average(ema, variables, config.ema_decay, state.step)
    # The loss is of the parameters before the update: those after it can be ruined
    # while it is still a number.
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm([params, batch_stats]))

    window = state.window
    is_new = state.step % config.log_every_steps == 0
    seen_bad = window.bad_after_step >= 0
    window = Window(
        steps=jnp.where(is_new, 0, window.steps) + 1,
        loss=jnp.where(is_new, 0, window.loss) + loss,
        correct=jnp.where(is_new, 0, window.correct) + correct,
        bad_after_step=jnp.where(seen_bad | finite, window.bad_after_step, state.step),
    )
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema, window)
    return state, {
        "loss": window.loss / window.steps,
        "accuracy": window.correct / (window.steps * config.batch_size),
        "bad_after_step": window.bad_after_step,
    }


def jit_step(
    config: ml_collections.ConfigDict,
    network: nn.Module,
    tx: optax.GradientTransformation,
    placed: Any,
) -> Callable[
    [TrainState, input_pipeline.Batch], tuple[TrainState, dict[str, jax.Array]]
]:
    """`train_step`, compiled; it donates the state.

    Args:
      placed: the sharding of every leaf of the state, in a TrainState.
    """
    return jax.jit(
        functools.partial(train_step, config, network, tx),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated(placed.step.mesh)),
        compiler_options=convolution.compiler_options(),
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for numbers that cannot be meant."""
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
    """Trains until `config.num_train_steps`, or raises `UserError` at the start."""
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
        jax.eval_shape(lambda key: create_state(key, config, tx), init_key), mesh
    )
    placed = sharding.shardings(abstract)
    step_fn = jit_step(config, network, tx, placed)

    # ---------------------------------------------------------------- restore
    workdir = files.make_folder(workdir).resolve()
    config.shards = str(shards.folder.resolve())
    crops_sha256 = shards.sha256(config.split)
    checkpoint.require_same_config(workdir, config, crops_sha256)
    checkpointer = checkpoint.Checkpointer(workdir, config, crops_sha256)
    state = checkpointer.restore(abstract)
    if state is None:
        state = _first_state(config, tx, init_key, placed)
    first_step = int(state.step)  # the only time that the loop's step leaves the device
    if first_step > config.num_train_steps:
        raise UserError(
            f"{workdir} is at step {first_step} already, beyond "
            f"config.num_train_steps = {config.num_train_steps}"
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
            validate(first_step)  # SIGTERM left no time for it
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
                    log.settle(numbers)  # never save what is ruined
                    checkpointer.save(done, state, measured)
                if is_stopped:
                    monitor.say(
                        f"SIGTERM: saved at step {done}; the same command goes on"
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
    placed: TrainState,
) -> TrainState:
    """The state of a new run, from `config.init_from` where that is given."""
    # Runs once: compiled with little optimisation it is there 7 to 12 s sooner on a
    # CPU; with none it takes 20 s more for the published network.
    init = jax.jit(
        lambda key: create_state(key, config, tx),
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
    # The step donates the state: nothing in it may be there twice.
    ema = jax.tree.map(jnp.copy, variables) if config.ema_decay else {}
    return state.replace(**variables, ema=ema)


def _validated(workdir: pathlib.Path, first_step: int) -> list[tuple[int, float]]:
    """Step and number that decides the best checkpoint, of every evaluation so far."""
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
            f"({' '.join(str(error).split())[:300]}); the last checkpoint is whole: "
            "restore the shards and run the same command again"
        ) from None


def main() -> None:
    config = config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flag_as_required("config")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    coordinator = flags.DEFINE_string(
        "coordinator", None, "Several processes: `auto`, or host:port of process 0."
    )
    processes = flags.DEFINE_integer("processes", None, "How many.", lower_bound=1)
    index = flags.DEFINE_integer("process_index", None, "Of this one.", lower_bound=0)

    def run() -> None:
        folder = files.make_folder(workdir.value).resolve()
        if coordinator.value is not None:
            sharding.join_processes(coordinator.value, processes.value, index.value)
        elif processes.value is not None or index.value is not None:
            raise UserError("--processes and --process_index need --coordinator")
        dtype = model.compute_dtype(config.value)
        # JAX adds the attributes of its options one by one, unknown to its types.
        cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if cache is None and not convolution.calls_library(dtype):
            # A run that was stopped starts again without compiling.
            jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        if jax.process_index() > 0:
            train(config.value, folder)
            return
        with files.locked(folder):
            train(config.value, folder)

    command.run(run, abandon_threads=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Trains a network on shards.

    python -m synister_jax.train --config=configs/skeleton.py --workdir=runs/skeleton \
        --config.shards=/data/fafb/shards

The same command resumes a run that was stopped, exactly where its last checkpoint is.
"""

import functools
import math
import pathlib

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from ml_collections import config_flags

from synister_jax import (
    augment,
    checkpoint,
    command,
    data,
    evaluate,
    files,
    inference,
    metrics,
    model,
    sharding,
)
from synister_jax.command import UserError


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes."""

    step: jax.Array  # int32, updates done
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, PyTorch's defaults; constant as published, or falling to 0 at the end."""
    rate = config.learning_rate
    if config.cosine_decay:
        rate = optax.cosine_decay_schedule(rate, config.num_train_steps)
    return optax.adam(rate)


def create_state(
    key: jax.Array, config: ml_collections.ConfigDict, tx: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; a pure function of the key."""
    crops = jnp.zeros((1, *config.crop_shape_zyx), jnp.float32)
    variables = model.from_config(config).init(key, crops, train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
    )


def train_step(
    config: ml_collections.ConfigDict,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: data.Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; all randomness is a function of (seed, step, example)."""
    network = model.from_config(config)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment_key, dropout_key = jax.random.split(key)
    crops = augment.augment(
        batch["crop"], augment_key, config.crop_shape_zyx, config.augment
    )

    def loss_fn(params: dict) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        logits, updated = network.apply(
            {"params": params, "batch_stats": state.batch_stats},
            crops,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (logits, updated["batch_stats"])

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, batch_stats)), grads = grad_fn(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    accuracy = (logits.argmax(axis=-1) == batch["label"]).mean()
    # The loss is of the parameters before the update: those after it can be ruined
    # while it is still a number.
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(state.params))
    return state, {"loss": loss, "accuracy": accuracy, "finite": finite}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for numbers that cannot be meant."""
    for name, value in config.items():
        counted = name.endswith("_steps") or name in ("batch_size", "keep_latest")
        if counted and value < 1:
            raise UserError(f"config.{name} is {value}; it must be at least 1")
    if config.seed < 0:
        raise UserError(f"config.seed is {config.seed}; it must not be negative")


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains until `config.num_train_steps`, or raises `UserError` at the start."""
    check(config)
    # ---------------------------------------------------------------- mesh
    mesh = sharding.make_mesh()
    sharding.require_divisible(config.batch_size, mesh)

    # ---------------------------------------------------------------- data
    shards = data.open_shards(config)
    batches = data.train_batches(
        shards, config.split, config.batch_size, config.seed, sharding.batch(mesh)
    )
    validation = evaluate.Part.of(shards, config.split, "validation")

    # ---------------------------------------------------------------- model and state
    tx = make_optimizer(config)
    init_key = jax.random.key(config.seed)
    replicated = sharding.replicated(mesh)
    abstract = sharding.abstract(
        jax.eval_shape(lambda key: create_state(key, config, tx), init_key), replicated
    )

    # ---------------------------------------------------------------- restore
    workdir = files.make_folder(workdir).resolve()
    config.shards = str(shards.folder.resolve())
    checkpoint.save_config(workdir, config, shards.sha256(config.split))
    checkpointer = checkpoint.Checkpointer(workdir, config)
    state = checkpointer.restore(abstract, batches)
    if state is None:
        # Runs once: the unoptimised program starts 18 s sooner on a CPU.
        init = jax.jit(
            lambda key: create_state(key, config, tx),
            out_shardings=replicated,
            compiler_options={"xla_backend_optimization_level": 0},
        )
        state = init(init_key)
    first_step = int(state.step)  # the only time that the loop's step leaves the device
    if first_step > config.num_train_steps:
        raise UserError(
            f"{workdir} is at step {first_step} already, beyond "
            f"config.num_train_steps = {config.num_train_steps}"
        )
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    print(
        f"{parameters:,} parameters, {len(shards.index):,} crops, "
        f"{mesh.size} {jax.default_backend()} device(s), "
        f"step {first_step} of {config.num_train_steps}",
        flush=True,
    )

    # ---------------------------------------------------------------- steps
    step_fn = jax.jit(
        lambda state, batch: train_step(config, tx, state, batch),
        donate_argnums=0,
        out_shardings=replicated,
    )
    classify = inference.make_classify(config, mesh)

    # ---------------------------------------------------------------- loop
    writer = metrics.Writer(workdir, first_step)
    progress = command.Progress(
        "train",
        config.num_train_steps * config.batch_size,
        "crops",
        done=first_step * config.batch_size,
    )
    numbers, written = {}, first_step  # of the last step, still on the device

    def fetch(step: int) -> None:
        """Waits for the numbers of `step`, checks them and writes them."""
        nonlocal written
        if step == written:
            return
        written = step
        if not bool(numbers["finite"]):
            raise UserError(
                f"loss {float(numbers['loss'])}, then no finite parameters, at step "
                f"{step}; the last checkpoint is intact: look at the data, or start "
                "another --workdir with a lower config.learning_rate"
            )
        scalars = {name: float(numbers[name]) for name in ("loss", "accuracy")}
        writer.write(step, {f"train/{k}": v for k, v in scalars.items()})
        progress.note = f"step {step}, loss {scalars['loss']:.3f}"

    try:
        for step in range(first_step, config.num_train_steps):
            is_due = step % config.log_every_steps == 0
            if step > first_step and step % config.checkpoint_every_steps == 0:
                fetch(step)  # never save what is ruined
                # Before next(): state and iterator both say `step`.
                checkpointer.save(step, state, batches)
            batch, before = next(batches), numbers
            state, after = step_fn(state, batch)
            # The numbers of a step are fetched when the next one is under way.
            if is_due:
                numbers = before
                fetch(step)
            numbers = after
            progress.add(config.batch_size)
            if (step + 1) % config.eval_every_steps == 0:
                fetch(step + 1)
                variables = {"params": state.params, "batch_stats": state.batch_stats}
                table = validation.predict(
                    functools.partial(classify, variables), config.batch_size, mesh, {}
                )
                measured = evaluate.scalars(validation.name, evaluate.measure(table))
                writer.write(step + 1, measured)
                print(_line(step + 1, measured), flush=True)
        if first_step < config.num_train_steps:
            fetch(config.num_train_steps)
            checkpointer.save(config.num_train_steps, state, batches)
    finally:
        checkpointer.close()
        writer.close()
        batches.close()


def _line(step: int, numbers: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    return f"step {step}: {shown}"


def main() -> None:
    config = config_flags.DEFINE_config_file("config", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(lambda: train(config.value, pathlib.Path(workdir.value)))


if __name__ == "__main__":
    main()

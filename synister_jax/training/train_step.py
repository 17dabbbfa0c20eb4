# SPDX-License-Identifier: Apache-2.0
"""One update of the network: the state that it changes, and the step itself."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from synister_jax.network import convolution, model, sharding
from synister_jax.training import augment, input_pipeline, loss_and_optimizer


class Window(flax.struct.PyTreeNode):
    """The sums since the last line of the log.

    They are part of the state, so that a resumed run writes the same lines.
    """

    steps: jax.Array  # int32, the steps since the last line
    loss: jax.Array  # float32, the sum of the mean losses of these steps
    correct: jax.Array  # int32, the examples that were called right
    bad_after_step: jax.Array  # int32, the step before the first ruined update, or -1


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes."""

    step: jax.Array  # int32, the number of updates so far
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict  # averages of params and batch_stats; empty if config.ema_decay is 0
    window: Window


def create_state(
    key: jax.Array, config: ml_collections.ConfigDict, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step, which depends only on the key."""
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
    """Makes one update. All randomness is a function of (seed, step, example).

    Args:
      batch: `crop`, uint8 [batch, z, y, x], records with the context that augmentation
        needs, and `label`, int32 [batch].

    Returns:
      The new state, and the numbers since the last line of the log: `loss`, `accuracy`
      and `bad_after_step`.
    """
    settings = augment.AugmentSettings.of(config)
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    dropout_key = jax.random.fold_in(dropout_key, state.step)
    keys = augment.batch_keys(config.seed, state.step, len(batch["label"]))
    batch = batch | {"key": keys}
    parts = config.accumulate_steps
    # Part i takes every `parts`-th example, so that no example changes its device.
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def of_part(
        number: jax.Array | int, examples: input_pipeline.Batch, batch_stats: dict
    ) -> tuple[dict, dict, jax.Array, jax.Array]:
        """Returns gradients, batch statistics, mean loss, and how many are right."""
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

    if parts == 1:  # a sum would need memory for a second copy of the gradients
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
    # The loss belongs to the parameters before the update. The parameters after it can
    # be ruined although the loss is still a number.
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
    """Returns `train_step`, compiled. It donates the state: do not use the old one.

    Args:
      placed: a TrainState that holds the sharding of every array of the state.
    """
    return jax.jit(
        functools.partial(train_step, config, network, tx),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated(placed.step.mesh)),
        compiler_options=convolution.compiler_options(),
    )

# SPDX-License-Identifier: Apache-2.0
"""What training minimises, and how: loss, optimiser, learning rate and averages."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from synister_jax.base.errors import UserError

_FRACTIONS = ("ema_decay", "label_smoothing")
_NOT_NEGATIVE = ("weight_decay", "clip_norm", "focal_gamma", "warmup_steps")


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the options of the loss and the optimiser.

    Raises:
      UserError: an option has a value that makes no sense.
    """
    for name in _FRACTIONS:
        if not 0 <= config[name] < 1:
            raise UserError(
                f"config.{name} is {config[name]}; give a number from 0 to below 1"
            )
    for name in _NOT_NEGATIVE:
        if not 0 <= config[name] < math.inf:
            raise UserError(f"config.{name} is {config[name]}; it must not be negative")
    if not 0 < config.learning_rate < math.inf:
        raise UserError(
            f"config.learning_rate is {config.learning_rate}; give a number above 0"
        )
    if config.schedule not in ("constant", "cosine"):
        raise UserError(
            f"config.schedule is {config.schedule!r}; give constant or cosine"
        )
    if config.warmup_steps >= config.num_train_steps:
        raise UserError(
            f"config.warmup_steps = {config.warmup_steps} leaves no step of "
            f"config.num_train_steps = {config.num_train_steps} for training; set a "
            "smaller number of warmup steps"
        )
    if len(config.class_weights) not in (0, len(config.classes)):
        raise UserError(
            f"config.class_weights has {len(config.class_weights)} numbers for "
            f"{len(config.classes)} classes; give one number for each class, or none"
        )
    if not all(0 <= weight < math.inf for weight in config.class_weights):
        raise UserError(
            f"config.class_weights are {tuple(config.class_weights)}; none may be "
            "negative"
        )
    if config.class_weights and not any(config.class_weights):
        raise UserError("config.class_weights are all 0: give a positive weight")
    if len(config.classes) < 2 or len(set(config.classes)) < len(config.classes):
        raise UserError(
            f"config.classes are {', '.join(config.classes)}: give at least two "
            "classes, each once"
        )


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Returns the schedule: linear over `warmup_steps`, then constant or half a cosine.

    The cosine ends at 0.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, config.num_train_steps - warmup)
    else:
        after = optax.constant_schedule(rate)
    if not warmup:
        return after
    # The schedule does not start at 0, because that would waste the first step.
    rising = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns Adam with PyTorch's defaults, as published, or AdamW for weight decay."""
    rate = learning_rate(config)
    if config.weight_decay:
        adam = optax.adamw(rate, weight_decay=config.weight_decay)
    else:
        adam = optax.adam(rate)
    if not config.clip_norm:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def losses(
    logits: jax.Array, labels: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Returns the cross-entropy of every example in nats, float32 [batch].

    With `focal_gamma` γ it is multiplied by (1 − p of the true class)^γ (Lin et al.
    2017). With `class_weights` it is multiplied by the weight of the true class. BANC
    uses γ = 2 and its own weights.

    Args:
      logits: float32 [batch, k].
      labels: int32 [batch].
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(targets, config.label_smoothing)
    value = optax.softmax_cross_entropy(logits, targets)
    if config.focal_gamma:
        # log(1 - p) is computed from the other logits. For a sure example, 1 - p rounds
        # to 0, where a power below 1 has no gradient.
        is_true = jnp.arange(logits.shape[-1]) == labels[:, None]
        others = jax.nn.logsumexp(jnp.where(is_true, -jnp.inf, logits), axis=-1)
        log_rest = others - jax.nn.logsumexp(logits, axis=-1)
        value *= jnp.exp(config.focal_gamma * log_rest)
    if config.class_weights:
        value *= jnp.asarray(config.class_weights)[labels]
    return value


def average(ema: Any, values: Any, decay: float, step: jax.Array) -> Any:
    """Returns the exponential moving average after update number `step`, from 0.

    At first the decay is (1 + step) / (10 + step), which is smaller. Otherwise the
    initial weights would stay in the average for a long time.
    """
    at_most = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, v: at_most * e + (1 - at_most) * v, ema, values)

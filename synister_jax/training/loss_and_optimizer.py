# SPDX-License-Identifier: Apache-2.0
"""What is minimised, and how: loss, optimiser, learning rate, averaged parameters."""

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
    """Raises `UserError` for an option that cannot be meant."""
    for name in _FRACTIONS:
        if not 0 <= config[name] < 1:
            raise UserError(f"config.{name} is {config[name]}; it lies in [0, 1)")
    for name in _NOT_NEGATIVE:
        if not 0 <= config[name] < math.inf:
            raise UserError(f"config.{name} is {config[name]}; it must not be negative")
    if not 0 < config.learning_rate < math.inf:
        raise UserError(f"config.learning_rate is {config.learning_rate}; above 0")
    if config.schedule not in ("constant", "cosine"):
        raise UserError(f"config.schedule is {config.schedule!r}: constant or cosine")
    if config.warmup_steps >= config.num_train_steps:
        raise UserError(
            f"config.warmup_steps = {config.warmup_steps} leaves nothing of "
            f"config.num_train_steps = {config.num_train_steps}"
        )
    if len(config.class_weights) not in (0, len(config.classes)):
        raise UserError(
            f"config.class_weights has {len(config.class_weights)} numbers for "
            f"{len(config.classes)} classes"
        )
    if not all(0 <= weight < math.inf for weight in config.class_weights):
        raise UserError(
            f"config.class_weights are {tuple(config.class_weights)}; none may be "
            "negative"
        )
    if config.class_weights and not any(config.class_weights):
        raise UserError("config.class_weights are all 0: nothing would be learnt")
    if len(config.classes) < 2 or len(set(config.classes)) < len(config.classes):
        raise UserError(
            f"config.classes are {', '.join(config.classes)}: at least two are needed, "
            "each once"
        )


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`; then constant, or a half cosine to 0."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, config.num_train_steps - warmup)
    else:
        after = optax.constant_schedule(rate)
    if not warmup:
        return after
    # The first step already moves: a rate of 0 would waste it.
    rising = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam with PyTorch's defaults, as published; AdamW where weights decay."""
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
    """Cross-entropy of every example, [batch] nats.

    With `focal_gamma` γ multiplied by (1 − p of the true class)^γ (Lin et al. 2017),
    with `class_weights` by that of the true class; BANC has γ = 2 and its own weights.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(targets, config.label_smoothing)
    value = optax.softmax_cross_entropy(logits, targets)
    if config.focal_gamma:
        # log(1 - p) from the other logits: for a sure example 1 - p rounds to 0, where
        # a power below 1 has no gradient.
        is_true = jnp.arange(logits.shape[-1]) == labels[:, None]
        others = jax.nn.logsumexp(jnp.where(is_true, -jnp.inf, logits), axis=-1)
        log_rest = others - jax.nn.logsumexp(logits, axis=-1)
        value *= jnp.exp(config.focal_gamma * log_rest)
    if config.class_weights:
        value *= jnp.asarray(config.class_weights)[labels]
    return value


def average(ema: Any, values: Any, decay: float, step: jax.Array) -> Any:
    """The exponential moving average after update number `step` (from 0).

    It decays faster at first, (1 + step) / (10 + step), or the initial weights would
    stay in it for long.
    """
    at_most = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, v: at_most * e + (1 - at_most) * v, ema, values)

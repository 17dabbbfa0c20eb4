# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from synister_jax.base.errors import UserError
from synister_jax.training import loss_and_optimizer
from tests.helpers.small_data import tiny_config

STEPS = 8


def given(**change: object) -> ml_collections.ConfigDict:
    """Returns the published recipe for `STEPS` steps and three classes, with changes.

    The rate is larger than the published one, so that few steps show a difference.
    """
    config = tiny_config()
    config.update(num_train_steps=STEPS, learning_rate=0.05)
    config.update(change)
    loss_and_optimizer.check(config)
    return config


def problem() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Returns parameters and their gradients at every step, of very different sizes."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": (1,)}

    def draw(size: float) -> dict[str, np.ndarray]:
        return {
            name: (size * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    return draw(1), [draw(10.0 ** (step % 4 - 2)) for step in range(STEPS)]


def descend(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    params, all_grads = problem()
    tx = loss_and_optimizer.make_optimizer(config)
    state = tx.init(params)
    for grads in all_grads:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params)


def descend_in_torch(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    start, all_grads = problem()
    params = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in start.items()}
    options: dict[str, Any] = {"lr": config.learning_rate}
    if config.weight_decay:
        options["weight_decay"] = config.weight_decay
        optimizer = torch.optim.AdamW(params.values(), **options)
    else:
        optimizer = torch.optim.Adam(params.values(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if config.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for grads in all_grads:
        for name, parameter in params.items():
            parameter.grad = torch.from_numpy(grads[name].copy())
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
        optimizer.step()
        schedule.step()
    return {name: parameter.detach().numpy() for name, parameter in params.items()}


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"schedule": "cosine"},
        {"weight_decay": 0.1},
        {"clip_norm": 1.0},  # some norms are above this, some below
        {"weight_decay": 0.1, "clip_norm": 0.5, "schedule": "cosine"},
    ],
)
def test_the_optimizer_is_torch_s(change: dict[str, object]) -> None:
    config = given(**change)
    ours, theirs = descend(config), descend_in_torch(config)
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=2e-5, atol=1e-6)
    if change:
        plain = descend(given())["kernel"]
        assert np.abs(ours["kernel"] - plain).max() > 1e-3  # the option has an effect


def rates(**change: object) -> np.ndarray:
    schedule = loss_and_optimizer.learning_rate(given(**change))
    return np.array([float(schedule(step)) for step in range(STEPS)])


def test_constant_rate() -> None:
    np.testing.assert_allclose(rates(), 0.05, rtol=1e-6)


def test_cosine_is_half_way_in_the_middle_and_0_at_the_end() -> None:
    found = rates(schedule="cosine")
    expected = [0.05 * (1 + math.cos(math.pi * i / STEPS)) / 2 for i in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[STEPS // 2] == pytest.approx(0.025)
    end = loss_and_optimizer.learning_rate(given(schedule="cosine"))(STEPS)
    assert float(end) == pytest.approx(0, abs=1e-9)


def test_warm_up_starts_above_0_and_reaches_the_rate() -> None:
    found = rates(warmup_steps=4)
    np.testing.assert_allclose(found[:4], 0.05 * np.arange(1, 5) / 5, rtol=1e-5)
    np.testing.assert_allclose(found[4:], 0.05, rtol=1e-6)


def test_warm_up_before_a_cosine_leaves_it_the_other_steps() -> None:
    found = rates(warmup_steps=4, schedule="cosine")
    np.testing.assert_allclose(found[:4], 0.05 * np.arange(1, 5) / 5, rtol=1e-5)
    assert found[4] == pytest.approx(0.05)
    assert found[6] == pytest.approx(0.025)
    schedule = loss_and_optimizer.learning_rate(
        given(warmup_steps=4, schedule="cosine")
    )
    assert float(schedule(STEPS)) == pytest.approx(0, abs=1e-9)


def examples() -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [32, 3], sure and unsure, right and wrong, and the labels."""
    rng = np.random.default_rng(0)
    logits = (6 * rng.standard_normal((32, 3))).astype(np.float32)
    return logits, rng.integers(0, 3, 32).astype(np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    torch = pytest.importorskip("torch")
    logits, labels = examples()
    theirs = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)
    expected = theirs(torch.from_numpy(logits), torch.from_numpy(labels).long())
    ours = loss_and_optimizer.losses(logits, labels, given(label_smoothing=smoothing))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_focal_loss_and_class_weights_follow_their_formula() -> None:
    logits, labels = examples()
    alpha = (1.0, 1.1, 0.9)
    ours = loss_and_optimizer.losses(
        logits, labels, given(focal_gamma=2.0, class_weights=alpha)
    )
    for logit, label, value in zip(logits.astype(float), labels, ours, strict=True):
        p = np.exp(logit - logit.max())
        p = (p / p.sum())[label]
        expected = alpha[label] * (1 - p) ** 2 * -math.log(p)
        assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_class_weights_alone_multiply() -> None:
    logits, labels = examples()
    plain = loss_and_optimizer.losses(logits, labels, given())
    weights = (0.5, 1.0, 3.0)
    ours = loss_and_optimizer.losses(logits, labels, given(class_weights=weights))
    np.testing.assert_allclose(ours, plain * np.asarray(weights)[labels], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("logit", [-200.0, 0.0, 20.0, 200.0])
def test_loss_and_gradient_are_finite_for_sure_examples(
    gamma: float, logit: float
) -> None:
    """The probability of the true class goes from exactly 0 to exactly 1 in float32."""
    config = given(focal_gamma=gamma, label_smoothing=0.1)
    value, grad = jax.value_and_grad(
        lambda x: loss_and_optimizer.losses(x, jnp.zeros(1, jnp.int32), config).sum()
    )(jnp.array([[logit, 0.0, 0.0]]))
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_average_follows_its_formula() -> None:
    ema = params = {"kernel": jnp.array([1.0, 2.0])}
    values = [np.array([3.0, -1.0]), np.array([0.5, 4.0])]
    expected = np.array([1.0, 2.0])
    for step, value in ((0, values[0]), (1_000, values[1])):
        params = {"kernel": jnp.asarray(value)}
        ema = loss_and_optimizer.average(ema, params, 0.9, jnp.int32(step))
        decay = 0.1 if step == 0 else 0.9  # early weights decay faster
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(ema["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("weight_decay", -1e-3),
        ("clip_norm", -1.0),
        ("focal_gamma", -2.0),
        ("warmup_steps", -1),
        ("warmup_steps", STEPS),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-4),
        ("schedule", "linear"),
        ("class_weights", (1.0, 2.0)),
        ("class_weights", (1.0, 2.0, 3.0, 4.0)),
        ("ema_decay", math.nan),
        ("weight_decay", math.nan),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("class_weights", (1.0, -1.0, 1.0)),
        ("class_weights", (1.0, math.nan, 1.0)),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"config\.{name}") as error:
        given(**{name: value})
    assert "\n" not in str(error.value)

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synister_jax.network import layers


@pytest.mark.long
def test_gradient_of_batch_norm_is_that_of_its_formula() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 2, (2, 3, 4, 5, 6)), jnp.float32)
    scale, bias = jnp.asarray(rng.uniform(-1, 2, (2, 6)), jnp.float32)
    direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def formula(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        axes = (0, 1, 2, 3)
        var = x.var(axis=axes) + 1e-5
        return (x - x.mean(axis=axes)) / jnp.sqrt(var) * scale + bias

    def ours(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return layers._normalised_by_batch(x, scale, bias)[0]

    expected, expected_gradient = jax.vjp(formula, x, scale, bias)
    found, gradient = jax.vjp(ours, x, scale, bias)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    pairs = zip(gradient(direction), expected_gradient(direction), strict=True)
    for mine, reference in pairs:
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-5)
    _, mean, var = layers._normalised_by_batch(x, scale, bias)
    np.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(var, x.var(axis=(0, 1, 2, 3)), rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (1, 1, 3), (1, 1, 1)])
def test_gradient_of_the_maximum_is_shared_by_equal_ones(factors: tuple) -> None:
    # There are only three different numbers, so most blocks have several maxima.
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, 4, 6, 6, 3)).astype(np.float32)
    direction = rng.normal(size=layers.max_pool(x, factors).shape).astype(np.float32)
    expected = np.zeros_like(x)
    for b, z, y, w, c in np.ndindex(*direction.shape):
        starts = np.multiply((z, y, w), factors)
        block = (b, *map(slice, starts, starts + factors), c)
        is_maximum = x[block] == x[block].max()
        expected[block] = is_maximum * direction[b, z, y, w, c] / is_maximum.sum()
    _, gradient = jax.vjp(lambda x: layers.max_pool(x, factors), x)
    np.testing.assert_allclose(gradient(direction)[0], expected, rtol=1e-6)

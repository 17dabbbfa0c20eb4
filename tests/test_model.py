# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from scipy import ndimage

from configs import hemibrain, skeleton
from synister_jax import convolution, inference, model
from synister_jax.command import UserError


def reference_convolution(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[z, y, x, in] with [3, 3, 3, in, out], by SciPy."""
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i, o in np.ndindex(*kernel.shape[3:]):
        out[..., o] += ndimage.correlate(x[..., i], kernel[..., i, o], mode="constant")
    return out


def reference_vgg(variables: dict, x: np.ndarray, config: object) -> np.ndarray:
    """Logits of one crop [z, y, x] in float64 NumPy, from the published description."""
    params, statistics = variables["params"], variables["batch_stats"]
    x = x[..., None].astype(np.float64)
    for level, factors in enumerate(config.model.downsample_factors):
        for i in range(config.model.convolutions[level]):
            convolution_ = params[f"level{level}_conv{i}"]
            x = reference_convolution(x, convolution_["kernel"]) + convolution_["bias"]
            norm = params[f"level{level}_norm{i}"]
            seen = statistics[f"level{level}_norm{i}"]
            x = (x - seen["mean"]) / np.sqrt(seen["var"] + 1e-5)
            x = np.maximum(x * norm["scale"] + norm["bias"], 0)
        z, y, w, c = x.shape
        fz, fy, fx = factors
        x = x.reshape(z // fz, fz, y // fy, fy, w // fx, fx, c).max(axis=(1, 3, 5))
    x = np.moveaxis(x, -1, 0).reshape(-1)  # C, z, y, x as PyTorch flattens
    for name in ("dense0", "dense1"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


def random_variables(config: object) -> dict:
    rng = np.random.default_rng(0)
    abstract = inference.abstract_variables(config)
    # Variances must be positive; for the rest any size that keeps numbers near 1.
    return jax.tree.map(
        lambda a: rng.uniform(0.05, 0.3, a.shape).astype(np.float32), abstract
    )


def test_network_agrees_with_an_independent_one() -> None:
    config = tiny_config()
    variables = random_variables(config)
    crops = np.random.default_rng(1).uniform(-1, 1, (2, 4, 16, 16)).astype(np.float32)
    logits = model.from_config(config).apply(variables, crops, train=False)
    expected = [reference_vgg(variables, crop, config) for crop in crops]
    np.testing.assert_allclose(logits, expected, rtol=2e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3  # the crop matters


def test_lowerings_of_the_convolution_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 7, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 3, 4)), jnp.float32)

    def value_and_grad(x: jax.Array, kernel: jax.Array) -> tuple:
        def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return (convolution.conv3d(x, kernel) ** 2).sum()

        out = convolution.conv3d(x, kernel)
        return out, *jax.grad(loss, argnums=(0, 1))(x, kernel)

    on_cpu = value_and_grad(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    native = value_and_grad(x, kernel)
    for a, b in zip(on_cpu, native, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-3)
    expected = reference_convolution(np.asarray(x[0]), np.asarray(kernel))
    np.testing.assert_allclose(on_cpu[0][0], expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_decays_as_published() -> None:
    config = tiny_config()
    network = model.from_config(config)
    variables = random_variables(config)
    crops = np.random.default_rng(1).uniform(-1, 1, (6, 4, 16, 16)).astype(np.float32)
    _, updated = network.apply(
        variables,
        crops,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )
    first = variables["params"]["level0_conv0"]
    out = np.stack(
        [reference_convolution(c[..., None], first["kernel"]) for c in crops]
    )
    mean = (out + first["bias"]).mean(axis=(0, 1, 2, 3))
    before = variables["batch_stats"]["level0_norm0"]["mean"]
    after = updated["batch_stats"]["level0_norm0"]["mean"]
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * mean, rtol=1e-4)


def test_initial_weights_are_those_of_pytorch() -> None:
    config = tiny_config()
    config.model.dense_features = 64
    crops = jnp.zeros((1, 4, 16, 16))
    params = model.from_config(config).init(jax.random.key(0), crops, train=False)[
        "params"
    ]
    for name, fan_in in (
        ("level1_conv0", 27 * 2),
        ("dense0", 4 * 2 * 4 * 4),
        ("dense1", 64),
    ):
        for leaf in ("kernel", "bias"):
            values, bound = np.asarray(params[name][leaf]), fan_in**-0.5
            assert np.abs(values).max() <= bound
            if values.size > 200:
                np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.1)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(skeleton.get_config(), 331.9e6), (hemibrain.get_config(), 117.1e6)],
)
def test_published_sizes(config: object, parameters: float) -> None:
    abstract = inference.abstract_variables(config)
    leaves = jax.tree.leaves(abstract["params"])
    assert sum(leaf.size for leaf in leaves) == pytest.approx(parameters, rel=1e-3)


def test_sizes_that_do_not_fit_are_refused() -> None:
    config = tiny_config()
    config.crop_shape_zyx = (4, 16, 18)
    with pytest.raises(UserError, match=r"crop_shape_zyx\[2\] = 18 is not divisible"):
        model.from_config(config)
    config = tiny_config()
    config.model.convolutions = (1, 1, 1)
    with pytest.raises(UserError, match="config.model.convolutions has 3 entries"):
        model.from_config(config)

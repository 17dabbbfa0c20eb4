# SPDX-License-Identifier: Apache-2.0
"""Compares every lowering with XLA's own 3D convolution, and one with SciPy."""

import concurrent.futures
import functools
import importlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from synister_jax.network import convolution, model
from tests.helpers.networks import random_variables, reference_convolution
from tests.helpers.small_data import ROOT, tiny_config

ONE = (1, 1, 1)
CONFIGS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__"
)

needs_library = pytest.mark.skipif(
    not convolution.has_library(), reason="no oneDNN in this build of jaxlib"
)


@pytest.fixture(autouse=True)
def fresh_answer() -> Iterator[None]:
    yield
    convolution.has_library.cache_clear()


@pytest.fixture
def on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX with one device, as users have. The tests run with several fake devices."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def layers_of(name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns kernel shape and strides of each convolution of a published network."""
    config = importlib.import_module(f"configs.{name}").get_config()
    network = model.from_config(config)
    crops = jax.ShapeDtypeStruct((1, *config.crop_shape_zyx), jnp.float32)
    found = set()

    def note(x: jax.Array, kernel: jax.Array, strides: tuple = ONE) -> jax.Array:
        found.add((kernel.shape, strides))
        return convolution._native(x, kernel, strides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "conv3d", note)
        patch.setattr(convolution, "calls_library", lambda dtype: False)
        jax.eval_shape(
            functools.partial(network.init, train=False), jax.random.key(0), crops
        )
    return sorted(found)


ALL_LAYERS = sorted({layer for name in CONFIGS for layer in layers_of(name)})


def drawn(shape: tuple[int, ...], seed: int) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def value_and_gradients(
    function: Callable, x: jax.Array, kernel: jax.Array
) -> list[jax.Array]:
    out, transpose = jax.vjp(jax.jit(function), x, kernel)
    return [out, *jax.jit(transpose)(drawn(out.shape, 2))]


def assert_equal_to_native(function: Callable, shape: tuple, kernel: tuple) -> None:
    strides = function.keywords["strides"]
    native = functools.partial(convolution._native, strides=strides)
    arguments = drawn((*shape, kernel[3]), 0), drawn(kernel, 1)
    found = value_and_gradients(function, *arguments)
    for a, b in zip(found, value_and_gradients(native, *arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_every_network_was_looked_at() -> None:
    kernels = {kernel for kernel, _ in ALL_LAYERS}
    for pair in ((1, 12), (48, 96), (64, 128), (96, 192), (8, 16), (256, 512)):
        assert (3, 3, 3, *pair) in kernels
    assert ((3, 7, 7, 1, 64), (1, 2, 2)) in ALL_LAYERS


@pytest.mark.long
@needs_library
@pytest.mark.parametrize(("kernel", "strides"), ALL_LAYERS)
def test_library_is_the_native_one_for_every_layer(
    kernel: tuple[int, ...], strides: tuple[int, int, int]
) -> None:
    function = functools.partial(convolution._by_library, strides=strides)
    assert_equal_to_native(function, (2, 5, 7, 10), kernel)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 7, 5), (2, 5, 1, 6)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 4), (30, 5)])
def test_odd_shapes(shape: tuple[int, ...], channels: tuple[int, int]) -> None:
    kernel = (3, 3, 3, *channels)
    lowerings = [lambda x, kernel, strides: convolution._by_sections(x, kernel)]
    if convolution.has_library():
        lowerings.append(convolution._by_library)
    for lowering in lowerings:
        assert_equal_to_native(functools.partial(lowering, strides=ONE), shape, kernel)


def test_native_is_scipys() -> None:
    x, kernel = drawn((1, 5, 6, 7, 3), 0), drawn((3, 3, 3, 3, 4), 1)
    expected = reference_convolution(np.asarray(x[0]), np.asarray(kernel))
    found = convolution._native(x, kernel, ONE)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@needs_library
def test_network_is_the_same_by_each_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    variables = random_variables(config)
    shape = (3, *config.crop_shape_zyx)
    crops = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    network = model.from_config(config)

    def loss(params: dict) -> tuple:
        logits, updated = network.apply(
            variables | {"params": params},
            crops,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jax.nn.logsumexp(logits), updated

    def outcome(lowering: str) -> dict:
        monkeypatch.setattr(convolution, "_lowering", lambda dtype: lowering)
        logits = jax.jit(lambda v: network.apply(v, crops, train=False))(variables)
        grads, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        # Batch norm subtracts the mean, so the gradients of biases are only rounding.
        for name in grads:
            if "_conv" in name:
                del grads[name]["bias"]
        return {"logits": logits, "grads": grads, "updated": updated}

    native = outcome("native")
    for lowering in ("library", "sections"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=0, atol=1e-4 * np.abs(b).max()
            ),
            outcome(lowering),
            native,
        )


@needs_library
def test_the_same_bits_each_time_and_in_many_threads(on_one_device: None) -> None:
    """The result is always the same, though the library runs tasks on XLA's threads."""
    x = drawn((2, 8, 20, 20, 12), 0)
    kernels = [drawn((3, 3, 3, 12, 12), seed) for seed in range(1, 7)]

    @jax.jit
    def several(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        """Computes convolutions that XLA can run at once, as they are independent."""
        outs = [convolution.conv3d(x, kernel) for kernel in kernels]
        return jnp.stack([convolution.conv3d(out, kernels[0]) for out in outs])

    expected = np.asarray(several(x, kernels))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: np.asarray(several(x, kernels)), range(40)):
            np.testing.assert_array_equal(found, expected)


@needs_library
def test_who_gets_the_library(
    on_one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convolution._lowering(jnp.float32) == "library"
    assert convolution.calls_library(jnp.float32)
    assert convolution._lowering(jnp.bfloat16) == "sections"
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert convolution._lowering(jnp.float32) == "sections"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolution._lowering(jnp.float32) == "native"
    assert convolution.compiler_options() == {}
    assert not convolution.calls_library(jnp.float32)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [(jaxlib, "__version__", "0.99.0"), (convolution, "_TARGET", "__onednn$nothing")],
)
def test_without_the_library(
    where: object,
    name: str,
    value: str,
    on_one_device: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convolution.has_library.cache_clear()
    monkeypatch.setattr(where, name, value)
    assert not convolution.has_library()
    assert convolution._lowering(jnp.float32) == "sections"

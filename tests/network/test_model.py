# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import hemibrain, skeleton
from synister_jax.base.errors import UserError
from synister_jax.network import inference, model
from tests.helpers.networks import random_variables, reference_convolution
from tests.helpers.small_data import tiny_config


def reference_vgg(variables: dict, x: np.ndarray, config: object) -> np.ndarray:
    """Returns the logits of one crop [z, y, x], in NumPy from the published text."""
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
    x = np.moveaxis(x, -1, 0).reshape(-1)  # channel, z, y, x as in PyTorch
    for name in ("dense0", "dense1"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


@pytest.mark.long
def test_network_agrees_with_an_independent_one() -> None:
    config = tiny_config()
    variables = random_variables(config)
    crops = np.random.default_rng(1).uniform(-1, 1, (2, 4, 16, 16)).astype(np.float32)
    logits = model.from_config(config).apply(variables, crops, train=False)
    expected = [reference_vgg(variables, crop, config) for crop in crops]
    np.testing.assert_allclose(logits, expected, rtol=2e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3  # the logits depend on the crop


@pytest.mark.long
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


@pytest.mark.long
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


def resnet_config() -> object:
    config = tiny_config()
    config.crop_shape_zyx = (5, 16, 32)
    config.model.network = "resnet18"
    return config


def test_resnet_has_the_published_size() -> None:
    config = resnet_config()
    config.classes = tuple("abcdefgh")
    leaves = jax.tree.leaves(inference.abstract_variables(config)["params"])
    assert sum(leaf.size for leaf in leaves) == 33_151_560


@pytest.mark.long
def test_resnet_starts_as_torchvisions() -> None:
    config = resnet_config()
    crops = jnp.zeros((1, *config.crop_shape_zyx))
    init = jax.jit(model.from_config(config).init, static_argnames="train")
    params = init(jax.random.key(0), crops, train=False)["params"]
    assert params["stem_conv"].keys() == {"kernel"}  # there is no bias
    for kernel, std in (
        (params["stem_conv"]["kernel"], (2 / (64 * 147)) ** 0.5),
        (params["layer4_block1"]["conv1"]["kernel"], (2 / (512 * 27)) ** 0.5),
        (params["layer2_block0"]["shortcut_conv"]["kernel"], (2 / 128) ** 0.5),
        (params["logits"]["kernel"], 0.01),
    ):
        np.testing.assert_allclose(np.std(kernel), std, rtol=0.06)
    assert not params["logits"]["bias"].any()


@pytest.mark.long
@pytest.mark.parametrize("make_config", [tiny_config, resnet_config])
def test_bfloat16_computes_about_the_same(make_config: object) -> None:
    config = make_config()
    variables = random_variables(config)
    shape = (2, *config.crop_shape_zyx)
    crops = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)

    def logits() -> jax.Array:
        network = model.from_config(config)
        return jax.jit(network.apply, static_argnames="train")(
            variables, crops, train=False
        )

    def training(params: dict) -> tuple:
        """Returns the gradients, the batch statistics and the initial variables."""
        network = model.from_config(config)

        def loss(params: dict) -> tuple:
            out, updated = network.apply(
                variables | {"params": params},
                crops,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return out.sum(), updated

        grads, updated = jax.grad(loss, has_aux=True)(params)
        return grads, updated, network.init(jax.random.key(0), crops, False)

    expected = logits()
    config.compute_dtype = "bfloat16"
    found = logits()
    assert found.dtype == jnp.float32
    scale = np.abs(expected).max()
    assert 0 < np.abs(found - expected).max() < 5e-2 * scale
    for leaf in jax.tree.leaves(jax.eval_shape(training, variables["params"])):
        assert leaf.dtype == jnp.float32


@pytest.mark.long
@pytest.mark.parametrize("make_config", [tiny_config, resnet_config])
def test_a_split_head_gives_the_same(make_config: object) -> None:
    config = make_config()
    variables = random_variables(config)
    shape = (4, *config.crop_shape_zyx)
    crops = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    gathered = NamedSharding(mesh, PartitionSpec("data"))
    split = NamedSharding(mesh, PartitionSpec(("data", "model")))
    columns = NamedSharding(mesh, PartitionSpec(None, "model"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, columns if leaf.ndim == 2 and leaf.shape[1] % 2 == 0 else everywhere
        ),
        variables,
    )

    def logits(head_sharding: NamedSharding | None, *arguments: object) -> jax.Array:
        network = model.from_config(config, head_sharding)
        return jax.jit(lambda v, x: network.apply(v, x, train=False))(*arguments)

    expected = logits(None, variables, crops)
    found = logits(gathered, placed, jax.device_put(crops, split))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_unknown_network_and_type_are_refused() -> None:
    config = tiny_config()
    config.compute_dtype = "float16"
    with pytest.raises(UserError, match="config.compute_dtype is 'float16'; choose"):
        model.from_config(config)
    config = tiny_config()
    config.model.network = "vgg2d"
    with pytest.raises(UserError, match="config.model.network is 'vgg2d'; choose vgg3"):
        model.from_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 0}, "features is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"downsample_factors": ((1, 2), (2, 2, 2))}, "three"),
    ],
)
def test_sizes_that_cannot_be_meant(change: dict, message: str) -> None:
    config = tiny_config()
    with config.unlocked():
        config.model.update(change)
    with pytest.raises(UserError, match=f"config.model.*{message}"):
        model.from_config(config)

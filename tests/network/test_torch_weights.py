# SPDX-License-Identifier: Apache-2.0
import gc
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import skeleton
from synister_jax.base.errors import UserError
from synister_jax.network import model, torch_weights

torch = pytest.importorskip("torch")
from tests.helpers import torch_networks  # noqa: E402
from tests.helpers.torch_comparison import (  # noqa: E402
    arrays,
    crops_of,
    deviation,
    torch_vgg,
    vgg_config,
)

BANC = ("acetylcholine", "dopamine", "gaba", "glutamate", "histamine", "octopamine")
BANC += ("serotonin", "tyramine")
FLAT = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
CUBIC = ((2, 2, 2),) * 4

TRAINING = """[Training]
synapse_types = gaba, acetylcholine, glutamate
input_shape = 8, 32, 32
fmaps = 3
batch_size = 8
db_credentials = /home/me/db%20credentials.ini
db_name_data = synister
split_name = skeleton
voxel_size = 40, 4, 4
raw_container = /data/fafb.n5
raw_dataset = volumes/raw/s0
downsample_factors = (1,2,2), (1,2,2), (2,2,2)
fmap_inc = 2, 3, 2
n_convolutions = 2, 1, 2
network = VGG
"""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def freed() -> Iterator[None]:
    """Frees the memory of a large network (up to 6 GB) after the test."""
    yield
    gc.collect()


def small_config() -> ml_collections.ConfigDict:
    factors = ((1, 2, 2), (2, 2, 2))
    return vgg_config((4, 16, 16), 3, 3, factors, (2, 1), 24)


def resnet_config(crop_shape_zyx: tuple[int, int, int]) -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.classes = BANC
    config.crop_shape_zyx = crop_shape_zyx
    config.model.network = "resnet18"
    return config


SMALL = {
    "fafb12": vgg_config((4, 32, 32), 6, 3, FLAT[:2] + FLAT[3:], (2, 2, 2), 64),
    "fafb16": vgg_config((4, 32, 32), 7, 4, FLAT[:2] + FLAT[3:], (2, 2, 2), 64),
    "hemibrain": vgg_config((16, 16, 16), 6, 3, CUBIC[:3], (4, 2, 2), 64),
    "male_vnc": vgg_config((16, 16, 16), 4, 2, CUBIC[:3], (2, 2, 2), 64),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_imported_vgg_gives_the_same_logits(name: str) -> None:
    config = SMALL[name]
    found = deviation(config, torch_vgg(config), torch_weights.vgg3d)
    print(f"small {name}: largest relative deviation {found:.1e}")
    assert found < 1e-4


@pytest.mark.long
@pytest.mark.parametrize(
    "crop_shape_zyx",
    [(5, 32, 48), pytest.param((14, 160, 160), marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("freed")
def test_imported_resnet_gives_the_same_logits(
    crop_shape_zyx: tuple[int, int, int],
) -> None:
    config = resnet_config(crop_shape_zyx)
    torch.manual_seed(0)
    network = torch_networks.ResNet18(8)
    assert sum(each.numel() for each in network.parameters()) == 33_151_560
    # The original BANC network takes crops with the axes z, x, y.
    found = deviation(config, network, torch_weights.resnet18, axes=(0, 2, 1))
    print(f"resnet18 {crop_shape_zyx}: largest relative deviation {found:.1e}")
    assert found < 1e-4


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {
        "/".join(part.key for part in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def loss_and_grads(
    network: model.VGG3D, variables: dict, crops: np.ndarray, labels: np.ndarray
) -> tuple:
    """Returns ((loss, batch statistics), gradients), with batch norm as in training."""

    def loss_fn(params: dict) -> tuple:
        logits, updated = network.apply(
            variables | {"params": params}, crops, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    return jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])


@pytest.mark.long
def test_one_training_step_is_the_originals() -> None:
    config = small_config()
    config.model.dropout = 0.0
    theirs = torch_vgg(config, dropout=0.0)
    torch_networks.randomise(theirs)
    before = torch_weights.vgg3d(
        {key: value.copy() for key, value in arrays(theirs).items()}, config
    )
    crops, labels = crops_of(config, 6, seed=2), np.array([0, 1, 2, 2, 1, 0])

    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-4)
    loss_theirs = torch.nn.CrossEntropyLoss()(
        theirs(torch.from_numpy(crops)[:, None]), torch.from_numpy(labels)
    )
    loss_theirs.backward()
    optimizer.step()
    after_theirs = torch_weights.vgg3d(arrays(theirs), config)
    state = arrays(theirs)
    state |= {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    grads_theirs = flat(torch_weights.vgg3d(state, config)["params"])

    step = jax.jit(loss_and_grads, static_argnums=0)
    (loss, statistics), grads = step(model.from_config(config), before, crops, labels)
    tx = optax.adam(1e-4)
    updates, _ = tx.update(grads, tx.init(before["params"]))
    after = flat(optax.apply_updates(before["params"], updates))

    assert float(loss) == pytest.approx(loss_theirs.item(), rel=1e-4)
    largest = max(np.abs(value).max() for value in grads_theirs.values())
    started, ended = flat(before["params"]), flat(after_theirs["params"])
    compared = nonzero = 0
    for name, ours in flat(grads).items():
        expected = grads_theirs[name]
        # A bias before batch norm has the gradient 0, so both sides are only rounding.
        is_zero = "conv" in name and name.endswith("bias")
        scale = largest if is_zero else np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * scale)
        # Adam's first update is the learning rate times the sign of the gradient. The
        # updates must agree where the sign is certain.
        certain = np.abs(expected) > 1e-3 * scale
        compared += certain.sum()
        nonzero += 0 if is_zero else np.count_nonzero(expected)
        np.testing.assert_allclose(
            (after[name] - started[name])[certain],
            (ended[name] - started[name])[certain],
            # The tolerance is 1e-4 of the update, plus the rounding of the parameters.
            atol=1e-4 * 1e-4 + 2**-23 * np.abs(started[name]).max(),
        )
    assert compared > 0.9 * nonzero > 0.5 * sum(map(np.size, started.values()))

    ours, old = flat(statistics), flat(before["batch_stats"])
    expected = flat(after_theirs["batch_stats"])
    positions = {"level0": 6 * 4 * 16 * 16, "level1": 6 * 4 * 8 * 8}
    for name, value in ours.items():
        if name.endswith("var"):  # PyTorch uses the unbiased variance of the batch
            n = positions[name.split("_")[0]]
            value = 0.9 * old[name] + (value - 0.9 * old[name]) * n / (n - 1)
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("freed")
def test_gradients_of_the_resnet_are_those_of_pytorch() -> None:
    """This is computed in float64: float32 rounding alone changes gradients by 1e-3."""
    config = resnet_config((6, 32, 48))
    torch.manual_seed(0)
    theirs = torch_networks.ResNet18(8)
    torch_networks.randomise(theirs)
    state = {key: value.copy() for key, value in arrays(theirs).items()}
    crops, labels = crops_of(config, 4, seed=2), np.array([0, 7, 2, 5])
    theirs.double()
    loss_theirs = torch.nn.CrossEntropyLoss()(
        theirs(torch.from_numpy(crops.transpose(0, 1, 3, 2)[:, None]).double()),
        torch.from_numpy(labels),
    )
    loss_theirs.backward()
    after = arrays(theirs)
    after |= {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    expected = torch_weights.resnet18(after, config)  # gradients and statistics

    with jax.enable_x64(True):
        network = model.from_config(config).clone(dtype=jnp.float64)
        variables = torch_weights.resnet18(state, config)
        step = jax.jit(loss_and_grads, static_argnums=0)
        (loss, statistics), grads = step(network, variables, crops, labels)
    assert float(loss) == pytest.approx(loss_theirs.item(), rel=1e-6)
    expected_grads = flat(expected["params"])
    for name, ours in flat(grads).items():
        found = expected_grads[name]
        np.testing.assert_allclose(ours, found, rtol=0, atol=1e-5 * np.abs(found).max())
    expected_statistics = flat(expected["batch_stats"])
    for name, ours in flat(statistics).items():
        if name.endswith("mean"):
            found = expected_statistics[name]
            np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_fifty_training_steps_differ_by_rounding_alone() -> None:
    """The limit is how much PyTorch's losses change if its weights change by 1e-6."""
    config = small_config()
    config.model.dropout = 0.0
    rng = np.random.default_rng(5)
    crops = crops_of(config, 4 * 6, seed=3).reshape(4, 6, *config.crop_shape_zyx)
    labels = rng.integers(0, 3, (4, 6))

    def theirs(perturbation: float, seed: int) -> np.ndarray:
        network = torch_vgg(config, dropout=0.0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in network.parameters():
                noise = torch.randn(each.shape, generator=generator)
                each *= 1 + perturbation * noise
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        losses = []
        for step in range(50):
            optimizer.zero_grad()
            logits = network(torch.from_numpy(crops[step % 4])[:, None])
            loss = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(labels[step % 4])
            )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return np.array(losses)

    def ours() -> np.ndarray:
        variables = torch_weights.vgg3d(arrays(torch_vgg(config, dropout=0.0)), config)
        network, tx = model.from_config(config), optax.adam(1e-3)
        opt_state = tx.init(variables["params"])

        @jax.jit
        def update(variables: dict, opt_state: tuple, i: jax.Array) -> tuple:
            (loss, statistics), grads = loss_and_grads(
                network, variables, jnp.asarray(crops)[i], jnp.asarray(labels)[i]
            )
            updates, opt_state = tx.update(grads, opt_state)
            params = optax.apply_updates(variables["params"], updates)
            return {"params": params, "batch_stats": statistics}, opt_state, loss

        losses = []
        for step in range(50):
            variables, opt_state, loss = update(variables, opt_state, step % 4)
            losses.append(float(loss))
        return np.array(losses)

    reference = theirs(0.0, 0)
    perturbed = [theirs(1e-6, seed) for seed in range(1, 5)]
    noise = max(np.abs(each - reference).max() for each in perturbed)
    difference = np.abs(ours() - reference).max()
    print(
        f"loss {reference[0]:.3f} to {reference[-1]:.3f}; noise {noise:.1e}, "
        f"difference {difference:.1e}"
    )
    assert reference[-4:].mean() < 0.7 * reference[:4].mean()  # it learns
    assert noise < 0.05  # otherwise the comparison proves nothing
    assert difference < 3 * noise


def test_setup_of_the_present_generation(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train_config.ini").write_text(TRAINING)
    base = skeleton.get_config().lock()
    config = torch_weights.read_setup(tmp_path, base)
    assert config.classes == ("gaba", "acetylcholine", "glutamate")
    assert config.crop_shape_zyx == (8, 32, 32)
    assert config.voxel_size_nm_zyx == (40, 4, 4)
    assert (config.batch_size, config.split) == (8, "skeleton")
    assert config.model.features == 3
    assert config.model.downsample_factors == ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert config.model.feature_multipliers == (2, 3, 2)
    assert config.model.convolutions == (2, 1, 2)
    assert config.model.dense_features == 4096  # from the base
    assert base.model.features == 12  # the base is unchanged


def test_setup_of_the_legacy_generation(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "predict_config.ini"
    path.write_text("""[Predict]
train_checkpoint = /a/02_train/setup_t3/model_checkpoint_500000
experiment = a
train_number = 3
predict_number = 0
synapse_types = gaba,acetylcholine , glutamate
input_shape = 80,80,80
fmaps = 16
batch_size = 8
split_name = skeleton
voxel_size = 8,8, 8
downsample_factors = (2, 2, 2),(2,2,2), (2,2,2) ,(2,2,2)
neither_class = True
overwrite = False
""")
    for given in (tmp_path, path):
        config = torch_weights.read_setup(given, skeleton.get_config())
        assert config.classes == ("gaba", "acetylcholine", "glutamate", "neither")
        assert config.voxel_size_nm_zyx == (8, 8, 8)
        assert config.model.downsample_factors == CUBIC
        assert config.model.feature_multipliers == (2, 2, 2, 2)  # the defaults
        assert config.model.convolutions == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("fmaps = 3", "", "has no key fmaps"),
        ("fmaps = 3", "fmaps = 3.5", "fmaps = 3.5: not a whole number"),
        ("fmaps = 3", "fmaps = 0", "fmaps = 0: not a whole number above 0"),
        ("fmaps = 3", "fmaps = 3\nfmaps = 4", "cannot be read as an .ini.*fmaps"),
        ("input_shape = 8, 32, 32", "input_shape = 8, 32", "input_shape.*not three"),
        ("(1,2,2), (1,2,2), (2,2,2)", "1, 2, 2", "downsample_factors.*not a list"),
        ("(1,2,2), (1,2,2), (2,2,2)", "(1,2,2), (2,2)", "downsample_factors.*three"),
        ("fmap_inc = 2, 3, 2", "fmap_inc = 2, 2", "fmap_inc.*2 numbers for 3 levels"),
        ("n_convolutions = 2, 1, 2", "", "has no key|n_convolutions.*4 numbers for 3"),
        ("network = VGG", "network = ResNet", "network = ResNet: only VGG"),
        ("gaba, acetylcholine", "gaba, gaba", "synapse_types.*twice"),
        ("gaba, acetylcholine", "gaba,, dopamine", "synapse_types.*empty"),
        ("[Training]", "[Worker]", "neither a section"),
        ("[Training]", "", "cannot be read as an .ini"),
    ],
)
def test_setup_with_a_mistake_is_refused(
    tmp_path: pathlib.Path, line: str, instead: str, says: str
) -> None:
    path = tmp_path / "train_config.ini"
    assert line in TRAINING
    path.write_text(TRAINING.replace(line, instead))
    with pytest.raises(UserError, match=f"{path}.*({says})"):
        torch_weights.read_setup(tmp_path, skeleton.get_config())


def test_setup_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="it has no train_config.ini"):
        torch_weights.read_setup(tmp_path, skeleton.get_config())
    with pytest.raises(UserError, match="absent.ini cannot be read"):
        torch_weights.read_setup(tmp_path / "absent.ini", skeleton.get_config())


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_checkpoints_of_both_formats_are_read(
    tmp_path: pathlib.Path, is_zip: bool, prefix: str
) -> None:
    state = torch_vgg(small_config()).state_dict()
    content = {prefix + key: value for key, value in state.items()}
    if not prefix:  # the original also saves the optimiser
        content = {"model_state_dict": content, "optimizer_state_dict": {"state": {}}}
    path = tmp_path / "model_checkpoint_7"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    loaded = torch_weights.load(path)
    assert loaded.keys() == state.keys()
    for key, value in loaded.items():
        np.testing.assert_array_equal(value, state[key].numpy())


def test_half_precision_is_read_as_float32(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "half.pth"
    torch.save({"a": torch.full((2,), 1.5, dtype=torch.bfloat16)}, path)
    loaded = torch_weights.load(path)["a"]
    assert loaded.dtype == np.float32 and loaded.tolist() == [1.5, 1.5]


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "old", "bare pickle"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: pathlib.Path, how: str) -> None:
    path, made = tmp_path / "model_checkpoint_1", tmp_path / "made"
    content = {"model_state_dict": {"a": torch.zeros(2)}, "more": Malicious(made)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"more": Malicious(made)}))
        pickle.loads(path.read_bytes())
        assert made.exists()  # unpickling runs the code
        made.unlink()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match="not a whole PyTorch checkpoint") as caught:
        torch_weights.load(path)
    assert "\n" not in str(caught.value)
    assert not made.exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_checkpoint_cut_short_is_refused(
    tmp_path: pathlib.Path, is_zip: bool
) -> None:
    path = tmp_path / "model_checkpoint_1"
    state = torch_vgg(small_config()).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for size in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole PyTorch checkpoint"):
            torch_weights.load(path)


@pytest.mark.parametrize(
    "content", [{}, {"model_state_dict": 3}, torch.zeros(2), {"a": [1]}, {1: 2}]
)
def test_a_checkpoint_without_a_state_is_refused(
    tmp_path: pathlib.Path, content: object
) -> None:
    path = tmp_path / "model_checkpoint_1"
    torch.save(content, path)
    with pytest.raises(UserError, match="holds no state dictionary"):
        torch_weights.load(path)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            torch_weights.load(path)


def test_a_name_twice_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model_checkpoint_1"
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="has a twice"):
        torch_weights.load(path)


@pytest.mark.long
def test_without_pytorch_the_package_says_what_to_install() -> None:
    program = """
import sys
sys.modules["torch"] = None
from synister_jax.network import torch_weights
torch_weights.load("x")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert "UserError: importing a PyTorch checkpoint needs PyTorch: pip install" in (
        done.stderr
    )


def test_state_that_does_not_fit_is_refused() -> None:
    config = small_config()
    state = arrays(torch_vgg(config))
    config.model.features = 4
    says = r"features\.[01]\.\w+ is \(3,.*network of the config needs \(4,"
    with pytest.raises(UserError, match=says):
        torch_weights.vgg3d(state, config)

    config = small_config()
    config.classes = (*config.classes, "neither")
    with pytest.raises(UserError, match=r"classifier\.6\.\w+ is \(3,.*needs \(4,"):
        torch_weights.vgg3d(state, config)

    config = small_config()
    with pytest.raises(UserError, match="has head.weight, but .* not; choose"):
        torch_weights.vgg3d(state | {"head.weight": np.zeros(2)}, config)
    more = {"head.weight": np.zeros(2), "head.bias": np.zeros(2)}
    with pytest.raises(UserError, match=r"has head.bias.*and 1 more"):
        torch_weights.vgg3d(state | more, config)

    del state["features.1.running_var"]
    with pytest.raises(UserError, match="has no features.1.running_var.*level0_norm0"):
        torch_weights.vgg3d(state, config)
    with pytest.raises(UserError, match=r"has no \w+.*, but the network .* needs this"):
        torch_weights.resnet18(state, resnet_config((5, 32, 32)))


def test_banc_classes_in_another_order_are_refused() -> None:
    config = resnet_config((5, 32, 32))
    config.classes = BANC[::-1]
    with pytest.raises(UserError, match="alphabetical order"):
        torch_weights.resnet18({}, config)

# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pytest

from synister_jax.network import checkpoint, inference, sharding

torch = pytest.importorskip("torch")
from tests.helpers import commands, torch_networks  # noqa: E402

pytestmark = pytest.mark.long

SETUP = """[Training]
synapse_types = gaba, acetylcholine, dopamine
neither_class = True
input_shape = 4, 16, 16
fmaps = 3
batch_size = 8
split_name = skeleton
voxel_size = 40, 4, 4
downsample_factors = (1,2,2), (2,2,2)
fmap_inc = 2, 2
n_convolutions = 2, 1
"""
BANC_CONFIG = """
from configs import skeleton


def get_config():
    config = skeleton.get_config()
    config.classes = ("acetylcholine", "dopamine", "gaba", "glutamate", "histamine",
                      "octopamine", "serotonin", "tyramine")
    config.crop_shape_zyx = (6, 32, 48)
    config.voxel_size_nm_zyx = (45, 4, 4)
    config.model.network = "resnet18"
    return config
"""


def run(*options: str) -> tuple[int, str, str]:
    done = commands.run("tools/import_torch.py", *options)
    return done.returncode, done.stdout, done.stderr


def probabilities(network: torch.nn.Module, records: np.ndarray) -> np.ndarray:
    """Returns the softmax of a PyTorch network for uint8 crops in its order of axes."""
    network.eval()
    crops = torch.from_numpy(records.copy())[:, None].float() / 255 * 2 - 1
    with torch.no_grad():
        return torch.softmax(network(crops), dim=1).numpy()


@pytest.fixture
def setup(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "setup_t3"
    folder.mkdir()
    (folder / "train_config.ini").write_text(SETUP)
    return folder


def small_vgg() -> torch_networks.Vgg3D:
    torch.manual_seed(0)
    network = torch_networks.Vgg3D(
        (4, 16, 16), 4, 3, (2, 2), ((1, 2, 2), (2, 2, 2)), (2, 1), dense_features=16
    )
    torch_networks.randomise(network)
    return network


def test_imported_setup_classifies_as_the_original(
    tmp_path: pathlib.Path, setup: pathlib.Path
) -> None:
    network = small_vgg()
    optimizer = torch.optim.Adam(network.parameters())
    path, workdir = setup / "model_checkpoint_1000", tmp_path / "run"
    torch.save(
        {
            "model_state_dict": network.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
        },
        path,
    )
    options = [f"--setup={setup}", f"--checkpoint={path}", f"--workdir={workdir}"]
    options.append("--config.model.dense_features=16")
    code, said, wrong = run(*options)
    assert code == 0, wrong
    parameters = sum(each.numel() for each in network.parameters())
    assert f"step 1000, vgg3d of {parameters:,} parameters" in said
    assert "classes gaba, acetylcholine, dopamine, neither; crop (4, 16, 16)" in said

    mesh = sharding.make_mesh()
    classify = inference.Classifier([(workdir, None)], 4 * mesh.size, mesh)
    assert classify.classes == ("gaba", "acetylcholine", "dopamine", "neither")
    assert classify.members[0]["step"] == 1000
    shape = (5, 4, 16, 16)
    records = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = probabilities(network, records)
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(classify(records), expected, rtol=1e-4, atol=1e-6)

    # A checkpoint of another step of the same training is added to the run.
    assert run(*options, "--step=2000")[0] == 0
    assert checkpoint.steps(workdir) == [1000, 2000]


@pytest.mark.slow
def test_imported_banc_checkpoint_classifies_as_the_original(
    tmp_path: pathlib.Path,
) -> None:
    torch.manual_seed(0)
    network = torch_networks.ResNet18(8)
    torch_networks.randomise(network)
    path, workdir = tmp_path / "model_checkpoint_1020000.pth", tmp_path / "run"
    state = network.state_dict()
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path)
    config = tmp_path / "banc.py"
    config.write_text(BANC_CONFIG)
    code, said, wrong = run(
        f"--config={config}", f"--checkpoint={path}", f"--workdir={workdir}"
    )
    assert code == 0, wrong
    assert "step 1020000, resnet18 of 33,151,560 parameters" in said

    mesh = sharding.make_mesh()
    classify = inference.Classifier([(workdir, 1_020_000)], mesh.size, mesh)
    shape = (3, 6, 32, 48)
    records = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    records[1, :, :, :24] //= 3
    records[2, :, :16] //= 3
    expected = probabilities(network, records.transpose(0, 1, 3, 2))  # BANC has z, x, y
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(classify(records), expected, rtol=1e-4, atol=1e-6)


def test_mistakes_are_named(tmp_path: pathlib.Path, setup: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    path = setup / "production.checkpoint"
    torch.save(small_vgg().state_dict(), path)

    def refused(*options: str) -> str:
        code, _, wrong = run(f"--checkpoint={path}", f"--workdir={workdir}", *options)
        assert code == 1 and wrong.count("\n") == 1
        assert not workdir.exists()
        return wrong

    assert "does not end in a step; give --step" in refused(f"--setup={setup}")
    wrong = refused(f"--setup={setup}", "--step=1")  # expects 4,096 dense features
    assert "classifier.0.bias is (16,) in the checkpoint" in wrong
    config = tmp_path / "banc.py"
    config.write_text(BANC_CONFIG)
    wrong = refused(f"--setup={setup}", "--step=1", f"--config={config}")
    assert "describes a vgg3d, but --config has a resnet18" in wrong
    ini = setup / "train_config.ini"
    ini.write_text(SETUP.replace("input_shape", "shape"))
    wrong = refused(f"--setup={setup}", "--step=1")
    assert f"{ini} has no key input_shape" in wrong

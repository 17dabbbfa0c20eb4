# SPDX-License-Identifier: Apache-2.0
import functools
import itertools
import json
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.evaluation import calibration
from synister_jax.network import checkpoint, inference, input_scaling, model, sharding
from tests.helpers.small_data import CLASSES, VOXEL_SIZE_NM_ZYX

pytestmark = pytest.mark.long

Members = list[tuple[pathlib.Path, int | None]]


@pytest.fixture(scope="module")
def other_network(
    tmp_path_factory: pytest.TempPathFactory, short_config: ml_collections.ConfigDict
) -> pathlib.Path:
    """An imported checkpoint of another architecture, with random weights."""
    config = short_config.copy_and_resolve_references()
    config.model.dense_features = 24
    config.model.convolutions = (2, 1)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda a: rng.uniform(0.05, 0.3, a.shape).astype(np.float32),
        inference.abstract_variables(config),
    )
    kernel = variables["params"]["logits"]["kernel"]
    # With larger weights the network would always be sure of one class.
    kernel *= rng.uniform(-0.1, 0.1, kernel.shape)
    folder = tmp_path_factory.mktemp("other") / "run"
    checkpoint.save_imported(folder, 20, variables, config)
    return folder


@pytest.fixture(scope="module")
def records() -> np.ndarray:
    """Crops with a margin of one voxel in y and x; each is brighter than the last."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 120, (11, 4, 18, 18), dtype=np.uint8)
    noise[:, :, :9, 4:] += np.arange(0, 110, 10, dtype=np.uint8)[:, None, None, None]
    return noise


def classifier(
    members: Members, views: int = 1, batch_size: int = 4, devices: int = 1
) -> inference.Classifier:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return inference.Classifier(members, batch_size, mesh, views)


def test_one_checkpoint_is_its_network(
    short_run: pathlib.Path,
    short_config: ml_collections.ConfigDict,
    records: np.ndarray,
) -> None:
    mesh = sharding.make_mesh(jax.devices()[:1])
    abstract = sharding.abstract(
        inference.abstract_variables(short_config), sharding.replicated(mesh)
    )
    variables = checkpoint.load_variables(short_run, 20, abstract, short_config)
    crops = input_scaling.centre(records, short_config.crop_shape_zyx)
    apply = model.from_config(short_config).apply
    network = jax.jit(functools.partial(apply, train=False))
    result = classifier([(short_run, None)], batch_size=11)(records)
    expected = jax.nn.softmax(network(variables, crops))
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert len(np.unique(result.argmax(axis=1))) > 1  # the classes differ


def test_mean_of_checkpoints_and_architectures(
    short_run: pathlib.Path, other_network: pathlib.Path, records: np.ndarray
) -> None:
    members: Members = [(short_run, 10), (short_run, None), (other_network, 20)]
    together = classifier(members)
    each = [classifier([member]) for member in members]
    results = [one(records) for one in each]
    for a, b in itertools.combinations(results, 2):
        assert np.abs(a - b).max() > 0.01
    expected = (results[0] + results[1] + results[2]) / np.float32(3)
    mean = together(records)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_array_equal(together(records), mean)
    two = classifier(members[:2])(records)
    np.testing.assert_array_equal(two, (results[0] + results[1]) / np.float32(2))

    assert together.classes == CLASSES
    assert together.config.model.dense_features == 16  # of the first member
    assert [m["step"] for m in together.members] == [10, 20, 20]
    assert together.members == [one.members[0] for one in each]
    assert json.loads(json.dumps(together.members)) == together.members
    assert together.members[0]["workdir"] == str(short_run)
    digests = {member["parameters_sha256"] for member in together.members}
    assert len(digests) == 3 and {len(digest) for digest in digests} == {64}


def symmetries(crops: np.ndarray) -> list[np.ndarray]:
    """Returns the crops [n, z, y, x] in all 8 mirrored and transposed versions."""
    result = []
    for y, x in itertools.product((1, -1), repeat=2):
        mirrored = crops[:, :, ::y, ::x]
        result += [mirrored, mirrored.swapaxes(2, 3)]
    return result


def test_eight_views_are_the_symmetries_of_the_section_plane(
    short_run: pathlib.Path, other_network: pathlib.Path, records: np.ndarray
) -> None:
    members: Members = [(short_run, 20), (other_network, 20)]
    plain, viewed = classifier(members), classifier(members, views=8)
    views = symmetries(records)
    assert len({view.tobytes() for view in views}) == 8
    each = [plain(view) for view in views]
    assert np.ptp(each, axis=0).max() > 0.01  # the network alone is not symmetric
    result = viewed(records)
    np.testing.assert_allclose(result, np.mean(each, axis=0), atol=1e-5)
    np.testing.assert_allclose(result.sum(axis=1), 1, rtol=1e-5)
    for view in views:
        np.testing.assert_allclose(viewed(view), result, atol=1e-5)


def test_crops_are_cut_before_they_are_turned(
    short_run: pathlib.Path, records: np.ndarray
) -> None:
    """With an odd margin, the centre of a mirrored record is at another voxel."""
    odd = np.pad(records[:, :, 1:-1, 1:-1], ((0, 0), (0, 1), (0, 1), (0, 1)))
    viewed = classifier([(short_run, 20)], views=8)
    np.testing.assert_allclose(viewed(odd), viewed(records), atol=1e-6)


@pytest.mark.parametrize("views", [1, 8])
def test_result_does_not_depend_on_devices_or_padding(
    short_run: pathlib.Path, records: np.ndarray, views: int
) -> None:
    members: Members = [(short_run, 10), (short_run, 20)]
    first = classifier(members, views, 11)(records)
    for batch_size, devices in ((3, 1), (4, 4), (16, 4)):
        other = classifier(members, views, batch_size, devices)
        np.testing.assert_allclose(other(records), first, atol=1e-5)


def test_put_and_start(short_run: pathlib.Path, records: np.ndarray) -> None:
    classify = classifier([(short_run, 10), (short_run, 20)], batch_size=8, devices=4)
    whole = classify(records)
    assert whole.shape == (11, 3)
    batches = [records[:8].copy(), records[8:].copy()]
    placed = [classify.put(batch) for batch in batches]
    for batch in batches:
        batch[:] = 0  # the caller may reuse the array
    for batch in placed:
        assert batch.shape == (8, 4, 18, 18) and batch.dtype == np.uint8
        assert [shard.data.shape[0] for shard in batch.addressable_shards] == [2] * 4
    assert not np.asarray(placed[1])[3:].any()
    started = [classify.start(batch) for batch in placed]
    for result in started:
        assert result.shape == (8, 3) and result.is_fully_replicated
    np.testing.assert_array_equal(np.concatenate(started)[:11], whole)
    assert classify(records[:0]).shape == (0, 3)


def with_config(
    folder: pathlib.Path, short_run: pathlib.Path, **changed: object
) -> pathlib.Path:
    """Copies the run, and changes these values in its config.json."""
    shutil.copytree(short_run, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | changed))
    return folder


def test_runs_that_differ_are_refused(
    tmp_path: pathlib.Path, short_run: pathlib.Path
) -> None:
    differences = {
        "classes": CLASSES[::-1],  # the same names in another order
        "crop_shape_zyx": (4, 16, 32),
        "voxel_size_nm_zyx": (35.0, *VOXEL_SIZE_NM_ZYX[1:]),
    }
    for name, value in differences.items():
        other = with_config(tmp_path / name, short_run, **{name: value})
        with pytest.raises(UserError) as caught:
            classifier([(short_run, 20), (short_run, 10), (other, 20)])
        said = str(caught.value)
        for part in (short_run, other, name, list(value)):
            assert str(part) in said
        assert "\n" not in said


def test_mistakes(tmp_path: pathlib.Path, short_run: pathlib.Path) -> None:
    with pytest.raises(UserError, match="views is 4; choose 1 or 8"):
        classifier([(short_run, 20)], views=4)
    oblong = with_config(tmp_path / "oblong", short_run, crop_shape_zyx=(4, 16, 32))
    with pytest.raises(UserError, match=r"views is 8.*\(4, 16, 32\); choose 1"):
        classifier([(oblong, 20)], views=8)
    with pytest.raises(UserError, match="no checkpoint of step 21; there are 10, 20"):
        classifier([(short_run, 20), (short_run, 21)])
    with pytest.raises(UserError, match="batch size 6 is not divisible by 4 devices"):
        classifier([(short_run, 20)], batch_size=6, devices=4)
    config = checkpoint.load_config(short_run)
    variables = jax.tree.map(
        lambda a: np.full(a.shape, np.nan, a.dtype),
        inference.abstract_variables(config),
    )
    checkpoint.save_imported(tmp_path / "ruined", 20, variables, config)
    with pytest.raises(UserError, match="ruined, step 20: parameters are NaN or inf"):
        classifier([(tmp_path / "ruined", None)])


def test_a_temperature_divides_the_logits(
    short_run: pathlib.Path, records: np.ndarray
) -> None:
    mesh = sharding.make_mesh(jax.devices()[:1])

    def at(temperature: float | None) -> np.ndarray:
        members: Members = [(short_run, 20)]
        model = inference.Classifier(members, 4, mesh, temperature=temperature)
        assert model.temperature == temperature
        return model(records)

    plain = at(None)
    np.testing.assert_array_equal(plain, classifier([(short_run, 20)])(records))
    np.testing.assert_array_equal(at(1.0), plain)
    result, expected = at(2.5), calibration.apply(plain, 2.5)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert np.abs(result - plain).max() > 0.05
    np.testing.assert_array_equal(result.argmax(1), plain.argmax(1))
    two: Members = [(short_run, 10), (short_run, 20)]
    for members, views in ((two, 1), (two[:1], 8)):
        with pytest.raises(UserError, match="fitted for one network and one view"):
            inference.Classifier(members, 4, mesh, views, temperature=1.5)

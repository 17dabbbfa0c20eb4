# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest

from synister_jax.evaluation import calibration


def softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


def drawn(
    n: int, sharpness: float, seed: int = 0, k: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Returns softmax(sharpness · z) in float32, and labels drawn from softmax(z)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, k))
    edges = softmax(logits).cumsum(axis=1)
    truth = (rng.random((n, 1)) > edges[:, :-1]).sum(axis=1)
    return softmax(sharpness * logits).astype(np.float32), truth


def error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    return calibration.reliability(probabilities, truth)["ece"]


@pytest.mark.long
@pytest.mark.parametrize("sharpness", [2.5, 1.0, 0.4])
def test_the_temperature_that_is_known(sharpness: float) -> None:
    probabilities, truth = drawn(20_000, sharpness)
    fitted = calibration.fit(probabilities, truth)
    # Over 20 seeds, the standard deviation was 0.011 of the sharpness.
    assert fitted == pytest.approx(sharpness, rel=0.05)
    after = calibration.apply(probabilities, fitted)
    # No temperature of a fine search has a lower loss.
    tried = sharpness * np.exp(np.linspace(-0.2, 0.2, 81))
    losses = [
        calibration.loss(calibration.apply(probabilities, t), truth) for t in tried
    ]
    assert calibration.loss(after, truth) <= min(losses) + 1e-6
    unseen, their_truth = drawn(20_000, sharpness, seed=1)
    assert error(calibration.apply(unseen, fitted), their_truth) < 0.012
    if sharpness != 1:
        assert error(unseen, their_truth) > 0.08


def test_apply_is_softmax_of_the_logits_over_t() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (200, 5))
    probabilities = softmax(logits).astype(np.float32)
    for temperature in (0.5, 1.0, 1.7, 20.0):
        result = calibration.apply(probabilities, temperature)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, softmax(logits / temperature), atol=1e-6)
        np.testing.assert_array_equal(result.argmax(1), probabilities.argmax(1))
    probabilities[3] = np.nan
    result = calibration.apply(probabilities, 2.0)
    assert np.isnan(result[3]).all() and np.isnan(result).any(axis=1).sum() == 1


def test_probabilities_of_0_and_1() -> None:
    probabilities = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    truth = np.array([0, 1, 0])  # the last row is certain and wrong
    assert calibration.loss(probabilities, truth) == pytest.approx(87.5 / 3, rel=1e-3)
    assert calibration.fit(probabilities, truth) == calibration.BOUNDS[1]
    assert np.isfinite(calibration.apply(probabilities, 0.05)).all()


def test_reliability_against_a_plain_loop() -> None:
    probabilities, truth = drawn(3_000, 2.0)
    probabilities[:15, :] = 0  # on edges, which belong to the lower bin
    probabilities[:15, 1] = np.arange(1, 16) / 15
    found = calibration.reliability(probabilities, truth)
    total = 0.0
    for i, one in enumerate(found["bins"]):
        # The edges are float64, because the probabilities are compared as float64.
        low, high = np.linspace(0, 1, 16)[i : i + 2]
        assert (one["low"], one["high"]) == (low, high)
        rows = [
            (float(max(p)), int(np.argmax(p)) == t)
            for p, t in zip(probabilities, truth, strict=True)
            if low < float(max(p)) <= high
        ]
        assert one["count"] == len(rows)
        if not rows:
            assert one["confidence"] is None and one["accuracy"] is None
            continue
        confidence = sum(p for p, _ in rows) / len(rows)
        accuracy = sum(right for _, right in rows) / len(rows)
        assert one["confidence"] == pytest.approx(confidence)
        assert one["accuracy"] == pytest.approx(accuracy)
        total += len(rows) / len(truth) * abs(accuracy - confidence)
    assert found["ece"] == pytest.approx(total) and total > 0.05
    assert len(found["bins"]) == 15
    assert sum(b["count"] for b in found["bins"]) == 3_000


def test_an_edge_belongs_to_the_bin_below() -> None:
    probabilities = np.array([[0.2, 0.6, 0.2], [0.1, np.nextafter(0.6, 1), 0.1]])
    bins = calibration.reliability(probabilities, np.array([1, 1]))["bins"]
    assert [b["count"] for b in bins[8:10]] == [1, 1]  # 9 / 15 is 0.6
    sure = calibration.reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert sure["bins"][-1]["count"] == 1 and sure["ece"] == 0


def test_rows_that_do_not_count() -> None:
    probabilities, truth = drawn(300, 2.0)
    more = np.concatenate([probabilities, probabilities[:5], np.full((4, 4), np.nan)])
    more[3, 2] = np.nan
    labels = np.concatenate([truth, [-1] * 5, truth[:4]])
    fewer, fewer_labels = np.delete(probabilities, 3, 0), np.delete(truth, 3)
    arguments = ((more, labels), (fewer, fewer_labels))
    for function in (calibration.fit, calibration.loss, calibration.reliability):
        a, b = itertools.starmap(function, arguments)
        assert a == b
    a, b = itertools.starmap(calibration.Curve.of, arguments)
    np.testing.assert_array_equal(a.kept, b.kept)
    np.testing.assert_array_equal(a.right, b.right)
    np.testing.assert_array_equal(a.threshold, b.threshold)
    a, b = (calibration.by_class(*x, 0.7) for x in arguments)
    assert a == b


@pytest.fixture(scope="module")
def tied() -> tuple[np.ndarray, np.ndarray]:
    """200 rows that have only about 20 different confidences."""
    rng = np.random.default_rng(4)
    top = rng.integers(20, 40, 200) / 40
    truth = np.where(rng.random(200) < top, 0, 1)
    return np.stack([top, 1 - top], axis=1), truth


def test_the_curve_and_its_thresholds_against_plain_loops(
    tied: tuple[np.ndarray, np.ndarray],
) -> None:
    probabilities, truth = tied
    curve = calibration.Curve.of(*tied)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    assert list(curve.threshold) == sorted(set(confidence.tolist()), reverse=True)
    precise = {}
    for i, threshold in enumerate(curve.threshold):
        kept = confidence >= threshold
        precise[threshold] = right[kept].mean()
        assert (curve.kept[i], curve.right[i]) == (kept.sum(), right[kept].sum())
        assert curve.coverage[i] == kept.mean()
        assert curve.precision[i] == precise[threshold]
        assert curve.at(threshold) == (kept.mean(), precise[threshold])
        assert curve.at(threshold - 1e-9) == curve.at(threshold)
    assert curve.at(1.5) == (0.0, None)
    found = set()
    for target in np.linspace(0, 1, 101):
        enough = [t for t, p in precise.items() if p >= target]
        lowest = curve.lowest(target)
        assert lowest == (min(enough) if enough else None)
        found.add(lowest)
    assert len(found) > 5


def test_precision_that_no_threshold_reaches() -> None:
    curve = calibration.Curve.of(
        np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([1, 0, 0])
    )
    assert curve.lowest(0.7) is None  # the precisions are 0, 1/2, 2/3
    assert curve.lowest(2 / 3) == 0.7
    # Rows of equal confidence enter together, so the right row cannot enter alone.
    tie = np.array([[0.9, 0.1], [0.9, 0.1]])
    assert calibration.Curve.of(tie, np.array([0, 1])).lowest(0.95) is None


def test_points_of_a_long_curve() -> None:
    probabilities, truth = drawn(5_000, 1.0)
    curve = calibration.Curve.of(probabilities, truth)
    points = curve.points()
    assert len(points) == 200
    assert points[0]["threshold"] == curve.threshold[0] and points[-1]["coverage"] == 1
    assert points[-1]["precision"] == curve.precision[-1]
    thresholds = [p["threshold"] for p in points]
    assert thresholds == sorted(thresholds, reverse=True)
    for point in points[::40]:
        expected = (point["coverage"], point["precision"])
        assert curve.at(point["threshold"]) == expected
    short = calibration.Curve.of(probabilities[:3], truth[:3])
    assert len(short.points()) == 3


def test_by_class_against_a_plain_loop() -> None:
    probabilities, truth = drawn(500, 2.0, k=3)
    probabilities = np.insert(probabilities, 1, 0, axis=1)  # a class never called
    truth = truth + (truth >= 1)
    found = calibration.by_class(probabilities, truth, 0.8)
    for index, (kept, precision) in enumerate(found):
        calls = (probabilities.argmax(1) == index) & (probabilities.max(1) >= 0.8)
        assert kept == calls.sum()
        assert precision == (None if index == 1 else (truth[calls] == index).mean())
    assert found[1] == (0, None) and min(found[i][0] for i in (0, 2, 3)) > 20


def test_degenerate_rows() -> None:
    low, high = calibration.BOUNDS
    right, _ = drawn(50, 1.0)
    assert calibration.fit(right, right.argmax(1)) == low
    assert calibration.fit(right, right.argmin(1)) == high
    assert calibration.fit(right[:1], right[:1].argmax(1)) == low
    # There is nothing to choose, so the probabilities stay as they are.
    one_class = np.ones((4, 1), np.float32)
    assert calibration.fit(one_class, np.zeros(4, int)) == 1
    assert calibration.fit(np.full((4, 2), 0.5), np.array([0, 1, 1, 1])) == 1
    assert error(one_class, np.zeros(4, int)) == 0
    none = np.zeros((0, 3)), np.zeros(0, int)
    assert calibration.loss(*none) is None and error(*none) is None
    curve = calibration.Curve.of(*none)
    assert curve.lowest(0.5) is None and curve.at(0.5) == (0.0, None)
    assert curve.points() == []
    assert calibration.by_class(*none, 0.5) == [(0, None)] * 3

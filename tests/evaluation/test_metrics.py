"""Fréchet distance, precision, recall, Inception Score: closed forms, other programs, known answers."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mdt_fast.errors import UserError
from mdt_fast.evaluation import (
    Moments,
    MomentSum,
    frechet_distance,
    inception_score,
    moments,
    parse_metrics,
    precision_recall,
)
from mdt_fast.evaluation.neighbours import squared_distances


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, seed: int) -> Tensor:
    root = normal(dim, dim, seed=seed)
    return root @ root.T / dim


def gaussian(mean: Tensor, cov: Tensor) -> Moments:
    return Moments(mean.double(), cov.double())


def test_commuting_gaussians_have_a_closed_form() -> None:
    """With the same eigenvectors: |m|^2 + sum (sqrt a - sqrt b)^2."""
    vectors = torch.linalg.qr(normal(40, 40)).Q
    a, b = normal(40, seed=1).square(), normal(40, seed=2).square()
    mean = normal(40, seed=3)
    left = gaussian(mean, vectors @ a.diag() @ vectors.T)
    right = gaussian(-mean, vectors @ b.diag() @ vectors.T)
    expected = 4 * mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(right, left) == pytest.approx(expected.item(), rel=1e-12)


def test_two_dimensions_have_a_closed_form_without_commuting() -> None:
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for 2x2."""
    a, b = covariance(2, 1), torch.diag(torch.tensor([3.0, 0.1], dtype=torch.float64))
    product = a @ b
    assert (product - b @ a).abs().max() > 0.1
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root).item()
    found = frechet_distance(gaussian(torch.zeros(2), a), gaussian(torch.zeros(2), b))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [500, 20], ids=["regular", "singular"])
def test_against_scipy_and_torchmetrics_on_the_same_features(count: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    mix = normal(64, 64, seed=9)
    left, right = normal(count, 64, seed=1) @ mix, normal(count + 30, 64, seed=2) @ mix + 0.3
    a, b = moments(left), moments(right)
    np.testing.assert_allclose(a.covariance, np.cov(left, rowvar=False), rtol=1e-10, atol=1e-12)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()
    expected -= 2 * root.real.trace()
    # The square root of a singular product is ill-posed: scipy's is the inexact one there.
    tolerance = 1e-9 if count > 64 else 1e-4
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=tolerance)

    identity = torch.nn.Identity()
    identity.num_features = 64
    judge = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    judge.update(left, real=True)
    judge.update(right, real=False)
    assert frechet_distance(a, b) == pytest.approx(judge.compute().item(), rel=tolerance)


def test_singular_covariances_against_thin_factors() -> None:
    """With fewer samples than features, the exact trace is the sum of singular values of X_c Y_c'."""
    left, right = normal(30, 200, seed=1), normal(40, 200, seed=2)
    thin = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (left, right)]
    a, b = moments(left), moments(right)
    expected = (a.mean - b.mean).square().sum() + sum(x.square().sum() for x in thin)
    expected -= 2 * torch.linalg.svdvals(thin[0] @ thin[1].T).sum()
    scale = a.covariance.trace() + b.covariance.trace()
    assert abs(frechet_distance(a, b) - expected) < 1e-6 * scale


def test_known_distances_of_sets() -> None:
    features = normal(300, 16)
    assert frechet_distance(moments(features), moments(features)) == pytest.approx(0, abs=1e-12)
    shift = torch.zeros(16, dtype=torch.float64)
    shift[3] = 2.5
    assert frechet_distance(moments(features), moments(features + shift)) == pytest.approx(6.25, rel=1e-12)


def test_moments_in_parts_are_those_of_the_whole() -> None:
    """Also far from the origin, where sums of squares would cancel."""
    features = normal(1000, 12) + 1e6
    whole = moments(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)
    for sizes in ([1, 999], [333, 333, 334], [7] * 142 + [6]):
        parts = MomentSum()
        for part in features.split(sizes):
            parts.add(part)
        found = parts.result()
        assert found.count == 1000
        torch.testing.assert_close(found.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(found.covariance, whole.covariance, rtol=1e-8, atol=1e-9)


def test_what_is_no_covariance_is_refused() -> None:
    good = gaussian(torch.zeros(3), torch.eye(3))
    with pytest.raises(UserError, match="dimension 3 and 2"):
        frechet_distance(good, gaussian(torch.zeros(2), torch.eye(2)))
    with pytest.raises(UserError, match="eigenvalue -1; none may be below 0"):
        frechet_distance(good, gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 2.0, -1.0]))))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(good, gaussian(torch.zeros(3), torch.eye(3) * torch.nan))


def plain_precision(samples: Tensor, reference: Tensor, k: int = 3) -> float:
    """As in the paper, without tiles."""
    between = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist")
    radii = between.sort(1).values[:, k]
    to_reference = torch.cdist(samples, reference, compute_mode="donot_use_mm_for_euclid_dist")
    return (to_reference <= radii).any(1).double().mean().item()


@pytest.mark.parametrize("tile", [(2048, 8192), (64, 50), (1, 1000), (300, 1)], ids=str)
def test_precision_and_recall_against_the_plain_form(tile: tuple[int, int]) -> None:
    samples, reference = normal(200, 10, seed=1) * 0.7, normal(150, 10, seed=2)
    precision, recall = precision_recall(samples, reference, tile=tile)
    assert precision == pytest.approx(plain_precision(samples, reference))
    assert recall == pytest.approx(plain_precision(reference, samples))
    assert 0 < recall < precision < 1


def test_known_precision_and_recall() -> None:
    points = normal(60, 5).float()
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points + 1000, points) == (0, 0)
    # Two clusters in the reference, one of them drawn: all precise, half of it recalled.
    reference = torch.cat([points, points + 1000])
    assert precision_recall(points, reference) == (1, 0.5)
    assert precision_recall(reference, points) == (0.5, 1)


def test_copies_have_no_distance_whatever_the_rounding() -> None:
    """A collapsed sampler: balls of radius 0 hold their centres, and only those."""
    one = 100 * normal(1, 300).float()
    collapsed = one.expand(50, -1)
    others = one + 100 * normal(50, 300, seed=1).float()
    assert precision_recall(collapsed, collapsed) == (1, 1)
    assert precision_recall(collapsed, torch.cat([collapsed, others]))[0] == 1
    assert precision_recall(others, collapsed)[0] == 0


@pytest.mark.parametrize("tile", [(2048, 8192), (1, 1), (7, 13)], ids=str)
def test_points_on_the_surface_of_a_ball_are_inside(tile: tuple[int, int]) -> None:
    """Features of few values: many distances are equal, and rounding must not tell them apart."""
    samples, reference = ((normal(150, 20, seed=seed) > 0.5).double() for seed in (1, 2))
    found = precision_recall(samples / 255, reference / 255, tile=tile)
    assert found == (plain_precision(samples, reference), plain_precision(reference, samples))
    assert 0 < found[1] < 1


def test_distances_by_a_product_are_those_of_differences() -> None:
    """Within float64's rounding; float32, which is not used, within its own."""
    a, b = normal(40, 256, seed=1), normal(50, 256, seed=2)
    exact = (a[:, None] - b).square().sum(-1)
    torch.testing.assert_close(squared_distances(a, b), exact, rtol=1e-12, atol=0)
    single = squared_distances(a.float(), b.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


def test_too_few_points_for_neighbours() -> None:
    with pytest.raises(UserError, match="got 3 samples, expected 4 or more"):
        precision_recall(normal(3, 2), normal(9, 2))


def test_known_inception_scores() -> None:
    uniform = torch.full((100, 7), 1 / 7)
    assert inception_score(uniform) == (pytest.approx(1, rel=1e-6), 0)
    one_hot = torch.eye(7).repeat(30, 1)
    assert inception_score(one_hot) == (pytest.approx(7), 0)
    assert inception_score(torch.eye(7)[:1].expand(50, -1)) == (pytest.approx(1), 0)
    # Two parts in order: one of 7 classes, one of a single class.
    mean, deviation = inception_score(torch.cat([one_hot, torch.eye(7)[:1].expand(210, -1)]), split=210)
    assert (mean, deviation) == (pytest.approx(4), pytest.approx(3))


def test_inception_score_against_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * normal(400, 11)
    judge = InceptionScore(feature=torch.nn.Identity(), splits=1)
    judge.update(logits)
    assert inception_score(logits.softmax(1))[0] == pytest.approx(judge.compute()[0].item(), rel=1e-10)


def test_metrics_by_name() -> None:
    assert parse_metrics("recall, fid") == ["fid", "recall"]
    with pytest.raises(UserError, match=r"got 'fdi' \(did you mean 'fid'\?\), expected fid, sfid, is"):
        parse_metrics("is,fdi")
    with pytest.raises(UserError, match="got none, expected one or more"):
        parse_metrics(" ,")

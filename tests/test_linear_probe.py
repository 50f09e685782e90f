"""The linear probe against scikit-learn and its own optimality condition, and OmniBenchmark."""

import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression

from mixer.evaluation import linear_probe
from mixer.parallel import sharding

COUNT, WIDTH, CLASSES = 300, 12, 4


def _features(count=COUNT, seed=0):
    """Features far from their origin whose deviations span three orders of magnitude."""
    rng = np.random.default_rng(0)
    centres, rotation = (
        rng.normal(size=(CLASSES, WIDTH)),
        np.linalg.qr(rng.normal(size=[WIDTH] * 2)),
    )
    rng = np.random.default_rng(seed)
    labels = rng.permutation(count) % CLASSES
    features = (rng.normal(size=(count, WIDTH)) + centres[labels]) * np.logspace(0, -3, WIDTH)
    return (features @ rotation[0] + 5).astype(np.float32), labels.astype(np.int32)


def _fit(features, labels, penalty, lambdas=linear_probe.LAMBDAS):
    mesh = sharding.make_mesh({"data": -1})
    fits = linear_probe.fit(
        features, labels, labels.max() + 1, mesh=mesh, penalty=penalty, lambdas=lambdas
    )
    return {each.lam: each for each in fits}


def _objective(fitted, features, labels):
    """The mean cross-entropy, and its gradients for the weights (of centred features) and bias."""
    logits = features.astype(np.float64) @ fitted.weights + fitted.bias
    log_softmax = logits - special.logsumexp(logits, axis=1, keepdims=True)
    loss = -log_softmax[np.arange(len(labels)), labels].mean()
    error = (np.exp(log_softmax) - np.eye(CLASSES)[labels]) / len(labels)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    return loss, centred.T @ error, error.sum(axis=0)


def test_squared_penalty_reaches_the_optimum_of_scikit_learn():
    features, labels = _features()
    other = _features(seed=1)[0].astype(np.float64)
    fits = _fit(features, labels, "squared")
    assert list(fits) == sorted(linear_probe.LAMBDAS, reverse=True)
    for lam, fitted in fits.items():
        assert fitted.converged and 0 < fitted.iterations < 100
        loss, of_weights, of_bias = _objective(fitted, features, labels)
        objective = loss + lam / 2 * np.sum(fitted.weights**2)
        assert fitted.objective == pytest.approx(objective, rel=1e-9)
        of_penalty = lam * fitted.weights
        left = np.linalg.norm(of_weights + of_penalty) / np.linalg.norm(of_penalty)
        assert left < linear_probe.TOLERANCE
        np.testing.assert_allclose(of_bias, 0, atol=1e-4)
        reference = LogisticRegression(C=1 / (lam * COUNT), solver="newton-cholesky", tol=1e-10)
        reference.fit(features.astype(np.float64), labels)
        probabilities = reference.predict_proba(features.astype(np.float64))
        best = -np.log(probabilities[np.arange(COUNT), labels]).mean()
        best += lam / 2 * np.sum(reference.coef_**2)
        assert objective == pytest.approx(best, abs=1e-6)
        logits = other @ fitted.weights + fitted.bias
        low, high = np.sort(logits, axis=1)[:, -2:].T
        assert np.all((logits.argmax(axis=1) == reference.predict(other)) | (high - low < 1e-2))


def test_norm_penalty_satisfies_its_optimality_condition(monkeypatch):
    """The data's gradient is that of the penalty; where W = 0 it is no longer than lam."""
    monkeypatch.setattr(linear_probe, "CHUNK_VALUES", 125 * WIDTH)  # three chunks, the last short
    features, labels = _features()
    fits = _fit(features, labels, "norm")
    zeros = {lam for lam, fitted in fits.items() if not fitted.weights.any()}
    assert 1.0 in zeros and not zeros & {1e-5, 1e-4, 3e-4, 1e-3, 1e-2} and len(fits) == 7
    for lam, fitted in fits.items():
        assert fitted.converged
        loss, of_weights, of_bias = _objective(fitted, features, labels)
        norm = np.linalg.norm(fitted.weights)
        assert fitted.objective == pytest.approx(loss + lam * norm, rel=1e-9)
        np.testing.assert_allclose(of_bias, 0, atol=1e-2 * lam)
        if lam in zeros:
            assert np.linalg.norm(of_weights) <= lam and fitted.iterations == 0
            np.testing.assert_allclose(np.exp(fitted.bias), 1 / CLASSES)
        else:
            left = of_weights + lam * fitted.weights / norm
            assert np.linalg.norm(left) < linear_probe.TOLERANCE * lam


# The probe of a model.


def _model(hidden_dim=16):
    """A tiny model, random parameters and the mesh they are on."""
    config = tiny_config(model__num_blocks=1)
    config.model.num_classes = 10
    model = run.build_model(config)
    mesh = sharding.make_mesh({"data": -1})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        train_state.abstract_params(model, (8, 8), mesh),
    )
    return model, params, mesh

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mixer.errors import UserError
from mixer.training.mixup import make_mix

OFF = dict(alpha=0.0, per_example=False, cutmix_alpha=0.0, cutmix_prob=0.0)
N = 64


@functools.cache
def _compiled(**options):
    return jax.jit(make_mix(**{**OFF, **options}))


def _mixed(seed=0, size=(8, 12), **options):
    """Image i is constant i + 1, its label one-hot i; so the mixture can be read off."""
    images = jnp.broadcast_to(jnp.arange(1.0, N + 1)[:, None, None, None], (N, *size, 3))
    images, labels = _compiled(**options)(jax.random.key(seed), images, jnp.eye(N))
    return np.asarray(images), np.asarray(labels)


def _shares(labels):
    """Share of the image itself in its label; the rest has to be its partner's."""
    own = np.diagonal(labels)
    partner = labels[np.arange(N), np.arange(N) - 1]
    np.testing.assert_allclose(own + partner, 1, atol=1e-6)
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)
    return own


def test_nothing_is_mixed_when_off():
    images, labels = _mixed()
    np.testing.assert_array_equal(labels, np.eye(N))
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(1, N + 1))


@pytest.mark.parametrize("per_example", [False, True])
def test_mixup_of_image_and_label(per_example):
    images, labels = _mixed(alpha=0.5, per_example=per_example)
    own = _shares(labels)
    values = np.arange(1, N + 1)
    expected = own * values + (1 - own) * np.roll(values, 1)
    expected = np.broadcast_to(expected[:, None, None, None], images.shape)
    np.testing.assert_allclose(images, expected, rtol=1e-6)
    assert own.min() >= 0.5
    assert len(np.unique(own.round(5))) == (1 if not per_example else N)


@pytest.mark.parametrize(
    "alpha", [0.2, *[pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.01, 0.5, 3.0)]]
)
def test_draws_are_those_of_beta(alpha):
    count = 20_000
    mix = _compiled(alpha=alpha, per_example=True)
    classes = jnp.arange(count) % 2  # an image's partner is of the other class
    _, labels = mix(jax.random.key(0), jnp.zeros((count, 1, 1, 1)), jnp.eye(2)[classes])
    own = np.asarray(labels)[np.arange(count), classes]
    assert own.min() >= 0.5 and own.max() <= 1
    # Near 1 float32 has few numbers: what lies there is counted as a whole.
    inside = np.linspace(0.501, 0.999, 500)
    shares = np.searchsorted(np.sort(own), inside) / count
    expected = 2 * special.betainc(alpha, alpha, inside) - 1  # of the larger of u and 1 - u
    assert np.abs(shares - expected).max() < 0.012  # of Kolmogorov and Smirnov: 1 in 150


@pytest.mark.parametrize("per_example", [False, True])
def test_cutmix_pastes_a_window_and_weighs_labels_by_its_area(per_example):
    images, labels = _mixed(cutmix_alpha=1.0, cutmix_prob=1.0, per_example=per_example)
    own = _shares(labels)
    values = np.arange(1, N + 1)
    windows = set()
    for i in range(N):
        mine = images[i, ..., 0] == values[i]
        assert (images[i, ..., 0][~mine] == values[i - 1]).all()
        np.testing.assert_allclose(mine.mean(), own[i], atol=1e-6)
        rows, columns = (~mine).any(1), (~mine).any(0)
        np.testing.assert_array_equal(~mine, rows[:, None] & columns)  # a rectangle
        for side in (rows, columns):
            assert (np.diff(np.flatnonzero(side)) == 1).all()
        windows.add(mine.tobytes())
    assert len(windows) == 1 if not per_example else len(windows) > N // 2


def _windows(alpha):
    """What CutMix pastes into each image, and whether the border cuts it off."""
    images, _ = _mixed(size=(80, 120), cutmix_alpha=alpha, cutmix_prob=1.0, per_example=True)
    pasted = images[..., 0] != np.arange(1, N + 1)[:, None, None]
    rows, columns = pasted.any(2), pasted.any(1)
    cut = rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]
    return pasted.mean((1, 2)), rows.mean(1), columns.mean(1), cut


def test_window_of_cutmix_has_the_images_aspect_and_the_area_drawn():
    _, rows, columns, cut = _windows(1.0)
    assert 5 < sum(~cut) < N
    np.testing.assert_allclose(rows[~cut], columns[~cut], atol=0.025)
    area, _, _, cut = _windows(1e4)  # all of them draw one half
    assert (area < 0.53).all() and any(~cut)
    np.testing.assert_allclose(area[~cut], 0.5, rtol=0.05)


def test_share_of_the_steps_that_take_cutmix():
    kinds = []
    for seed in range(60):
        images, _ = _mixed(seed, size=(4, 4), alpha=0.5, cutmix_alpha=1.0, cutmix_prob=0.5)
        blended = images[5, ..., 0] % 1 != 0
        assert blended.all() or not blended.any()
        kinds.append(bool(blended.any()))
    assert 18 < sum(kinds) < 42


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-1.0), "alpha.*-1"),
        (dict(alpha=float("nan")), "alpha.*nan"),
        (dict(cutmix_prob=0.5), "cutmix_prob=0.5"),
        (dict(cutmix_alpha=1.0), "cutmix_alpha=1.0"),
        (dict(cutmix_alpha=1.0, cutmix_prob=1.5), "cutmix_prob=1.5"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make_mix(**{**OFF, **options})


@pytest.mark.optimized
def test_lambda_has_the_same_bits_inside_a_loop():
    """XLA folds and moves constants otherwise there, and its logarithms are not all alike."""
    mix = make_mix(**OFF | dict(alpha=0.3))

    def share(key):
        return mix(key, jnp.ones((2, 1, 1, 1)), jnp.eye(2))[1]

    @jax.jit
    def looped(keys, count):
        def body(row, found):
            return found.at[row].set(share(keys[row]))

        return jax.lax.fori_loop(0, count, body, jnp.zeros((32, 2, 2)))

    keys = jax.random.split(jax.random.key(0), 32)
    alone = jax.jit(share)
    alone = [alone(key) for key in keys]
    np.testing.assert_array_equal(looped(keys, 32), alone)

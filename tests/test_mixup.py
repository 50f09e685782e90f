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


def _mix(seed=0, size=(8, 12), **options):
    """Mixes N images: image i has the constant value i + 1 and the one-hot label i."""
    images = jnp.broadcast_to(jnp.arange(1.0, N + 1)[:, None, None, None], (N, *size, 3))
    images, labels = _compiled(**options)(jax.random.key(seed), images, jnp.eye(N))
    return np.asarray(images), np.asarray(labels)


def _shares(labels):
    """Returns each image's own share of its label, and checks that its partner has the rest."""
    own_share = np.diagonal(labels)
    partner_share = labels[np.arange(N), np.arange(N) - 1]
    np.testing.assert_allclose(own_share + partner_share, 1, atol=1e-6)
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)
    return own_share


def test_mixing_can_be_off():
    images, labels = _mix()
    np.testing.assert_array_equal(labels, np.eye(N))
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(1, N + 1))


@pytest.mark.parametrize("per_example", [False, True])
def test_mixup_blends_images_and_labels(per_example):
    images, labels = _mix(alpha=0.5, per_example=per_example)
    own_share = _shares(labels)
    values = np.arange(1, N + 1)
    expected = own_share * values + (1 - own_share) * np.roll(values, 1)
    expected = np.broadcast_to(expected[:, None, None, None], images.shape)
    np.testing.assert_allclose(images, expected, rtol=1e-6)
    assert own_share.min() >= 0.5
    assert len(np.unique(own_share.round(5))) == (1 if not per_example else N)


@pytest.mark.parametrize(
    "alpha", [0.2, *[pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.01, 0.5, 3.0)]]
)
def test_mixup_shares_follow_the_beta_distribution(alpha):
    count = 20_000
    mix = _compiled(alpha=alpha, per_example=True)
    classes = jnp.arange(count) % 2  # the partner of an image has the other class
    _, labels = mix(jax.random.key(0), jnp.zeros((count, 1, 1, 1)), jnp.eye(2)[classes])
    own_share = np.asarray(labels)[np.arange(count), classes]
    assert own_share.min() >= 0.5 and own_share.max() <= 1
    # Near 1 float32 is coarse, so the distribution is compared below 0.999.
    points = np.linspace(0.501, 0.999, 500)
    cdf = np.searchsorted(np.sort(own_share), points) / count
    expected = 2 * special.betainc(alpha, alpha, points) - 1  # max(u, 1 - u)
    assert np.abs(cdf - expected).max() < 0.012  # Kolmogorov-Smirnov: false alarm 1 in 150


@pytest.mark.parametrize("per_example", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cutmix_pastes_a_window_and_weights_labels_by_its_area(per_example):
    images, labels = _mix(cutmix_alpha=1.0, cutmix_prob=1.0, per_example=per_example)
    own_share = _shares(labels)
    values = np.arange(1, N + 1)
    windows = set()
    for i in range(N):
        window = images[i, ..., 0] != values[i]
        assert (images[i, ..., 0][window] == values[i - 1]).all()
        np.testing.assert_allclose(1 - window.mean(), own_share[i], atol=1e-6)
        rows, columns = window.any(1), window.any(0)
        np.testing.assert_array_equal(window, rows[:, None] & columns)  # a rectangle
        for side in (rows, columns):
            assert (np.diff(np.flatnonzero(side)) == 1).all()
        windows.add(window.tobytes())
    assert len(windows) == 1 if not per_example else len(windows) > N // 2


def _windows(alpha):
    """Returns the area, height and width of each CutMix window, and whether the border clips it."""
    images, _ = _mix(size=(80, 120), cutmix_alpha=alpha, cutmix_prob=1.0, per_example=True)
    pasted = images[..., 0] != np.arange(1, N + 1)[:, None, None]
    rows, columns = pasted.any(2), pasted.any(1)
    is_clipped = rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]
    return pasted.mean((1, 2)), rows.mean(1), columns.mean(1), is_clipped


def test_cutmix_window_has_the_drawn_area_and_the_image_aspect():
    _, rows, columns, is_clipped = _windows(1.0)
    assert 5 < sum(~is_clipped) < N
    np.testing.assert_allclose(rows[~is_clipped], columns[~is_clipped], atol=0.025)
    area, _, _, is_clipped = _windows(1e4)  # every drawn area is close to one half
    assert (area < 0.53).all() and any(~is_clipped)
    np.testing.assert_allclose(area[~is_clipped], 0.5, rtol=0.05)


def test_cutmix_prob_is_the_share_of_steps_with_cutmix():
    mixups = 0
    for seed in range(60):
        images, _ = _mix(seed, size=(4, 4), alpha=0.5, cutmix_alpha=1.0, cutmix_prob=0.5)
        is_mixup = images[5, ..., 0] % 1 != 0
        assert is_mixup.all() or not is_mixup.any()
        mixups += is_mixup.any()
    assert 18 < mixups < 42


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
def test_invalid_values_are_named_in_the_error(options, message):
    with pytest.raises(UserError, match=message):
        make_mix(**{**OFF, **options})


@pytest.mark.optimized
def test_mixing_shares_are_bit_identical_inside_a_loop():
    """In a loop, XLA folds constants differently and may use another implementation of log."""
    mix = make_mix(**OFF | dict(alpha=0.3))

    def share(key):
        return mix(key, jnp.ones((2, 1, 1, 1)), jnp.eye(2))[1]

    @jax.jit
    def shares_in_a_loop(keys, count):
        def body(row, shares):
            return shares.at[row].set(share(keys[row]))

        return jax.lax.fori_loop(0, count, body, jnp.zeros((32, 2, 2)))

    keys = jax.random.split(jax.random.key(0), 32)
    compiled = jax.jit(share)
    np.testing.assert_array_equal(shares_in_a_loop(keys, 32), [compiled(key) for key in keys])

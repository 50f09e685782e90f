"""TensorFlow's stateless random numbers in JAX, bit-identical to TensorFlow's CPU kernels.

The generator is Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2,
3"). A key is TensorFlow's seed, two int64, as four uint32 words (..., 4), the low word of each
number first. Every function takes one key, or many keys in the leading dimensions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The paper's multipliers and key increments (golden ratio, square root of 3 minus 1).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# The key with which TensorFlow derives the key and the start of the counter from a seed.
SEED_KEY = (0x3EC8F720, 0x02461E29)


def make_key(first, second) -> jax.Array:
    """Returns the key for TensorFlow's seed [first, second].

    Args:
      first: 64-bit integers of Python or NumPy, or int32 or uint32 JAX arrays.
      second: the same; the two are broadcast against each other.

    Returns:
      (*shape, 4) uint32.
    """
    words = [*_words(first), *_words(second)]
    return jnp.stack(jnp.broadcast_arrays(*words), -1)


def _words(number) -> list[jax.Array]:
    """Returns the low and the high 32 bits of integers that are extended to int64."""
    if isinstance(number, jax.Array):
        signed = jnp.issubdtype(number.dtype, jnp.signedinteger)
        high = (number >> 31).astype(jnp.uint32) if signed else jnp.zeros(number.shape, jnp.uint32)
        return [number.astype(jnp.uint32), high]
    number = np.asarray(number, np.int64)
    return [jnp.asarray((number >> shift).astype(np.uint32)) for shift in (0, 32)]


def fold_in(key: jax.Array, data, *, bits: int = 64) -> jax.Array:
    """As `tf.random.experimental.stateless_fold_in`.

    Args:
      key: (..., 4) uint32.
      data: integers as in `make_key`, broadcast against the keys.
      bits: size of the data's type, which is also the type of TensorFlow's new seed: 64 for
        tf.int64, 32 for tf.int32 and for Python integers.

    Returns:
      The new keys, (..., 4) uint32.
    """
    low, high = jnp.moveaxis(_blocks(key, 1)[..., 0, :2], -1, 0)
    if bits == 32:
        high = _words(low.astype(jnp.int32))[1]
    words = [low, high, *_words(data)]
    return jnp.stack(jnp.broadcast_arrays(*words), -1)


def split(key: jax.Array, num: int = 2) -> jax.Array:
    """As `tf.random.experimental.stateless_split` of an int32 seed: (..., num, 4) uint32."""
    words = random_bits(key, (num, 2)).astype(jnp.int32)
    return make_key(words[..., 0], words[..., 1])


def uniform(key: jax.Array, shape=(), minval: float = 0.0, maxval: float = 1.0) -> jax.Array:
    """As `tf.random.stateless_uniform` in float32: `minval` <= number < `maxval`.

    Args:
      key: (..., 4) uint32.
      shape: shape of the numbers of one key.
      minval: smallest value.
      maxval: end of the range, exclusive.

    Returns:
      (..., *shape) float32.
    """
    # 23 random bits as the fraction of a float32 between 1 and 2.
    mantissa = random_bits(key, shape) & 0x7FFFFF
    value = jax.lax.bitcast_convert_type(mantissa | 0x3F800000, jnp.float32) - 1.0
    if (minval, maxval) == (0.0, 1.0):
        return value
    minval, maxval = np.float32(minval), np.float32(maxval)
    return rounded(value * (maxval - minval)) + minval


def integers(key: jax.Array, shape, minval: int, maxval: int) -> jax.Array:
    """As `tf.random.stateless_uniform` in int32: `minval` <= number < `maxval`.

    Args:
      key: (..., 4) uint32.
      shape: shape of the numbers of one key.
      minval: smallest number.
      maxval: end of the range, exclusive.

    Returns:
      (..., *shape) int32.
    """
    offset = random_bits(key, shape) % np.uint32(maxval - minval)
    return offset.astype(jnp.int32) + np.int32(minval)


def random_bits(key: jax.Array, shape=()) -> jax.Array:
    """Returns uniform uint32 numbers, `shape` for each key: (..., *shape)."""
    count = int(np.prod(shape))
    words = _blocks(key, -(-count // 4))
    words = words.reshape(*words.shape[:-2], -1)[..., :count]
    return words.reshape(*words.shape[:-1], *shape)


def rounded(product: jax.Array) -> jax.Array:
    """Returns a float32 product, rounded before a later addition.

    Compilers fuse a product and a sum into one operation (FMA) that rounds once, which differs in
    the last bit from TensorFlow's two operations. The maximum prevents this fusion.
    """
    return jnp.maximum(product, np.float32(-3e38))


def _blocks(key: jax.Array, count: int) -> jax.Array:
    """Returns the first `count` blocks of four words, (..., count, 4) uint32."""
    # TensorFlow enciphers the seed once: half of the result is the key, half the start counter.
    seed_key = [jnp.uint32(word) for word in SEED_KEY]
    mixed = _philox([key[..., i] for i in range(4)], seed_key)
    number = jnp.arange(
        count, dtype=jnp.uint32
    )  # below 2^32, so the counter's other words do not change
    first, second, third, fourth = (word[..., None] for word in mixed)
    zero = jnp.zeros_like(first)
    return jnp.stack(_philox([zero + number, zero, third, fourth], [first, second]), -1)


@functools.partial(jax.jit, inline=True)  # traced only once per shape
def _philox(counter: list[jax.Array], key: list[jax.Array]) -> list[jax.Array]:
    """Enciphers counters of four words with keys of two words; the arrays are broadcast."""
    counter = jnp.broadcast_arrays(*counter)
    first, second = map(np.uint32, MULTIPLIERS)
    for _ in range(ROUNDS):
        # The high and low halves of two 64-bit products.
        high0, low0 = _high_word(first, counter[0]), first * counter[0]
        high1, low1 = _high_word(second, counter[2]), second * counter[2]
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [word + np.uint32(step) for word, step in zip(key, KEY_STEPS, strict=True)]
    return counter


def _high_word(factor: np.uint32, words: jax.Array) -> jax.Array:
    """Returns the high 32 bits of 64-bit products, without `jax.lax.mulhi`.

    XLA does not partition `jax.lax.mulhi` over devices.
    """
    low, high = np.uint32(factor & 0xFFFF), np.uint32(factor >> 16)
    words_low, words_high = words & 0xFFFF, words >> 16
    middle = high * words_low + (low * words_low >> 16)
    return high * words_high + (middle >> 16) + (low * words_high + (middle & 0xFFFF) >> 16)

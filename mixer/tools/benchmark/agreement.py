"""How far this project's forms of the layers are from the plain formulation, on this device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixer.models import layers
from mixer.tools.benchmark.contest import Case
from mixer.tools.benchmark.jax_side import draw_params, make_mixer, make_plain
from mixer.training.step import normalize

SMALL = 1e-3  # share of the whole gradient's norm below which a parameter's is taken as so large


def compare(case: Case) -> dict[str, dict[str, Any]]:
    """Errors of ours and of the plain formulation, both in the case's dtype.

    Each is held against the plain one in float32 at the highest precision of matmuls, as
    |x - reference| / |reference|: in bfloat16 the plain one is about 1e-2 from it too, and ours is
    right where it is no further.

    Returns:
      For "ours" and "plain": "logits" of a batch, "gradient" of the softmax loss over all
      parameters together, and of the parameter where it is largest, "worst" and its "name".
    """
    params = draw_params(case)
    rng = np.random.default_rng(2)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    label = rng.integers(0, case.num_classes, case.batch_size, np.int32)

    def ours(params: Any, images: jax.Array) -> jax.Array:
        return make_mixer(case).apply({"params": params}, normalize(images))[0]

    def plain_in(dtype: str) -> Any:
        model = make_plain(case).clone(dtype=dtype)
        return lambda params, images: model.apply({"params": params}, images)

    def computed(logits_of: Any, options: dict[str, bool]) -> tuple[Any, Any]:
        def loss(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return jnp.mean(losses), logits

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)
        (_, logits), grads = gradient(params, images)
        return jax.device_get((logits, grads))

    with jax.default_matmul_precision("highest"):
        reference = computed(plain_in("float32"), {})
    options = layers.compiler_options(jax.default_backend())
    return {
        "ours": relative_errors(computed(ours, options), reference),
        "plain": relative_errors(computed(plain_in(case.dtype), {}), reference),
    }


def relative_errors(found: tuple[Any, Any], reference: tuple[Any, Any]) -> dict[str, Any]:
    """Relative errors of (logits, gradient)."""
    (logits, grads), (true_logits, true_grads) = found, reference
    each = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            np.linalg.norm(one - other),
            np.linalg.norm(other),
        )
        for (path, one), other in zip(
            jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(true_grads), strict=True
        )
    }
    off, size = (np.linalg.norm(norms) for norms in zip(*each.values(), strict=True))
    # The bias that follows token mixing has no gradient but rounding: the norm takes it away.
    least = SMALL * size
    relative = {name: float(off / max(size, least)) for name, (off, size) in each.items()}
    worst = max(relative, key=relative.__getitem__)
    return {
        "logits": float(np.linalg.norm(logits - true_logits) / np.linalg.norm(true_logits)),
        "gradient": float(off / size),
        "worst": relative[worst],
        "name": worst,
    }

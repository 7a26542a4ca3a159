"""The router phi: domain weights h [K] -> coefficients alpha [E].

    x = h - g                         (g: the natural frequencies; only if `center`)
    z = x W + gelu(x W1 + b1) W2      (W2 starts at zero; hidden_dim 0 leaves the second term out)
    alpha = scale * normalise(z)

Centering makes alpha zero at the generic h of a fresh router: there the merged model starts as S
alone, and experts start out as what *distinguishes* a mixture from the corpus.

Normalisations of z: none; softmax; tanh; l2 (unit length); ball (shrunk into the unit ball, left
alone inside it). Under Adam, softmax never separates experts that start at zero: all receive the
same update. The others give coefficients of both signs, and these separate them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax.shapes import Array, Params

NORMALIZATIONS = ("none", "softmax", "tanh", "l2", "ball")


def init_router(
    key: Array,
    *,
    num_domains: int,
    num_experts: int,
    hidden_dim: int,
    frequencies_K: np.ndarray,
    centroids_KC: np.ndarray | None = None,
) -> Params:
    """Router parameters; the constants it needs (g) are stored beside the trained ones.

    Args:
      frequencies_K: the natural domain frequencies g.
      centroids_KC: embeddings of the domains. Given, W starts as the projection of a mixture's
        mean embedding on the E main directions among domains, so that similar mixtures start with
        similar coefficients; else W is random.
    """
    keys = jax.random.split(key, 2)
    if centroids_KC is None:
        # A sparse h of s domains has length about s**-0.5; this makes z of unit variance for s=4.
        linear_KE = 2.0 * jax.random.normal(keys[0], (num_domains, num_experts))
    else:
        linear_KE = jnp.asarray(centroid_projection(centroids_KC, frequencies_K, num_experts))
    router = {"frequencies": jnp.asarray(frequencies_K, jnp.float32), "linear": linear_KE}
    if hidden_dim:
        std = 2.0 * hidden_dim**-0.5
        router["hidden"] = std * jax.random.normal(keys[1], (num_domains, hidden_dim))
        router["hidden_bias"] = jnp.zeros((hidden_dim,))
        router["out"] = jnp.zeros((hidden_dim, num_experts))
    return router


def centroid_projection(
    centroids_KC: np.ndarray, frequencies_K: np.ndarray, num_experts: int
) -> np.ndarray:
    """[K, E] float32: each domain's coordinates on the main directions among the domains.

    Directions come from the principal components of the frequency-weighted centroids, scaled to
    the same variance (whitened) so that all experts get used. With more experts than directions
    the rest are fixed pseudo-random combinations of them.
    """
    centered = centroids_KC - frequencies_K @ centroids_KC
    weighted = centered * np.sqrt(frequencies_K)[:, None]
    _, singular, directions = np.linalg.svd(weighted.astype(np.float64), full_matrices=False)
    rank = int((singular > 1e-6 * singular[0]).sum())
    kept = min(rank, num_experts)
    coordinates = centered @ directions[:kept].T / singular[:kept]
    if num_experts > kept:
        mixing = np.random.Generator(np.random.Philox(key=[0, num_experts])).normal(
            size=(kept, num_experts - kept)
        )
        coordinates = np.concatenate([coordinates, coordinates @ mixing / kept**0.5], axis=1)
    return coordinates.astype(np.float32)


def route(router: Params, h_MK: Array, *, normalization: str, scale: float, center: bool) -> Array:
    """alpha_ME of M domain weights; differentiable in the router's trained leaves."""
    x_MK = h_MK.astype(jnp.float32)
    if center:
        x_MK = x_MK - jax.lax.stop_gradient(router["frequencies"])
    z_ME = x_MK @ router["linear"]
    if "hidden" in router:
        z_ME = z_ME + jax.nn.gelu(x_MK @ router["hidden"] + router["hidden_bias"]) @ router["out"]
    return scale * normalize(z_ME, normalization)


def normalize(z_ME: Array, normalization: str) -> Array:
    """One of NORMALIZATIONS, along E.

    Raises:
      ValueError: unknown normalisation.
    """
    if normalization == "none":
        return z_ME
    if normalization == "softmax":
        return jax.nn.softmax(z_ME, axis=-1)
    if normalization == "tanh":
        return jnp.tanh(z_ME)
    # The small constant keeps the gradient finite at z = 0 (the generic h of a centered router).
    square = jnp.sum(z_ME * z_ME, axis=-1, keepdims=True) + 1e-12
    if normalization == "l2":
        return z_ME * jax.lax.rsqrt(square)
    if normalization == "ball":
        return z_ME * jax.lax.rsqrt(jnp.maximum(square, 1.0))
    raise ValueError(f"normalization {normalization!r} is none of {NORMALIZATIONS}")

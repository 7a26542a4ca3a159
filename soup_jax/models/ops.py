"""The costly parts of the base network: products by weights, attention and losses.

Each has a backward pass of its own. Autodiff of the plain formulas gives the same numbers, but
keeps and copies more: two arrays of attention scores a layer, three of logits, and for each weight
gradient a transposed copy of the larger operand. `benchmarks/base.py` measures them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from soup_jax.errors import UserError
from soup_jax.shapes import Array


def matmul(x: Array, w_DF: Any) -> Array:
    """x [..., D] @ w -> [..., F]; w may be a matrix that differs by row (`row_product`)."""
    if hasattr(w_DF, "row_product"):
        return w_DF.row_product(x)
    return _matmul(x, w_DF)


@jax.custom_vjp
def _matmul(x: Array, w_DF: Array) -> Array:
    return x @ w_DF


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w_DF = saved
    return jnp.einsum("...F,DF->...D", dy, w_DF), _outer(x, dy)


_matmul.defvjp(lambda x, w_DF: (x @ w_DF, (x, w_DF)), _matmul_backward)


def _outer(x: Array, dy: Array) -> Array:
    # sum over rows of x dy^T, [D, F]. A CPU transposes a copy of the first operand, and autodiff
    # always gives it dy: of logits that is the largest array there is.
    axes = (tuple(range(x.ndim - 1)),) * 2
    if x.shape[-1] <= dy.shape[-1]:
        return jnp.tensordot(x, dy, axes)
    return jnp.tensordot(dy, x, axes).T


@jax.custom_vjp
def look_up(table_VD: Array, token_BL: Array) -> Array:
    """Rows of the table, [B, L, D]; their gradients are added up in float32.

    In bfloat16 a token that a batch has a thousand times lost 5% of its gradient.
    """
    return table_VD[token_BL]


def _look_up_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, None]:
    table_VD, token_BL = saved
    total_VD = jnp.zeros(table_VD.shape, jnp.float32).at[token_BL].add(dy.astype(jnp.float32))
    return total_VD.astype(table_VD.dtype), None


look_up.defvjp(lambda table, token: (table[token], (table, token)), _look_up_backward)


def logits(x_BLD: Array, head_DV: Array) -> Array:
    """x @ head in float32, [B, L, V]."""
    return jnp.dot(x_BLD, head_DV, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _losses(x_BLD: Array, head_DV: Array, target_BL: Array) -> Array:
    return _losses_forward(x_BLD, head_DV, target_BL)[0]


def _losses_forward(x_BLD: Array, head_DV: Array, target_BL: Array) -> tuple[Array, Any]:
    logits_BLV = logits(x_BLD, head_DV)
    log_sum_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    picked = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)[..., 0]
    return log_sum_BL - picked, (x_BLD, head_DV, target_BL, logits_BLV, log_sum_BL)


def _losses_backward(saved: Any, g_BL: Array) -> tuple[Array, Array, None]:
    x_BLD, head_DV, target_BL, logits_BLV, log_sum_BL = saved
    # Autodiff subtracts the targets by a scatter, and makes two arrays of this size more.
    is_target = jnp.arange(logits_BLV.shape[-1]) == target_BL[..., None]
    d_BLV = (jnp.exp(logits_BLV - log_sum_BL[..., None]) - is_target) * g_BL[..., None]
    d_BLV = d_BLV.astype(x_BLD.dtype)
    return jnp.einsum("BLV,DV->BLD", d_BLV, head_DV), _outer(x_BLD, d_BLV), None


_losses.defvjp(_losses_forward, _losses_backward)


def token_losses(x_BLD: Array, head_DV: Array, target_BL: Array, *, chunk: int = 0) -> Array:
    """Cross-entropy of softmax(x @ head) in nats, float32 [B, L].

    Args:
      chunk: positions whose logits exist at one time, recomputed in the backward pass; must divide
        L. 0: all of them. Logits of all positions are the largest array of a small model with a
        usual vocabulary, by far.
    """

    length = x_BLD.shape[1]
    if not chunk or chunk >= length:
        return _losses(x_BLD, head_DV, target_BL)

    # Cut along L: rows may be sharded.
    def cut(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(a.shape[0], length // chunk, chunk, *a.shape[2:]), 1, 0)

    parts = jax.lax.map(
        jax.checkpoint(lambda xt: _losses(xt[0], head_DV, xt[1])), (cut(x_BLD), cut(target_BL))
    )
    return jnp.moveaxis(parts, 0, 1).reshape(target_BL.shape)


def document_begins(token_BL: Array, position_BL: Array, reset: int) -> Array:
    """int32 [B, L]: the place of the newest token `reset` up to each position, or 0."""
    return jax.lax.cummax(jnp.where(token_BL == reset, position_BL, 0), axis=1)


def attend(
    query: Array,
    key: Array,
    value: Array,
    begin_BL: Array | None = None,
    *,
    kind: str = "auto",
) -> Array:
    """Causal attention of query [B, L, H, head_dim], key and value [B, L, KV, head_dim].

    Args:
      begin_BL: int32, the first position that each one sees; None: 0.
      kind: "xla", which keeps no scores for the backward pass; "cudnn", jax's flash attention on
        NVIDIA GPUs; "auto", cudnn where there is such a GPU and cuDNN takes the type and head.

    Raises:
      UserError: "cudnn", and no such GPU, or a type or head that it does not take.
    """
    takes = kind != "xla" and _cudnn_takes(query)
    if begin_BL is not None and query.shape[1] % 2:
        takes = False  # cuDNN's training pass takes masks of even lengths only
    if kind == "cudnn" and not takes:
        raise UserError(
            "model.attention = 'cudnn' needs an NVIDIA GPU of compute capability 8.0 or more, "
            "model.dtype = 'bfloat16', heads of 8 to 128 in steps of 8 and, with "
            "model.attention_reset, an even seq_len; here are "
            f"{query.dtype}, heads of {query.shape[-1]} and {jax.devices()[0].device_kind}. "
            "Set model.attention=auto, which takes cuDNN where it can"
        )
    if takes:
        mask = None
        if begin_BL is not None:
            mask = jnp.arange(key.shape[1]) >= begin_BL[:, None, :, None]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation="cudnn"
        )
    return _attention(query, key, value, begin_BL)


def _cudnn_takes(query: Array) -> bool:
    # jax's own choice (implementation=None) is always XLA. At trace time, because both kinds in one
    # program would each keep what they need for the backward pass.
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    recent = float(device.compute_capability) >= 8
    return half and recent and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128


@jax.custom_vjp
def _attention(query: Array, key: Array, value: Array, begin_BL: Array | None) -> Array:
    return _attention_forward(query, key, value, begin_BL)[0]


def _by_head(x: Array, num_kv_heads: int) -> Array:
    # [B, L, H, D] -> [P, G * L, D], P = B * KV: the queries that share a key as rows of one matrix.
    # No dimension of its own for B: where it is 1, XLA's sums take a CPU many times as long.
    x = x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0] * num_kv_heads, -1, x.shape[-1])


def _by_position(x: Array, shape: tuple[int, ...]) -> Array:
    x = x.reshape(shape[0], -1, x.shape[1] // shape[1], shape[1], x.shape[-1])
    return x.transpose(0, 3, 1, 2, 4).reshape(shape)


def _scores(q_PTH: Array, k_PSH: Array, begin_BL: Array | None) -> Array:
    scores = jnp.einsum("PTH,PSH->PTS", q_PTH, k_PSH, preferred_element_type=jnp.float32)
    length = k_PSH.shape[1]
    position_T = jnp.arange(q_PTH.shape[1]) % length
    visible = jnp.arange(length) <= position_T[:, None]
    if begin_BL is not None:
        begin_PT = jnp.tile(begin_BL, (1, q_PTH.shape[1] // length))
        begin_PT = begin_PT.repeat(len(k_PSH) // len(begin_BL), axis=0)
        visible = visible & (jnp.arange(length) >= begin_PT[..., None])
    return jnp.where(visible, scores, -jnp.inf)


def _attention_forward(
    query: Array, key: Array, value: Array, begin_BL: Array | None
) -> tuple[Array, Any]:
    heads = key.shape[2]
    q_PTH = _by_head(query * query.shape[-1] ** -0.5, heads)
    k_PSH, v_PSH = _by_head(key, heads), _by_head(value, heads)
    scores = _scores(q_PTH, k_PSH, begin_BL)
    top = scores.max(-1, keepdims=True)
    p_PTS = jnp.exp(scores - top)  # divided by their sum only after the product: fewer numbers
    total = p_PTS.sum(-1, keepdims=True)
    y_PTH = jnp.einsum("PTS,PSH->PTH", p_PTS.astype(value.dtype), v_PSH) / total
    y_PTH = y_PTH.astype(query.dtype)
    saved = (q_PTH, k_PSH, v_PSH, y_PTH, top + jnp.log(total), begin_BL)
    return _by_position(y_PTH, query.shape), saved


def attend_cached(query: Array, key_BGSH: Array, value_BGSH: Array, visible_BTS: Array) -> Array:
    """Attention of query [B, L, H, head_dim] to a cache of S positions.

    Args:
      key_BGSH: [B, KV, S, head_dim], as `value_BGSH`.
      visible_BTS: [B, H / KV * L, S]: which positions each query of a key's head sees.
    """
    rows, heads = key_BGSH.shape[:2]
    q_PTH = _by_head(query * query.shape[-1] ** -0.5, heads)
    k_PSH, v_PSH = (x.reshape(rows * heads, *x.shape[2:]) for x in (key_BGSH, value_BGSH))
    scores = jnp.einsum("PTH,PSH->PTS", q_PTH, k_PSH, preferred_element_type=jnp.float32)
    p_PTS = jax.nn.softmax(jnp.where(visible_BTS.repeat(heads, 0), scores, -jnp.inf), axis=-1)
    y_PTH = jnp.einsum("PTS,PSH->PTH", p_PTS.astype(v_PSH.dtype), v_PSH)
    return _by_position(y_PTH, query.shape)


def _attention_backward(saved: Any, dy: Array) -> tuple[Array, Array, Array, None]:
    # As flash attention does it: the scores again, which is faster than keeping them.
    q_PTH, k_PSH, v_PSH, y_PTH, log_sum_PT1, begin_BL = saved
    rows = dy.shape[0]
    dy_PTH, dtype = _by_head(dy, len(k_PSH) // rows), dy.dtype
    p_PTS = jnp.exp(_scores(q_PTH, k_PSH, begin_BL) - log_sum_PT1)
    dp_PTS = jnp.einsum("PTH,PSH->PTS", dy_PTH, v_PSH, preferred_element_type=jnp.float32)
    along = (dy_PTH.astype(jnp.float32) * y_PTH.astype(jnp.float32)).sum(-1, keepdims=True)
    ds_PTS = (p_PTS * (dp_PTS - along)).astype(dtype)
    dq_PTH = jnp.einsum("PTS,PSH->PTH", ds_PTS, k_PSH) * dy.shape[-1] ** -0.5
    # The small operand first: it is the one that a CPU transposes a copy of.
    dk_PHS = jnp.einsum("PTH,PTS->PHS", q_PTH, ds_PTS)
    dv_PHS = jnp.einsum("PTH,PTS->PHS", dy_PTH, p_PTS.astype(dtype))
    dk, dv = (x.reshape(rows, -1, *x.shape[1:]).transpose(0, 3, 1, 2) for x in (dk_PHS, dv_PHS))
    return _by_position(dq_PTH, dy.shape), dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)

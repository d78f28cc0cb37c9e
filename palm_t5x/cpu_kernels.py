"""The two kernels that XLA:CPU does not find by itself: a matmul and causal attention.

Measured on two AVX-512 cores (docs/log.md), which is why they are written as they are:

* only a plain 2-D dot whose left operand contracts its last axis runs at full speed;
  with bf16 operands and fp32 result it runs at twice the fp32 rate, and any other
  layout is silently converted to fp32 first;
* attention over whole [T, T] score arrays is bound by memory, not by arithmetic: blocks
  that stay in the cache, and that skip what causality masks, are three times faster.

Shape letters as in `layers`, plus N rows, C contracted, O output.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

NEG_INF = -1e10


def _dot(a, b, contract):
  return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


_NN, _NT = ((1,), (0,)), ((1,), (1,))  # N: as stored, T: transposed


def _transpose(x_NC):
  """x.T through a 3-D transpose, which XLA cannot fold back into the dot."""
  n, c = x_NC.shape
  rows = math.gcd(n, 64)
  return x_NC.reshape(n // rows, rows, c).transpose(2, 0, 1).reshape(c, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_NC, w_CO, operand_dtype):
  """fp32 x @ w with operands rounded to `operand_dtype`, in the gradients as well."""
  return _dot(x_NC.astype(operand_dtype), w_CO.astype(operand_dtype), _NN)


def _matmul_fwd(x_NC, w_CO, operand_dtype):
  x_NC = x_NC.astype(operand_dtype)
  return _dot(x_NC, w_CO.astype(operand_dtype), _NN), (x_NC, w_CO)


def _matmul_bwd(operand_dtype, saved, g_NO):
  x_NC, w_CO = saved
  g_NO = g_NO.astype(operand_dtype)
  dx = _dot(g_NO, w_CO.astype(operand_dtype), _NT)
  if x_NC.shape[1] <= g_NO.shape[1]:  # transpose the narrower one
    return dx, _dot(_transpose(x_NC), g_NO, _NN)
  return dx, _transpose(_dot(_transpose(g_NO), x_NC, _NN))


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def num_blocks(length):
  """Query blocks of `causal_attention`: 64 steps each or more, and at most 8."""
  n = min(8, -(-length // 64))
  while length % n:
    n -= 1
  return n


def _blocks(q_XK, k_SK):
  """(rows, keys, mask [steps, keys]) of each query block, keys from 0 to its end."""
  T, R = k_SK.shape[0], q_XK.shape[0] // k_SK.shape[0]
  n = num_blocks(T)
  step = T // n
  for i in range(n):
    keys = (i + 1) * step
    seen = jnp.arange(keys)[None] <= jnp.arange(i * step, keys)[:, None]
    yield slice(i * step * R, keys * R), keys, seen


def _forward_row(q_XK, k_SK, v_SK):
  """(out [X, K], logsumexp [X]) of one row and key head; X = T*R, time-major."""
  outs, logsums = [], []
  for rows, keys, seen in _blocks(q_XK, k_SK):
    s = _dot(q_XK[rows], k_SK[:keys], _NT)
    s = s.reshape(len(seen), -1, keys)
    s = jnp.where(seen[:, None], s, NEG_INF).reshape(-1, keys)
    top = jnp.max(s, axis=1, keepdims=True)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=1, keepdims=True)
    outs.append(_dot(p.astype(v_SK.dtype), v_SK[:keys], _NN) / total)
    logsums.append((top + jnp.log(total))[:, 0])
  return jnp.concatenate(outs), jnp.concatenate(logsums)


def _backward_row(q_XK, k_SK, v_SK, out_XK, logsum_X, g_XK):
  """Gradients of one row. Scores are made again, transposed, so that no dot is slow."""
  delta_X = jnp.sum(out_XK * g_XK, axis=1)
  g_XK = g_XK.astype(q_XK.dtype)
  dq, dk, dv = [], *(jnp.zeros(x.shape, jnp.float32) for x in (k_SK, v_SK))
  for rows, keys, seen in _blocks(q_XK, k_SK):
    q, g, k = q_XK[rows], g_XK[rows], k_SK[:keys]
    s = _dot(k, q, _NT).reshape(keys, len(seen), -1)
    s = jnp.where(seen.T[:, :, None], s, NEG_INF).reshape(keys, -1)
    p = jnp.exp(s - logsum_X[rows])
    ds = p * (_dot(v_SK[:keys], g, _NT) - delta_X[rows])
    p, ds = p.astype(q.dtype), ds.astype(q.dtype)
    dv = dv.at[:keys].add(_dot(p, g, _NN))
    dk = dk.at[:keys].add(_dot(ds, q, _NN))
    dq.append(_transpose(_dot(_transpose(k), ds, _NN)))
  return jnp.concatenate(dq), dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q_YXK, k_YSK, v_YSK, operand_dtype):
  return _attend_fwd(q_YXK, k_YSK, v_YSK, operand_dtype)[0]


def _attend_fwd(q_YXK, k_YSK, v_YSK, operand_dtype):
  args = tuple(x.astype(operand_dtype) for x in (q_YXK, k_YSK, v_YSK))
  out, logsum = lax.map(lambda row: _forward_row(*row), args)
  return out, (*args, out, logsum)


def _attend_bwd(operand_dtype, saved, g_YXK):
  return lax.map(lambda row: _backward_row(*row), (*saved, g_YXK))


_attend.defvjp(_attend_fwd, _attend_bwd)


def causal_attention(q_BTHK, k_BTGK, v_BTGK, operand_dtype):
  """softmax(q k / sqrt(K)) v under a causal mask, fp32 result, in O(T) memory.

  Rows and key heads go one by one, query blocks within them; the backward pass computes
  the scores again from their log-sums. Any group size H/G. Operands of the products are
  rounded to `operand_dtype`; the softmax is fp32.
  """
  B, T, H, K = q_BTHK.shape
  G = k_BTGK.shape[2]
  q = (q_BTHK * (1.0 / math.sqrt(K))).reshape(B, T, G, H // G, K)
  by_head = lambda x: jnp.moveaxis(x, 2, 1).reshape(B * G, -1, K)
  out = _attend(by_head(q), by_head(k_BTGK), by_head(v_BTGK), operand_dtype)
  return jnp.moveaxis(out.reshape(B, G, T, H // G, K), 1, 2).reshape(B, T, H, K)

"""The arithmetic of a PaLM block: norm, projections, rotary, attention, gated MLP.

Everything here is a function of arrays; parameters live in `network`. Letters in names
and einsums, the same in the whole package:

  B batch   T query time   S key time   D model   H heads   K head size   L layers
  G key/value heads (1 = multi-query)   R = H/G   F feed-forward   V vocabulary

Activations carry logical axis names ('batch', 'length', 'embed', 'heads', 'kv', 'mlp',
'vocab'); which mesh axis each one maps to is the partitioner's table, not ours.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from palm_t5x import cpu_kernels, tpu_kernels

NEG_INF = -1e10  # the mask value of Google's PaLM code; finite, so no row can be NaN
NORM_EPSILON = 1e-6


def constrain(x, names):
  """Pins `x` to the mesh axes that the active rules give `names`; no rules: x."""
  return nn.with_logical_constraint(x, names)


def normalize(x, scale=None, kind='rms'):
  """RMS norm (or mean-centred 'layer_norm') over the last axis, times (1 + scale).

  Statistics in fp32, result in x's dtype. `scale` is stored around zero so that weight
  decay pulls the gain to 1; None means no gain. PaLM §2; Google's `_scaled_layernorm`.
  """
  y = x.astype(jnp.float32)
  if kind == 'layer_norm':
    y -= jnp.mean(y, axis=-1, keepdims=True)
  y *= lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + NORM_EPSILON)
  if scale is not None:
    y *= 1.0 + scale
  return y.astype(x.dtype)


def _contract(x, w, dims, out):
  return lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=out)


def operand_dtype(mode):
  """What a mode rounds the operands of matrix products to."""
  return jnp.float32 if mode == 'float32' else jnp.bfloat16


def project(x, w, mode, contract=1):
  """Contracts the last `contract` axes of x with the first of w.

  mode 'bfloat16': operands and result bf16, as accelerators like it. 'float32': fp32.
  'fast': operands rounded to bf16, result fp32, forward and backward (XLA:CPU).
  """
  lead, tail = x.shape[: x.ndim - contract], w.shape[contract:]
  if mode == 'bfloat16':
    dims = (tuple(range(len(lead), x.ndim)), tuple(range(contract)))
    return _contract(x.astype(mode), w.astype(mode), dims, jnp.bfloat16)
  size = math.prod(w.shape[:contract])
  y = cpu_kernels.matmul(x.reshape(-1, size), w.reshape(size, -1), operand_dtype(mode))
  return y.reshape(*lead, *tail)


def _one_matmul(x, w_rows, mode):
  """Whether a fused kernel is used whole: on accelerators, and for a few tokens."""
  return mode == 'bfloat16' or math.prod(x.shape[:2]) <= w_rows


def project_split(x_BTD, w, widths, mode):
  """`project`, its last axis split into `widths`: q and the MLP branches of a block.

  One matmul on accelerators. On CPU one for each slice of the kernel: what is then
  never split, and in the backward pass never put together, is the activations.
  """
  cuts = list(itertools.accumulate(widths))[:-1]
  if _one_matmul(x_BTD, w.shape[0], mode):
    return jnp.split(project(x_BTD, w, mode), cuts, axis=-1)
  return [project(x_BTD, part, mode) for part in jnp.split(w, cuts, axis=-1)]


def project_joined(parts, w_HFD, mode):
  """Heads' parts [B, T, H, f_i], side by side, times w: the output projection."""
  if _one_matmul(parts[0], w_HFD.shape[-1], mode):
    return project(jnp.concatenate(parts, axis=-1), w_HFD, mode, contract=2)
  cuts = list(itertools.accumulate(part.shape[-1] for part in parts))[:-1]
  kernels = jnp.split(w_HFD, cuts, axis=-2)
  pairs = zip(parts, kernels, strict=True)
  return sum(project(part, w, mode, contract=2) for part, w in pairs)


def fp32_logits(x, embedding_VD, mode):
  """x @ embedding.T as fp32, in every mode; operands are rounded as the mode says."""
  operands = operand_dtype(mode)
  dims = ((x.ndim - 1,), (1,))
  return _contract(x.astype(operands), embedding_VD.astype(operands), dims, jnp.float32)


def rotary_tables(positions_BT, head_dim, base=10_000.0):
  """(sin, cos) of shape [B, T, 1, head_dim/2], fp32, exact at any integer position.

  Angle j is position * base^(-2j/head_dim). Never built in bf16, which rounds 257 to
  256. PaLM §2; Google's `_generate_fixed_pos_embedding`.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  angles = positions_BT.astype(jnp.float32)[..., None] * base**-exponents
  return jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]


@jax.custom_vjp
def rotate(x_BTHK, tables):
  """Rotary embedding over all K dimensions, dim j paired with j + K/2 (half split).

  Its gradient is the rotation by the opposite angle. The pair is an axis of its own,
  for a concatenation would keep XLA:CPU from vectorising the loop.
  """
  sin, cos = (t[..., None, :] for t in tables)
  pairs = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], 2, -1)
  first = pairs[..., :1, :] * jnp.concatenate([cos, sin], axis=-2)
  second = pairs[..., 1:, :] * jnp.concatenate([-sin, cos], axis=-2)
  return (first + second).astype(x_BTHK.dtype).reshape(x_BTHK.shape)


rotate.defvjp(
  lambda x, tables: (rotate(x, tables), tables),
  lambda tables, g: (rotate(g, (-tables[0], tables[1])), None),
)


def training_mask(length, segment_ids_BT=None, prefix_BT=None):
  """[B or 1, T, T] bool, True where query t may see key s.

  Causal by row index; both in the prefix (1 = bidirectional input) also see each other;
  segments, where given, see only themselves. None of them: None, meaning plain causal.
  """
  if segment_ids_BT is None and prefix_BT is None:
    return None
  mask = jnp.tril(jnp.ones((1, length, length), bool))
  if prefix_BT is not None:
    inside = prefix_BT > 0
    mask = mask | (inside[:, :, None] & inside[:, None, :])
  if segment_ids_BT is not None:
    mask = mask & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
  return mask


def _einsum(spec, a, b):
  """fp32 result; XLA:CPU cannot run batched bf16 dots and gets fp32 operands."""
  run = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
  if a.dtype == jnp.float32:
    return run(a, b)
  up = lambda a, b: run(a.astype(jnp.float32), b.astype(jnp.float32))
  return lax.platform_dependent(a, b, cpu=up, default=run)


def attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS=None, kernel='xla', mode='float32'):
  """softmax(q k / sqrt(K)) v with fp32 softmax; [B, T, H, K] in q's dtype.

  Query head h reads key head h // (H/G). `mask_BTS` None means causal (T == S).
  kernel: 'xla', 'cudnn' (GPU, bf16), or, where the mask is plain causal, 'splash' (TPU,
  T a multiple of 128) and 'blocked' (one CPU device). All are the same function.
  """
  (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
  if kernel == 'cudnn':
    mask = None if mask_BTS is None else mask_BTS[:, None]
    return jax.nn.dot_product_attention(
      q_BTHK, k_BSGK, v_BSGK, mask=mask, is_causal=mask is None, implementation='cudnn'
    )
  if kernel == 'splash' and mask_BTS is None and tpu_kernels.fits(T):
    return tpu_kernels.causal_attention(q_BTHK, k_BSGK, v_BSGK)
  on_one_device = jax.sharding.get_abstract_mesh().size <= 1
  if kernel == 'blocked' and mask_BTS is None and on_one_device:
    out = cpu_kernels.causal_attention(q_BTHK, k_BSGK, v_BSGK, operand_dtype(mode))
    return checkpoint_name(out, 'attention')
  if mask_BTS is None:
    mask_BTS = jnp.tril(jnp.ones((1, T, S), bool))
  # Multi-query heads ride along the time axis, so nothing is transposed for G = 1.
  q = (q_BTHK * (1.0 / math.sqrt(K))).astype(q_BTHK.dtype).reshape(B, T, G, H // G, K)
  scores = _einsum('BTGRK,BSGK->BGTRS', q, k_BSGK)
  scores = jnp.where(mask_BTS[:, None, :, None, :], scores, NEG_INF)
  probs = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
  out = _einsum('BGTRS,BSGK->BTGRK', probs, v_BSGK)
  out = out.reshape(B, T, H, K).astype(q_BTHK.dtype)
  return checkpoint_name(out, 'attention')


ACTIVATIONS = {
  'swish': jax.nn.silu,
  'silu': jax.nn.silu,
  'gelu': jax.nn.gelu,
  'relu': jax.nn.relu,
  'linear': lambda x: x,
}


@jax.custom_vjp
def _swiglu(a, b):
  return jax.nn.silu(a) * b


def _swiglu_bwd(saved, g):
  a, b = saved
  # By tanh, so that XLA does not keep the forward pass's sigmoid in memory for this.
  sigmoid = 0.5 * jnp.tanh(0.5 * a) + 0.5
  swish = a * sigmoid
  return g * b * (sigmoid + swish * (1.0 - sigmoid)), g * swish


_swiglu.defvjp(lambda a, b: (_swiglu(a, b), (a, b)), _swiglu_bwd)


def gate(branches, activations):
  """Product of act_i(branch_i): ('swish', 'linear') is SwiGLU, swish(xW) * xV."""
  if activations in (('swish', 'linear'), ('silu', 'linear')):
    return checkpoint_name(_swiglu(*branches), 'gated')
  parts = [ACTIVATIONS[a](b) for a, b in zip(activations, branches, strict=True)]
  return checkpoint_name(functools.reduce(jnp.multiply, parts), 'gated')

"""Cross entropy with z-loss, computed a chunk of tokens at a time.

With a vocabulary of 256k the logits of one PaLM batch would be far larger than the
model. So hidden states, not logits, come in: each chunk's logits are made, reduced to
losses and turned into gradients before the next chunk's exist, and never made twice.

Shape letters as in `layers`; N counts tokens, c the tokens of one row in a chunk.
"""

import enum
import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from palm_t5x import layers, meshes
from palm_t5x.errors import UserError


@enum.unique
class SpecialLossNormalizingFactor(enum.Enum):
  """What the summed loss is divided by (T5X's names).

  NUM_REAL_TARGET_TOKENS: the sum of the loss weights. The paper's mean over tokens.
  NUM_TOTAL_TARGET_TOKENS: batch size times length, padding included.
  AVERAGE_PER_SEQUENCE: every (packed) sequence weighs the same, however long.
  """

  NUM_REAL_TARGET_TOKENS = 1
  NUM_TOTAL_TARGET_TOKENS = 2
  AVERAGE_PER_SEQUENCE = 3


def normalizing_factor(value):
  """None, a positive number, or a SpecialLossNormalizingFactor from its name.

  Raises UserError for anything else, with the names that exist.
  """
  if value is None or isinstance(value, SpecialLossNormalizingFactor):
    return value
  if isinstance(value, str):
    if value.upper() in SpecialLossNormalizingFactor.__members__:
      return SpecialLossNormalizingFactor[value.upper()]
  elif value > 0:
    return float(value)
  names = ', '.join(SpecialLossNormalizingFactor.__members__)
  raise UserError(
    f'LOSS_NORMALIZING_FACTOR={value!r}: give None, a number above 0, or one of {names}'
  )


def per_sequence_weights(weights_BT, segment_ids_BT=None):
  """Weights divided by their sum over the row, or over the packed segment."""
  if segment_ids_BT is None:
    totals = jnp.sum(weights_BT, axis=1, keepdims=True)
  else:
    length = weights_BT.shape[1]
    row = lambda w, s: jax.ops.segment_sum(w, s, num_segments=length + 1)[s]
    totals = jax.vmap(row)(weights_BT, segment_ids_BT)
  return jnp.where(totals > 0, weights_BT / jnp.where(totals > 0, totals, 1.0), 0.0)


def _smoothing(label_smoothing, num_classes):
  """(weight of every class, extra weight of the target, T5X's subtracted constant)."""
  low = label_smoothing / (num_classes - 1)
  confidence = 1.0 - label_smoothing
  entropy = -confidence * math.log(confidence)
  entropy -= label_smoothing * math.log(low + 1e-20)
  return low, confidence - low, entropy


def _columns(width, axes):
  """Numbers of the vocabulary that `width` columns stand for on this device."""
  first = lax.axis_index(axes) * width if axes else 0
  return first + jnp.arange(width)


def _over(reduce, x, axes):
  """psum or pmax over the devices that share the vocabulary, if several do."""
  return reduce(x, axes) if axes else x


def _reduce(logits_NV, targets_N, z_loss, label_smoothing, num_real_tokens, axes=()):
  """(masked logits, logsumexp [N], cross entropy [N], z-loss [N], correct [N]).

  With `axes`, the columns of logits are this device's share of the vocabulary.
  """
  columns = _columns(logits_NV.shape[-1], axes)
  classes = num_real_tokens or logits_NV.shape[-1] * meshes.size(axes)
  if classes < logits_NV.shape[-1] * meshes.size(axes):
    logits_NV = jnp.where(columns < classes, logits_NV, layers.NEG_INF)
  top = _over(lax.pmax, lax.stop_gradient(jnp.max(logits_NV, axis=-1)), axes)
  total = jnp.sum(jnp.exp(logits_NV - top[:, None]), axis=-1)
  logz = top + jnp.log(_over(lax.psum, total, axes))
  # Not a gather: the target's column may lie on another device.
  chosen = jnp.where(columns == targets_N[:, None], logits_NV, 0.0)
  picked = _over(lax.psum, jnp.sum(chosen, axis=-1), axes)
  low, extra, entropy = _smoothing(label_smoothing, classes)
  if label_smoothing:
    real = jnp.sum(jnp.where(columns < classes, logits_NV, 0.0), axis=-1)
    cross = logz - extra * picked - entropy - low * _over(lax.psum, real, axes)
  else:
    cross = logz - picked
  correct = (picked >= top).astype(jnp.float32)
  return logits_NV, logz, cross, z_loss * jnp.square(logz), correct


def cross_entropy_with_z_loss(
  logits_NV, targets_N, z_loss=0.0, label_smoothing=0.0, num_real_tokens=None
):
  """(cross entropy [N], z-loss [N]) in nats; train on their sum. PaLM §5.

  Args:
    logits_NV: fp32 logits.
    targets_N: int target ids, below num_real_tokens.
    z_loss: coefficient of log(Z)^2, Z the softmax normaliser; PaLM: 1e-4.
    label_smoothing: mass spread over the other real tokens (T5X subtracts the
      entropy of the smoothed target, and so do we).
    num_real_tokens: later columns are padding and get no probability; None: all real.
  """
  parts = _reduce(logits_NV, targets_N, z_loss, label_smoothing, num_real_tokens)
  return parts[2], parts[3]


class _Options(typing.NamedTuple):
  scale: float
  z_loss: float
  label_smoothing: float
  num_real_tokens: int | None
  chunk_length: int
  dtype: str
  axes: tuple[str, ...] = ()  # that cut the vocabulary


def _matmul(a, b, dims, dtype):
  """fp32 result of the mode's operand dtype, one plain 2-D dot."""
  if dtype != 'float32':
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  return lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32)


def _one_chunk(hidden_ND, embedding_VD, targets_N, weights_N, options, with_grad):
  """Per-token numbers of one chunk, and the gradients of its weighted loss."""
  o = options
  logits = _matmul(hidden_ND, embedding_VD, ((1,), (1,)), o.dtype) * o.scale
  logits, logz, cross, z, correct = _reduce(
    logits, targets_N, o.z_loss, o.label_smoothing, o.num_real_tokens, o.axes
  )
  tokens = {'cross_entropy': cross, 'z_loss': z, 'correct': correct}
  if not with_grad:
    return tokens, None, None
  # d/dlogits = (1 + 2 c log Z) softmax - target distribution, which is 0 on padding.
  classes = o.num_real_tokens or logits.shape[-1] * meshes.size(o.axes)
  low, extra, _ = _smoothing(o.label_smoothing, classes)
  columns = _columns(logits.shape[-1], o.axes)
  g = (1.0 + 2.0 * o.z_loss * logz)[:, None] * jnp.exp(logits - logz[:, None])
  g -= jnp.where(columns == targets_N[:, None], extra, 0.0)
  if o.label_smoothing:
    g -= jnp.where(columns < classes, low, 0.0)
  g *= (weights_N * o.scale)[:, None]
  if o.dtype != 'float32':
    g = g.astype(jnp.bfloat16)
  d_hidden = _over(lax.psum, _matmul(g, embedding_VD, ((1,), (0,)), o.dtype), o.axes)
  d_embedding = _matmul(g, hidden_ND, ((0,), (0,)), o.dtype)
  return tokens, d_hidden.astype(hidden_ND.dtype), d_embedding


def _chunk_shape(B, T, V, chunk_length):
  """(chunks, tokens of each row in a chunk); the rows stay together, for sharding."""
  length = chunk_length or max(16, 2**22 // (B * V))
  n = -(-T // min(T, length))
  return n, -(-T // n)


def _run(hidden_BTD, embedding_VD, targets_BT, weights_BT, options, with_grad):
  """(loss sum, per-token numbers [B, T], d_hidden [B, T, D], d_embedding [V, D]).

  Where a mesh cuts batch or vocabulary, each device works on its rows and columns, and
  d_embedding is added up over all chunks before it is reduced over the batch: XLA's
  partitioner would gather the embedding and reduce its gradient once per chunk.
  """
  if options.dtype != 'float32':
    embedding_VD = embedding_VD.astype(jnp.bfloat16)
  arrays = (hidden_BTD, embedding_VD, targets_BT, weights_BT)
  rows, (vocab,) = meshes.batch_axes(hidden_BTD.shape[0]), meshes.axes_of('vocab')
  if not rows and not vocab:
    return _run_share(*arrays, options, with_grad)
  options = options._replace(axes=vocab)
  columns = rows if hidden_BTD.shape[-1] % meshes.size(rows) == 0 else ()

  def share(*arrays):
    loss, tokens, d_hidden, d_embedding = _run_share(*arrays, options, with_grad)
    if d_embedding is not None and columns:
      d_embedding = lax.psum_scatter(
        d_embedding, columns, scatter_dimension=1, tiled=True
      )
    elif d_embedding is not None:
      d_embedding = _over(lax.psum, d_embedding, rows)
    return _over(lax.psum, loss, rows), tokens, d_hidden, d_embedding

  spec = PartitionSpec
  return jax.shard_map(
    share,
    in_specs=(spec(rows), spec(vocab), spec(rows), spec(rows)),
    out_specs=(spec(), spec(rows), spec(rows), spec(vocab, columns)),
    axis_names={*rows, *vocab},
    check_vma=False,
  )(*arrays)


def _run_share(hidden_BTD, embedding_VD, targets_BT, weights_BT, options, with_grad):
  """`_run` on the rows and the columns of one device."""
  B, T, _ = hidden_BTD.shape
  n, c = _chunk_shape(B, T, embedding_VD.shape[0], options.chunk_length)

  def cut(x):  # [B, T, ...] -> [n, B*c, ...], zero weights where T was padded
    x = jnp.pad(x, [(0, 0), (0, n * c - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, n, c, *x.shape[2:]), 1, 0).reshape(
      n, B * c, *x.shape[2:]
    )

  def join(x):
    x = jnp.moveaxis(x.reshape(n, B, c, *x.shape[2:]), 0, 1)
    return x.reshape(B, n * c, *x.shape[3:])[:, :T]

  def body(d_embedding, chunk):
    hidden, targets, weights = chunk
    tokens, d_hidden, more = _one_chunk(
      hidden, embedding_VD, targets, weights, options, with_grad
    )
    d_embedding = None if more is None else d_embedding + more
    return d_embedding, (tokens, d_hidden)

  zero = jnp.zeros(embedding_VD.shape, jnp.float32) if with_grad else None
  d_embedding, (tokens, d_hidden) = lax.scan(
    body, zero, (cut(hidden_BTD), cut(targets_BT), cut(weights_BT))
  )
  tokens = jax.tree.map(join, tokens)
  loss = jnp.sum((tokens['cross_entropy'] + tokens['z_loss']) * weights_BT)
  return loss, tokens, None if d_hidden is None else join(d_hidden), d_embedding


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden_BTD, embedding_VD, targets_BT, weights_BT, options):
  return _run(hidden_BTD, embedding_VD, targets_BT, weights_BT, options, False)[:2]


def _chunked_fwd(hidden_BTD, embedding_VD, targets_BT, weights_BT, options):
  loss, tokens, *gradients = _run(
    hidden_BTD, embedding_VD, targets_BT, weights_BT, options, True
  )
  like = jnp.zeros((), embedding_VD.dtype)
  return (loss, tokens), (*gradients, like)


def _chunked_bwd(options, saved, cotangents):
  d_hidden, d_embedding, like = saved
  g = cotangents[0]  # the per-token numbers are for reports: no gradient through them
  return (
    (g * d_hidden).astype(d_hidden.dtype),
    (g * d_embedding).astype(like.dtype),
    None,
    None,
  )


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def chunked_cross_entropy(
  hidden_BTD,
  embedding_VD,
  targets_BT,
  weights_BT,
  *,
  scale=1.0,
  z_loss=0.0,
  label_smoothing=0.0,
  num_real_tokens=None,
  chunk_length=None,
  dtype='float32',
):
  """Weighted sums over tokens of loss and its parts; no [B, T, V] array ever exists.

  Args:
    hidden_BTD: normed decoder output.
    embedding_VD: output embedding; logits = hidden @ embedding.T * scale, fp32.
    targets_BT: int target ids.
    weights_BT: loss weight of each target; 0 leaves it out.
    scale, z_loss, label_smoothing, num_real_tokens: see `cross_entropy_with_z_loss`.
    chunk_length: tokens of each row whose logits exist at one time; None: as many as
      make 4M logits, but 16 or more.
    dtype: matmul mode, 'float32', or bf16 operands in 'bfloat16' and 'fast'.

  Returns:
    (loss, tokens): the fp32 sum of weight * (cross entropy + z-loss), differentiable
    in hidden and embedding; and per-token {'cross_entropy', 'z_loss', 'correct'},
    [B, T] each, unweighted, through which no gradient flows.
  """
  options = _Options(
    float(scale), z_loss, label_smoothing, num_real_tokens, chunk_length or 0, dtype
  )
  weights_BT = weights_BT.astype(jnp.float32)
  return _chunked(hidden_BTD, embedding_VD, targets_BT, weights_BT, options)

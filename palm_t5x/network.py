"""PaLM's decoder: configuration, the block, the stack, and the explicit decode cache.

The layout of the parameters is in `parameters`, the shape letters are in `layers`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from palm_t5x import embedding, layers, parameters
from palm_t5x.network_config import REMAT_POLICIES, TransformerConfig
from palm_t5x.parameters import param_logical_axes

__all__ = ['Decoder', 'DecoderWrapper', 'TransformerConfig', 'param_logical_axes']


def output_embedding(params, config):
  """(embedding_VD, scale): logits are hidden @ embedding.T * scale. PaLM §5."""
  if config.logits_via_embedding:
    return params['embedding'], 1.0 / math.sqrt(config.emb_dim)
  return params['lm_head'].T, 1.0


def init_cache(config, batch, max_len, dtype=None):
  """Empty decode cache {'k', 'v'}: [L, B, max_len, G, K] each, a plain pytree."""
  shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_dim)
  dtype = dtype or config.activation_dtype
  return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}


@struct.dataclass
class Context:
  """What every block of one call shares."""

  rotary: Any  # (sin, cos) [B or 1, T, 1, K/2]
  mask: Any = None  # [B, T, S + T] bool; None: plain causal
  dropout: bool = struct.field(pytree_node=False, default=False)


class Norm(nn.Module):
  """`layers.normalize` with its gain, stored around zero."""

  kind: str
  has_scale: bool = True

  @nn.compact
  def __call__(self, x):
    zeros = nn.initializers.zeros
    scale = self.param('scale', zeros, x.shape[-1:]) if self.has_scale else None
    return layers.normalize(x, scale, self.kind)


class Block(nn.Module):
  """One layer: x + Attn(norm(x)) + MLP(norm(x)), or the serial pair. PaLM §2."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BTD, cache, context):
    """(x_BTD, the new keys and values of this layer); cache: its old ones, or None."""
    cfg = self.config
    p = {
      name: self.param(name, init, shape)
      for name, (shape, _, init) in parameters.block_table(cfg).items()
    }
    drop = nn.Dropout(
      cfg.dropout_rate, broadcast_dims=(-2,), deterministic=not context.dropout
    )
    norm = lambda name, x: Norm(cfg.norm, name=name)(x)
    y_BTD = norm('layer_norm', x_BTD)
    if cfg.parallel_block:
      q, *wi = self._split(y_BTD, p['q_wi_fused'])
      attended, new = self._attend(q, y_BTD, p['kv_fused'], cache, context)
      gated = layers.gate(wi, cfg.mlp_activations)
      x_BTD += drop(layers.project_joined([attended, gated], p['o_wo_fused'], cfg.mode))
    else:
      q = layers.project(y_BTD, p['q_fused'], cfg.mode)
      attended, new = self._attend(q, y_BTD, p['kv_fused'], cache, context)
      x_BTD += drop(layers.project(attended, p['o'], cfg.mode, contract=2))
      y_BTD = norm('mlp_norm', x_BTD)
      wi = [
        layers.project(y_BTD, p['wi_fused'][:, i], cfg.mode)
        for i in range(len(cfg.mlp_activations))
      ]
      gated = layers.gate(wi, cfg.mlp_activations)
      gated = layers.constrain(gated, ('batch', 'length', 'mlp'))
      x_BTD += drop(layers.project(gated, p['wo'], cfg.mode))
    return layers.constrain(x_BTD, ('batch', 'length', 'embed')), new

  def _split(self, y_BTD, w_DHF):
    """q [.., H, K] and the MLP branches [.., H, F/H] of the fused input projection."""
    cfg = self.config
    width = cfg.mlp_dim // cfg.num_heads
    widths = [cfg.head_dim] + [width] * len(cfg.mlp_activations)
    q, *wi = (
      layers.constrain(part, ('batch', 'length', 'heads', None))
      for part in layers.project_split(y_BTD, w_DHF, widths, cfg.mode)
    )
    return q, *(checkpoint_name(w, 'wi') for w in wi)

  def _attend(self, q_BTHK, y_BTD, w_kv, cache, context):
    """Attention over the cache (if any) and this call's own keys; and those keys."""
    cfg = self.config
    kv = checkpoint_name(layers.project(y_BTD, w_kv, cfg.mode), 'kv')
    k, v = jnp.split(kv, 2, axis=-1)
    q = checkpoint_name(layers.rotate(q_BTHK, context.rotary), 'q')
    k = layers.rotate(k, context.rotary)
    new = None
    if cache is not None:
      new = {'k': k, 'v': v}
      k, v = (jnp.concatenate([cache[n].astype(q.dtype), new[n]], 1) for n in 'kv')
    return layers.attention(q, k, v, context.mask, cfg.kernel, cfg.mode), new


class Decoder(nn.Module):
  """Token ids to logits. `hidden` stops before the logits, `decode` uses a cache."""

  config: TransformerConfig

  def setup(self):
    cfg = self.config
    self.embedding = self.param(
      'embedding', nn.initializers.normal(1.0), (cfg.vocab_size, cfg.emb_dim)
    )
    if not cfg.logits_via_embedding:
      init = parameters.fan_in_normal((None, cfg.emb_dim))
      self.lm_head = self.param('lm_head', init, (cfg.emb_dim, cfg.vocab_size))
    self.final_norm = Norm(cfg.norm, cfg.final_norm_scale)
    self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    block = Block
    if cfg.remat_policy != 'none':
      policy = REMAT_POLICIES[cfg.remat_policy]
      block = nn.remat(Block, policy=policy, prevent_cse=not cfg.scan_layers)
    if cfg.scan_layers:
      self.layers = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast),
        length=cfg.num_layers,
        unroll=cfg.unroll,
      )(cfg)
    else:
      self.layers = [block(cfg) for _ in range(cfg.num_layers)]

  def __call__(self, tokens_BT, **kwargs):
    """Logits [B, T, V] in fp32; the arguments are those of `hidden`."""
    return self._logits(self.hidden(tokens_BT, **kwargs))

  def hidden(
    self,
    tokens_BT,
    *,
    segment_ids_BT=None,
    positions_BT=None,
    causal_prefix_BT=None,
    enable_dropout=False,
  ):
    """Normed output of the last block, [B, T, D]: what the logits are a product of."""
    cfg = self.config
    length = tokens_BT.shape[1]
    if positions_BT is None:
      positions_BT = jnp.arange(length)[None]
    context = Context(
      layers.rotary_tables(positions_BT, cfg.head_dim),
      layers.training_mask(
        length, segment_ids_BT if cfg.segment_masking else None, causal_prefix_BT
      ),
      enable_dropout,
    )
    return self._stack(tokens_BT, None, context)[0]

  def decode(
    self,
    tokens_BT,
    cache,
    positions_BT,
    *,
    prefix_lengths_B=None,
    fresh=False,
    logits_at_B=None,
  ):
    """(logits, new cache): the tokens' keys and values are written at positions_BT.

    A row's positions count up from its first; a token sees cached positions before that
    and, in this call, positions <= its own. So T = 1 is a step and positions = arange a
    prefill, which `fresh=True` spares the reading of an empty cache. Tokens beyond a
    row's prompt do no harm: a later step overwrites their slot before it looks there.

    Args:
      tokens_BT: int ids.
      cache: as from `init_cache`; passed in, and returned updated.
      positions_BT: int positions, below the cache's max_len.
      prefix_lengths_B: positions below it see each other in both directions.
      fresh: nothing is in the cache yet.
      logits_at_B: one index into T for each row; logits are then [B, V], not [B, T, V].
    """
    cfg = self.config
    old = 0 if fresh else cache['k'].shape[2]
    slots = jnp.broadcast_to(jnp.arange(old), (tokens_BT.shape[0], old))
    past = jnp.broadcast_to(
      (slots < positions_BT[:, :1])[:, None], (*tokens_BT.shape, old)
    )
    now = positions_BT[:, None, :] <= positions_BT[:, :, None]
    if prefix_lengths_B is not None:
      inside = positions_BT < prefix_lengths_B[:, None]
      now |= inside[:, :, None] & inside[:, None, :]
    context = Context(
      layers.rotary_tables(positions_BT, cfg.head_dim), jnp.concatenate([past, now], 2)
    )
    visible = jax.tree.map(lambda c: c[:, :, :old], cache)
    x_BTD, new = self._stack(tokens_BT, visible, context)
    rows = jnp.arange(tokens_BT.shape[0])[:, None]
    write = lambda c, n: c.at[:, rows, positions_BT].set(n.astype(c.dtype))
    cache = jax.tree.map(write, cache, new)
    if logits_at_B is not None:
      x_BTD = jnp.take_along_axis(x_BTD, logits_at_B[:, None, None], axis=1)[:, 0]
    return self._logits(x_BTD), cache

  def _stack(self, tokens_BT, cache, context):
    cfg = self.config
    drop = lambda x: self.dropout(x, deterministic=not context.dropout)
    x_BTD = embedding.lookup(self.embedding, tokens_BT, cfg.activation_dtype)
    x_BTD = drop(layers.constrain(x_BTD, ('batch', 'length', 'embed')))
    if cfg.scan_layers:
      x_BTD, new = self.layers(x_BTD, cache, context)
    else:
      news = []
      for i, layer in enumerate(self.layers):
        one = jax.tree.map(lambda c, i=i: c[i], cache)
        x_BTD, new = layer(x_BTD, one, context)
        news.append(new)
      new = jax.tree.map(lambda *n: jnp.stack(n), *news)
    return drop(self.final_norm(x_BTD)), new

  def _logits(self, x):
    cfg = self.config
    params = {'embedding': self.embedding}
    if not cfg.logits_via_embedding:
      params['lm_head'] = self.lm_head
    embedding_VD, scale = output_embedding(params, cfg)
    logits = layers.fp32_logits(x, embedding_VD, cfg.mode) * scale
    if cfg.real_tokens < cfg.vocab_size:
      logits = jnp.where(
        jnp.arange(cfg.vocab_size) < cfg.real_tokens, logits, layers.NEG_INF
      )
    return logits


DecoderWrapper = Decoder  # T5X's name

"""What a decoder's parameters are: shapes, logical axes, initialisers, in one table.

On disk (scanned: one tree with a leading L axis; unscanned: `layers_<i>/...`):

  embedding [V, D]   lm_head [D, V] if untied
  layers/layer_norm/scale [D]
  parallel  q_wi_fused [D, H, K + 2F/H]  kv_fused [D, G, 2K]  o_wo_fused [H, K + F/H, D]
  serial    q_fused [D, H, K]  kv_fused  o [H, K, D]
            mlp_norm/scale [D]  wi_fused [D, 2, F]  wo [F, D]

It is the layout of Google's PaLM checkpoints. The shape letters are those of `layers`.
"""

import math

import jax
import jax.numpy as jnp


def fan_in_normal(*pieces):
  """Initialiser N(0, 1/sqrt(fan_in)); pieces (size, fan_in) split axis -2's rows.

  One piece (None, fan_in) covers the whole kernel. PaLM §5, read as a standard
  deviation so that it is the fan-in variance scaling the paper names.
  """

  def init(rng, shape, dtype=jnp.float32):
    stds = [
      jnp.full((size or shape[-2],), 1.0 / math.sqrt(fan_in)) for size, fan_in in pieces
    ]
    rows = jnp.concatenate(stds).astype(dtype)[:, None]
    return jax.random.normal(rng, shape, dtype) * rows

  return init


def block_table(cfg):
  """{name: (shape, logical axes, initialiser)} of one block's kernels."""
  D, H, G = cfg.emb_dim, cfg.num_heads, cfg.num_kv_heads
  K, F = cfg.head_dim, cfg.mlp_dim
  n, f = len(cfg.mlp_activations), F // H
  from_d = fan_in_normal((None, D))
  kv = {'kv_fused': ((D, G, 2 * K), ('kv_embed', 'kv_heads', 'kv'), from_d)}
  if cfg.parallel_block:
    out = fan_in_normal((K, H * K), (f, F))
    if cfg.fused_fan_in:
      out = fan_in_normal((None, H * K + F))
    return kv | {
      'q_wi_fused': ((D, H, K + n * f), ('embed', 'heads', 'fused'), from_d),
      'o_wo_fused': ((H, K + f, D), ('heads', 'fused', 'embed'), out),
    }
  from_heads, from_f = (fan_in_normal((None, size)) for size in (H * K, F))
  return kv | {
    'q_fused': ((D, H, K), ('embed', 'heads', 'kv'), from_d),
    'o': ((H, K, D), ('heads', 'kv', 'embed'), from_heads),
    'wi_fused': ((D, n, F), ('embed', 'fused', 'mlp'), from_d),
    'wo': ((F, D), ('mlp', 'embed'), from_f),
  }


def param_logical_axes(config):
  """Tree of axis-name tuples with the structure of the parameters of `config`."""
  block = {name: axes for name, (_, axes, _) in block_table(config).items()}
  norms = ('layer_norm',) if config.parallel_block else ('layer_norm', 'mlp_norm')
  block |= {name: {'scale': ('embed',)} for name in norms}
  is_axes = lambda x: isinstance(x, tuple)
  if config.scan_layers:
    stack = jax.tree.map(lambda axes: ('layers', *axes), block, is_leaf=is_axes)
    tree = {'layers': stack}
  else:
    tree = {f'layers_{i}': block for i in range(config.num_layers)}
  tree['embedding'] = ('vocab', 'embed')
  if not config.logits_via_embedding:
    tree['lm_head'] = ('embed', 'vocab')
  if config.final_norm_scale:
    tree['final_norm'] = {'scale': ('embed',)}
  return tree

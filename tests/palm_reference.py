"""PaLM's forward pass in float64 NumPy, written from the paper and Google's layout.

The oracle of the model's tests: loops over layers and heads, no code of palm_t5x. It
takes the parameter tree as it is on disk, scanned or not.
"""

import numpy as np


def norm(x, scale=None, kind='rms'):
  """x / rms(x) (or the mean-centred form), times 1 + scale; epsilon 1e-6."""
  if kind == 'layer_norm':
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
  return x if scale is None else x * (1.0 + scale)


def rope(x, positions):
  """Rotates x [T, K]: dim j with j + K/2, by position * 10000^(-2j/K)."""
  half = x.shape[-1] // 2
  y = np.empty_like(x)
  for t, position in enumerate(positions):
    for j in range(half):
      angle = float(position) * 10000.0 ** (-2.0 * j / x.shape[-1])
      a, b = x[t, j], x[t, j + half]
      y[t, j] = a * np.cos(angle) - b * np.sin(angle)
      y[t, j + half] = b * np.cos(angle) + a * np.sin(angle)
  return y


def softmax(x):
  """Over the last axis."""
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def swish(x):
  """x * sigmoid(x)."""
  return x / (1.0 + np.exp(-x))


def attention(q, k, v, positions, seen):
  """One head: q, k, v [T, K], seen [T, T] bool; scores scaled by 1/sqrt(K)."""
  scores = rope(q, positions) @ rope(k, positions).T / np.sqrt(q.shape[-1])
  return softmax(np.where(seen, scores, -1e30)) @ v


def layer_params(params, i):
  """Layer i's parameters as float64, from the scanned or the unscanned layout."""
  tree = params['layers'] if 'layers' in params else params[f'layers_{i}']
  pick = (lambda x: x[i]) if 'layers' in params else (lambda x: x)

  def walk(node):
    if isinstance(node, dict):
      return {name: walk(child) for name, child in node.items()}
    return np.asarray(pick(node), np.float64)

  return walk(tree)


def heads(p, y, positions, seen, num_heads, head_dim, queries):
  """[T, H, K]: attention output of every head; head h reads key head h // (H/G)."""
  num_kv = p['kv_fused'].shape[1]
  out = np.empty((len(y), num_heads, head_dim))
  for h in range(num_heads):
    kv = y @ p['kv_fused'][:, h * num_kv // num_heads]
    out[:, h] = attention(
      queries(h), kv[:, :head_dim], kv[:, head_dim:], positions, seen
    )
  return out


def parallel_block(x, p, positions, seen, cfg):
  """x + Attn(norm(x)) + MLP(norm(x)) on one row [T, D]."""
  K, H = cfg['head_dim'], cfg['num_heads']
  f = cfg['mlp_dim'] // H
  y = norm(x, p['layer_norm']['scale'], cfg['norm'])
  w_in, w_out = p['q_wi_fused'], p['o_wo_fused']
  attended = heads(p, y, positions, seen, H, K, lambda h: y @ w_in[:, h, :K])
  for h in range(H):
    x = x + attended[:, h] @ w_out[h, :K]
    hidden = swish(y @ w_in[:, h, K : K + f]) * (y @ w_in[:, h, K + f :])
    x = x + hidden @ w_out[h, K:]
  return x


def serial_block(x, p, positions, seen, cfg):
  """x + Attn(norm(x)), then x + MLP(norm(x))."""
  K, H = cfg['head_dim'], cfg['num_heads']
  y = norm(x, p['layer_norm']['scale'], cfg['norm'])
  attended = heads(p, y, positions, seen, H, K, lambda h: y @ p['q_fused'][:, h])
  for h in range(H):
    x = x + attended[:, h] @ p['o'][h]
  y = norm(x, p['mlp_norm']['scale'], cfg['norm'])
  wi = p['wi_fused']
  return x + (swish(y @ wi[:, 0]) * (y @ wi[:, 1])) @ p['wo']


def forward(params, tokens, cfg, positions=None, segments=None, prefix=None):
  """Logits [B, T, V] in float64; cfg: dict of sizes and kinds by their T5X names."""
  embedding = np.asarray(params['embedding'], np.float64)
  block = parallel_block if cfg['parallel_block'] else serial_block
  rows = []
  for b, row in enumerate(np.asarray(tokens)):
    T = len(row)
    seen = np.tril(np.ones((T, T), bool))
    if prefix is not None:
      seen |= np.outer(prefix[b], prefix[b]) > 0
    if segments is not None:
      seen &= segments[b][:, None] == segments[b][None, :]
    where = np.arange(T) if positions is None else positions[b]
    x = embedding[row]
    for i in range(cfg['num_layers']):
      x = block(x, layer_params(params, i), where, seen, cfg)
    x = norm(x, None, cfg['norm'])
    if 'lm_head' in params:
      rows.append(x @ np.asarray(params['lm_head'], np.float64))
    else:
      rows.append(x @ embedding.T / np.sqrt(embedding.shape[1]))
  return np.stack(rows)


def token_losses(logits, targets, z_loss, num_real_tokens):
  """(cross entropy, z-loss) of every token, over the real columns only."""
  logits = np.asarray(logits, np.float64)[..., :num_real_tokens]
  top = logits.max(-1, keepdims=True)
  logz = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
  return logz - picked, z_loss * logz**2

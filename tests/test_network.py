"""network: the forward pass against float64 NumPy, sizes, cache, configuration."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import palm_reference as reference
import pytest

from palm_t5x import errors, network, parameters

SMALL = {
  'vocab_size': 40,
  'emb_dim': 16,
  'num_heads': 4,
  'num_layers': 2,
  'head_dim': 8,
  'mlp_dim': 32,
}
# Table 1 of the paper; d_ff = 4 d, head size 256.
PAPER = {
  '8b': (32, 16, 4096, 8.63e9, 8_632_012_800),
  '62b': (64, 32, 8192, 62.50e9, 62_495_662_080),
  '540b': (118, 48, 18432, 540.35e9, 540_356_474_880),
}


def config(**changes):
  return network.TransformerConfig(**SMALL | {'dtype': 'float32'} | changes)


def tokens(batch=2, length=7, seed=0):
  ids = np.random.default_rng(seed).integers(3, 40, (batch, length))
  return jnp.asarray(ids, jnp.int32)


@functools.cache
def init(cfg):
  """Parameters, with norm scales that are not zero."""
  params = jax.jit(network.Decoder(cfg).init)(jax.random.key(0), tokens())['params']
  noise = lambda path, x: (
    x + 0.3 * np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)
    if path[-1].key == 'scale'
    else x
  )
  return jax.tree_util.tree_map_with_path(noise, params)


@functools.partial(
  jax.jit, static_argnames=('cfg', 'enable_dropout', 'fresh', 'method')
)
def apply(cfg, params, *args, **kwargs):
  return network.Decoder(cfg).apply({'params': params}, *args, **kwargs)


def sizes(cfg):
  names = ('num_heads', 'num_layers', 'head_dim', 'mlp_dim', 'norm', 'parallel_block')
  return {name: getattr(cfg, name) for name in names}


@pytest.mark.parametrize('kv_heads', [1, 4])
@pytest.mark.parametrize('norm', ['rms', 'layer_norm'])
@pytest.mark.parametrize('parallel', [True, False])
def test_forward_is_the_papers(parallel, norm, kv_heads):
  scan = (norm == 'rms') == parallel  # each of the two, in half of the combinations
  cfg = config(
    parallel_block=parallel, norm=norm, num_kv_heads=kv_heads, scan_layers=scan
  )
  params = init(cfg)
  got = apply(cfg, params, tokens())
  assert got.dtype == jnp.float32
  want = reference.forward(params, tokens(), sizes(cfg))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_untied_logits_are_not_scaled():
  cfg = config(logits_via_embedding=False, num_kv_heads=2)
  params = init(cfg)
  assert params['lm_head'].shape == (16, 40)
  want = reference.forward(params, tokens(), sizes(cfg))
  np.testing.assert_allclose(apply(cfg, params, tokens()), want, atol=1e-4)


def test_packed_rows_and_bidirectional_prefix():
  cfg = config()
  params = init(cfg)
  segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 3, 3, 0]])
  positions = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0]])
  got = apply(cfg, params, tokens(), segment_ids_BT=segments, positions_BT=positions)
  want = reference.forward(params, tokens(), sizes(cfg), positions, segments)
  np.testing.assert_allclose(got, want, atol=1e-4)
  prefix = np.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
  got = apply(cfg, params, tokens(), causal_prefix_BT=prefix)
  want = reference.forward(params, tokens(), sizes(cfg), prefix=prefix)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_segments_see_across_eod_if_told_to():
  cfg = config(segment_masking=False)
  params = init(cfg)
  segments = np.array([[1, 1, 1, 2, 2, 2, 2]] * 2)
  got = apply(cfg, params, tokens(), segment_ids_BT=segments)
  np.testing.assert_array_equal(got, apply(cfg, params, tokens()))


def test_padding_columns_cannot_be_predicted():
  cfg = config(num_real_tokens=37)
  logits = apply(cfg, init(cfg), tokens())
  assert np.all(np.asarray(logits[..., 37:]) < -1e9)
  assert np.all(np.asarray(logits[..., :37]) > -1e3)


@pytest.mark.parametrize('policy', ['full', 'save_qkv', 'save_wi', 'minimal'])
def test_remat_changes_no_gradient(policy):
  def gradient(**changes):
    cfg = config(**changes)
    loss = lambda p: jnp.sum(jnp.sin(apply(cfg, p, tokens(), enable_dropout=False)))
    return jax.jit(jax.grad(loss))(init(config()))

  want = gradient(attention_kernel='xla')
  got = gradient(remat_policy=policy, scan_unroll=1)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_unrolling_changes_nothing():
  params = init(config())
  outputs = [apply(config(scan_unroll=n), params, tokens()) for n in (1, 2)]
  np.testing.assert_allclose(*outputs, atol=1e-6)
  assert config().unroll == 2 and config(dtype='bfloat16').unroll == 1
  assert config(num_layers=118).unroll == 1


@pytest.mark.parametrize('dtype', ['fast', 'bfloat16'])
def test_lower_precision_modes_are_close(dtype):
  cfg, low = config(), config(dtype=dtype)
  params = init(cfg)
  want, got = apply(cfg, params, tokens()), apply(low, params, tokens())
  assert got.dtype == jnp.float32
  assert np.abs(got - want).max() < 0.15 * np.abs(want).max()
  grads = jax.grad(lambda p: jnp.sum(apply(low, p, tokens()) ** 2))(params)
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_dropout_drops_in_training_only():
  cfg = config(dropout_rate=0.5)
  params = init(cfg)
  plain = apply(cfg, params, tokens())
  np.testing.assert_array_equal(plain, apply(config(), params, tokens()))
  run = lambda seed: apply(
    cfg, params, tokens(), enable_dropout=True, rngs={'dropout': jax.random.key(seed)}
  )
  assert not np.allclose(run(0), plain)
  assert not np.allclose(run(0), run(1))
  np.testing.assert_array_equal(run(0), run(0))


def test_axes_are_those_of_the_parameters():
  for changes in (
    {},
    {'scan_layers': False},
    {'parallel_block': False},
    {'logits_via_embedding': False, 'final_norm_scale': True},
    {'parallel_block': False, 'scan_layers': False, 'num_kv_heads': 4},
  ):
    cfg = config(**changes)
    axes = network.param_logical_axes(cfg)
    shapes = jax.tree.map(lambda x: x.shape, init(cfg))
    is_leaf = lambda x: isinstance(x, tuple)
    jax.tree.map(
      lambda a, s: np.testing.assert_equal(len(a), len(s)),
      axes,
      shapes,
      is_leaf=is_leaf,
    )
  axes = network.param_logical_axes(config())
  assert axes['layers']['q_wi_fused'] == ('layers', 'embed', 'heads', 'fused')
  assert axes['embedding'] == ('vocab', 'embed')


def test_layout_is_googles():
  shapes = jax.tree.map(lambda x: x.shape, init(config()))
  assert shapes == {
    'embedding': (40, 16),
    'layers': {
      'layer_norm': {'scale': (2, 16)},
      'q_wi_fused': (2, 16, 4, 8 + 2 * 8),
      'kv_fused': (2, 16, 1, 16),
      'o_wo_fused': (2, 4, 8 + 8, 16),
    },
  }
  assert set(init(config(scan_layers=False))) == {'embedding', 'layers_0', 'layers_1'}


def test_initialisers_have_the_papers_deviations():
  cfg = config(emb_dim=128, head_dim=32, mlp_dim=512, vocab_size=512, num_layers=4)
  params = jax.jit(network.Decoder(cfg).init)(jax.random.key(0), tokens())['params']
  std = lambda x: float(np.std(np.asarray(x)))
  layer = params['layers']
  out = layer['o_wo_fused']
  np.testing.assert_allclose(std(params['embedding']), 1.0, rtol=0.02)
  for kernel, fan_in in (
    (layer['q_wi_fused'], 128),
    (layer['kv_fused'], 128),
    (out[:, :, :32], 4 * 32),
    (out[:, :, 32:], 512),
  ):
    np.testing.assert_allclose(std(kernel), 1 / math.sqrt(fan_in), rtol=0.03)
  assert not np.any(np.asarray(layer['layer_norm']['scale']))
  init = parameters.block_table(config(fused_fan_in=True))['o_wo_fused'][2]
  joint = init(jax.random.key(0), (64, 4, 16, 16))
  np.testing.assert_allclose(std(joint), 1 / math.sqrt(4 * 8 + 32), rtol=0.02)


@pytest.mark.parametrize('size', PAPER)
def test_paper_sizes_by_shape_only(size):
  """8.63 / 62.50 / 540.35 B as Table 1 counts, and the exact closed forms of §1.9."""
  L, H, D, printed, exact_with_norms = PAPER[size]
  cfg = network.TransformerConfig(
    vocab_size=256_128,
    num_real_tokens=256_000,
    emb_dim=D,
    num_heads=H,
    num_layers=L,
    head_dim=256,
    mlp_dim=4 * D,
    dtype='bfloat16',
  )
  init = lambda rng: network.Decoder(cfg).init(rng, jnp.ones((1, 2), jnp.int32))
  shapes = jax.eval_shape(init, jax.random.key(0))['params']
  stored = sum(math.prod(s.shape) for s in jax.tree.leaves(shapes))
  norms = shapes['layers']['layer_norm']['scale'].shape
  assert norms == (L, D)
  counted = stored - 128 * D - L * D
  assert counted == L * (2 * D * H * 256 + 2 * D * 256 + 3 * D * 4 * D) + 256_000 * D
  assert round(counted / 1e7) == round(printed / 1e7)
  assert stored - 128 * D + D == exact_with_norms  # counted there with a final scale
  assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(shapes))


# -- Decode cache --


def decode(cfg, params, *args, **kwargs):
  return apply(cfg, params, *args, method='decode', **kwargs)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'scan_layers': False, 'num_kv_heads': 4},
    {'parallel_block': False, 'num_kv_heads': 2, 'norm': 'layer_norm'},
    {'logits_via_embedding': False},
  ],
)
def test_one_token_at_a_time_is_the_full_forward(changes):
  cfg = config(**changes)
  params = init(cfg)
  full = apply(cfg, params, tokens())
  cache = network.init_cache(cfg, 2, 9)
  assert cache['k'].shape == (2, 2, 9, cfg.num_kv_heads, 8)
  step = jax.jit(lambda t, c, p: decode(cfg, params, t, c, p))
  for t in range(7):
    logits, cache = step(tokens()[:, t : t + 1], cache, jnp.full((2, 1), t))
    np.testing.assert_allclose(logits[:, 0], full[:, t], atol=2e-5)


def test_prefill_then_steps_with_rows_of_unequal_length():
  """Row 0 has 3 prompt tokens, row 1 has 5; each goes on at its own position."""
  cfg = config()
  params, ids = init(cfg), tokens()
  full = apply(cfg, params, ids)
  lengths = np.array([3, 5])
  positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
  cache = network.init_cache(cfg, 2, 12)
  logits, cache = decode(
    cfg, params, ids[:, :5], cache, positions, fresh=True, logits_at_B=lengths - 1
  )
  assert logits.shape == (2, 40)
  np.testing.assert_allclose(logits, full[np.arange(2), lengths - 1], atol=2e-5)
  for i in range(2):
    at = lengths + i
    token = ids[np.arange(2), at][:, None]
    logits, cache = decode(cfg, params, token, cache, at[:, None])
    np.testing.assert_allclose(logits[:, 0], full[np.arange(2), at], atol=2e-5)


def test_prefill_continues_a_cache():
  cfg = config()
  params, ids = init(cfg), tokens()
  cache = network.init_cache(cfg, 2, 7)
  for part in (slice(0, 3), slice(3, 7)):
    at = jnp.broadcast_to(jnp.arange(7)[part], ids[:, part].shape)
    logits, cache = decode(cfg, params, ids[:, part], cache, at)
  np.testing.assert_allclose(logits, apply(cfg, params, ids)[:, 3:], atol=2e-5)


def test_bidirectional_prefill():
  cfg = config()
  params, ids = init(cfg), tokens()
  prefix = (np.arange(7) < np.array([[3], [5]])).astype(int)
  full = apply(cfg, params, ids, causal_prefix_BT=prefix)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
  got, _ = decode(
    cfg,
    params,
    ids,
    network.init_cache(cfg, 2, 7),
    positions,
    prefix_lengths_B=jnp.array([3, 5]),
    fresh=True,
  )
  np.testing.assert_allclose(got, full, atol=2e-5)


def test_no_parameter_of_a_future_token_matters():
  cfg = config(attention_kernel='blocked')
  params = init(cfg)
  changed = tokens().at[:, 4:].set(5)
  a, b = apply(cfg, params, tokens()), apply(cfg, params, changed)
  np.testing.assert_array_equal(a[:, :4], b[:, :4])


# -- Configuration --


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'dtype': 'float16'}, ['float16', 'bfloat16', 'fast']),
    ({'norm': 'batch'}, ['batch', 'layer_norm']),
    ({'remat_policy': 'some'}, ['some', 'save_attention']),
    ({'num_kv_heads': 3}, ['num_kv_heads=3', 'num_heads=4']),
    ({'mlp_dim': 30}, ['mlp_dim=30', 'num_heads=4']),
    ({'head_dim': 7}, ['head_dim=7', 'even']),
    ({'num_real_tokens': 41}, ['num_real_tokens=41', 'vocab_size=40']),
    ({'mlp_activations': ('swosh',)}, ['swosh', 'swish']),
    ({'dropout_rate': 1.5}, ['dropout_rate=1.5']),
    ({'emb_dim': 0}, ['emb_dim=0']),
    ({'vocab_size': None}, ['vocab_size=None']),
    ({'attention_kernel': 'flash'}, ['flash', 'cudnn']),
  ],
)
def test_bad_configurations_say_what_to_do(changes, words):
  with pytest.raises(errors.UserError) as e:
    config(**changes)
  assert all(word in str(e.value) for word in words), e.value


def test_dtype_takes_names_and_jax_dtypes():
  assert config(dtype=jnp.bfloat16).mode == 'bfloat16'
  assert config(dtype=jnp.float32).mode == 'float32'
  assert config(dtype='auto').mode == 'float32'  # the tests run on CPU
  assert network.DecoderWrapper is network.Decoder

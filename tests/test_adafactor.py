"""Adafactor against NumPy float64: PaLM's recipe, the paper of 2018, optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_t5x import adafactor
from palm_t5x.errors import UserError

PALM = dict(
  factored=False,
  beta1=0.9,
  decay_rate=0.8,
  global_norm_clip_threshold=1.0,
  weight_decay_rate_lr_exponent=2.0,
)
STEPS = 20


def palm_lr(k):
  return 1 / np.sqrt(max(k, 10_000))


def layer(rng, scale=1.0):
  """One block's parameters in the shapes of the paper's fused layout, tiny."""
  return {
    'layer_norm': {'scale': np.zeros(6)},
    'q_wi_fused': scale * rng.normal(size=(6, 2, 5)) / np.sqrt(6),
    'kv_fused': scale * rng.normal(size=(6, 1, 4)) / np.sqrt(6),
    'o_wo_fused': scale * rng.normal(size=(2, 3, 6)) / np.sqrt(6),
  }


AXES = {
  'layer_norm': {'scale': ('embed',)},
  'q_wi_fused': ('embed', 'heads', 'fused'),
  'kv_fused': ('embed', 'kv_heads', 'kv'),
  'o_wo_fused': ('heads', 'fused', 'embed'),
}
is_axes = lambda x: isinstance(x, tuple)
STACKED_AXES = {
  'embedding': ('vocab', 'embed'),
  'layers': jax.tree.map(lambda a: ('layers', *a), AXES, is_leaf=is_axes),
}
FLAT_AXES = {'embedding': ('vocab', 'embed'), 'layers_0': AXES, 'layers_1': AXES}


def flat_tree(rng):
  # Layers of very different scale: averaging over the stack would show.
  return {
    'embedding': rng.normal(size=(11, 6)),
    'layers_0': layer(rng),
    'layers_1': layer(rng, 30.0),
  }


def stack(tree):
  both = jax.tree.map(lambda *x: np.stack(x), tree['layers_0'], tree['layers_1'])
  return {'embedding': tree['embedding'], 'layers': both}


def as_fp32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def gradients(steps=STEPS):
  """Gradients whose global norm is sometimes above 1 and sometimes below."""
  rng = np.random.default_rng(1)
  for k in range(steps):
    tree = flat_tree(rng)
    yield jax.tree.map(lambda g, k=k: g * (0.002 if k % 3 else 0.1) + 1e-4, tree)


def numpy_palm(params, grads_per_step, lr_of=palm_lr):
  """The seven steps of palm_t5x.adafactor, in float64, each array one parameter."""
  names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
  treedef = jax.tree.structure(params)
  p = dict(zip(names, jax.tree.leaves(params), strict=True))
  v = {n: np.zeros_like(x) for n, x in p.items()}
  m = {n: np.zeros_like(x) for n, x in p.items()}
  rms = lambda x: np.sqrt(np.mean(x * x))
  for k, grads in enumerate(grads_per_step):
    g = dict(zip(names, jax.tree.leaves(grads), strict=True))
    norm = np.sqrt(sum(np.sum(x * x) for x in g.values()))
    lr = lr_of(k)
    beta2 = 1 - (k + 1.0) ** -0.8
    for n in names:
      g_n = g[n] * min(1, 1 / norm)
      v[n] = beta2 * v[n] + (1 - beta2) * (g_n**2 + 1e-30)
      y = g_n / np.sqrt(v[n])
      y = y / max(1, rms(y))
      u = lr * max(rms(p[n]), 1e-3) * y
      m[n] = 0.9 * m[n] + 0.1 * u
      p[n] = (1 - lr**2) * p[n] - m[n]
  return treedef.unflatten(p.values()), treedef.unflatten(v.values())


def train(optimizer, params, grads_per_step, lr_of=palm_lr):
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  auxs = []
  for k, grads in enumerate(grads_per_step):
    params, state, aux = update(as_fp32(grads), state, params, jnp.float32(lr_of(k)))
    auxs.append(aux)
  return params, state, auxs


def assert_close(actual, expected, rtol=2e-5, atol=1e-8):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(np.asarray(a), e, rtol=rtol, atol=atol),
    actual,
    expected,
  )


@pytest.fixture(scope='module')
def start():
  return flat_tree(np.random.default_rng(0))


def test_unscanned_equals_the_seven_steps_in_numpy(start):
  optimizer = adafactor.Adafactor(**PALM).bind(FLAT_AXES)
  params, state, auxs = train(optimizer, as_fp32(start), gradients())
  expected, v = numpy_palm(start, gradients())
  assert_close(params, expected)
  assert_close(state['param_states']['v'], v)
  assert int(state['step']) == STEPS
  norms = [float(a['grad_norm']) for a in auxs]
  assert max(norms) > 1 > min(norms)  # both sides of the clip were taken
  first = next(gradients())
  norm = np.sqrt(sum(np.sum(x * x) for x in jax.tree.leaves(first)))
  np.testing.assert_allclose(norms[0], norm, rtol=1e-6)


def test_scanned_equals_the_seven_steps_in_numpy_and_unscanned(start):
  optimizer = adafactor.Adafactor(**PALM).bind(STACKED_AXES)
  stacked_grads = map(stack, gradients())
  params, state, _ = train(optimizer, as_fp32(stack(start)), stacked_grads)
  expected, v = numpy_palm(start, gradients())
  assert_close(params, stack(expected))
  assert_close(state['param_states']['v'], stack(v))
  unscanned = adafactor.Adafactor(**PALM).bind(FLAT_AXES)
  same, _, _ = train(unscanned, as_fp32(start), gradients())
  assert_close(params, stack(same), rtol=1e-6)


def test_without_axes_the_stack_is_one_parameter(start):
  optimizer = adafactor.Adafactor(**PALM)
  params, _, _ = train(optimizer, as_fp32(stack(start)), map(stack, gradients()))
  expected, _ = numpy_palm(stack(start), map(stack, gradients()))
  assert_close(params, expected)


def test_update_under_eval_shape_keeps_shapes_and_fp32(start):
  optimizer = adafactor.Adafactor(**PALM).bind(STACKED_AXES)
  shapes = jax.eval_shape(lambda: as_fp32(stack(start)))
  state = jax.eval_shape(optimizer.init, shapes)
  params, new_state, _ = jax.eval_shape(
    optimizer.update, shapes, state, shapes, jax.ShapeDtypeStruct((), jnp.float32)
  )
  assert params == shapes and new_state == state


def numpy_factored(params, grads_per_step, lr, min_size, steps=STEPS):
  """Algorithm 4 of Shazeer and Stern 2018 for matrices and vectors, float64."""
  p = dict(params)
  rows = {n: 0.0 for n in p}
  columns = {n: 0.0 for n in p}
  v = {n: 0.0 for n in p}
  rms = lambda x: np.sqrt(np.mean(x * x))
  for t, grads in enumerate(grads_per_step, start=1):
    beta2 = 1 - t**-0.8
    for n, g in grads.items():
      square = g * g + 1e-30
      if g.ndim == 2 and min(g.shape) >= min_size:
        rows[n] = beta2 * rows[n] + (1 - beta2) * square.sum(1)
        columns[n] = beta2 * columns[n] + (1 - beta2) * square.sum(0)
        second = np.outer(rows[n], columns[n]) / rows[n].sum()
      else:
        second = v[n] = beta2 * v[n] + (1 - beta2) * square
      y = g / np.sqrt(second)
      y = y / max(1, rms(y))
      p[n] = p[n] - lr * max(rms(p[n]), 1e-3) * y
  return p


def matrices():
  rng = np.random.default_rng(3)
  shapes = {'wide': (8, 12), 'tall': (12, 8), 'thin': (3, 12), 'vector': (7,)}
  make = lambda: {n: rng.normal(size=s) for n, s in shapes.items()}
  return make(), [make() for _ in range(STEPS)]


def test_factored_equals_the_papers_algorithm_and_optax():
  params, grads = matrices()
  ours = adafactor.Adafactor(min_dim_size_to_factor=8)
  actual, state, _ = train(ours, as_fp32(params), grads, lambda k: 0.01)
  assert_close(actual, numpy_factored(params, grads, 0.01, 8))
  assert state['param_states']['v']['wide']['row'].shape == (8,)
  assert state['param_states']['v']['tall']['row'].shape == (8,)
  assert state['param_states']['v']['thin'].shape == (3, 12)
  assert 'm' not in state['param_states']

  # optax counts its decay from t = 1 as well, and orders its steps alike.
  theirs = optax.adafactor(0.01, min_dim_size_to_factor=8, decay_rate=0.8)
  expected = as_fp32(params)
  opt_state = theirs.init(expected)
  for g in grads:
    updates, opt_state = theirs.update(as_fp32(g), opt_state, expected)
    expected = optax.apply_updates(expected, updates)
  assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_factored_by_logical_axes_scanned_equals_matrices_per_layer():
  """A 3-D kernel with columns (heads, fused) is the matrix [embed, heads * fused]."""
  rng = np.random.default_rng(4)
  kernel = rng.normal(size=(2, 6, 2, 5)) * np.array([1.0, 20.0])[:, None, None, None]
  grads = [rng.normal(size=kernel.shape) for _ in range(STEPS)]
  axes = {'w': ('layers', 'embed', 'heads', 'fused')}
  optimizer = adafactor.Adafactor(
    logical_factor_rules=adafactor.standard_logical_factor_rules()
  ).bind(axes)
  actual, state, _ = train(
    optimizer, as_fp32({'w': kernel}), [{'w': g} for g in grads], lambda k: 0.01
  )
  as_matrices = lambda x: {str(i): x[i].reshape(6, 10) for i in range(2)}
  expected = numpy_factored(
    as_matrices(kernel), [as_matrices(g) for g in grads], 0.01, 0
  )
  for i in range(2):
    got = np.asarray(actual['w'][i]).reshape(6, 10)
    np.testing.assert_allclose(got, expected[str(i)], rtol=2e-5)
  v = state['param_states']['v']['w']
  assert v['row'].shape == (2, 6) and v['column'].shape == (2, 2, 5)


def test_state_axes_mirror_the_state(start):
  shapes = jax.eval_shape(lambda: as_fp32(stack(start)))
  for kwargs in (PALM, {'beta1': 0.9, 'min_dim_size_to_factor': 4}):
    optimizer = adafactor.Adafactor(**kwargs).bind(STACKED_AXES)
    axes = optimizer.state_axes(STACKED_AXES, shapes)
    state = jax.eval_shape(optimizer.init, shapes)
    treedef = jax.tree.structure(state)
    leaves = treedef.flatten_up_to(axes)
    for leaf, names in zip(jax.tree.leaves(state), leaves, strict=True):
      assert is_axes(names) and len(names) == leaf.ndim
    assert axes['step'] == ()
    assert axes['param_states']['m'] == STACKED_AXES
  v = axes['param_states']['v']
  assert v['layers']['q_wi_fused'] == {
    'row': ('layers', 'embed'),
    'column': ('layers', 'heads', 'fused'),
  }
  assert v['embedding'] == {'row': ('embed',), 'column': ('vocab',)}
  palm = adafactor.Adafactor(**PALM).state_axes(STACKED_AXES)
  assert palm['param_states'] == {'v': STACKED_AXES, 'm': STACKED_AXES}


def one_step(grad, param, lr=0.5, step=0, **kwargs):
  optimizer = adafactor.Adafactor(**{'factored': False, **kwargs})
  params = {'w': jnp.asarray(param, jnp.float32)}
  state = optimizer.init(params)
  state['step'] = jnp.int32(step)
  grads = {'w': jnp.asarray(grad, jnp.float32)}
  params, state, _ = optimizer.update(grads, state, params, lr)
  return np.asarray(params['w']), state


def test_weight_decay_keywords():
  # A zero gradient leaves only the decay.
  p = np.array([2.0, -4.0])
  zero = np.zeros(2)
  np.testing.assert_allclose(one_step(zero, p)[0], p)
  np.testing.assert_allclose(one_step(zero, p, weight_decay_rate=0.1)[0], 0.9 * p)
  decayed, _ = one_step(zero, p, weight_decay_rate_lr_exponent=2.0)
  np.testing.assert_allclose(decayed, (1 - 0.25) * p)
  decayed, _ = one_step(
    zero, p, weight_decay_rate=0.1, weight_decay_rate_lr_exponent=2.0
  )
  np.testing.assert_allclose(decayed, (1 - 0.1 * 0.25) * p, rtol=1e-6)


def test_parameter_scale_keywords():
  g, p = np.array([1.0, -1.0]), np.array([3.0, 4.0])
  rms = np.sqrt(12.5)
  sign = np.sign(g)  # the first update is g / sqrt(g^2)
  moved = lambda **kw: p - one_step(g, p, **kw)[0]
  np.testing.assert_allclose(moved(), 0.5 * rms * sign, rtol=1e-6)
  np.testing.assert_allclose(moved(max_parameter_scale=2.0), 0.5 * 2 * sign, rtol=1e-6)
  np.testing.assert_allclose(moved(epsilon2=10.0), 0.5 * 10 * sign, rtol=1e-6)
  off = moved(multiply_by_parameter_scale=False)
  np.testing.assert_allclose(off, 0.5 * sign, rtol=1e-6)
  by_path = adafactor.HParamMap([('^w$', False), ('.*', True)])
  off = moved(multiply_by_parameter_scale=by_path)
  np.testing.assert_allclose(off, 0.5 * sign, rtol=1e-6)


def test_clipping_threshold_and_momentum_dtype():
  # v decays slowly, so a sudden gradient has RMS(y) > 1 at a late step.
  g, p = np.array([1.0, 1.0]), np.array([1.0, 1.0])
  y = (100**-0.8) ** -0.5
  moved = lambda **kw: p - one_step(g, p, step=99, **kw)[0]
  np.testing.assert_allclose(moved(clipping_threshold=None), 0.5 * y, rtol=1e-5)
  np.testing.assert_allclose(moved(clipping_threshold=2.0), 0.5 * 2, rtol=1e-5)
  np.testing.assert_allclose(moved(), 0.5, rtol=1e-5)
  moved, state = one_step(g, p, beta1=0.9, dtype_momentum='bfloat16')
  assert state['param_states']['m']['w'].dtype == jnp.bfloat16
  np.testing.assert_allclose(p - moved, 0.05, rtol=1e-5)


def test_step_offset_empties_v_but_not_m():
  """Fine-tuning from step 1000: beta2 is 0 there, so v = g^2, and m goes on."""
  optimizer = adafactor.Adafactor(**PALM, step_offset=1000)
  params = {'w': jnp.ones(3)}
  state = {
    'step': jnp.int32(1000),
    'param_states': {'v': {'w': jnp.full(3, 7.0)}, 'm': {'w': jnp.full(3, 2.0)}},
  }
  g = {'w': jnp.full(3, 0.5)}
  _, state, _ = optimizer.update(g, state, params, 1e-3)
  np.testing.assert_allclose(state['param_states']['v']['w'], 0.25, rtol=1e-6)
  np.testing.assert_allclose(state['param_states']['m']['w'], 1.8 + 1e-4, rtol=1e-6)
  # From scratch with an offset, T5X takes a root of a negative number.
  _, state, _ = optimizer.update(g, optimizer.init(params), params, 1e-3)
  assert np.isfinite(state['param_states']['v']['w']).all()


def test_skip_nan_updates_keeps_single_elements():
  g, p = np.array([1.0, np.nan]), np.array([1.0, 2.0])
  kwargs = dict(skip_nan_updates=True, clipping_threshold=None, beta1=0.9)
  moved, state = one_step(g, p, **kwargs)
  assert moved[1] == 2.0 and moved[0] < 1.0
  assert np.isfinite(state['param_states']['v']['w']).all()
  assert int(state['step']) == 1


def test_factor_map_by_path():
  rules = adafactor.HParamMap(
    [('whole', None), ('deep', ('row', 'column', 'column')), ('.*', 'unused')]
  )
  optimizer = adafactor.Adafactor(factor_map=rules)
  params = {'deep': jnp.ones((4, 2, 3)), 'whole': jnp.ones((200, 200))}
  v = optimizer.init(params)['param_states']['v']
  assert v['deep']['row'].shape == (4,) and v['deep']['column'].shape == (2, 3)
  assert v['whole'].shape == (200, 200)


def test_errors_name_the_parameter_and_the_fix():
  shape = {'layers': {'w': jnp.ones((4, 2, 3))}}
  with pytest.raises(UserError, match=r"'layers/w' has 3 dimensions.*factored = False"):
    adafactor.Adafactor().init(shape)
  axes = {'layers': {'w': ('embed', 'head', 'kv')}}
  with pytest.raises(UserError, match=r"'head'.*'layers/w'.*Did you mean 'heads'"):
    adafactor.Adafactor().init(shape, axes)
  wrong_rank = adafactor.HParamMap([('w', ('row', 'column'))])
  with pytest.raises(UserError, match=r'shape \(4, 2, 3\).*2 entries'):
    adafactor.Adafactor(factor_map=wrong_rank).init(shape)
  mixed = {'embed': 'row', 'heads': 'column', 'kv': 'none'}
  axes = {'layers': {'w': ('embed', 'heads', 'kv')}}
  with pytest.raises(UserError, match='rows, columns and none at once'):
    adafactor.Adafactor(logical_factor_rules=mixed).init(shape, axes)
  with pytest.raises(UserError, match='diagonal'):
    adafactor.factor_name_to_factordim('diagonal')
  with pytest.raises(UserError, match=r"No rule of this HParamMap matches.*'x'"):
    adafactor.HParamMap([('w', 1)])['x']
  with pytest.raises(UserError, match='factor_map needs factored'):
    adafactor.Adafactor(factored=False, factor_map=wrong_rank)
  with pytest.raises(UserError, match=r'beta1 = 1\.5'):
    adafactor.Adafactor(beta1=1.5)
  with pytest.raises(UserError, match='state_axes'):
    adafactor.Adafactor().state_axes(axes)
  with pytest.raises(UserError, match='Adafactor has no learning rate'):
    one_step(np.ones(2), np.ones(2), lr=None)


def test_bound_learning_rate_serves_where_the_trainer_has_none():
  g, p = np.array([1.0, -1.0]), np.array([1.0, 1.0])
  moved, _ = one_step(g, p, lr=None, learning_rate=0.25)
  np.testing.assert_allclose(p - moved, 0.25 * g, rtol=1e-6)
  moved, _ = one_step(g, p, lr=0.5, learning_rate=0.25)
  np.testing.assert_allclose(p - moved, 0.5 * g, rtol=1e-6)


def test_sharded_gradients_give_the_same_update(start):
  """On a mesh of all devices the update is the one-device update to rounding."""
  devices = jax.devices()
  mesh = jax.sharding.Mesh(np.array(devices), ('x',))
  size = len(devices) * 4
  rng = np.random.default_rng(5)
  p, g = rng.normal(size=(2, size, 3)), rng.normal(size=(2, size, 3))
  optimizer = adafactor.Adafactor(**PALM).bind({'w': ('layers', 'embed', 'mlp')})
  alone, _, _ = train(optimizer, as_fp32({'w': p}), [{'w': g}] * 3)
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'x'))
  place = lambda x: jax.device_put(x, spread)
  params = jax.tree.map(place, as_fp32({'w': p}))
  sharded, _, _ = train(optimizer, params, [{'w': place(g)}] * 3)
  assert_close(sharded, alone, rtol=1e-6)
  assert len(sharded['w'].sharding.device_set) == len(devices)

"""Optimizers by name against optax itself, the wrappers, and the Gin surface."""

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from palm_t5x import adafactor, optimizers
from palm_t5x.errors import UserError

NAMES = [
  *('adabelief', 'adagrad', 'adam', 'adamw', 'fromage', 'lamb', 'lars', 'lion'),
  *('noisy_sgd', 'radam', 'rmsprop', 'sgd', 'yogi'),
]
EXTRA = {
  'noisy_sgd': {'key': 3},
  'rmsprop': {'momentum': 0.5},
  'sgd': {'momentum': 0.9, 'nesterov': True},
  'adamw': {'weight_decay': 0.01, 'b2': 0.95},
}
AXES = {'layers': {'w': ('layers', 'embed'), 'scale': ('layers',)}, 's': ()}
RATES = (0.1, 0.03, 0.2)


def params_and_grads():
  rng = np.random.default_rng(0)
  make = lambda: {
    'layers': {
      'w': jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
      'scale': jnp.asarray(rng.normal(size=2), jnp.float32),
    },
    's': jnp.float32(rng.normal()),
  }
  return make(), [make() for _ in RATES]


def run(optimizer, params, grads, rates=RATES):
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for g, rate in zip(grads, rates, strict=True):
    params, state, aux = update(g, state, params, jnp.float32(rate))
  return params, state, aux


def assert_trees_close(a, b, **kwargs):
  kwargs = {'rtol': 1e-6, 'atol': 1e-7} | kwargs
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


@pytest.mark.parametrize('name', NAMES)
def test_trainers_rate_reaches_optax_each_step(name):
  """Equals optax driven by a schedule of the same rates."""
  params, grads = params_and_grads()
  extra = EXTRA.get(name, {})
  actual, state, aux = run(getattr(optimizers, name)(**extra), params, grads)
  theirs = getattr(optax, name)(lambda k: jnp.array(RATES)[k], **extra)
  if name == 'fromage':  # it divides by its learning rate's norm: numbers only
    expected = run_optax_per_rate(params, grads)
  else:
    expected, opt_state = params, theirs.init(params)
    for g in grads:
      updates, opt_state = theirs.update(g, opt_state, expected)
      expected = optax.apply_updates(expected, updates)
  assert_trees_close(actual, expected)
  assert int(state['step']) == len(RATES)
  np.testing.assert_allclose(aux['learning_rate'], RATES[-1])
  squares = sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads[-1]))
  np.testing.assert_allclose(aux['grad_norm'], np.sqrt(squares), rtol=1e-6)


def run_optax_per_rate(params, grads):
  for g, rate in zip(grads, RATES, strict=True):
    tx = optax.fromage(rate)  # stateless but for its empty chain
    updates, _ = tx.update(g, tx.init(params), params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize('name', NAMES)
def test_state_axes_match_the_state(name):
  params, _ = params_and_grads()
  optimizer = getattr(optimizers, name)()
  state = optimizer.init(params)
  for axes in (optimizer.state_axes(AXES), optimizer.state_axes(AXES, params)):
    leaves = jax.tree.structure(state).flatten_up_to(axes)
    for leaf, names in zip(jax.tree.leaves(state), leaves, strict=True):
      assert optimizers.is_axes(names) and len(names) == leaf.ndim
  if name == 'adamw':
    adam = axes['param_states'][0]
    assert adam.mu == AXES and adam.nu == AXES and adam.count == ()


def test_a_bound_rate_replaces_the_trainers():
  params, grads = params_and_grads()
  bound, _, aux = run(optimizers.sgd(learning_rate=0.5), params, grads)
  expected, _, _ = run(optimizers.sgd(), params, grads, [0.5] * 3)
  assert_trees_close(bound, expected)
  assert float(aux['learning_rate']) == 0.5
  schedule = lambda k: jnp.array(RATES)[k]
  scheduled, _, _ = run(
    optimizers.sgd(learning_rate=schedule), params, grads, [9.0] * 3
  )
  assert_trees_close(scheduled, run(optimizers.sgd(), params, grads)[0])


def test_chain_follows_the_trainer_only_by_its_last_link():
  params, grads = params_and_grads()
  links = [optax.scale_by_adam(), optimizers.scale_by_learning_rate()]
  actual, _, _ = run(optimizers.chain(links), params, grads)
  assert_trees_close(actual, run(optimizers.adam(), params, grads)[0])
  own = optimizers.chain([optax.clip(0.1), optax.sgd(0.5)])
  wrapped = optimizers.OptaxWrapper(optax.chain(optax.clip(0.1), optax.sgd(0.5)))
  assert_trees_close(run(own, params, grads)[0], run(wrapped, params, grads)[0])


def test_wrong_arguments_are_reported_at_once():
  with pytest.raises(TypeError, match='beta1'):
    optimizers.adam(beta1=0.9)
  with pytest.raises(UserError, match='no learning rate'):
    optimizers.adam().update({}, {'step': jnp.int32(0)}, {}, None)


def test_skip_nonfinite_drops_the_whole_step():
  params, (g, bad, g2) = params_and_grads()
  bad = {**bad, 's': jnp.float32(np.nan)}
  optimizer = optimizers.skip_nonfinite(adafactor.Adafactor(factored=False, beta1=0.9))
  actual, state, aux = run(optimizer, params, [g, bad, g2])
  assert int(state['step']) == 2
  expected, _, _ = run(optimizer.optimizer_def, params, [g, g2], [0.1, 0.2])
  assert_trees_close(actual, expected)
  assert float(aux['skipped']) == 0.0
  _, _, aux = run(optimizer, params, [bad], [0.1])
  assert float(aux['skipped']) == 1.0
  bad = {**bad, 's': jnp.float32(np.inf)}
  same, state, _ = run(optimizer, params, [bad], [0.1])
  assert_trees_close(same, params, rtol=0, atol=0)
  assert int(state['step']) == 0
  bound = optimizer.bind(AXES)
  assert bound.optimizer_def.param_axes == AXES
  assert bound.state_axes(AXES, params)['step'] == ()


def test_reset_is_a_fresh_state():
  params, grads = params_and_grads()
  optimizer = optimizers.adagrad()
  _, state, _ = run(optimizer, params, grads)
  assert_trees_close(optimizer.reset(state, params), optimizer.init(params))


SELECTORS = {
  'regex': ('scale$', '/w$'),
  'function': (lambda path, _: 'scale' in path, lambda path, _: 'w' in path),
  'flax': tuple(
    traverse_util.ModelParamTraversal(lambda path, _, end=end: path.endswith(end))
    for end in ('/layers/scale', '/layers/w')
  ),
}


@pytest.mark.parametrize('kind', SELECTORS)
def test_multi_optimizer_gives_each_part_its_own(kind):
  params, grads = params_and_grads()
  first, second = SELECTORS[kind]
  multi = optimizers.MultiOptimizer(
    [(first, optimizers.sgd()), (second, optimizers.adam())]
  )
  actual, state, aux = run(multi, params, grads)
  sgd, _, sgd_aux = run(optimizers.sgd(), params, grads)
  adam, _, _ = run(optimizers.adam(), params, grads)
  assert_trees_close(actual['layers']['scale'], sgd['layers']['scale'])
  assert_trees_close(actual['layers']['w'], adam['layers']['w'])
  assert float(actual['s']) == float(params['s'])  # nobody's: unchanged
  np.testing.assert_allclose(aux['grad_norm'], sgd_aux['grad_norm'])
  axes = multi.state_axes(AXES)
  leaves = jax.tree.structure(state).flatten_up_to(axes)
  for leaf, names in zip(jax.tree.leaves(state), leaves, strict=True):
    assert len(names) == leaf.ndim
  assert axes['param_states']['1']['param_states'][0].mu == {
    'layers': {'w': ('layers', 'embed')}
  }


def test_multi_optimizer_binds_axes_and_refuses_overlap():
  params, grads = params_and_grads()
  palm = adafactor.Adafactor(factored=False)
  multi = optimizers.MultiOptimizer([('w|scale', palm), ('^s', optimizers.sgd())])
  actual, _, _ = run(multi.bind(AXES), params, grads)
  expected, _, _ = run(palm.bind(AXES), params, grads)
  assert_trees_close(actual['layers'], expected['layers'])
  overlap = optimizers.MultiOptimizer(
    [('layers', optimizers.sgd()), ('scale', optimizers.sgd())]
  )
  with pytest.raises(
    UserError, match=r"'layers/scale' is selected by entries \[0, 1\]"
  ):
    overlap.init(params)


@pytest.mark.parametrize('name', ['adafactor', 'adamw', 'noisy_sgd', 'multi'])
def test_orbax_saves_and_restores_the_state(name, tmp_path):
  params, grads = params_and_grads()
  optimizer = {
    'adafactor': lambda: adafactor.Adafactor(factored=False, beta1=0.9),
    'multi': lambda: optimizers.MultiOptimizer([('w', optimizers.lion())]),
  }.get(name, lambda: getattr(optimizers, name)())()
  _, state, _ = run(optimizer, params, grads)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    abstract = jax.eval_shape(lambda: state)
    restored = checkpointer.restore(tmp_path / 'state', abstract)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  raw = lambda tree: jax.tree.map(
    lambda x: (
      jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    ),
    tree,
  )
  assert_trees_close(raw(restored), raw(state), rtol=0, atol=0)


def test_gin_binds_them_by_name():
  gin.clear_config()
  with gin.unlock_config():
    gin.parse_config("""
      from __gin__ import dynamic_registration
      from palm_t5x import adafactor
      from palm_t5x import optimizers

      OPTIMIZER = @optimizers.skip_nonfinite()
      optimizers.skip_nonfinite.optimizer_def = @adafactor.Adafactor()
      adafactor.Adafactor:
        factored = False
        multiply_by_parameter_scale = @adafactor.HParamMap()
      adafactor.HParamMap.rules = [('scale', False), ('.*', True)]
      optimizers.adamw.b2 = 0.95
      OTHER = @optimizers.adamw()
    """)
  try:
    palm = gin.query_parameter('%OPTIMIZER').scoped_configurable_fn()
    assert palm.optimizer_def.factored is False
    adamw = gin.query_parameter('%OTHER').scoped_configurable_fn()
    assert isinstance(adamw, optimizers.OptimizerDef)
    with gin.unlock_config(), pytest.raises(ValueError, match='beta2'):
      gin.parse_config("""
        from __gin__ import dynamic_registration
        from palm_t5x import optimizers
        optimizers.adamw.beta2 = 0.95
      """)
  finally:
    gin.clear_config()

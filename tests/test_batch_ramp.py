"""A batch-size ramp: compiled ahead, and the same run as its stages one by one."""

import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import arrays, here, losses

from palm_t5x import ahead, trainer
from palm_t5x.metric_writers import read_metrics

RAMP = 'BATCH_SIZE=((0, 8), (4, 16), (8, 24))'
KEEP = ('CHECKPOINT_PERIOD=1', 'CHECKPOINT_KEEP=None')
_COMPILES = ('jaxpr_trace', 'jaxpr_to_mlir', 'backend_compile', 'cache_retrieval')


@pytest.fixture(scope='module')
def ramp(workspace):
  """12 steps through three sizes: the folder, and (step, thread) of each compile."""
  compiles, now = [], {'step': None}
  train = trainer.Trainer.train

  def counting(self, batch):
    now['step'] = int(self.train_state.step) + 1
    try:
      return train(self, batch)
    finally:
      now['step'] = None

  def listen(event, seconds, **kwargs):
    del seconds, kwargs
    if any(name in event for name in _COMPILES):
      compiles.append((now['step'], threading.current_thread().name))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer.Trainer, 'train', counting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      done = here(workspace, 'train', workspace / 'ramp', RAMP, *KEEP)
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
  assert done.code == 0, done.err
  return workspace / 'ramp', compiles


def test_a_switch_compiles_nothing(ramp):
  _, compiles = ramp
  here_ = threading.current_thread().name
  stepping = {step for step, thread in compiles if thread == here_ and step}
  assert stepping == {1}, 'only the first step compiles where training happens'
  assert 'compile-ahead' in {thread for _, thread in compiles}
  assert 'prefetch' not in {thread for _, thread in compiles}


def test_stages_of_their_own_give_the_same(workspace, ramp):
  model_dir = workspace / 'stages'
  for steps, size in ((4, 8), (8, 16), (12, 24)):
    bindings = (f'TRAIN_STEPS={steps}', f'BATCH_SIZE={size}')
    assert here(workspace, 'train', model_dir, *bindings).code == 0
  assert losses(model_dir) == losses(ramp[0])
  expected = arrays(ramp[0] / 'checkpoint_12')
  for name, value in arrays(model_dir / 'checkpoint_12').items():
    np.testing.assert_array_equal(expected[name], value, err_msg=name)


@pytest.mark.parametrize(
  'step',
  [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)],
)
def test_resumes_before_at_and_after_a_switch(workspace, ramp, step):
  model_dir = workspace / f'ramp_from_{step}'
  shutil.copytree(ramp[0], model_dir)
  for later in range(step + 1, 13):
    shutil.rmtree(model_dir / f'checkpoint_{later}')
  assert here(workspace, 'train', model_dir, RAMP, *KEEP).code == 0
  assert losses(model_dir) == losses(ramp[0])
  expected = arrays(ramp[0] / 'checkpoint_12')
  for name, value in arrays(model_dir / 'checkpoint_12').items():
    np.testing.assert_array_equal(expected[name], value, err_msg=name)


def test_tokens_and_learning_rate_follow_the_schedule(ramp):
  rows = {row['step']: row for row in read_metrics(str(ramp[0]), 'train')}
  sizes = {step: 8 if step <= 4 else 16 if step <= 8 else 24 for step in range(1, 13)}
  assert {s: row['tokens'] for s, row in rows.items()} == {
    s: 64 * size for s, size in sizes.items()
  }
  for row in rows.values():
    assert row['learning_rate'] == pytest.approx(1e-2)
    assert row['tokens_per_second'] == pytest.approx(
      row['tokens'] * row['steps_per_second']
    )


# -- ahead.BySize --


def _step(state, batch, rng):
  del rng
  return state + 1, {'sum': jnp.sum(batch['x'])}


class _Counting:
  """A jitted step that counts calls and can refuse to lower."""

  def __init__(self, refuses=None):
    self.jitted, self.calls, self.refuses = jax.jit(_step), 0, refuses

  def __call__(self, *args):
    self.calls += 1
    return self.jitted(*args)

  def lower(self, *args):
    if self.refuses:
      raise self.refuses
    return self.jitted.lower(*args)


def _batch(size):
  return {'x': jnp.arange(float(size))}


def test_what_was_compiled_ahead_is_used():
  counting = _Counting()
  step = ahead.BySize(counting)
  state, _ = step(jnp.float32(0), _batch(4), jax.random.key(0))
  step.compile_ahead(8)
  step.compile_ahead(8)
  state, metrics = step(state, _batch(8), jax.random.key(0))
  state, _ = step(state, _batch(8), jax.random.key(0))
  assert counting.calls == 1 and float(state) == 3 and float(metrics['sum']) == 28


def test_a_size_nobody_asked_for_compiles_when_it_comes():
  counting = _Counting()
  step = ahead.BySize(counting)
  for size in (4, 8, 4):
    step(jnp.float32(0), _batch(size), jax.random.key(0))
  assert counting.calls == 3


def test_an_error_of_the_compilation_is_an_error_at_the_switch():
  counting = _Counting()
  step = ahead.BySize(counting)
  step(jnp.float32(0), _batch(4), jax.random.key(0))
  counting.refuses = RuntimeError('does not fit')
  step.compile_ahead(8)
  step(jnp.float32(0), _batch(4), jax.random.key(0))
  with pytest.raises(RuntimeError, match='does not fit'):
    step(jnp.float32(0), _batch(8), jax.random.key(0))

"""Learning rates against T5X's formulas in float64 and the paper's numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_t5x.errors import UserError
from palm_t5x.schedules import create_learning_rate_scheduler

STEPS = (0, 1, 3, 9, 10, 11, 57, 100, 1234, 255_000)
W, BASE, DECAY, EVERY, CYCLE = 10, 0.3, 0.01, 40, 90

FORMULAS = {
  'constant': lambda s: BASE,
  'linear_warmup': lambda s: min(1, s / W),
  'linear_decay': lambda s: BASE * min(s / W, 1 + DECAY * (W - s)),
  'rsqrt_decay': lambda s: 1 / math.sqrt(max(s, W)),
  'rsqrt_normalized_decay': lambda s: math.sqrt(W) / math.sqrt(max(s, W)),
  'decay_every': lambda s: DECAY ** (s // EVERY),
  'cosine_decay': lambda s: (
    0.5 * (1 + math.cos(math.pi * (max(0, (s - W) / CYCLE) % 1)))
  ),
}


def schedule(factors, **kwargs):
  defaults = dict(
    base_learning_rate=BASE,
    warmup_steps=W,
    decay_factor=DECAY,
    steps_per_decay=EVERY,
    steps_per_cycle=CYCLE,
  )
  return create_learning_rate_scheduler(factors, **{**defaults, **kwargs})


@pytest.mark.parametrize(
  'factors',
  [*FORMULAS, 'constant * linear_warmup*rsqrt_decay', 'constant*cosine_decay'],
)
def test_equals_the_formulas(factors):
  rate = jax.jit(schedule(factors, min_learning_rate=1e-8))
  for step in STEPS:
    expected = math.prod(FORMULAS[f.strip()](step) for f in factors.split('*'))
    actual = rate(jnp.int32(step))
    assert actual.dtype == jnp.float32 and actual.shape == ()
    np.testing.assert_allclose(actual, max(expected, 1e-8), rtol=2e-5)


def test_palm_schedule():
  """lr = 1/sqrt(max(k, 10^4)): 1e-2 up to 10,000, 1.98e-3 at 255,000 (paper §5)."""
  palm = create_learning_rate_scheduler(
    'constant * rsqrt_decay', base_learning_rate=1.0, warmup_steps=10_000
  )
  for k in (0, 1, 9_999, 10_000):
    np.testing.assert_allclose(palm(k), 1e-2, rtol=1e-6)
  np.testing.assert_allclose(palm(40_000), 5e-3, rtol=1e-6)
  assert f'{float(palm(255_000)):.2e}' == '1.98e-03'


def test_defaults_are_t5xs():
  rate = create_learning_rate_scheduler()
  np.testing.assert_allclose(rate(500), 0.5 * 0.5 / math.sqrt(1000), rtol=1e-6)


def test_step_offset_and_floor():
  rate = schedule('linear_warmup', step_offset=100, min_learning_rate=0.05)
  np.testing.assert_allclose(rate(40), 0.05)
  np.testing.assert_allclose(rate(105), 0.5)


def test_mistakes_are_named():
  with pytest.raises(UserError, match=r"'rsqrt_decy'.*Did you mean 'rsqrt_decay'"):
    schedule('constant * rsqrt_decy')
  with pytest.raises(UserError, match=r'warmup_steps = 0.*leave the factor out'):
    schedule('constant * linear_warmup', warmup_steps=0)
  with pytest.raises(UserError, match='at least 1 step, not 0'):
    schedule('cosine_decay', steps_per_cycle=0)
  assert float(schedule('constant', warmup_steps=0)(0)) == np.float32(BASE)

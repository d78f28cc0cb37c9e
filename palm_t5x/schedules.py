"""Learning rates as T5X writes them: factor names joined by `*`, one number per step.

PaLM's own schedule, lr = 1/sqrt(max(k, 10,000)) (paper §5), is
`factors='constant * rsqrt_decay', base_learning_rate=1.0, warmup_steps=10_000`.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from palm_t5x.errors import UserError

FACTORS = (
  'constant',
  'linear_warmup',
  'linear_decay',
  'rsqrt_decay',
  'rsqrt_normalized_decay',
  'decay_every',
  'cosine_decay',
)
_DIVIDE_BY_WARMUP = frozenset(FACTORS[1:5])

Schedule = Callable[[jax.Array | int], jax.Array]


def _check(names: list[str], warmup_steps: int, periods: dict[str, int]) -> None:
  """Says which factor or which number cannot work, before any step is traced."""
  for name in names:
    if name not in FACTORS:
      near = difflib.get_close_matches(name, FACTORS, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise UserError(
        f'Unknown learning-rate factor {name!r} in create_learning_rate_scheduler.'
        f'factors.{hint} Known factors, joined by "*": {", ".join(FACTORS)}.'
      )
    if name in _DIVIDE_BY_WARMUP and warmup_steps < 1:
      raise UserError(
        f'create_learning_rate_scheduler.warmup_steps = {warmup_steps}, but factor '
        f'{name!r} divides by it: use at least 1, or leave the factor out.'
      )
    if periods.get(name, 1) < 1:
      raise UserError(
        f'Factor {name!r} of create_learning_rate_scheduler needs a period of at '
        f'least 1 step, not {periods[name]}.'
      )


def create_learning_rate_scheduler(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20_000,
  steps_per_cycle: int = 100_000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> Schedule:
  """Returns step -> learning rate (fp32 scalar), the product of the named factors.

  T5X's `utils.create_learning_rate_scheduler`, same names and formulas, with
  s = max(0, step - step_offset) and w = warmup_steps:

  * `constant`: base_learning_rate
  * `linear_warmup`: min(1, s / w)
  * `linear_decay`: base_learning_rate * min(s / w, 1 + decay_factor * (w - s));
    it holds both the constant and the warm-up
  * `rsqrt_decay`: 1 / sqrt(max(s, w))
  * `rsqrt_normalized_decay`: sqrt(w) / sqrt(max(s, w))
  * `decay_every`: decay_factor ** (s // steps_per_decay)
  * `cosine_decay`: (1 + cos(pi * ((s - w) / steps_per_cycle mod 1))) / 2, 1 before w

  The product never falls below min_learning_rate. `step` counts finished steps (0
  for the first update) and may be traced. Raises UserError for an unknown factor
  and for numbers that would divide by zero.
  """
  names = [name.strip() for name in factors.split('*')]
  periods = {'decay_every': steps_per_decay, 'cosine_decay': steps_per_cycle}
  _check(names, warmup_steps, periods)

  def factor(name: str, s: jax.Array) -> jax.Array | float:
    if name == 'constant':
      return base_learning_rate
    if name == 'linear_warmup':
      return jnp.minimum(1.0, s / warmup_steps)
    if name == 'linear_decay':
      down = 1.0 + decay_factor * (warmup_steps - s)
      return base_learning_rate * jnp.minimum(s / warmup_steps, down)
    if name == 'rsqrt_decay':
      return 1.0 / jnp.sqrt(jnp.maximum(s, warmup_steps))
    if name == 'rsqrt_normalized_decay':
      return jnp.sqrt(warmup_steps / jnp.maximum(s, warmup_steps))
    if name == 'decay_every':
      return decay_factor ** jnp.floor(s / steps_per_decay)
    # The remainder of whole steps is exact; that of a quotient is not, after cycles.
    in_cycle = jnp.maximum(s - warmup_steps, 0.0) % steps_per_cycle
    return 0.5 * (1.0 + jnp.cos(jnp.pi * (in_cycle / steps_per_cycle)))

  def learning_rate(step: jax.Array | int) -> jax.Array:
    # fp32 holds every step count below 2**24 exactly: 65 runs of PaLM's length.
    s = jnp.maximum(jnp.asarray(step) - step_offset, 0).astype(jnp.float32)
    rate = jnp.float32(1.0)
    for name in names:
      rate = rate * factor(name, s)
    return jnp.maximum(rate, min_learning_rate).astype(jnp.float32)

  return learning_rate

"""Adafactor with T5X's keywords, as a chain of optax transformations.

PaLM trains with Adafactor *without* factoring (paper §5), "Adam with parameter
scaling": `factored=False, beta1=0.9, decay_rate=0.8, global_norm_clip_threshold=1.0,
weight_decay_rate_lr_exponent=2.0`. With k the number of finished steps, one update is

  1. g <- g * min(1, 1 / ||g||)                      clip_by_global_norm
  2. v <- b2 v + (1 - b2) (g^2 + 1e-30), b2 = 1 - (k + 1)^-0.8
  3. y = g / sqrt(v)                                 scale_by_second_moment
  4. y <- y / max(1, RMS(y))                         clip_by_layer_rms
  5. u = lr * max(RMS(p), 1e-3) * y                  scale_by_parameter_scale
  6. m <- 0.9 m + 0.1 u                              momentum (no bias correction)
  7. p <- (1 - lr^2) p - m                           decay_and_descend

Each link is one function below; `learning_rate` and `step` reach them as optax's
extra arguments. RMS is taken over one layer: where layers are stacked, an axis whose
logical name maps to BATCH ('layers') is never averaged over, so a scanned model and
an unscanned one train alike. Which axes a parameter has comes from `bind`.

With `factored=True` (T5X's default) step 2 keeps row and column means of g^2 instead
of v: Shazeer and Stern, "Adafactor", 2018, generalised as in T5X to kernels of more
than two dimensions, whose axes are sorted into rows and columns by logical name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from palm_t5x import factor_rules, optimizers
from palm_t5x.errors import UserError
from palm_t5x.factor_rules import (
  HEURISTIC_RULE,
  FactorDim,
  HParamMap,
  LeafPlan,
  factor_name_to_factordim,
  standard_logical_factor_rules,
)

# T5X keeps the rules in this module: Gin files write @adafactor.HParamMap().
__all__ = [
  'HEURISTIC_RULE',
  'Adafactor',
  'FactorDim',
  'HParamMap',
  'factor_name_to_factordim',
  'standard_logical_factor_rules',
]

PyTree = Any


def _map(fn: Callable, plans: Sequence[LeafPlan], tree: PyTree, *rest: PyTree):
  """tree_map that hands each leaf its plan first; `rest` may go deeper than `tree`."""
  leaves, treedef = jax.tree.flatten(tree)
  columns = [treedef.flatten_up_to(r) for r in rest]
  return treedef.unflatten(map(fn, plans, leaves, *columns))


# -- the links of the chain --

Plans = Callable[[PyTree], Sequence[LeafPlan]]


def clip_by_global_norm(threshold: float) -> optax.GradientTransformationExtraArgs:
  """g * min(1, threshold / ||g||) with the norm that OptimizerDef.update measured.

  optax.clip_by_global_norm would measure it again and divide per element.
  """

  def update(updates, state, params=None, *, grad_norm, **extra_args):
    del params, extra_args
    # min before the product: a zero gradient has threshold / 0 = inf.
    scale = jnp.minimum(1.0, threshold / grad_norm)
    return jax.tree.map(lambda g: g * scale, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_second_moment(
  plan: Plans, decay_rate: float, step_offset: int, epsilon: float
) -> optax.GradientTransformationExtraArgs:
  """g / sqrt(v), v the moving mean of g^2, whole or factored per parameter.

  State: the tree of params with v (same shape, fp32) or {'row', 'column'} as leaves.
  """

  def zeros(leaf_plan, param):
    if not leaf_plan.rows:
      return jnp.zeros(param.shape, jnp.float32)
    row = np.delete(param.shape, leaf_plan.columns)
    column = np.delete(param.shape, leaf_plan.rows)
    return {
      'row': jnp.zeros(tuple(row), jnp.float32),
      'column': jnp.zeros(tuple(column), jnp.float32),
    }

  def init(params):
    return _map(zeros, plan(params), params)

  def update(updates, state, params=None, *, step, **extra_args):
    del extra_args
    # Steps since step_offset, 1 for the first: beta2 is then 0, and v = g^2.
    k = jnp.maximum(step - step_offset, 0).astype(jnp.float32) + 1.0
    keep_old = 1.0 - k ** (-decay_rate)
    plans = plan(params)

    def moving_mean(old, new):
      return keep_old * old + (1.0 - keep_old) * new

    def next_v(leaf_plan, g, v):
      square = jnp.square(g) + epsilon
      if not leaf_plan.rows:
        return moving_mean(v, square)
      return {
        'row': moving_mean(v['row'], jnp.mean(square, axis=leaf_plan.columns)),
        'column': moving_mean(v['column'], jnp.mean(square, axis=leaf_plan.rows)),
      }

    new_state = _map(next_v, plans, updates, state)
    return _map(_whiten, plans, updates, new_state), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def _whiten(plan: LeafPlan, g: jax.Array, v: PyTree) -> jax.Array:
  """g / sqrt(v); factored, v = row x column / mean over the rows of row."""
  if not plan.rows:
    return g * jax.lax.rsqrt(v)
  row = jnp.expand_dims(v['row'], plan.columns)
  column = jnp.expand_dims(v['column'], plan.rows)
  row = row / jnp.mean(row, axis=plan.rows, keepdims=True)
  return g * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)


def clip_by_layer_rms(plan: Plans, threshold: float) -> optax.GradientTransformation:
  """y / max(1, RMS(y) / threshold), one RMS per parameter and layer."""

  def clip(leaf_plan, y):
    return y / jnp.maximum(1.0, leaf_plan.rms(y) / threshold)

  def update(updates, state, params=None):
    return _map(clip, plan(params), updates), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def scale_by_parameter_scale(
  plan: Plans, applies: Callable[[str], bool], minimum: float, maximum: float | None
) -> optax.GradientTransformationExtraArgs:
  """lr * clip(RMS(p), minimum, maximum) * y, or lr * y where `applies(path)` is False.

  A norm scale stored around zero has RMS 0: `minimum` is what lets it move.
  """

  def update(updates, state, params=None, *, learning_rate, **extra_args):
    del extra_args
    paths = iter(optimizers.leaf_paths(params))

    def scale(leaf_plan, y, p):
      if not applies(next(paths)):
        return learning_rate * y
      rms = leaf_plan.rms(p.astype(jnp.float32))
      return learning_rate * jnp.clip(rms, minimum, maximum) * y

    return _map(scale, plan(params), updates, params), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def momentum(beta1: float, dtype: Any) -> optax.GradientTransformation:
  """m <- beta1 m + (1 - beta1) u, starting from 0 and never corrected for it.

  State: the tree of params, stored as `dtype`; the update uses m before rounding.
  """

  def init(params):
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

  def update(updates, state, params=None):
    del params
    m = jax.tree.map(lambda u, m: beta1 * m + (1.0 - beta1) * u, updates, state)
    return m, jax.tree.map(lambda m: m.astype(dtype), m)

  return optax.GradientTransformation(init, update)


def decay_and_descend(
  rate: float | None, lr_exponent: float | None
) -> optax.GradientTransformationExtraArgs:
  """The last link, -(m + d p): d = rate, or (rate or 1) * lr^lr_exponent, or 0."""

  def update(updates, state, params=None, *, learning_rate, **extra_args):
    del extra_args
    if lr_exponent:
      decay = (rate or 1.0) * learning_rate**lr_exponent
    elif rate is not None:
      decay = rate
    else:
      return jax.tree.map(jnp.negative, updates), state
    return jax.tree.map(lambda m, p: -(m + decay * p), updates, params), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# -- the optimizer --


class Adafactor(optimizers.OptimizerDef):
  """Adafactor (T5X `adafactor.Adafactor`: same keywords, defaults and arithmetic).

  Keywords (the module's text has the seven steps):

  * learning_rate: used only where the trainer passes none.
  * factored: row and column statistics instead of v; False is PaLM's.
  * multiply_by_parameter_scale: step 5's RMS(p); bool, or HParamMap path -> bool.
  * beta1: momentum; None keeps none and needs no memory for it.
  * decay_rate: the exponent in step 2.
  * step_offset: the step at which fine-tuning starts: empties v there, not m.
  * clipping_threshold: step 4; None for none.
  * weight_decay_rate, weight_decay_rate_lr_exponent: step 7's d = rate * lr^exponent;
    with both None there is no decay.
  * min_dim_size_to_factor: the paper's heuristic factors two dimensions at least this.
  * epsilon1, epsilon2: added to g^2; least parameter scale.
  * dtype_momentum: how m is stored.
  * factor_map: HParamMap path -> tuple of FactorDim (or their names) per dimension.
  * logical_factor_rules: axis name -> FactorDim; takes precedence over factor_map once
    axes are bound. None means `standard_logical_factor_rules()`.
  * global_norm_clip_threshold: step 1; None for none.
  * max_parameter_scale: greatest parameter scale.
  * skip_nan_updates: elements that would become NaN keep their value.

  State: `param_states/v/<path>` fp32, of the parameter's shape or {'row', 'column'},
  and `param_states/m/<path>`.
  """

  def __init__(
    self,
    learning_rate: float | None = None,
    factored: bool = True,
    multiply_by_parameter_scale: bool | HParamMap = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    dtype_momentum: Any = jnp.float32,
    factor_map: HParamMap | None = None,
    logical_factor_rules: Mapping[str, FactorDim | str] | None = None,
    weight_decay_rate_lr_exponent: float | None = None,
    global_norm_clip_threshold: float | None = None,
    max_parameter_scale: float | None = None,
    skip_nan_updates: bool | None = False,
  ):
    super().__init__(learning_rate)
    if not factored and factor_map is not None:
      raise UserError('Adafactor.factor_map needs factored = True (it is False).')
    if beta1 is not None and not 0 <= beta1 < 1:
      raise UserError(f'Adafactor.beta1 = {beta1}: must be in [0, 1), or None.')
    self.factored = factored
    self._planner = factor_rules.Planner(
      factored, min_dim_size_to_factor, factor_map, logical_factor_rules
    )
    self.multiply_by_parameter_scale = multiply_by_parameter_scale
    self.beta1 = beta1
    self.decay_rate = decay_rate
    self.step_offset = step_offset
    self.clipping_threshold = clipping_threshold
    self.weight_decay_rate = weight_decay_rate
    self.epsilon1 = epsilon1
    self.epsilon2 = epsilon2
    self.dtype_momentum = jnp.dtype(dtype_momentum)
    self.weight_decay_rate_lr_exponent = weight_decay_rate_lr_exponent
    self.global_norm_clip_threshold = global_norm_clip_threshold
    self.max_parameter_scale = max_parameter_scale
    self.skip_nan_updates = skip_nan_updates

  def transform(self, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    del learning_rate  # An extra argument of the update.
    links = {}
    if self.global_norm_clip_threshold:
      links['clip'] = clip_by_global_norm(self.global_norm_clip_threshold)
    links['v'] = scale_by_second_moment(
      self.plans, self.decay_rate, self.step_offset, self.epsilon1
    )
    if self.clipping_threshold is not None:
      links['rms'] = clip_by_layer_rms(self.plans, self.clipping_threshold)
    links['scale'] = scale_by_parameter_scale(
      self.plans, self._uses_scale, self.epsilon2, self.max_parameter_scale
    )
    if self.beta1 is not None:
      links['m'] = momentum(self.beta1, self.dtype_momentum)
    links['descend'] = decay_and_descend(
      self.weight_decay_rate, self.weight_decay_rate_lr_exponent
    )
    return optimizers.chain_by_name(links)

  def update(
    self, grads: PyTree, state: PyTree, params: PyTree, learning_rate: Any = None
  ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """One step: see OptimizerDef.update."""
    new_params, new_state, aux = super().update(grads, state, params, learning_rate)
    if self.skip_nan_updates:
      keep = lambda new, old: jnp.where(jnp.isnan(new), old, new)
      new_params = jax.tree.map(keep, new_params, params)
      new_state = jax.tree.map(keep, new_state, state)
    return new_params, new_state, aux

  def state_axes(self, param_axes: PyTree, params: PyTree = None) -> PyTree:
    """As OptimizerDef.state_axes; factoring by size needs `params` (shapes will do)."""
    if self.factored and params is None:
      raise UserError(
        'Adafactor with factored = True decides by size what to factor: pass the '
        "parameters' shapes, state_axes(param_axes, params)."
      )
    axes = super().state_axes(param_axes, params)
    if self.factored:
      plans = self.bind(param_axes).plans(params)
      axes['param_states']['v'] = _map(_second_moment_axes, plans, params, param_axes)
    return axes

  def plans(self, params: PyTree) -> list[LeafPlan]:
    """A LeafPlan per parameter, in the order of the flattened tree."""
    treedef = jax.tree.structure(params)
    if self.param_axes is None:
      axes = [None] * treedef.num_leaves
    else:
      axes = treedef.flatten_up_to(self.param_axes)
    shapes = [p.shape for p in jax.tree.leaves(params)]
    return list(map(self._planner, optimizers.leaf_paths(params), shapes, axes))

  def _uses_scale(self, path: str) -> bool:
    choice = self.multiply_by_parameter_scale
    return bool(choice[path] if isinstance(choice, HParamMap) else choice)


def _second_moment_axes(plan: LeafPlan, _: Any, axes: optimizers.Axes) -> PyTree:
  without = lambda gone: tuple(n for d, n in enumerate(axes) if d not in gone)
  if not plan.rows:
    return tuple(axes)
  return {'row': without(plan.columns), 'column': without(plan.rows)}

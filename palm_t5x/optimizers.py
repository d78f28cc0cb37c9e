"""Optimizers: one small contract for the train step, filled by optax.

`OptimizerDef` is what the trainer sees: `init`, `update`, `state_axes`. The state is a
plain pytree, `{'step': int32 scalar, 'param_states': ...}` (T5X's names on disk), and
the learning rate is an argument of every update, so a schedule is never part of an
optimizer. Gin names them as T5X does: `@optimizers.adamw()`.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from palm_t5x.errors import UserError

PyTree = Any
# A logical name (or None) per dimension; scalars have ().
Axes = tuple[str | None, ...]


def is_axes(x: Any) -> bool:
  """True for a leaf of a tree of logical axes: a tuple of names, one per dimension."""
  return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)


def path_name(path: Sequence[Any]) -> str:
  """A JAX key path as T5X writes it: 'layers/layer_norm/scale'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def leaf_paths(tree: PyTree) -> list[str]:
  """The path of every leaf, in the order of the flattened tree."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [path_name(path) for path, _ in flat]


class OptimizerDef:
  """How parameters change, given gradients: the base of every optimizer.

  A subclass writes `transform(learning_rate)`; the rest follows. All methods are pure
  and may run under jit, on sharded arrays and on abstract ones (`jax.eval_shape`).
  """

  def __init__(self, learning_rate: Any = None, param_axes: PyTree = None):
    self.learning_rate = learning_rate
    self.param_axes = param_axes

  def transform(self, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    """The optax transformation; its update also gets learning_rate, step, grad_norm."""
    raise UserError(f'{type(self).__name__} must define transform(learning_rate).')

  def bind(self, param_axes: PyTree) -> 'OptimizerDef':
    """A copy that knows each parameter's logical axes (a tree of tuples of names)."""
    bound = copy.copy(self)
    bound.param_axes = param_axes
    return bound

  def init(self, params: PyTree, param_axes: PyTree = None) -> PyTree:
    """The state before the first update, for parameters of these shapes."""
    bound = self if param_axes is None else self.bind(param_axes)
    return {
      'step': jnp.zeros((), jnp.int32),
      'param_states': bound.transform(0.0).init(params),
    }

  def reset(self, state: PyTree, params: PyTree) -> PyTree:
    """The state as new, step 0 and empty accumulators: what fine-tuning starts from."""
    del state
    return self.init(params)

  def choose_learning_rate(self, passed: Any, step: jax.Array) -> jax.Array:
    """The rate of this update: the trainer's, or where it has none the bound one."""
    rate = self.learning_rate if passed is None else passed
    if rate is None:
      raise UserError(
        f'{type(self).__name__} has no learning rate: bind trainer.Trainer.'
        "learning_rate_fn or the optimizer's own learning_rate in Gin."
      )
    return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)

  def update(
    self, grads: PyTree, state: PyTree, params: PyTree, learning_rate: Any = None
  ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """One step: returns (new params, new state, aux).

    `grads` has the tree and shapes of `params`; `learning_rate` is an fp32 scalar,
    traced or not. aux: 'grad_norm', the global norm before any clipping, and
    'learning_rate', the rate that was used, both fp32 scalars.
    """
    step = state['step']
    rate = self.choose_learning_rate(learning_rate, step)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    grad_norm = optax.tree.norm(grads)
    updates, param_states = optax.with_extra_args_support(self.transform(rate)).update(
      grads,
      state['param_states'],
      params,
      learning_rate=rate,
      step=step,
      grad_norm=grad_norm,
    )
    new_params = optax.apply_updates(params, updates)
    new_state = {'step': step + 1, 'param_states': param_states}
    return new_params, new_state, {'grad_norm': grad_norm, 'learning_rate': rate}

  def state_axes(self, param_axes: PyTree, params: PyTree = None) -> PyTree:
    """Logical axes of the state: same tree, each leaf a tuple of names (scalars: ()).

    A state leaf that mirrors a parameter (the same path below its own, the same
    shape) takes its axes; anything else is replicated. `params` (arrays or shapes)
    is needed only by optimizers whose state's shape depends on sizes.
    """
    if params is None:
      params = jax.tree.map(_stand_in, param_axes, is_leaf=is_axes)
    axes_by_path = {}
    flat_axes = jax.tree.leaves(param_axes, is_leaf=is_axes)
    flat_params, _ = jax.tree_util.tree_flatten_with_path(params)
    for (path, param), axes in zip(flat_params, flat_axes, strict=True):
      axes_by_path[_keys(path)] = (param.shape, tuple(axes))
    state = jax.eval_shape(self.bind(param_axes).init, params)
    return jax.tree_util.tree_map_with_path(
      functools.partial(_axes_of_leaf, axes_by_path), state
    )


def _keys(path: Sequence[Any]) -> tuple[str, ...]:
  return tuple(path_name((key,)) for key in path)


def _stand_in(axes: Axes) -> jax.ShapeDtypeStruct:
  # Sizes that no optimizer cares about: enough to see which leaves mirror which.
  shape = tuple(range(2, 2 + len(axes)))
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _axes_of_leaf(axes_by_path: Mapping, path: Sequence[Any], leaf: Any) -> Axes:
  keys = _keys(path)
  for start in range(len(keys) + 1):
    shape, axes = axes_by_path.get(keys[start:], (None, ()))
    if shape == leaf.shape:
      return axes
  return (None,) * len(leaf.shape)


# -- optax by Gin name --


class OptaxWrapper(OptimizerDef):
  """Any optax transformation as an OptimizerDef (T5X `optimizers.OptaxWrapper`).

  The transformation brings its own learning rate, number or schedule, as in T5X. To
  follow the trainer's, end a chain with `@optimizers.scale_by_learning_rate()`.
  """

  def __init__(self, optax_optimizer: optax.GradientTransformation):
    super().__init__()
    self.optax_optimizer = optax_optimizer

  def transform(self, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    return self.optax_optimizer


def chain(transformations: Sequence[optax.GradientTransformation]) -> OptaxWrapper:
  """`optax.chain` of the given transformations (T5X `optimizers.chain`)."""
  return OptaxWrapper(optax.chain(*transformations))


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
  """The last link of a chain: multiplies by minus the trainer's learning rate."""

  def update(updates, state, params=None, *, learning_rate, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda u: -learning_rate * u, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def chain_by_name(
  links: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """`optax.named_chain` whose state, {name: state}, leaves out what holds no array.

  A link without state can so be added or dropped between two runs (clipping, say)
  and the checkpoint of the first still fits.
  """
  named = optax.named_chain(*links.items())

  def stateful(state):
    return {name: s for name, s in state.items() if jax.tree.leaves(s)}

  def update(updates, state, params=None, **extra_args):
    state = {name: state.get(name, optax.EmptyState()) for name in links}
    updates, state = named.update(updates, state, params, **extra_args)
    return updates, stateful(state)

  return optax.GradientTransformationExtraArgs(
    lambda p: stateful(named.init(p)), update
  )


class _NamedOptax(OptimizerDef):
  """An optax optimizer by name: the trainer's learning rate unless Gin binds one."""

  def __init__(self, make: Callable, learning_rate: Any, kwargs: Mapping[str, Any]):
    super().__init__(learning_rate)
    self._make, self._kwargs = make, dict(kwargs)
    self.transform(0.0)  # A wrong argument is reported here, not inside the step.

  def transform(self, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    # Built anew around the traced rate (as optax.inject_hyperparams does), so that
    # the rate reaches wherever the optimizer uses it and is not stored in its state.
    return self._make(learning_rate=learning_rate, **self._kwargs)

  def choose_learning_rate(self, passed: Any, step: jax.Array) -> jax.Array:
    bound = passed if self.learning_rate is None else self.learning_rate
    return super().choose_learning_rate(bound, step)


def _by_name(name: str, make: Callable, **defaults: Any) -> Callable[..., OptimizerDef]:
  """`make` with its own arguments and defaults, learning_rate made optional."""
  signature = inspect.signature(make)
  parameters = {
    key: p.replace(annotation=p.empty, default=defaults.get(key, p.default))
    for key, p in signature.parameters.items()
    if key != 'seed'  # deprecated in optax: `key`
  }
  rate = parameters.pop('learning_rate').replace(default=None)
  signature = signature.replace(
    parameters=[rate, *parameters.values()], return_annotation=OptimizerDef
  )

  def optimizer(*args, **kwargs):
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    return _NamedOptax(make, arguments.pop('learning_rate'), arguments)

  optimizer.__name__ = optimizer.__qualname__ = name
  optimizer.__signature__ = signature
  optimizer.__doc__ = f"""`optax.{name}` as an OptimizerDef (T5X `optimizers.{name}`).

  Arguments as in optax. learning_rate None (the default) follows the trainer's; a
  number or a schedule bound here replaces it. See optax for the source.
  """
  return optimizer


adabelief = _by_name('adabelief', optax.adabelief)
adagrad = _by_name('adagrad', optax.adagrad)
adam = _by_name('adam', optax.adam)
adamw = _by_name('adamw', optax.adamw)
fromage = _by_name('fromage', optax.fromage)
lamb = _by_name('lamb', optax.lamb)
lars = _by_name('lars', optax.lars)
lion = _by_name('lion', optax.lion)
noisy_sgd = _by_name('noisy_sgd', optax.noisy_sgd, key=0)
radam = _by_name('radam', optax.radam)
rmsprop = _by_name('rmsprop', optax.rmsprop)
sgd = _by_name('sgd', optax.sgd)
yogi = _by_name('yogi', optax.yogi)


# -- wrappers: an OptimizerDef made of others --


class skip_nonfinite(OptimizerDef):  # noqa: N801 (a Gin name: reads as a verb)
  """Leaves parameters and state as they were when a gradient is NaN or infinite.

  One bad batch then costs one step (GLaM's remedy; T5X's `skip_nan_updates` instead
  replaces single elements). aux gains 'skipped', 1.0 where the step was dropped.
  """

  def __init__(self, optimizer_def: OptimizerDef):
    super().__init__(optimizer_def.learning_rate)
    self.optimizer_def = optimizer_def

  def bind(self, param_axes: PyTree) -> OptimizerDef:
    return skip_nonfinite(self.optimizer_def.bind(param_axes))

  def init(self, params: PyTree, param_axes: PyTree = None) -> PyTree:
    return self.optimizer_def.init(params, param_axes)

  def state_axes(self, param_axes: PyTree, params: PyTree = None) -> PyTree:
    return self.optimizer_def.state_axes(param_axes, params)

  def update(
    self, grads: PyTree, state: PyTree, params: PyTree, learning_rate: Any = None
  ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """As OptimizerDef.update, or no change at all."""
    new_params, new_state, aux = self.optimizer_def.update(
      grads, state, params, learning_rate
    )
    # A sum of squares is finite exactly when every gradient is (or is about to be
    # too large for fp32, which deserves the same).
    finite = jnp.isfinite(aux['grad_norm'])
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    aux = {**aux, 'skipped': 1.0 - finite.astype(jnp.float32)}
    return keep(new_params, params), keep(new_state, state), aux


class MultiOptimizer(OptimizerDef):
  """Different optimizers for different parameters (T5X `optimizers.MultiOptimizer`).

  `traversals_and_optimizers` pairs a selector with an OptimizerDef. A selector is a
  regular expression searched in the parameter's path ('layers/kv_fused'), a function
  (path, value) -> bool, or flax's `traverse_util.ModelParamTraversal`, whose paths
  begin with '/'. A parameter that nobody selects stays as it is; two selectors on
  one parameter are a UserError. State: `param_states/<index>/...`.
  """

  def __init__(self, traversals_and_optimizers: Sequence[tuple[Any, OptimizerDef]]):
    super().__init__()
    self.selectors = [_selector(t) for t, _ in traversals_and_optimizers]
    self.optimizer_defs = [o for _, o in traversals_and_optimizers]

  def bind(self, param_axes: PyTree) -> OptimizerDef:
    bound = super().bind(param_axes)
    parts = self._split(param_axes, param_axes, is_axes)
    pairs = zip(self.optimizer_defs, parts, strict=True)
    bound.optimizer_defs = [o.bind(part) for o, part in pairs]
    return bound

  def init(self, params: PyTree, param_axes: PyTree = None) -> PyTree:
    bound = self if param_axes is None else self.bind(param_axes)
    parts = self._split(params, params)
    pairs = zip(bound.optimizer_defs, parts, strict=True)
    states = {str(i): o.init(part) for i, (o, part) in enumerate(pairs)}
    return {'step': jnp.zeros((), jnp.int32), 'param_states': states}

  def state_axes(self, param_axes: PyTree, params: PyTree = None) -> PyTree:
    parts = self._split(param_axes, param_axes, is_axes)
    shapes = [None] * len(parts) if params is None else self._split(params, params)
    states = {
      str(i): o.state_axes(axes, shape)
      for i, (o, axes, shape) in enumerate(
        zip(self.optimizer_defs, parts, shapes, strict=True)
      )
    }
    return {'step': (), 'param_states': states}

  def update(
    self, grads: PyTree, state: PyTree, params: PyTree, learning_rate: Any = None
  ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """As OptimizerDef.update; each optimizer clips by the norm of its own part."""
    new_params, new_states, aux = params, {}, {}
    param_parts = self._split(params, params)
    grad_parts = self._split(grads, params)
    for i, (optimizer, part) in enumerate(
      zip(self.optimizer_defs, param_parts, strict=True)
    ):
      inner = state['param_states'][str(i)]
      part, new_states[str(i)], inner_aux = optimizer.update(
        grad_parts[i], inner, part, learning_rate
      )
      new_params = _merge(new_params, part)
      aux = {**inner_aux, **aux}
    aux['grad_norm'] = optax.tree.norm(
      jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    )
    new_state = {'step': state['step'] + 1, 'param_states': new_states}
    return new_params, new_state, aux

  def _split(self, tree: PyTree, params: PyTree, is_leaf: Any = None) -> list[dict]:
    """For each optimizer the leaves it owns, {path: leaf} nested as in `tree`."""
    flat_tree = traverse_util.flatten_dict(tree, is_leaf=_leaf_test(is_leaf))
    flat_params = traverse_util.flatten_dict(params, is_leaf=_leaf_test(is_leaf))
    parts = [{} for _ in self.selectors]
    for keys, value in flat_params.items():
      path = '/'.join(keys)
      owners = [i for i, selects in enumerate(self.selectors) if selects(path, value)]
      if len(owners) > 1:
        raise UserError(
          f'MultiOptimizer: parameter {path!r} is selected by entries {owners} of '
          'traversals_and_optimizers; each may belong to one optimizer only.'
        )
      for owner in owners:
        parts[owner][keys] = flat_tree[keys]
    return [traverse_util.unflatten_dict(part) for part in parts]


def _leaf_test(is_leaf: Callable[[Any], bool] | None) -> Callable | None:
  return None if is_leaf is None else lambda _, value: is_leaf(value)


def _merge(tree: PyTree, part: PyTree) -> PyTree:
  flat = traverse_util.flatten_dict(tree) | traverse_util.flatten_dict(part)
  return traverse_util.unflatten_dict(flat)


def _selector(traversal: Any) -> Callable[[str, Any], bool]:
  if isinstance(traversal, str):
    pattern = re.compile(traversal)
    return lambda path, value: bool(pattern.search(path))
  if isinstance(traversal, traverse_util.Traversal):
    # A traversal yields the leaves it selects from a tree: here a tree of one.
    return lambda path, value: any(
      True for _ in traversal.iterate(traverse_util.unflatten_dict({path: value}, '/'))
    )
  return traversal

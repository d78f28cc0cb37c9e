"""Everything that training changes: step, parameters, optimizer state.

`TrainState` is a pytree. Beside it goes a tree of the same structure whose leaves are
tuples of logical axis names; partitioner, checkpoints and `model-info.txt` read it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
  """The state of a run (T5X: FlaxOptimTrainState).

  Attributes:
    step: int32 scalar, optimizer updates done so far.
    params: parameter tree (palm_t5x.network says its layout).
    opt_state: the optimizer's own {'step', 'param_states'} (optimizers.OptimizerDef).
  """

  step: jax.Array
  params: Any
  opt_state: Any

  def to_tree(self) -> dict[str, Any]:
    """The layout on disk, T5X's: target/..., state/step, state/param_states/...

    The optimizer counts its own updates, which are fewer than the steps where it
    skipped some; that count is beside the others as state/optimizer_step.
    """
    own = {'step': self.step, 'optimizer_step': self.opt_state['step']}
    return {'target': self.params, 'state': {**self.opt_state, **own}}

  @classmethod
  def from_tree(cls, tree: dict[str, Any]) -> 'TrainState':
    """Inverse of `to_tree`."""
    opt_state = dict(tree['state'])
    step, opt_state['step'] = opt_state['step'], opt_state.pop('optimizer_step')
    return cls(step, tree['target'], opt_state)


class TrainStateInitializer:
  """Knows the shapes, axes and shardings of a state before any of it exists.

  T5X's name. Nothing is materialised on one host: parameters are born sharded, by a
  jitted initialiser with output shardings.
  """

  def __init__(self, model, partitioner, input_shapes: dict[str, tuple[int, ...]]):
    self.model = model
    self.partitioner = partitioner
    self._input_shapes = input_shapes
    param_axes = model.param_logical_axes()
    self.optimizer = model.optimizer_def.bind(param_axes)
    # A key of shapes alone: the mesh may be one of chips that are not here.
    rng = jax.eval_shape(jax.random.key, 0)
    with partitioner.context():
      self.shapes = jax.eval_shape(self._create, rng)
    self.axes = TrainState(
      (), param_axes, self.optimizer.state_axes(param_axes, self.shapes.params)
    )
    self.shardings = partitioner.shardings(self.axes, self.shapes)

  def _create(self, rng: jax.Array) -> TrainState:
    params = self.model.get_initial_variables(rng, self._input_shapes)['params']
    return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

  def from_scratch(self, rng: jax.Array) -> TrainState:
    """A fresh state, already sharded."""
    init = self.partitioner.partition(self._create, out_shardings=self.shardings)
    return init(rng)

  def abstract(self) -> TrainState:
    """Shapes, dtypes and shardings: what a restore fills in."""
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
      self.shapes,
      self.shardings,
    )

"""One training step, on one screen, and the Trainer that compiles it.

The step is a pure function of (state, batch, rng). It knows no features: microbatching
is an argument, the optimizer decides what an update is, the schedule what a learning
rate is, and everything that looks at a run from outside is an action.
"""

import abc
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from palm_t5x import ahead, gradients
from palm_t5x.errors import UserError
from palm_t5x.metrics import Ratio
from palm_t5x.train_state import TrainState

logger = logging.getLogger(__name__)

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]


def train_step(
  state: TrainState,
  batch: Batch,
  rng: jax.Array,
  *,
  model,
  optimizer,
  learning_rate_fn: Callable[[jax.Array], jax.Array],
  gradients_fn: Callable[..., tuple[Any, Metrics]] = gradients.of_batch,
  weight_metrics_fn: Callable[..., Metrics] = lambda grads, old, new: {},
) -> tuple[TrainState, Metrics]:
  """Gradient of the mean loss, one optimizer update.

  Args:
    state: before the update; its step k selects learning rate and dropout masks.
    batch: feature name -> [B, T].
    rng: the run's dropout key; folded with the step, so that a step is a function of
      (state, batch, seed) and of nothing that happened before.
    gradients_fn: (model, params, batch, rng) -> (summed gradients, metrics).
    weight_metrics_fn: (gradients, old params, new params) -> more metrics.

  Returns:
    (state after the update, metrics: name -> Ratio).
  """
  step_rng = jax.random.fold_in(rng, state.step)
  grads, metrics = gradients_fn(model, state.params, batch, step_rng)
  # Dividing the total by the total weight makes microbatches with unequal token
  # counts give the same update as one batch.
  scale = 1.0 / model.loss_normalizer(metrics)
  grads = jax.tree.map(lambda g: g * scale, grads)
  learning_rate = jnp.asarray(learning_rate_fn(state.step), jnp.float32)
  params, opt_state, aux = optimizer.update(
    grads, state.opt_state, state.params, learning_rate
  )
  one = jnp.ones((), jnp.float32)
  metrics = metrics | {
    'learning_rate': Ratio(aux.get('learning_rate', learning_rate), one),
    'grad_norm': Ratio(aux['grad_norm'], one),
    **weight_metrics_fn(grads, state.params, params),
  }
  return TrainState(state.step + 1, params, opt_state), metrics


class BaseAction(abc.ABC):
  """Looks at the metrics of a finished evaluation or interval (T5X's BaseAction)."""

  @abc.abstractmethod
  def run(self, train_state: TrainState, metrics_by_task: Mapping[str, Any]) -> bool:
    """Returns True to stop training."""


@dataclasses.dataclass
class TerminateOnNanAction(BaseAction):
  """Stops when a metric is not finite.

  Attributes:
    task: 'train' or the name of an evaluated task.
    metric: name of the metric.
  """

  task: str
  metric: str = 'loss'

  def run(self, train_state, metrics_by_task):
    """True if the metric is NaN or infinite."""
    value = metrics_by_task.get(self.task, {}).get(self.metric)
    if value is None or math.isfinite(value):
      return False
    logger.error(
      'step %d: %s of %s is %s: stopping.',
      int(train_state.step),
      self.metric,
      self.task,
      value,
    )
    return True


@dataclasses.dataclass
class EarlyStoppingAction(BaseAction):
  """Stops when a metric has not improved for `patience` evaluations.

  Attributes:
    metric: (task, metric name).
    mode: 'min' or 'max'.
    patience: evaluations without improvement to wait for.
    atol: absolute change that counts as improvement.
    rtol: relative change that counts as improvement.
  """

  metric: tuple[str, str]
  mode: str
  patience: int = 3
  atol: float = 0.0
  rtol: float = 0.0

  def __post_init__(self):
    if self.mode not in ('min', 'max'):
      raise UserError(f"EarlyStoppingAction.mode={self.mode!r}: 'min' or 'max'.")
    self._best: float | None = None
    self._waited = 0

  def run(self, train_state, metrics_by_task):
    """True once `patience` evaluations in a row brought nothing."""
    task, name = self.metric
    value = metrics_by_task.get(task, {}).get(name)
    if value is None:
      return False
    if self._best is None or self._improves(value):
      self._best, self._waited = value, 0
      return False
    self._waited += 1
    if self._waited < self.patience:
      return False
    logger.warning(
      'step %d: %s of %s has not improved on %.5g for %d evaluations: stopping.',
      int(train_state.step),
      name,
      task,
      self._best,
      self._waited,
    )
    return True

  def _improves(self, value: float) -> bool:
    delta = value - self._best if self.mode == 'max' else self._best - value
    return delta > self.atol and delta > self.rtol * abs(self._best)


class WeightMetricsComputer:
  """RMS of every parameter, its gradient and its update, as metrics (T5X's name)."""

  def __call__(self, grads, old_params, new_params) -> Metrics:
    """Trees of one structure -> {'weight_rms/<name>': Ratio, ...}."""
    updates = jax.tree.map(jnp.subtract, new_params, old_params)
    metrics = {}
    for kind, tree in (
      ('weight_rms', new_params),
      ('weight_gradient_rms', grads),
      ('weight_update_rms', updates),
    ):
      for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        rms = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
        metrics[f'{kind}/{name}'] = Ratio(rms, jnp.ones((), jnp.float32))
    return metrics


class Trainer:
  """Compiles the step and the evaluation for a partitioner and holds the state.

  T5X's Trainer; `num_microbatches`, `pod_gradient_dtype` (in which gradients cross
  between pods) and `learning_rate_fn` are bound by Gin, `train` passes the rest.
  """

  def __init__(
    self,
    model,
    train_state: TrainState,
    partitioner,
    eval_names: Sequence[str] = (),
    summary_dir: str | None = None,
    train_state_axes: TrainState | None = None,
    rng: jax.Array | None = None,
    *,
    optimizer=None,
    learning_rate_fn: Callable[[jax.Array], jax.Array],
    num_microbatches: int | None = None,
    pod_gradient_dtype: str = 'float32',
    weight_metrics_computer: Callable[..., Metrics] | None = None,
  ):
    self.train_state = train_state
    self.model = model
    self.learning_rate_fn = learning_rate_fn
    self.num_microbatches = 1 if num_microbatches is None else num_microbatches
    if self.num_microbatches < 1:
      raise UserError(f'MICROBATCHES={num_microbatches}: it is 1 or more, or None.')
    self.partitioner = partitioner
    self._rng = jax.random.key(0) if rng is None else rng
    optimizer = optimizer or model.optimizer_def.bind(train_state_axes.params)

    more = {}
    if weight_metrics_computer is not None:
      more['weight_metrics_fn'] = weight_metrics_computer

    def step(state, batch, rng):
      return train_step(
        state,
        batch,
        rng,
        model=model,
        optimizer=optimizer,
        learning_rate_fn=learning_rate_fn,
        gradients_fn=functools.partial(
          gradients.of_batch,
          num_microbatches=self.num_microbatches,
          exchange_dtype=pod_gradient_dtype,
        ),
        **more,
      )

    shardings = partitioner.shardings(train_state_axes, train_state)
    self._step = partitioner.partition(
      step,
      in_shardings=(shardings, partitioner.data_sharding, None),
      out_shardings=(shardings, None),
      donate_argnums=(0,),
    )
    self._steps = ahead.BySize(self._step)
    self._eval_step = partitioner.partition(
      lambda params, batch: model.eval_fn(params, batch)[1],
      in_shardings=(shardings.params, partitioner.data_sharding),
    )

  def train(self, batch: Batch) -> Metrics:
    """One update of `self.train_state`. Metrics stay on the device until read."""
    self.train_state, metrics = self._steps(self.train_state, batch, self._rng)
    return metrics

  def compile_ahead(self, batch_size: int):
    """Compiles the step for batches of another size, beside the training."""
    self._steps.compile_ahead(batch_size)

  def eval(self, batch: Batch) -> Metrics:
    """Metrics of one evaluation batch with the present parameters."""
    return self._eval_step(self.train_state.params, batch)

  def lower(self, batch: Any):
    """The train step, lowered for these shapes and not yet compiled."""
    return self._step.lower(self.train_state, batch, self._rng)

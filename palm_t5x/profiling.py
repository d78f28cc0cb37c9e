"""A profile of a few training steps, for TensorBoard's profile page or Perfetto."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from palm_t5x.errors import UserError

logger = logging.getLogger(__name__)


class ProfileHook:
  """Traces the steps `first` ... `last` of a run, a hook of the train loop.

  Args:
    steps: (first, last), both traced; a number n means n steps after the tenth of this
      start, when everything is compiled; None traces nothing.
    start: the step that this start of the run goes on from.
    model_dir: the profile is written to its folder plugins/profile, where
      `tensorboard --logdir MODEL_DIR` finds it.

  Raises:
    UserError: for anything else.
  """

  _WARM = 10  # steps before a profile that names no first step

  def __init__(self, steps: int | Sequence[int] | None, start: int, model_dir: str):
    if isinstance(steps, int) and not isinstance(steps, bool):
      steps = (start + self._WARM + 1, start + self._WARM + steps)
    self._first, self._last = self._checked(steps) if steps else (None, None)
    self._model_dir = os.path.abspath(model_dir)
    self._running = False
    if self._first == start + 1:
      self._begin()

  def _checked(self, steps: Any) -> tuple[int, int]:
    try:
      first, last = (int(step) for step in steps)
    except (TypeError, ValueError):
      first, last = 0, 0
    if not 1 <= first <= last:
      raise UserError(
        f'PROFILE_STEPS={steps!r}: give the number of steps to profile, or the first '
        'and the last, such as (100, 104).'
      )
    return first, last

  def _begin(self):
    jax.profiler.start_trace(self._model_dir)
    self._running = True

  def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
    """`step` is done: starts or ends the trace."""
    if self._first is None:
      return
    if self._running and step >= self._last:
      jax.block_until_ready(metrics)
      self.close()
    elif not self._running and self._first == step + 1:
      jax.block_until_ready(metrics)  # so that no earlier step is in the trace
      self._begin()

  def close(self):
    """Ends a trace that is under way, and writes it."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      folder = os.path.join(self._model_dir, 'plugins', 'profile')
      logger.info('steps %d to %d are profiled in %s.', self._first, self._last, folder)

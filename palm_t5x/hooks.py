"""What happens between steps: statistics, evaluations, checkpoints, signals.

The train loop calls each hook after each update with (step, metrics). A hook that
returns a string ends the run, and the string says why. Hooks run in the order they are
given: statistics first, so that what an evaluation takes is not counted as training
time; checkpoints after evaluations; signals last.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from palm_t5x import processes
from palm_t5x.metrics import sum_metrics

logger = logging.getLogger(__name__)

Hook = Callable[[int, Mapping[str, Any]], str | None]


class StatsHook:
  """Sums metrics and hands them on every `period` steps.

  Reading a metric waits for its step, so only the step before the last is waited for:
  the device always has one step queued, and the host never runs further ahead.
  """

  def __init__(
    self,
    period: int,
    total_steps: int,
    write: Callable[[int, dict[str, float], int], str | None],
  ):
    self._period, self._total, self._write = period, total_steps, write
    self._pending: list[Any] = []

  def __call__(self, step: int, metrics: Mapping[str, Any]) -> str | None:
    if self._pending:
      jax.block_until_ready(self._pending[-1])
    self._pending.append(metrics)
    if step % self._period and step != self._total:
      return None
    return self.flush(step)

  def flush(self, step: int) -> str | None:
    """Writes what has gathered."""
    if not self._pending:
      return None
    total: dict[str, Any] = {}
    for metrics in jax.device_get(self._pending):
      total = sum_metrics(total, metrics)
    count, self._pending = len(self._pending), []
    values = {name: float(ratio.value()) for name, ratio in total.items()}
    values['tokens'] = float(total['loss'].weight)
    return self._write(step, values, count)


def periodically(
  period: int | None, run: Callable[[int], str | None], never_at: int | None = None
) -> Hook:
  """A hook that runs `run(step)` every `period` steps, and not at `never_at`."""

  def hook(step: int, metrics: Mapping[str, Any]) -> str | None:
    del metrics
    if not period or step % period or step == never_at:
      return None
    return run(step)

  return hook


class SignalHook:
  """Ends a run after its step on Ctrl-C or SIGTERM; a second one ends it now.

  Of several processes, any may get the signal: all end after the same step.
  """

  def __init__(self, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)):
    self._signals = signals
    self.received: int | None = None

  def _handle(self, number: int, frame: Any):
    del frame
    signal.signal(number, signal.SIG_DFL)
    if processes.count() > 1:  # jax hears SIGTERM and tells the others
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._receive(number)

  def _receive(self, number: int):
    self.received = number
    name = signal.Signals(number).name
    print(f'\n{name}: saving a checkpoint and leaving ...', file=sys.stderr, flush=True)

  @contextlib.contextmanager
  def installed(self):
    """Handles the signals inside the block. A no-op outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
      yield self
      return
    ours = set(self._signals)
    if processes.count() > 1:
      ours.discard(signal.SIGTERM)
    before = {n: signal.signal(n, self._handle) for n in ours}
    try:
      with processes.preemption():
        yield self
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def __call__(self, step: int, metrics: Mapping[str, Any]) -> str | None:
    del metrics
    if processes.preempted(step):
      self._receive(signal.SIGTERM)
    if self.received is None:
      return None
    return f'{signal.Signals(self.received).name} at step {step}'


def compile_ahead(trainer: Any, next_size: Callable[[int], int | None]) -> Hook:
  """A hook that has the step for the next batch size compiled while this one trains."""

  def hook(step: int, metrics: Mapping[str, Any]) -> None:
    del metrics
    size = next_size(step)
    if size is not None:
      trainer.compile_ahead(size)

  return hook


def run_actions(
  actions: Sequence[Any], state: Any, metrics_by_task: Mapping[str, Any]
) -> str | None:
  """Runs T5X-style actions; the first that says stop gives the reason."""
  for action in actions:
    if action.run(state, metrics_by_task):
      reason = f'{type(action).__name__} at step {int(state.step)}'
      logger.warning('%s ends the run.', reason)
      return reason
  return None

"""Loss spikes: told from noise by a median and a median deviation, and what to do.

PaLM's 540B run spiked about twenty times, despite clipping. Its authors went back to a
checkpoint about 100 steps before each spike and skipped 200 to 500 batches; the same
batches read from another checkpoint did no harm (paper §5.1). `LossSpikeRecovery` does
that by itself: `LossSpikes` sees a spike, `palm_t5x.rewind` goes back.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from palm_t5x.errors import UserError

# A normal distribution's standard deviation, in units of its median deviation.
_SIGMA = 1.4826


@dataclasses.dataclass(frozen=True)
class LossSpikeRecovery:
  """When a training loss counts as a spike, and how far a run goes back (for Gin).

  A step is out of line if its loss exceeds the median of the last `window` by more
  than `threshold` standard deviations and by more than `min_rise`; `patience` such
  steps in a row are a spike, which began with the first of them. The deviation is
  1.4826 times the median absolute deviation, so that neither a few odd batches nor an
  early spike widens it. A slow rise moves the median with it and is no spike.

  Attributes:
    rewind_steps: data changes from so many steps before the spike began; the
      checkpoint gone back to is the newest at least as old.
    skip_batches: how many batches are left out there.
    max_rewinds: the run stops at the spike after this many.
    window: steps whose losses are compared with; none is judged before it is full.
    threshold: in standard deviations.
    min_rise: in nats per token.
    patience: steps in a row.
    nonfinite: whether a NaN or infinite loss is a spike, at once and without history.
  """

  rewind_steps: int = 100
  skip_batches: int = 300
  max_rewinds: int = 20
  window: int = 100
  threshold: float = 6.0
  min_rise: float = 0.2
  patience: int = 5
  nonfinite: bool = True

  def __post_init__(self):
    least = {'rewind_steps': 0, 'max_rewinds': 0, 'window': 3, 'patience': 1}
    for name, bound in least.items():
      value = getattr(self, name)
      if value < bound:
        raise UserError(f'LossSpikeRecovery.{name}={value}: it is {bound} or more.')
    for name in ('threshold', 'min_rise'):
      value = getattr(self, name)
      if not value >= 0:
        raise UserError(f'LossSpikeRecovery.{name}={value}: it is 0 or more.')
    if self.skip_batches < self.rewind_steps + self.patience:
      raise UserError(
        f'LossSpikeRecovery.skip_batches={self.skip_batches} would stop short of the '
        f'batches that spiked: it is at least rewind_steps + patience = '
        f'{self.rewind_steps + self.patience}. To turn recovery off, bind '
        'LOSS_SPIKE_RECOVERY=None.'
      )

  @property
  def reach(self) -> int:
    """How old a checkpoint a rewind may need, in steps: one such is always kept."""
    return self.rewind_steps + self.patience


class Spike(NamedTuple):
  """A spike, and the statistics that make it one.

  Attributes:
    step: at which it was certain.
    began: the first step out of line.
    loss: of `step`.
    median: of the window before `began`; NaN if it was not full.
    deviation: the window's robust standard deviation.
    limit: what a loss had to exceed.
  """

  step: int
  began: int
  loss: float
  median: float
  deviation: float
  limit: float


class LossSpikes:
  """Watches the loss of each step. Its state is a few numbers, kept in checkpoints.

  A run that resumes from a checkpoint sees what the uninterrupted run sees: the state
  after step s is a function of the losses up to s.
  """

  def __init__(self, config: LossSpikeRecovery, state: Mapping[str, Any] | None = None):
    """Args: state: an earlier `to_json()`."""
    self.config = config
    state = state or {}
    self._window = _floats(state.get('window', ()))[-config.window :]
    # (step, loss) of the steps out of line that lead up to now.
    self._out = [
      (int(step), loss)
      for step, loss in zip(
        state.get('out_steps', ()), _floats(state.get('out_losses', ())), strict=True
      )
    ]

  def to_json(self) -> dict[str, Any]:
    """Plain values; what is not finite is None."""
    return {
      'window': _plain(self._window),
      'out_steps': [step for step, _ in self._out],
      'out_losses': _plain([loss for _, loss in self._out]),
    }

  def observe(self, step: int, loss: float) -> Spike | None:
    """Takes the loss of `step`; returns the spike that it completes, if it does."""
    if not math.isfinite(loss):
      if self.config.nonfinite:
        self._out.append((step, loss))
    elif loss > self._statistics()[2]:
      self._out.append((step, loss))
    else:
      recent = [x for _, x in self._out if math.isfinite(x)] + [loss]
      self._window = (self._window + recent)[-self.config.window :]
      self._out = []
    return self.spike()

  def spike(self) -> Spike | None:
    """The spike that the losses so far end in, or None."""
    if not self._out:
      return None
    step, loss = self._out[-1]
    if len(self._out) < self.config.patience and math.isfinite(loss):
      return None
    return Spike(step, self._out[0][0], loss, *self._statistics())

  def _statistics(self) -> tuple[float, float, float]:
    """Median, robust standard deviation, and the limit that they make."""
    if len(self._window) < self.config.window:
      return math.nan, math.nan, math.inf
    median = float(np.median(self._window))
    deviation = _SIGMA * float(np.median(np.abs(np.asarray(self._window) - median)))
    rise = max(self.config.threshold * deviation, self.config.min_rise)
    return median, deviation, median + rise


def _plain(values: Sequence[float]) -> list[float | None]:
  return [value if math.isfinite(value) else None for value in values]


def _floats(values: Sequence[float | None]) -> list[float]:
  return [math.nan if value is None else float(value) for value in values]

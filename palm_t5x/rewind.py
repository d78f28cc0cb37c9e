"""Going back: what a run does when its loss has spiked, and what of it is on disk.

The hook reads each step's loss one step late, so that the devices never wait for it.
A spike leaves the train loop as `SpikeFound`; `Recovery.record` then writes one line of
intent (palm_t5x.timeline), after which the run simply resumes, in this process or after
a kill in the next, by the one path there is for that.
"""

import datetime
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from palm_t5x import checkpoints, datasets, processes, timeline
from palm_t5x.errors import Failure
from palm_t5x.spikes import LossSpikeRecovery, LossSpikes, Spike

logger = logging.getLogger(__name__)


class SpikeFound(Exception):  # noqa: N818 (no error: a request to go back)
  """Leaves the train loop when the loss has spiked."""

  def __init__(self, spike: Spike):
    super().__init__(f'loss spike at step {spike.step}')
    self.spike = spike


class Recovery:
  """One run's watch over its loss, and its way back.

  Args:
    config: thresholds; None watches nothing.
    model_dir: where rewinds.json and events.jsonl are.
  """

  def __init__(
    self,
    config: LossSpikeRecovery | None,
    model_dir: str,
  ):
    self.config = config
    self._model_dir = model_dir
    self.restart({})

  @property
  def reach(self) -> int | None:
    """How old a checkpoint a rewind may need, in steps; None without recovery."""
    return self.config.reach if self.config else None

  def restart(self, metadata: Mapping[str, Any]):
    """Takes up the losses that a checkpoint remembers; {} for a run's beginning."""
    self._pending: tuple[int, Any] | None = None
    self._losses = None
    if self.config:
      self._losses = LossSpikes(self.config, metadata.get('losses'))

  def metadata(self) -> dict[str, Any]:
    """What a checkpoint must say: the rewinds before it, and the losses up to it."""
    self._read()
    known = {'losses': self._losses.to_json()} if self._losses else {}
    return {'rewinds': len(timeline.read(self._model_dir)), **known}

  def hook(self, is_last_before_save: Callable[[int], bool]) -> Callable[..., None]:
    """Raises SpikeFound; reads a step's loss when the next one is under way.

    Args:
      is_last_before_save: steps after which a checkpoint is written or the run ends:
        their loss is read at once (a save waits for the step anyhow), so that a
        checkpoint's record of losses is complete and never begins with a spike.
    """

    def watch(step: int, metrics: Mapping[str, Any]) -> None:
      if self._losses is None:
        return
      self._read()
      self._raise_spike()
      self._pending = step, metrics['loss']
      if is_last_before_save(step):
        self._read()
        self._raise_spike()

    return watch

  def _raise_spike(self):
    spike = self._losses.spike()
    if spike:
      raise SpikeFound(spike)

  def _read(self):
    """Waits for the loss that is not yet read, if there is one."""
    if self._pending is not None:
      step, ratio = self._pending
      self._pending = None
      self._losses.observe(step, float(jax.device_get(ratio).value()))

  def record(
    self, spike: Spike, data: datasets.TrainDataset, steps: list[int], origin: int
  ) -> Mapping[str, Any]:
    """Decides where to go back to and writes it down; nothing is undone yet.

    Args:
      spike: what was seen.
      data: the training data of the timeline that is given up.
      steps: checkpoints that there are, oldest first, none being written.
      origin: the step that a run without checkpoints starts from.

    Returns:
      The line for events.jsonl.

    Raises:
      Failure: if the run has gone back `max_rewinds` times already.
    """
    done = len(timeline.read(self._model_dir))
    if done >= self.config.max_rewinds:
      raise Failure(
        f'the loss spiked at step {spike.began} ({_number(spike.loss)}), and the run '
        f'has gone back {done} times already, which is max_rewinds: it stops. '
        'Checkpoints are as they were. Raise spikes.LossSpikeRecovery.max_rewinds or '
        'its threshold, or bind LOSS_SPIKE_RECOVERY=None, and run the same command.'
      )
    # The batch that step s reads has number s - 1.
    change = max(spike.began - 1 - self.config.rewind_steps, 0)
    target = processes.decide(
      lambda: _newest_whole(self._model_dir, steps, change, origin)
    )
    start = max(target, change)
    added = data.examples(start, start + self.config.skip_batches)
    event = {
      'event': 'rewind',
      'number': done + 1,
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'step': spike.step,
      'spike_began': spike.began,
      'loss': _finite(spike.loss),
      'median': _finite(spike.median),
      'deviation': _finite(spike.deviation),
      'limit': _finite(spike.limit),
      'checkpoint': target,
      'skipped_from_step': start,
      'skipped_batches': list(data.batch_numbers(*added)),
      'skipped_examples': [list(added)],
    }
    entry = {
      'checkpoint': target,
      'skips': [*map(list, data.skips), list(added)],
      'event': event,
    }
    processes.decide(lambda: timeline.append(self._model_dir, entry))
    return event


def settle(model_dir: str) -> list[timeline.Entry]:
  """Writes down in events.jsonl what a kill may have left out; returns the rewinds."""
  entries = timeline.read(model_dir)

  def record():
    for entry in entries:
      timeline.record_event(model_dir, entry['event'])

  processes.decide(record)
  return entries


def say(event: Mapping[str, Any], most: int) -> str:
  """A rewind in one line for the user."""
  first, last = event['skipped_batches']
  usual = '' if event['median'] is None else f' (median {event["median"]:.4g})'
  return (
    f'Loss spike from step {event["spike_began"]:,}: {_number(event["loss"])} at step '
    f'{event["step"]:,}{usual}. Back to step {event["checkpoint"]:,}; batches '
    f'{first:,}:{last:,} are skipped (rewind {event["number"]} of at most {most}).'
  )


def _newest_whole(model_dir: str, steps: list[int], latest: int, origin: int) -> int:
  """The newest whole checkpoint up to step `latest`, else the oldest, else `origin`."""
  whole = None
  for step in reversed(steps):
    problem = checkpoints.damage(f'{model_dir}/checkpoint_{step}')
    if problem is None:
      whole = step
      if step <= latest:
        break
  return origin if whole is None else whole


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
  return 'not finite' if value is None or not math.isfinite(value) else f'{value:.4g}'

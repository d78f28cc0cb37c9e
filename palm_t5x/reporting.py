"""What a run tells its user: progress lines, metrics files, and how it ended."""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from palm_t5x import metrics, processes
from palm_t5x.metric_writers import MetricsWriter, read_metrics
from palm_t5x.progress import ProgressLine, duration


class Reporter:
  """Console, metrics.jsonl and TensorBoard of one training run. A context manager.

  Args:
    model_dir: where files go.
    total_steps: the step at which the run ends.
    start: the step it starts from.
    bytes_per_token: of the training text, for bits per byte.
    model: whose FLOPs MFU counts, if it says how many they are.
    length: tokens per row.
    partitioner: its devices' peak is what MFU divides by.
  """

  def __init__(
    self,
    model_dir: str,
    total_steps: int,
    start: int,
    bytes_per_token: float,
    model: Any,
    length: int,
    partitioner: Any,
  ):
    self._model_dir, self._total, self._start = model_dir, total_steps, start
    self._bytes_per_token = bytes_per_token
    self._flops_per_token: dict[str, float] = {}
    self._peak = None
    if hasattr(model, 'hardware_flops_per_token'):
      self._flops_per_token = {
        'mfu': model.flops_per_token(length),
        'mfu_without_attention': model.flops_per_token(length, attention=False),
        'hfu': model.hardware_flops_per_token(length),
      }
      self._peak = metrics.peak_flops(
        list(np.ravel(partitioner.mesh.devices)),
        cpu_operand_dtype='bfloat16' if model.config.mode == 'fast' else 'float32',
      )
    self._line = ProgressLine(total_steps)
    self._writers = {'train': MetricsWriter(model_dir, 'train', first_step=start + 1)}
    self._began = self._mark = time.monotonic()
    self._away = 0.0
    self._quiet = jax.process_index() != 0
    self.last_evaluation: dict[str, float] = {}

  def __enter__(self) -> 'Reporter':
    if not self._quiet:
      self._line.__enter__()
    return self

  def __exit__(self, *exc_info: Any):
    self._line.__exit__(*exc_info)
    for writer in self._writers.values():
      writer.close()

  def say(self, text: str):
    """A line for the user, once per run and not once per process."""
    if not self._quiet:
      self._line.message(text)

  @contextlib.contextmanager
  def paused(self):
    """Time inside the block is not training time."""
    before = time.monotonic()
    try:
      yield
    finally:
      self._away += time.monotonic() - before

  def training_starts(self):
    """The first step is about to be compiled; the clock starts when it is done."""
    self._mark, self._away = time.monotonic(), 0.0

  def interval(self, step: int, values: dict[str, float], steps: int):
    """Training metrics of the last `steps` steps, which ended with `step`."""
    now = time.monotonic()
    seconds = max(now - self._mark - self._away, 1e-9)
    self._mark, self._away = now, 0.0
    rate = values['tokens'] / seconds
    row = dict(values)
    row['bits_per_byte'] = (
      values['cross_ent_loss'] / math.log(2) / self._bytes_per_token
    )
    row |= {'tokens_per_second': rate, 'steps_per_second': steps / seconds}
    shares = {}
    if self._peak:
      shares = {
        name: metrics.mfu(rate, flops, self._peak.flops)
        for name, flops in self._flops_per_token.items()
      }
    row |= shares
    self._writers['train'].write_scalars(step, row)
    if self._quiet:
      return
    measured = self._peak is not None and self._peak.source == 'measured'
    if measured:  # of a CPU: the other shares are in metrics.jsonl
      shares = {'mfu': shares['mfu']} if shares else {}
    self._line.report(
      step,
      loss=values['loss'],
      bits_per_byte=row['bits_per_byte'],
      learning_rate=values['learning_rate'],
      grad_norm=values['grad_norm'],
      tokens_per_second=rate,
      **shares,
      mfu_label='of measured peak' if measured else 'MFU',
    )

  def goes_back(self, step: int):
    """The run goes on from `step`: what it wrote of later ones is removed."""
    self._start = step
    for writer in self._writers.values():
      writer.drop_from(step + 1)

  def tick(self, step: int):
    """A step is done: moves the bar."""
    if not self._quiet:
      self._line.tick(step)

  def evaluation(self, step: int, kind: str, name: str, values: Mapping[str, float]):
    """Metrics of one evaluated task; kind is 'training_eval' or 'inference_eval'."""
    split = f'{kind}/{name}'
    if split not in self._writers:
      self._writers[split] = MetricsWriter(
        self._model_dir, split, first_step=self._start + 1
      )
    self._writers[split].write_scalars(step, values)
    if kind == 'training_eval':
      self.last_evaluation = dict(values)
    self.say(f'  eval step {step:,}  {name:20} {readable(values)}')

  def already_finished(self) -> bool:
    """Whether a run that had nothing left to do wrote its closing evaluation too."""

    def written() -> bool:
      rows = read_metrics(self._model_dir)
      return any(row['step'] == self._total and 'eval' in row['split'] for row in rows)

    return self._start == self._total and processes.decide(written)

  def samples(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]):
    """Prompts and what the model made of them."""
    self.say('\nSamples')
    for prompt, texts in zip(prompts, continuations, strict=True):
      for text in texts:
        self.say(f'  {prompt!r}\n    -> {text!r}')

  def finished(self, step: int, reason: str | None):
    """How the run ended, where its files are, and what to type next."""
    folder = os.path.relpath(self._model_dir)
    folder = self._model_dir if folder.startswith('..') else folder
    took = duration(time.monotonic() - self._began)
    if reason:
      self.say(f'\nEnded at step {step:,} of {self._total:,} after {took}: {reason}.')
    elif step == self._start:
      self.say(f'\n{folder} already has all its {step:,} steps.')
    else:
      self.say(f'\nTrained to step {step:,} in {took}.')
    self.say(
      f'Everything is in {folder}: checkpoint_{step}, metrics.jsonl, config.gin, '
      'model-info.txt, TensorBoard events.'
    )
    # config.gin is the whole configuration, overrides of this run included.
    here = f'--gin_file={folder}/config.gin'
    self.say('Next:')
    self.say(f"  t5x complete {here} 'def main('")
    self.say(f'  t5x train {here} --gin.TRAIN_STEPS={2 * step}    # go on')
    self.say(f'  tensorboard --logdir={folder}')

  def stopped(self, step: int, name: str):
    """A signal ended the run; its checkpoint is written."""
    self.say(
      f'{name}: stopped at step {step:,} of {self._total:,}; checkpoint_{step} is '
      'saved. The same command goes on from there.'
    )


def readable(values: Mapping[str, float]) -> str:
  """Metrics in one line, bits per byte first where there are some."""
  shown = []
  for name, value in values.items():
    if name in ('tokens', 'bytes'):
      continue
    shown.append((name != 'bits_per_byte', f'{name} {value:.4g}'))
  return '  '.join(text for _, text in sorted(shown, key=lambda s: s[0]))


def print_table(title: str, results: Mapping[str, Mapping[str, float]]):
  """One line per task, aligned."""
  print(title)
  width = max((len(name) for name in results), default=0)
  for name, values in results.items():
    print(f'  {name:{width}}  {readable(values)}')

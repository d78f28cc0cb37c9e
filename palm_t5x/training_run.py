"""The things a training run does besides training: evaluate, save, report, finish."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from palm_t5x import (
  checkpoints,
  datasets,
  evaluation,
  generation,
  hooks,
  rewind,
  run_dir,
  utils,
)
from palm_t5x.reporting import Reporter
from palm_t5x.spikes import Spike
from palm_t5x.train_state import TrainStateInitializer


@dataclasses.dataclass
class TrainingRun:
  """One run's trainer, data and outputs, and what hooks do with them.

  Attributes:
    trainer: holds the state.
    data: the training dataset.
    checkpointer: of MODEL_DIR.
    reporter: console, metrics.jsonl, TensorBoard.
    metadata: goes into every checkpoint beside step and data position.
    actions: {'train' | 'train_eval' | 'infer_eval': [BaseAction, ...]}.
    recovery: watches the loss and goes back when it spikes.
    restart: gives state, data position and metadata to resume from, as at the start.
    stop_signal: the signal that ended the run, if one did.
  """

  trainer: Any
  data: datasets.TrainDataset
  checkpointer: checkpoints.Checkpointer
  reporter: Reporter
  metadata: Mapping[str, Any]
  actions: Mapping[str, Sequence[Any]]
  recovery: rewind.Recovery
  restart: Callable[..., tuple[Any, datasets.Position, Mapping[str, Any]]]
  stop_signal: int | None = None

  def __post_init__(self):
    self._readers: dict[str, Any] = {}
    self._task_evaluator: evaluation.TaskEvaluator | None = None
    # Beyond one train loop: a signal during a rewind ends the run after it.
    self.signals = hooks.SignalHook()
    self._starts_at(int(self.trainer.train_state.step))

  def _starts_at(self, step: int):
    self._saved_step = step or None
    self._origin = step

  @property
  def partitioner(self) -> Any:
    """The mesh everything runs on."""
    return self.trainer.partitioner

  def add_loss_evaluation(
    self,
    cfg: utils.DatasetConfig | None,
    cache_dir: str,
    seed: int,
    eval_steps: int | None,
    final_eval_steps: int | None,
  ):
    """Measures the loss of this held-out text at each evaluation."""
    if cfg is None:
      return
    self._eval_cfg = cfg
    self._eval_steps, self._final_eval_steps = eval_steps, final_eval_steps
    self._readers = datasets.eval_readers(
      cfg, self.trainer.model.output_vocabulary, cache_dir, seed
    )

  def add_task_evaluation(
    self,
    cfg: utils.DatasetConfig | None,
    initializer: TrainStateInitializer,
    evaluator_cls: Callable[..., Any] | None,
    model_dir: str,
  ):
    """Computes SeqIO metrics of this task or mixture at each evaluation."""
    if cfg is None:
      return
    self._task_evaluator = evaluation.TaskEvaluator(
      cfg,
      self.trainer.model,
      self.partitioner,
      initializer.shardings.params,
      evaluator_cls,
      os.path.join(model_dir, 'inference_eval'),
    )

  def write_stats(self, step: int, values: dict[str, float], steps: int) -> str | None:
    """One interval's training metrics."""
    self.reporter.interval(step, values, steps)
    actions = self.actions.get('train', ())
    return hooks.run_actions(actions, self.trainer.train_state, {'train': values})

  def save(self, step: int):
    """Starts writing a checkpoint, unless this step has one."""
    if self._saved_step == step:
      return
    with self.reporter.paused():
      position = self.data.position(step).to_json()
      self.checkpointer.save(
        self.trainer.train_state,
        {
          **self.metadata,
          'step': step,
          'data': position,
          **self.recovery.metadata(),
        },
      )
    self._saved_step = step

  def through_spikes(
    self, loop: Callable[..., str | None], start: int, *args: Any
  ) -> str | None:
    """Calls loop(self, start, *args); after a loss spike again, from further back.

    Returns:
      What the loop returns when it comes to its end.
    """
    while True:
      try:
        return loop(self, start, *args)
      except rewind.SpikeFound as found:
        start = self._go_back(found.spike)

  def _go_back(self, spike: Spike) -> int:
    """Resumes from before the spike, with its data skipped; returns the step."""
    with self.reporter.paused():
      self.checkpointer.wait()
      steps = checkpoints.steps_in(self.checkpointer.directory)
      event = self.recovery.record(spike, self.data, steps, self._origin)
      self.reporter.say(rewind.say(event, self.recovery.config.max_rewinds))
      # Two states need not fit beside each other.
      jax.tree.map(lambda x: x.delete(), self.trainer.train_state)
      self.trainer.train_state, position, metadata = self.restart(quiet=True)
      step = int(self.trainer.train_state.step)
      self.recovery.restart(metadata)
      self.data.move_to(position)
      self.reporter.goes_back(step)
      self._starts_at(step)
    return step

  def evaluate(self, step: int, final: bool = False) -> str | None:
    """Runs the evaluations; returns why to stop, if an action says so."""
    reason = None
    with self.reporter.paused():
      if self._readers:
        results = self._loss(self._final_eval_steps if final else self._eval_steps)
        for name, values in results.items():
          self.reporter.evaluation(step, 'training_eval', name, values)
        reason = self._act('train_eval', results)
      if self._task_evaluator:
        params = self.trainer.train_state.params
        results = self._task_evaluator.evaluate(params, step)
        for name, values in results.items():
          self.reporter.evaluation(step, 'inference_eval', name, values)
        reason = reason or self._act('infer_eval', results)
    return reason

  def _act(self, kind: str, results: Mapping[str, Any]) -> str | None:
    actions = self.actions.get(kind, ())
    return hooks.run_actions(actions, self.trainer.train_state, results)

  def _loss(self, max_batches: int | None) -> dict[str, dict[str, float]]:
    """Held-out loss of each task, and of all together under the mixture's name."""
    results = {
      name: evaluation.evaluate_loss(
        self.trainer.eval,
        self.partitioner,
        reader,
        self._eval_cfg.eval_batch_size,
        max_batches,
      )
      for name, reader in self._readers.items()
    }
    if len(results) > 1:
      results[self._eval_cfg.name] = evaluation.combine(results, self._readers)
    return results

  def finish(
    self,
    stopped: str | None,
    sample_prompts: Sequence[str],
    sampling: generation.SamplingConfig | None,
  ) -> dict[str, float]:
    """Closing evaluation, samples, and where everything is.

    Raises:
      SystemExit: with 128 + signal number, after a signal.
    """
    step = int(self.trainer.train_state.step)
    if self.stop_signal:
      self.checkpointer.wait()
      self.reporter.stopped(step, signal.Signals(self.stop_signal).name)
      raise SystemExit(128 + self.stop_signal)
    self.evaluate(step, final=True)
    if sample_prompts:
      self._sample(step, sample_prompts, sampling or generation.SamplingConfig())
    self.checkpointer.wait()
    self.reporter.finished(step, stopped)
    return self.reporter.last_evaluation

  def _sample(
    self, step: int, prompts: Sequence[str], sampling: generation.SamplingConfig
  ):
    """Continues the prompts; prints them and appends them to samples.jsonl."""
    generator = generation.Generator(
      self.trainer.model, self.partitioner, self.trainer.train_state.params
    )
    continuations = generator.text(prompts, sampling)
    if jax.process_index():
      return
    path = os.path.join(self.checkpointer.directory, 'samples.jsonl')
    with run_dir.writing(path), open(path, 'a') as f:
      for prompt, texts in zip(prompts, continuations, strict=True):
        f.write(json.dumps({'step': step, 'prompt': prompt, 'samples': texts}) + '\n')
    self.reporter.samples(prompts, continuations)

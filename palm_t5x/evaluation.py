"""Two evaluations: bits per byte of held-out text, and SeqIO metrics of tasks.

`evaluate_loss` predicts every token of a validation store exactly once, so its bits per
byte are comparable between vocabularies. `TaskEvaluator` hands SeqIO's Evaluator the
two functions it wants, `predict_fn` and `score_fn`, and keeps clear of its two crashes
(ragged predictions; a log directory that does not exist).
"""

import concurrent.futures
import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from palm_t5x import processes, utils
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.corpus.reader import EvalReader
from palm_t5x.errors import Failure, disk_problem
from palm_t5x.metrics import sum_metrics

logger = logging.getLogger(__name__)


def pad_rows(batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
  """Fills a short last batch with rows of zeros, whose loss weights are zero too."""

  def pad(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])

  return {k: pad(v) if len(v) < size else v for k, v in batch.items()}


def evaluate_loss(
  eval_step: Callable[[Mapping[str, jax.Array]], Any],
  partitioner: Any,
  reader: EvalReader,
  batch_size: int,
  max_batches: int | None = None,
) -> dict[str, float]:
  """Loss of one validation store.

  Args:
    eval_step: batch -> {name: Ratio}.
    partitioner: places the batches.
    reader: sequential rows that cover every token once.
    batch_size: sequences per batch.
    max_batches: stop after so many; None reads everything.

  Returns:
    {'loss' (nats per token, cross entropy), 'accuracy', 'bits_per_byte', 'tokens',
    'bytes'}. If `max_batches` cut the text short, bytes are those of the whole store in
    proportion to the tokens read.
  """
  total = None
  for step in range(reader.num_batches(batch_size, max_batches)):
    first = step * batch_size  # each process reads the rows of its own devices
    batch = partitioner.shard_batch(
      batch_size, lambda wanted, first=first: reader.examples(first + wanted)
    )
    part = eval_step(batch)
    total = part if total is None else sum_metrics(total, part)
  total = jax.device_get(total)
  nats, tokens = float(total['cross_ent_loss'].total), float(total['loss'].weight)
  num_bytes = reader.num_bytes * tokens / reader.num_tokens
  return {
    'loss': nats / tokens,
    'accuracy': float(total['accuracy'].value()),
    'bits_per_byte': nats / math.log(2) / num_bytes,
    'tokens': tokens,
    'bytes': num_bytes,
  }


def combine(
  results: Mapping[str, Mapping[str, float]], readers: Mapping[str, EvalReader]
) -> dict[str, float]:
  """All stores as one text: each counts by its whole length, however much was read.

  With every store read to its end these are total nats over total tokens and bytes.
  """
  tokens = sum(readers[name].num_tokens for name in results)
  num_bytes = sum(readers[name].num_bytes for name in results)
  mean = lambda key: (
    sum(r[key] * readers[name].num_tokens for name, r in results.items()) / tokens
  )
  return {
    'loss': mean('loss'),
    'accuracy': mean('accuracy'),
    'bits_per_byte': mean('loss') * tokens / math.log(2) / num_bytes,
    'tokens': sum(r['tokens'] for r in results.values()),
    'bytes': sum(r['bytes'] for r in results.values()),
  }


class _AtOnce:
  """An executor without threads, for SeqIO's Evaluator; its results are waited for.

  The Evaluator joins its executor's thread when it is garbage. A collection that runs
  while another thread is being started holds a lock which that join needs (Python
  3.11): the process then never ends. Seen once, in the middle of a checkpoint.
  """

  def submit(self, function: Callable[[], Any]) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    try:
      future.set_result(function())
    except Exception as e:
      future.set_exception(e)
    return future

  def shutdown(self, wait: bool = True) -> None:
    del wait


class TaskEvaluator:
  """Runs SeqIO metrics of a task or mixture with a model's predict and score.

  Attributes:
    names: tasks that have metrics.
  """

  def __init__(
    self,
    cfg: utils.DatasetConfig,
    model: Any,
    partitioner: Any,
    param_shardings: Any,
    evaluator_cls: Callable[..., Any] | None,
    log_dir: str | None,
  ):
    self._cfg, self._partitioner, self._log_dir = cfg, partitioner, log_dir
    vocabulary_lib.use(model.output_vocabulary)
    provider = utils.get_mixture_or_task(cfg.mixture_or_task_name)
    if log_dir:
      for task in getattr(provider, 'tasks', [provider]):
        os.makedirs(os.path.join(log_dir, task.name), exist_ok=True)
    converter = model.FEATURE_CONVERTER_CLS(
      pack=False, apply_length_check=False, bos_id=1
    )
    self._evaluator = (evaluator_cls or _default_evaluator())(
      mixture_or_task_name=cfg.name,
      feature_converter=converter,
      eval_split=cfg.split,
      use_cached=utils.uses_cache(cfg),
      seed=cfg.seed if cfg.seed is not None else 42,
      sequence_length=cfg.task_feature_lengths,
      log_dir=log_dir,
      use_memory_cache=cfg.use_memory_cache,
    )
    self._evaluator._metrics_executor = _AtOnce()
    self.names = [t.name for t in self._evaluator.eval_tasks]
    if not self.names:
      logger.warning(
        'no task of %s has both metrics and a split %r: no metrics are computed.',
        cfg.name,
        cfg.split,
      )
    data = partitioner.data_sharding
    self._predict = partitioner.partition(
      lambda params, batch, rng: model.predict_batch(params, batch, rng),
      in_shardings=(param_shardings, data, None),
      out_shardings=partitioner.sharding(()),
    )
    self._score = partitioner.partition(
      lambda params, batch, rng: model.score_batch(params, batch),
      in_shardings=(param_shardings, data, None),
      out_shardings=partitioner.sharding(()),
    )

  def _over_dataset(self, step_fn: Callable, params: Any) -> Callable:
    """A SeqIO predict_fn or score_fn: dataset of (index, example) -> [(index, out)]."""
    batch_size = self._cfg.eval_batch_size
    rng = jax.random.key(self._cfg.seed or 0)

    def run(dataset) -> list[tuple[int, Any]]:
      results = []
      for indices, batch in dataset.batch(batch_size).as_numpy_iterator():
        rows = pad_rows(numeric(batch), batch_size)
        placed = self._partitioner.shard_batch(
          batch_size, lambda wanted, rows=rows: {k: v[wanted] for k, v in rows.items()}
        )
        out = np.asarray(step_fn(params, placed, jax.random.fold_in(rng, indices[0])))
        results += [(int(i), out[n].tolist()) for n, i in enumerate(indices)]
      return results

    return run

  def evaluate(self, params: Any, step: int) -> dict[str, dict[str, float]]:
    """Metrics of every task, by task name; process 0 computes them for all."""
    if not self.names:
      return {}
    future, _ = self._evaluator.evaluate(
      compute_metrics=jax.process_index() == 0,
      step=step,
      predict_fn=self._over_dataset(self._predict, params),
      score_fn=self._over_dataset(self._score, params),
    )
    return processes.decide(lambda: self._metrics(future))

  def _metrics(self, future: Any) -> dict[str, dict[str, float]]:
    try:
      metrics = future.result() or {}
    except Exception as e:  # a logger's disk, or a bug in a task's metric
      problem = disk_problem(e)
      if problem is None:
        raise
      raise Failure(
        f'the results of {", ".join(self.names)} could not be written under '
        f'{self._log_dir}: {problem}. Make room or name another folder, then run the '
        'same command again.'
      ) from e
    return {
      task: {name: float(getattr(v, 'value', v)) for name, v in values.items()}
      for task, values in metrics.items()
    }


def _default_evaluator() -> Callable[..., Any]:
  """SeqIO's Evaluator, writing one JSON line per example."""
  import seqio

  return functools.partial(seqio.Evaluator, logger_cls=[seqio.JSONLogger])


def numeric(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Text features that pass through a converter cannot go to a device."""
  return {k: v for k, v in batch.items() if v.dtype.kind in 'biuf'}

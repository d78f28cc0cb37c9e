"""`t5x eval`: a checkpoint's metrics on a task or mixture.

Tasks with SeqIO metrics are predicted and scored through SeqIO's Evaluator; tasks
without any (plain text) get their loss and bits per byte, every token counted once.
"""

import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from palm_t5x import (
  checkpoints,
  datasets,
  evaluation,
  gin_utils,
  processes,
  run_dir,
  utils,
)
from palm_t5x.errors import Failure, UserError
from palm_t5x.reporting import print_table
from palm_t5x.restored import Restored, restore_params

logger = logging.getLogger(__name__)


def evaluate(
  *,
  model: Any,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: Any,
  output_dir: str,
  inference_evaluator_cls: Callable[..., Any] | None = None,
  training_evaluator_cls: Any = None,
  summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
  fallback_init_rng: int | None = None,
  cache_dir: str = '~/.cache/palm_t5x',
  eval_steps: int | None = None,
) -> dict[str, dict[str, float]]:
  """Evaluates one checkpoint (T5X's evaluate), or all of a run with mode='all'.

  Args:
    model: a models.BaseModel.
    dataset_cfg: what to evaluate on.
    restore_checkpoint_cfg: the checkpoint, or a run directory (its newest).
    partitioner: the mesh and its rules.
    output_dir: results go to `<output_dir>/inference_eval` (T5X's place), or straight
      here if this folder has that name.
    inference_evaluator_cls: makes a seqio.Evaluator.
    training_evaluator_cls: accepted for T5X: the loss of plain text needs no trainer.
    summarize_config_fn: writes config.gin.
    fallback_init_rng: accepted for T5X; a checkpoint must exist.
    cache_dir: token stores of plain-text tasks.
    eval_steps: batches of plain text to read; None reads everything.

  Returns:
    {task: {metric: value}} of the (last) checkpoint.

  Raises:
    UserError: for a missing checkpoint, task or vocabulary.
  """
  del training_evaluator_cls, fallback_init_rng
  partitioner.check_batch(dataset_cfg.eval_batch_size, name='EVAL_BATCH_SIZE')
  utils.check_split(dataset_cfg)
  folders = _folders(restore_checkpoint_cfg)
  if pathlib.PurePath(output_dir).name != 'inference_eval':
    output_dir = os.path.join(output_dir, 'inference_eval')
  output_dir = run_dir.prepare(output_dir, 'EVAL_OUTPUT_DIR')
  results: dict[str, dict[str, float]] = {}
  for folder in folders:
    one = restore_params(model, partitioner, restore_checkpoint_cfg, folder)
    if folder == folders[0]:
      utils.verify_matching_vocabs(dataset_cfg, model)
    results = _losses(model, dataset_cfg, partitioner, one, cache_dir, eval_steps)
    results |= _task_metrics(
      model, dataset_cfg, partitioner, one, inference_evaluator_cls, output_dir
    )
    if folder == folders[0]:
      summarize_config_fn(output_dir, None, one.step)
    if jax.process_index() == 0:
      _write(output_dir, one, results)
  return results


def _folders(cfg: utils.RestoreCheckpointConfig) -> list[pathlib.Path | None]:
  """The checkpoints to evaluate; [None] for the one that cfg.path names.

  Raises:
    UserError: if all of a run were asked for and there are none.
    Failure: if all of them are damaged; a few are reported and passed over.
  """
  if cfg.mode != 'all':
    return [None]
  folder = pathlib.Path(os.path.abspath(os.path.expanduser(cfg.single_path or '')))
  steps = processes.decide(lambda: checkpoints.steps_in(folder))
  if not steps:
    raise UserError(
      f'no checkpoints in {folder}, whose every one was to be evaluated '
      "(RestoreCheckpointConfig.mode = 'all'): name a run's folder."
    )
  whole = []
  for path in (folder / f'checkpoint_{step}' for step in steps):
    problem = processes.decide(lambda path=path: checkpoints.damage(path))
    if problem:
      logger.warning('checkpoint %s is damaged: %s; passed over.', path, problem)
    else:
      whole.append(path)
  if not whole:
    raise Failure(f'all {len(steps)} checkpoints in {folder} are damaged.')
  return whole


def _losses(
  model: Any,
  cfg: utils.DatasetConfig,
  partitioner: Any,
  one: Restored,
  cache_dir,
  steps,
) -> dict[str, dict[str, float]]:
  """Loss and bits per byte of the tasks that have no metrics of their own."""
  plain = [task for task in utils.check_split(cfg) if not task.metric_objs]
  if not plain:
    return {}
  eval_step = partitioner.partition(
    lambda params, batch: model.eval_fn(params, batch)[1],
    in_shardings=(one.shardings, partitioner.data_sharding),
  )
  results, all_readers = {}, {}
  for task in plain:
    part = utils.DatasetConfig(
      task, cfg.task_feature_lengths, cfg.split, cfg.eval_batch_size
    )
    readers = datasets.eval_readers(part, model.output_vocabulary, cache_dir, 0)
    all_readers |= readers
    for name, reader in readers.items():
      results[name] = evaluation.evaluate_loss(
        lambda batch: eval_step(one.params, batch),
        partitioner,
        reader,
        cfg.eval_batch_size,
        steps,
      )
  if len(results) > 1:
    results[cfg.name] = evaluation.combine(results, all_readers)
  return results


def _task_metrics(
  model: Any, cfg: utils.DatasetConfig, partitioner: Any, one: Restored, cls, output_dir
) -> dict[str, dict[str, float]]:
  """SeqIO metrics of the tasks that have some."""
  if not any(task.metric_objs for task in utils.check_split(cfg)):
    return {}
  evaluator = evaluation.TaskEvaluator(
    cfg,
    model,
    partitioner,
    one.shardings,
    cls,
    output_dir,
  )
  return evaluator.evaluate(one.params, one.step)


def _write(output_dir: str, one: Restored, results: dict[str, dict[str, float]]):
  """Prints the table and appends one line per task to results.jsonl."""
  path = pathlib.Path(output_dir) / 'results.jsonl'
  with run_dir.writing(path), path.open('a') as f:
    for task, values in results.items():
      line = {'task': task, 'step': one.step, 'checkpoint': one.path, **values}
      f.write(json.dumps(line) + '\n')
  print_table(f'step {one.step} of {one.path}', results)
  print(f'written to {path}')

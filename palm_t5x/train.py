"""`t5x train`: from a configuration to a trained model.

`train` reads like the recipe it is: data, state, trainer, hooks, loop, closing report.
What happens between steps lives in `hooks`, what a step is in `trainer`.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from palm_t5x import (
  checkpoints,
  datasets,
  generation,
  gin_check,
  gin_utils,
  hooks,
  profiling,
  provenance,
  rewind,
  run_dir,
  timeline,
  utils,
)
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.corpus.sampling import parse_ranges
from palm_t5x.errors import UserError
from palm_t5x.reporting import Reporter
from palm_t5x.restored import VOCABULARY_COPY, prefer_copy
from palm_t5x.spikes import LossSpikeRecovery
from palm_t5x.train_state import TrainState, TrainStateInitializer
from palm_t5x.training_run import TrainingRun

logger = logging.getLogger(__name__)


def train(
  *,
  model: Any,
  train_dataset_cfg: utils.DatasetConfig,
  train_eval_dataset_cfg: utils.DatasetConfig | None,
  infer_eval_dataset_cfg: utils.DatasetConfig | None,
  checkpoint_cfg: utils.CheckpointConfig,
  partitioner: Any,
  trainer_cls: Callable[..., Any],
  model_dir: str,
  total_steps: int,
  eval_steps: int | None,
  eval_period: int | None,
  relative_steps: int | None = None,
  stats_period: int | None = None,
  random_seed: int | None = 0,
  use_hardware_rng: bool = False,
  summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
  inference_evaluator_cls: Callable[..., Any] | None = None,
  actions: Mapping[str, Sequence[Any]] | None = None,
  run_eval_before_training: bool = False,
  gc_period: int = 0,
  cache_dir: str = '~/.cache/palm_t5x',
  final_eval_steps: int | None = None,
  sample_prompts: Sequence[str] = (),
  sampling: generation.SamplingConfig | None = None,
  loss_spike_recovery: LossSpikeRecovery | None = None,
  skip_batches: Sequence[Any] = (),
  profile_steps: int | Sequence[int] | None = None,
) -> dict[str, float]:
  """Trains, resuming from the newest checkpoint in `model_dir` (T5X's train).

  Args:
    model: a models.BaseModel.
    train_dataset_cfg: training data.
    train_eval_dataset_cfg: held-out text whose loss is measured; None for none.
    infer_eval_dataset_cfg: task whose SeqIO metrics are measured; None for none.
    checkpoint_cfg: what to restore and when to save.
    partitioner: the mesh and its rules.
    trainer_cls: makes the Trainer.
    model_dir: where everything is written; made if missing.
    total_steps: updates after which the run is done, earlier ones counted.
    eval_steps: batches per evaluation during training; None or 0 reads everything.
    eval_period: steps between evaluations; None for none during training.
    relative_steps: if set, so many steps more than the restored checkpoint has.
    stats_period: steps between progress lines; by default a hundredth of the run.
    random_seed: of initialisation, dropout and data order; None means 0.
    use_hardware_rng: faster random bits on TPUs, reproducible on one sharding only.
    summarize_config_fn: (model_dir, None, step) -> None, writes config.gin.
    inference_evaluator_cls: makes a seqio.Evaluator; None: SeqIO's, logging to files.
    actions: {'train' | 'train_eval' | 'infer_eval': [BaseAction, ...]}.
    run_eval_before_training: evaluate the initial parameters too.
    gc_period: accepted for T5X; Python's collector needs no help here.
    cache_dir: vocabularies and token stores.
    final_eval_steps: batches of the closing evaluation; None reads everything.
    sample_prompts: continued by the trained model at the end.
    sampling: how.
    loss_spike_recovery: goes back and skips data when the loss spikes; None does not.
    skip_batches: 'a:b' texts, half-open ranges of batch numbers of the unskipped run;
      kept in checkpoints from then on.
    profile_steps: which steps to write a profile of; see profiling.ProfileHook.

  Returns:
    The closing evaluation's overall metrics ({} without one).

  Raises:
    UserError: for anything that a change of configuration mends.
    Failure: if data or disk fail; earlier checkpoints stay as they are.
  """
  seed = _seed(random_seed, use_hardware_rng)
  skip_batches = parse_ranges(skip_batches)
  check_numbers(total_steps, relative_steps, eval_period, stats_period, eval_steps)
  profiling.check(profile_steps)
  cfgs = (train_dataset_cfg, train_eval_dataset_cfg, infer_eval_dataset_cfg)
  model_dir = prepare_run(model, cfgs, partitioner, model_dir, cache_dir)
  shapes = train_dataset_cfg.input_shapes
  initializer = TrainStateInitializer(model, partitioner, shapes)
  save_cfg = checkpoint_cfg.save or utils.SaveCheckpointConfig()
  recovery = rewind.Recovery(loss_spike_recovery, model_dir)
  checkpointer = checkpoints.Checkpointer.of_run(model_dir, save_cfg, recovery.reach)
  metadata = provenance.describe(model, partitioner, seed)
  restart = functools.partial(
    initial_state, initializer, checkpointer, checkpoint_cfg.restore, metadata
  )
  state, position, stored = restart()
  recovery.restart(stored)
  start = int(state.step)
  total_steps = last_step(start, total_steps, relative_steps, model_dir)
  data = datasets.TrainDataset(
    train_dataset_cfg, model.output_vocabulary, cache_dir, seed, position, skip_batches
  )
  data.check_repeats(total_steps)
  trainer = _trainer(trainer_cls, initializer, state, model_dir, seed, cfgs[0])
  reporter = Reporter(
    model_dir, total_steps, start, data.bytes_per_token, model, data.length, partitioner
  )
  with reporter, checkpointer:
    if reporter.already_finished():
      reporter.finished(start, None)
      return {}
    run = TrainingRun(
      trainer, data, checkpointer, reporter, metadata, actions or {}, recovery, restart
    )
    run.profile(profile_steps, start)
    run.add_loss_evaluation(
      train_eval_dataset_cfg, cache_dir, seed, eval_steps, final_eval_steps
    )
    run.add_task_evaluation(
      infer_eval_dataset_cfg, initializer, inference_evaluator_cls, model_dir
    )
    # Only now, when nothing is left to refuse: a mistake changes no file of the run.
    _describe_run(model, model_dir, initializer, state, summarize_config_fn)
    if run_eval_before_training and start == 0:
      run.evaluate(0)
    stopped = run.through_spikes(
      train_loop, start, total_steps, save_cfg, eval_period, stats_period
    )
    return run.finish(stopped, sample_prompts, sampling)


def _seed(random_seed: int | None, use_hardware_rng: bool) -> int:
  """The seed, once the kind of random bits is set that it is for."""
  if use_hardware_rng:
    jax.config.update('jax_default_prng_impl', 'unsafe_rbg')
  return random_seed or 0


def _trainer(trainer_cls, initializer, state, model_dir, seed, cfg):
  """The Trainer, with T5X's arguments; its microbatches divide every batch."""
  trainer = trainer_cls(
    model=initializer.model,
    train_state=state,
    partitioner=initializer.partitioner,
    eval_names=(),
    summary_dir=model_dir,
    train_state_axes=initializer.axes,
    rng=jax.random.key(seed),
  )
  check_batches(cfg, initializer.partitioner, trainer.num_microbatches)
  return trainer


def check_batches(
  cfg: utils.DatasetConfig, partitioner: Any, num_microbatches: int | None = None
):
  """Refuses a schedule of which the mesh or the microbatches cannot cut every size."""
  for size in cfg.batch_sizes:
    partitioner.check_batch(size, num_microbatches)


def check_numbers(
  total_steps: int,
  relative_steps: int | None,
  eval_period: int | None,
  stats_period: int | None,
  eval_steps: int | None,
):
  """Refuses counts of steps that mean nothing.

  Raises:
    UserError: naming the macro.
  """
  for name, value, least in (
    ('TRAIN_STEPS', total_steps, 1),
    ('TRAIN_STEPS_RELATIVE', relative_steps, 1),
    ('EVAL_PERIOD', eval_period, 0),
    ('STATS_PERIOD', stats_period, 0),
    ('EVAL_STEPS', eval_steps, 0),
  ):
    if value is not None and value < least:
      raise UserError(f'{name}={value}: it is a number of steps, {least} or more.')


def prepare_run(
  model: Any,
  cfgs: Sequence[utils.DatasetConfig | None],
  partitioner: Any,
  model_dir: str,
  cache_dir: str,
) -> str:
  """Checks what can be checked before any device work; learns a missing vocabulary.

  Args:
    model: a models.BaseModel.
    cfgs: of training, then of the evaluations, None for those that there are not.
    partitioner: the mesh.
    model_dir: the run's folder.
    cache_dir: where a vocabulary is kept.

  Returns:
    The absolute path of the run directory, which exists and can be written.

  Raises:
    UserError: for a batch that the mesh does not divide, an unknown task, an
      unwritable directory, vocabularies or sizes that do not match.
  """
  train_cfg, *eval_cfgs = cfgs = [cfg for cfg in cfgs if cfg]
  check_batches(train_cfg, partitioner)
  for eval_cfg in eval_cfgs:
    partitioner.check_batch(eval_cfg.eval_batch_size, name='EVAL_BATCH_SIZE')
  for cfg in cfgs:
    utils.check_split(cfg)
  model_dir = run_dir.prepare(model_dir)
  vocabulary = model.output_vocabulary
  vocabulary_lib.use(vocabulary)
  prefer_copy(vocabulary, model_dir)
  datasets.learn_vocabulary(vocabulary, cache_dir)
  utils.verify_vocabulary_size(model)
  for cfg in cfgs:
    utils.verify_matching_vocabs(cfg, model)
  return model_dir


def _describe_run(model, model_dir, initializer, state, summarize_config_fn):
  """config.gin, model-info.txt, and the vocabulary, which the run needs for good."""
  run_dir.write_model_info(
    model_dir, state.params, initializer.axes.params, initializer.partitioner
  )
  summarize_config_fn(model_dir, None, int(state.step))
  vocabulary = model.output_vocabulary
  if jax.process_index() == 0 and hasattr(vocabulary, 'save_copy'):
    vocabulary.save_copy(os.path.join(model_dir, VOCABULARY_COPY))


def last_step(
  start: int, total_steps: int, relative_steps: int | None, model_dir: str
) -> int:
  """The step to end at.

  Raises:
    UserError: if the run is past it already.
  """
  total_steps = start + relative_steps if relative_steps else total_steps
  if start > total_steps:
    raise UserError(
      f'TRAIN_STEPS={total_steps}, but the checkpoint in {model_dir} has {start} steps '
      'already: raise TRAIN_STEPS, or name another MODEL_DIR.'
    )
  return total_steps


def train_loop(
  run: TrainingRun,
  start: int,
  stop: int,
  save_cfg: utils.SaveCheckpointConfig,
  eval_period: int | None,
  stats_period: int | None,
) -> str | None:
  """Updates `start` ... `stop`, with hooks between them.

  Returns:
    Why the run ended early, or None if it reached `stop`.
  """
  if start == stop:
    return None
  signals = run.signals
  run.reporter.say(f'Compiling the train step, then steps {start + 1:,} to {stop:,}.')
  stats = hooks.StatsHook(stats_period or max(1, stop // 100), stop, run.write_stats)
  between_steps = [
    stats,
    run.recovery.hook(lambda step: step == stop or save_cfg.due(step)),
    hooks.compile_ahead(run.trainer, lambda step: run.data.next_size(step - 1)),
    run.profiler,
    hooks.periodically(eval_period, run.evaluate, never_at=stop),
    lambda step, metrics: run.save(step) if save_cfg.due(step) else None,
    signals,
  ]
  with signals.installed(), run.data.batches(run.partitioner, start) as batches:
    for step, batch in zip(range(start + 1, stop + 1), batches):  # noqa: B905
      metrics = run.trainer.train(batch)
      run.reporter.tick(step)
      reasons = [hook(step, metrics) for hook in between_steps]
      reason = next((r for r in reasons if r), None)
      if reason:
        stats.flush(step)
        break
  run.save(step)
  run.stop_signal = signals.received
  return reason


def initial_state(
  initializer: TrainStateInitializer,
  checkpointer: checkpoints.Checkpointer,
  restore: utils.RestoreCheckpointConfig | None,
  metadata: Mapping[str, Any],
  quiet: bool = False,
) -> tuple[TrainState, datasets.Position, Mapping[str, Any]]:
  """The state to start from, where its data stands, and what its checkpoint says.

  In this order (T5X's):
  1. the newest whole checkpoint in MODEL_DIR: an interrupted run goes on;
  2. the checkpoint that Gin names (INITIAL_CHECKPOINT_PATH): fine-tuning starts from
     its parameters, on fresh data;
  3. an initialisation from the seed.

  A run that has gone back (palm_t5x.timeline) starts there, and passes over what it
  skips since.
  """
  vocabulary = initializer.model.output_vocabulary
  checkpointer.clean()
  rewinds = rewind.settle(checkpointer.directory)
  abstract = initializer.abstract()
  newest = checkpointer.restore_newest(abstract)
  if newest is not None:
    state, stored = newest
    provenance.check_vocabulary(stored, vocabulary, checkpointer.directory)
    if not quiet:
      provenance.warn_differences(stored, metadata)
    logger.info('resumed from step %d in %s.', int(state.step), checkpointer.directory)
    position = datasets.Position.from_json(stored['data'])
    more = timeline.skips(rewinds, stored.get('rewinds', 0))
    return state, position.skipping(more), stored
  more = timeline.skips(rewinds, 0)
  path = restore.single_path if restore else None
  if path:
    try:
      folder = checkpoints.find(path)
    except UserError:
      if not restore.fallback_to_scratch:
        raise
      folder = None
    if folder:
      state, position = _from_checkpoint(initializer, folder, restore, vocabulary)
      return state, position.skipping(more), {}
  state = initializer.from_scratch(jax.random.key(metadata['seed']))
  return state, datasets.Position().skipping(more), {}


def _from_checkpoint(
  initializer: TrainStateInitializer, folder, restore, vocabulary
) -> tuple[TrainState, datasets.Position]:
  """Parameters, and unless they are to be reset the optimizer, of another run."""
  abstract = initializer.abstract()
  stored = checkpoints.read_metadata(folder)
  provenance.check_vocabulary(stored, vocabulary, folder)
  provenance.warn_settings(stored, *gin_check.settings(), only='network.')
  if restore.reset_optimizer:
    params = checkpoints.load(folder, {'target': abstract.params})['target']
    fresh = initializer.from_scratch(jax.random.key(0))
    state = TrainState(fresh.step, params, fresh.opt_state)
  else:
    state = TrainState.from_tree(checkpoints.load(folder, abstract.to_tree()))
  kept = 'a fresh optimizer' if restore.reset_optimizer else 'its optimizer state'
  logger.info('started from %s with %s, at step %d.', folder, kept, int(state.step))
  return state, datasets.Position(step=int(state.step))

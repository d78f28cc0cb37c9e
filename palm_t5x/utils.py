"""The configuration objects that Gin files bind, and what turns them into data.

T5X names: DatasetConfig, SaveCheckpointConfig, RestoreCheckpointConfig,
CheckpointConfig, get_dataset, create_learning_rate_scheduler, verify_matching_vocabs,
round_vocab_size_to_multiple. Fields that T5X has and this engine does not need are
dropped at the Gin boundary (palm_t5x.gin_utils), not here.
"""

import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palm_t5x.errors import UserError
from palm_t5x.schedules import create_learning_rate_scheduler

__all__ = ['create_learning_rate_scheduler']

logger = logging.getLogger(__name__)

BatchSize = int | Sequence[tuple[int, int]]


@dataclasses.dataclass
class DatasetConfig:
  """Names the data of one role: training, evaluation or inference.

  Attributes:
    mixture_or_task_name: a name in SeqIO's registry (or a Task / Mixture itself).
    task_feature_lengths: tokens per feature, such as {'inputs': 512, 'targets': 2048};
      a language model reads rows of `targets` tokens. None: the longest example.
    split: SeqIO split.
    batch_size: sequences per step; for training also ((first step, size), ...).
    shuffle: accepted for T5X; training order is always a seeded permutation.
    seed: of the data order; None means the run's RANDOM_SEED.
    use_cached: read SeqIO's own cache where there is one; training reads token stores
      in any case, which are then made from it.
    pack: pack several examples into a row (inputs + targets tasks).
    module: accepted for T5X's MIXTURE_OR_TASK_MODULE: imported for its registrations.
    use_memory_cache: keep an evaluation task's examples in memory.
    trim_output_features: cut features to their lengths.
    allow_repeats: whether training may read a task's text more than once.
  """

  mixture_or_task_name: Any
  task_feature_lengths: Mapping[str, int] | None
  split: str
  batch_size: BatchSize
  shuffle: bool = True
  seed: int | None = None
  use_cached: bool = False
  pack: bool = False
  use_custom_packing_ops: bool = False
  module: str | None = None
  use_memory_cache: bool = True
  trim_output_features: bool = True
  allow_repeats: bool = True

  def __post_init__(self):
    if self.module:
      _import(self.module)
    for size in self.batch_sizes:
      if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(
          f'BATCH_SIZE={self.batch_size!r}: a batch size is a whole number of '
          'sequences, 1 or more, or ((first step, size), ...).'
        )
    lengths = self.task_feature_lengths
    if lengths is not None and not _are_lengths(lengths):
      raise UserError(
        f'TASK_FEATURE_LENGTHS={lengths!r}: it maps features to whole numbers of '
        "tokens, 1 or more, such as {'inputs': 512, 'targets': 2048}."
      )

  @property
  def batch_sizes(self) -> list[int]:
    """Every size of the schedule, in order."""
    if isinstance(self.batch_size, (tuple, list)):
      return [size for _, size in self.batch_size]
    return [self.batch_size]

  @property
  def eval_batch_size(self) -> int:
    """The one size of an evaluation: a schedule's largest (T5X shares BATCH_SIZE)."""
    return max(self.batch_sizes)

  @property
  def name(self) -> str:
    """The mixture's or task's name."""
    return getattr(self.mixture_or_task_name, 'name', self.mixture_or_task_name)

  @property
  def length(self) -> int:
    """Tokens in a training row.

    Raises:
      UserError: if the lengths do not say.
    """
    lengths = self.task_feature_lengths or {}
    if 'targets' not in lengths:
      raise UserError(
        f'TASK_FEATURE_LENGTHS={dict(lengths)} has no "targets": bind for example '
        '{"inputs": 512, "targets": 2048}.'
      )
    return int(lengths['targets'])

  @property
  def input_shapes(self) -> dict[str, tuple[int, int]]:
    """Of a training batch, for a model that initialises by them."""
    return {'decoder_input_tokens': (self.batch_sizes[0], self.length)}

  @property
  def inputs_and_targets(self) -> tuple[int, int]:
    """Tokens kept of an example's inputs and of its targets; a row holds both.

    Raises:
      UserError: if the lengths do not say.
    """
    targets, lengths = self.length, self.task_feature_lengths or {}
    if 'inputs' not in lengths:
      raise UserError(
        f'{self.name} has inputs, but TASK_FEATURE_LENGTHS={dict(lengths)} does not '
        'say how long they are: bind for example {"inputs": 512, "targets": 128}.'
      )
    return int(lengths['inputs']), targets


def _import(module: str):
  """Imports a module for its registrations (MIXTURE_OR_TASK_MODULE).

  Raises:
    UserError: if there is none of that name.
  """
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as e:
    if not module.startswith(e.name or module):
      raise  # it is there, and what it imports is not
    raise UserError(
      f'MIXTURE_OR_TASK_MODULE={module!r}: there is no such module on the Python path '
      f'or in {os.getcwd()}.'
    ) from e


def _are_lengths(value: Any) -> bool:
  """Whether it is a mapping of features to whole numbers above zero, or None."""
  return isinstance(value, Mapping) and all(
    n is None or (isinstance(n, int) and not isinstance(n, bool) and n > 0)
    for n in value.values()
  )


def _check_dtype(owner: str, dtype: str | None):
  """Refuses what no checkpoint is written or restored in, naming what is."""
  if dtype not in (None, 'float32', 'bfloat16', 'float16'):
    raise UserError(
      f"{owner}.dtype={dtype!r}: it can be 'float32', 'bfloat16' or 'float16'."
    )


@dataclasses.dataclass
class SaveCheckpointConfig:
  """When and how to save (T5X's fields).

  Attributes:
    dtype: of floating point parameters on disk.
    period: steps between saves; None saves at the end alone.
    checkpoint_steps: further steps to save at.
    keep: how many newest to keep; None keeps all.
    save_dataset: accepted for T5X: the data position, one number, is always saved.
    keep_period: checkpoints of steps that it divides are kept for good, beside the
      newest (Orbax's name); None for none.
  """

  dtype: str = 'float32'
  period: int | None = None
  checkpoint_steps: Sequence[int] | None = None
  keep: int | None = None
  save_dataset: bool = False
  keep_period: int | None = None

  def __post_init__(self):
    _check_dtype('SaveCheckpointConfig', self.dtype)
    for name, without in (
      ('period', 'save at the end alone'),
      ('keep', 'keep all'),
      ('keep_period', 'keep the newest alone'),
    ):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(
          f'SaveCheckpointConfig.{name}={value}: it is 1 or more, or None ({without}).'
        )
    if self.keep_period and self.period and self.keep_period % self.period:
      raise UserError(
        f'SaveCheckpointConfig.keep_period={self.keep_period} is no multiple of '
        f'period={self.period}, so that no checkpoint would be of such a step.'
      )

  def due(self, step: int) -> bool:
    """Whether a checkpoint is to be written after `step` updates."""
    periodic = bool(self.period) and step % self.period == 0
    return periodic or step in (self.checkpoint_steps or ())


@dataclasses.dataclass
class RestoreCheckpointConfig:
  """What to restore (T5X's fields).

  Attributes:
    path: a checkpoint or a run directory; '' or () for none.
    mode: 'specific' or 'latest'; in eval also 'all', every checkpoint of a run.
    fallback_to_scratch: start from an initialisation if nothing is there.
    dtype: restore floating point parameters in it; None keeps theirs.
    reset_optimizer: start the optimizer afresh (fine-tuning: PaLM paper §6.1.2).
  """

  path: str | Sequence[str] = ''
  mode: str = 'latest'
  assignment_map: Sequence[tuple[str, str | None]] | None = None
  strict: bool = True
  fallback_to_scratch: bool = False
  dtype: str | None = None
  restore_dataset: bool = False
  reset_optimizer: bool = False

  def __post_init__(self):
    if self.mode not in ('specific', 'latest', 'all'):
      raise UserError(
        f"RestoreCheckpointConfig.mode={self.mode!r}: it can be 'specific', 'latest' "
        "or, in eval, 'all'."
      )
    _check_dtype('RestoreCheckpointConfig', self.dtype)

  @property
  def single_path(self) -> str | None:
    """The one path, or None for none.

    Raises:
      UserError: if several are given.
    """
    paths = [self.path] if isinstance(self.path, str) else list(self.path or ())
    if len(paths) > 1:
      raise UserError(f'one checkpoint can be restored, but {paths} are named.')
    return os.fspath(paths[0]) if paths and paths[0] else None


@dataclasses.dataclass
class CheckpointConfig:
  """Saving and restoring of a run (T5X's fields)."""

  save: SaveCheckpointConfig | None = None
  restore: RestoreCheckpointConfig | None = None


def get_mixture_or_task(name: Any) -> Any:
  """The registered mixture or task; UserError with near names if there is none."""
  from palm_t5x.corpus import prepare  # here: it imports seqio, which takes seconds

  return prepare.mixture_or_task(name)


def check_split(cfg: DatasetConfig) -> list[Any]:
  """The tasks of cfg's mixture that have its split.

  Raises:
    UserError: if none has, naming the splits there are; or for an unknown mixture.
  """
  from palm_t5x.corpus import prepare

  get_mixture_or_task(cfg.mixture_or_task_name)
  return [t for t, _ in prepare.tasks_and_weights(cfg.mixture_or_task_name, cfg.split)]


_without_cache: set[str] = set()  # tasks that the user has been told about


def uses_cache(cfg: DatasetConfig) -> bool:
  """Whether SeqIO's cache is read: USE_CACHED_TASKS is set and there is one.

  T5X sets it by default and fails where there is none; here that is said once.
  """
  if not cfg.use_cached:
    return False
  missing = [task.name for task in check_split(cfg) if not task.cache_dir]
  new = [name for name in missing if name not in _without_cache]
  if new:
    _without_cache.update(new)
    logger.info(
      'USE_CACHED_TASKS=True, but SeqIO has no cache of %s: read from the source, and '
      'from token stores in training.',
      ', '.join(new),
    )
  return not missing


def verify_matching_vocabs(cfg: DatasetConfig, model: Any):
  """Checks that data and model speak the same vocabulary (T5X's check, always on).

  Raises:
    UserError: if they do not, naming both.
  """
  import seqio

  provider = get_mixture_or_task(cfg.mixture_or_task_name)
  for name, feature in provider.output_features.items():
    vocabulary = feature.vocabulary
    if isinstance(vocabulary, seqio.PassThroughVocabulary):
      continue
    if name in ('inputs', 'targets') and vocabulary != model.output_vocabulary:
      raise UserError(
        f'{provider.name!r} was written for another vocabulary than the model: '
        f'{describe_vocabulary(vocabulary)} there, '
        f'{describe_vocabulary(model.output_vocabulary)} in the model.'
      )


def verify_vocabulary_size(model: Any):
  """Checks that the embedding has a row for each id, and not many more than that.

  Raises:
    UserError: naming both sizes and the binding that mends it.
  """
  config = getattr(model, 'config', None)
  if config is None:
    return
  size, real = model.output_vocabulary.vocab_size, config.real_tokens
  # T5X files round vocab_size up and name no num_real_tokens: padding, not a mistake.
  padded = config.num_real_tokens is None and size <= real < size + 1024
  if size == real or padded:
    return
  raise UserError(
    f'the vocabulary has {size} ids ({describe_vocabulary(model.output_vocabulary)}), '
    f'but the model is made for {real}: bind network.TransformerConfig.vocab_size = '
    f'{-(-size // 128) * 128} and num_real_tokens = {size}, or use the vocabulary it '
    'was made for.'
  )


def describe_vocabulary(vocabulary: Any) -> str:
  """A vocabulary in words a user can act on."""
  path = getattr(vocabulary, 'path', None) or getattr(
    vocabulary, 'sentencepiece_model_file', None
  )
  where = f' at {path}' if path else ''
  return f'{type(vocabulary).__name__} of {vocabulary.vocab_size} ids{where}'


def round_vocab_size_to_multiple(vocabulary: Any, divisor: int = 128) -> int:
  """Rounds a vocabulary's size up, so that a mesh divides it (T5X's helper)."""
  size = vocabulary.vocab_size
  return (size + divisor - 1) // divisor * divisor


def get_dataset(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., Any],
  num_epochs: int | None = None,
):
  """SeqIO's own pipeline: a tf.data.Dataset of unbatched examples (T5X's name).

  Evaluation of tasks with metrics uses it; training reads token stores instead.
  """
  import seqio

  provider = get_mixture_or_task(cfg.mixture_or_task_name)
  return seqio.get_dataset(
    provider,
    task_feature_lengths=cfg.task_feature_lengths,
    feature_converter=feature_converter_cls(pack=cfg.pack, apply_length_check=False),
    dataset_split=cfg.split,
    shuffle=cfg.shuffle,
    num_epochs=num_epochs,
    shard_info=seqio.ShardInfo(shard_id, num_shards),
    use_cached=uses_cache(cfg),
    seed=cfg.seed,
    batch_size=None,
  )

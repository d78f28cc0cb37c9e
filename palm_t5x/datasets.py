"""From a DatasetConfig to batches: what the train loop and the evaluations read.

A training batch is a pure function of (seed, step): the schedule says which global
examples step s reads, the reader turns example indices into rows of tokens, and each
process reads only the rows of its own devices. No iterator, no shuffle buffer, no state
beyond one number, the next example.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from palm_t5x import processes, utils
from palm_t5x.corpus import learning, plan, prepare, storage
from palm_t5x.corpus.packing import SupervisedEvalReader, SupervisedReader
from palm_t5x.corpus.reader import EvalReader, MixtureReader, Prefetcher
from palm_t5x.corpus.sampling import BatchSchedule
from palm_t5x.corpus.vocabulary import hash_of
from palm_t5x.errors import UserError
from palm_t5x.progress import PrepareProgress

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
  """Where a run stands in its data; saved in every checkpoint.

  Attributes:
    step: the next step.
    examples_read: examples that the steps before it read.
    skips: half-open ranges of example indices that are passed over.
  """

  step: int = 0
  examples_read: int = 0
  skips: tuple[tuple[int, int], ...] = ()

  def skipping(self, more: Sequence[tuple[int, int]]) -> 'Position':
    """The same place, with more ranges to pass over from there."""
    return dataclasses.replace(self, skips=(*self.skips, *more))

  def to_json(self) -> dict[str, Any]:
    """Plain values for a checkpoint's metadata."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> 'Position':
    """Inverse of to_json."""
    skipped = tuple(tuple(s) for s in value.get('skips', ()))
    return cls(value['step'], value['examples_read'], skipped)


class TrainDataset:
  """The training data of a run, addressed by step."""

  def __init__(
    self,
    cfg: utils.DatasetConfig,
    vocabulary: Any,
    cache_dir: str,
    seed: int,
    position: Position | None = None,
    skip_batches: Sequence[tuple[int, int]] = (),
  ):
    """Args: skip_batches: half-open ranges of batch numbers of the unskipped run."""
    seed = seed if cfg.seed is None else cfg.seed
    self.stores = _stores(cfg, vocabulary, cache_dir, seed)
    self.reader = _train_reader(self.stores, cfg, seed)
    self.length = self.reader.length
    self._batch_size, self._skip_batches = cfg.batch_size, tuple(skip_batches)
    self._allow_repeats = cfg.allow_repeats
    self.move_to(position or Position())
    self._say_what_came_too_late()

  def move_to(self, position: Position):
    """Goes on, or back, to where a checkpoint stands."""
    planned = BatchSchedule(self._batch_size).examples_read(position.step)
    # A run resumed with another batch size goes on at the example where it stopped.
    self._schedule = BatchSchedule(
      self._batch_size,
      skips=position.skips,
      skip_batches=self._skip_batches,
      shift=position.examples_read - planned,
      begun=position.step,
    )

  def _say_what_came_too_late(self):
    for missed in self._schedule.missed:
      first, last = self.batch_numbers(*missed)
      logger.warning(
        '--skip_batches: batches %d:%d have been trained on already and are not '
        'skipped; an older checkpoint would be needed.',
        first,
        last,
      )

  @property
  def skips(self) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of example indices that are passed over."""
    return self._schedule.skips

  def examples(self, start: int, stop: int) -> tuple[int, int]:
    """The half-open range of example indices that steps start ... stop-1 read in."""
    return self._schedule.examples_of_steps(start, stop)

  def batch_numbers(self, first: int, last: int) -> tuple[int, int]:
    """The batches of the unskipped run that hold examples first ... last-1."""
    return self._schedule.batch_numbers(first, last)

  def next_size(self, step: int) -> int | None:
    """The batch size that the schedule changes to after `step`, if it does."""
    return self._schedule.next_size(step)

  def check_repeats(self, total_steps: int):
    """Refuses a run of so many steps that would read text twice, unless it may.

    Raises:
      UserError: naming each sub-corpus that is too short; see `plan.check`.
    """
    if not self._allow_repeats:
      weights = {name: weight for name, _, weight in self.stores}
      rows, examples = self.reader.rows_available, self._schedule.offset(total_steps)
      plan.check(plan.shares(weights, rows, self.length, examples))

  @property
  def bytes_per_token(self) -> float:
    """UTF-8 bytes of text per token, averaged with the mixture's weights."""
    total = sum(weight for _, _, weight in self.stores)
    return sum(w / total * s.num_bytes / _targets(s) for _, s, w in self.stores)

  def batch_size(self, step: int) -> int:
    """Sequences in the batch of `step`."""
    return self._schedule.size(step)

  def position(self, step: int) -> Position:
    """The position before `step`, for a checkpoint."""
    schedule = self._schedule
    return Position(step, schedule.examples_read(step), schedule.skips)

  def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The given rows of the batch of `step`."""
    return self.reader.examples(self._schedule.indices(step)[rows])

  def batches(self, partitioner, start: int) -> Iterator[dict[str, jax.Array]]:
    """Global batches of steps start, start+1, ... read ahead by one thread."""

    def load(step: int) -> dict[str, jax.Array]:
      return partitioner.shard_batch(
        self.batch_size(step), lambda rows: self.read(step, rows)
      )

    return Prefetcher(load, start)


def learn_vocabulary(vocabulary: Any, cache_dir: str):
  """Learns the vocabulary where its file is missing; every process has the same then.

  Raises:
    UserError: if there is nothing to learn from, or the processes' files differ.
  """

  def make():
    progress = None if processes.index() else PrepareProgress()
    learning.learn_vocabulary(vocabulary, cache_dir, progress=progress)

  path = str(getattr(vocabulary, 'path', None) or cache_dir)
  if storage.is_remote(path) or storage.is_remote(cache_dir):
    processes.first(make)
  else:
    make()
  processes.agree(
    'vocabulary',
    {'VOCABULARY_PATH, by its contents,': hash_of(vocabulary)},
    'Copy one file to all hosts.',
  )


def eval_readers(
  cfg: utils.DatasetConfig, vocabulary: Any, cache_dir: str, seed: int
) -> dict[str, EvalReader]:
  """One sequential reader per task of a validation mixture."""
  stores = _stores(cfg, vocabulary, cache_dir, seed)
  return {name: _eval_reader(store, cfg) for name, store, _ in stores}


def _stores(
  cfg: utils.DatasetConfig, vocabulary: Any, cache_dir: str, seed: int
) -> list[tuple[str, Any, float]]:
  """(task name, token store, weight) of each task, built where they are missing.

  On hosts with disks of their own each builds its own, on a shared disk the lock lets
  one build, and in a bucket, which has no locks, process 0 does. All must be the same.
  """

  def make():
    return prepare.prepare(
      utils.get_mixture_or_task(cfg.mixture_or_task_name),
      cfg.split,
      vocabulary,
      cache_dir,
      seed=seed,
      use_cached=utils.uses_cache(cfg),
      progress=None if processes.index() else PrepareProgress(),
    )

  stores = processes.first(make) if storage.is_remote(cache_dir) else make()
  held = {name: store.manifest for name, store, _ in stores}
  facts = {
    f'{name}/{cfg.split}': f'{m.num_tokens:,} tokens ({m.checksums["tokens"][:12]})'
    for name, m in held.items()
  }
  processes.agree(
    'text',
    facts,
    'Every host must see the same source files; delete CACHE_DIR/token_stores where it '
    'was made from others.',
  )
  return stores


def _targets(store: Any) -> int:
  """How many tokens of a store are predicted."""
  if not store.manifest.has_inputs:
    return store.num_tokens
  return store.num_tokens - int(store.inputs_lengths().sum())


def _train_reader(stores: Any, cfg: utils.DatasetConfig, seed: int) -> MixtureReader:
  """Rows of running text, or of packed examples where tasks have inputs.

  Raises:
    UserError: for a mixture of both.
  """
  kinds = {bool(store.manifest.has_inputs) for _, store, _ in stores}
  if kinds == {True, False}:
    named = {name: store.manifest.has_inputs for name, store, _ in stores}
    raise UserError(
      f'{cfg.name} mixes tasks with inputs and tasks of plain text ({named}): make two '
      'mixtures, or give every task inputs (they may be empty).'
    )
  if kinds == {True}:
    return SupervisedReader(stores, *cfg.inputs_and_targets, seed, cfg.pack)
  return MixtureReader(stores, cfg.length, seed)


def _eval_reader(store: Any, cfg: utils.DatasetConfig) -> EvalReader:
  if store.manifest.has_inputs:
    return SupervisedEvalReader(store, *cfg.inputs_and_targets, cfg.pack)
  return EvalReader(store, cfg.length)

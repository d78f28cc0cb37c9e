"""Learning a vocabulary from what a mixture, or files, are made of."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator

import numpy as np
import seqio

from palm_t5x import errors
from palm_t5x.corpus import (
  documents,
  jobs,
  prepare,
  sources,
  storage,
  token_store,
  vocabulary_sample,
)
from palm_t5x.corpus import vocabulary as vocabulary_lib

MIN_SAMPLE_BYTES = 4_000_000  # of text to learn a vocabulary from, or
SAMPLE_BYTES_PER_PIECE = 1_000  # this many for each piece, if that is more
_WHOLE = 'all'  # the part that is all of a task's text


def learn_vocabulary(
  vocabulary: seqio.Vocabulary,
  cache_dir: str | None = None,
  *,
  sample_bytes: int | None = None,
  progress=None,
) -> seqio.Vocabulary:
  """Learns the vocabulary's file if it is missing and says what to learn it from.

  From a sample of the training split of `vocabulary.learn_from`, in the mixture's
  proportions and in a fixed order, so that the result is the same every time.

  Args:
    vocabulary: any; only a SentencePieceVocabulary with `learn_from` is ever learned.
    cache_dir: where its file lies if its path is relative and it was given no
      cache_dir of its own.
    sample_bytes: how much text; by default 4 MB, or 1 kB per piece if that is more.
    progress: called as progress(label, done, total) as text is drawn and learned from.

  Returns:
    `vocabulary`, whose file now exists if it could be learned.

  Raises:
    UserError: nothing to learn from, or no `vocab_size`.
  """
  if cache_dir and getattr(vocabulary, 'cache_dir', cache_dir) is None:
    vocabulary.cache_dir = cache_dir
  name = getattr(vocabulary, 'learn_from', None)
  if name is None or vocabulary.exists():
    return vocabulary
  sample = vocabulary_sources(name)
  if not learn(vocabulary, sample, name, sample_bytes, progress=progress):
    raise AssertionError('one shard does the whole job')
  return vocabulary


def vocabulary_sources(name: str) -> list[vocabulary_sample.Source]:
  """What a vocabulary can be learned from: the tasks of a mixture, by weight."""
  return [
    vocabulary_sample.Source(task.name, weight, _text_parts(task))
    for task, weight in prepare.tasks_and_weights(name, 'train')
  ]


def learn(
  vocabulary: vocabulary_lib.SentencePieceVocabulary,
  sample: list[vocabulary_sample.Source],
  note: str,
  sample_bytes: int | None = None,
  *,
  progress=None,
  **how,
) -> bool:
  """Draws text and learns the vocabulary's missing file from it.

  Args:
    vocabulary: it must know its `vocab_size`.
    sample: where to draw from.
    note: what that is called, in the manifest and in messages.
    sample_bytes: see `learn_vocabulary`.
    progress: see `learn_vocabulary`.
    **how: workers, shard_id and num_shards, as in `jobs.run`.

  Returns:
    whether it was learned; False where other shards have yet to draw their text. Of
    shards that find it all drawn one learns, and the others wait for it.

  Raises:
    UserError: there is no text, or no `vocab_size`, or shards without a shared folder.
  """
  if not vocabulary.has_size:
    raise errors.UserError(
      f'To learn {vocabulary.path} from {note}, the vocabulary needs its vocab_size.'
    )
  size = vocabulary.vocab_size
  budget = sample_bytes or max(MIN_SAMPLE_BYTES, SAMPLE_BYTES_PER_PIECE * size)
  shared = how.get('num_shards', 1) > 1
  if shared and storage.is_remote(vocabulary.path):
    raise errors.UserError(
      f'{vocabulary.path} lies in a bucket, and the shards need a folder that they '
      'share for the text they draw: learn it with --num_shards=1, or at a path that '
      'all machines mount.'
    )
  with token_store.only_builder(vocabulary.path, shared), _folder(vocabulary) as folder:
    if vocabulary.exists():
      return True
    job = _job(folder, sample, budget, shared)
    local = any(_is_local(source) for source in sample)
    stages = vocabulary_sample.stages(sample, budget, folder, local)
    how['finished'] = vocabulary.exists
    if not jobs.run(job, stages, progress=progress, **how):
      return False
    if not shared:
      _learn(vocabulary, sample, note, budget, job, progress)
      return True
  # Every shard comes here, when no shard draws or reads any more: the first one learns.
  with token_store.only_builder(vocabulary.path):
    if not vocabulary.exists():
      _learn(vocabulary, sample, note, budget, job, progress)
  return True


def _learn(vocabulary, sample, note: str, budget: int, job: jobs.Job, progress) -> None:
  """Learns from the drawn text, then deletes that; for one process at a time."""
  texts = None
  if storage.exists(job.folder):  # else another shard found no text in it
    texts = vocabulary_sample.texts(sample, budget, job.folder)
    texts = vocabulary_sample.first(texts)
  if texts is None:
    job.delete()  # so that it is drawn again when there is some
    raise errors.UserError(
      f"'{note}' has no text in its split 'train': there is nothing to learn a "
      'vocabulary from. Check where it reads its files from.'
    )
  if progress:
    progress(f'learning {vocabulary.vocab_size:,} pieces from {note}', 0, 0)
  vocabulary_lib.train(
    texts,
    vocabulary.path,
    vocabulary.vocab_size,
    model_type=vocabulary.model_type,
    character_coverage=vocabulary.character_coverage,
    note=note,
  )
  job.delete()


def _is_local(source: vocabulary_sample.Source) -> bool:
  """Whether its documents come from a task's own Python function."""
  return any(part.name == _WHOLE for part in source.parts)


def _job(folder: str, sample, budget: int, shared: bool) -> jobs.Job:
  """The folder of the drawing; begun anew where it was begun for something else."""
  settings = {
    'sample_bytes': budget,
    'sources': [
      [s.name, s.weight, [(part.name, part.num_bytes) for part in s.parts]]
      for s in sample
    ],
  }
  if not shared:
    # Whether a function's texts are still the same cannot be told.
    if any(_is_local(source) for source in sample):
      jobs.Job(folder).delete()
    try:
      return jobs.Job(folder, settings)
    except errors.UserError:
      jobs.Job(folder).delete()
  return jobs.Job(folder, settings)


@contextlib.contextmanager
def _folder(vocabulary):
  """Where the drawn text is put, kept after a kill so that drawing can go on."""
  path = f'{vocabulary.path}.sample'
  if not storage.is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    yield folder


def _text_parts(task: seqio.Task) -> list[documents.Part]:
  """The training text of a task: its own parts, or all of it as one."""
  parts = getattr(task.source, 'parts', None)
  if sources.is_plain_text(task) and parts is not None and parts('train') is not None:
    return parts('train')
  return [documents.Part(_WHOLE, functools.partial(_texts, task))]


def _texts(task: seqio.Task) -> Iterator[str]:
  if sources.is_plain_text(task):
    yield from task.source.documents('train')
    return
  # Bytes as ids, so that a task's preprocessors run before there is a vocabulary.
  stand_in = seqio.ByteVocabulary()
  for example in prepare.examples(task, 'train', stand_in):
    for key in ('inputs', 'targets'):
      yield stand_in.decode(np.append(example.get(key, []), 1).astype(int).tolist())

"""`t5x vocab`: learns a lossless SentencePiece vocabulary from a sample of text."""

import glob
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from palm_t5x.corpus import jobs, learning, readers, vocabulary_sample
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.errors import UserError
from palm_t5x.progress import PrepareProgress


def vocab(
  *,
  vocabulary: vocabulary_lib.SentencePieceVocabulary,
  sources: str | Sequence[str] | Mapping[str, float],
  sample_bytes: int | None = None,
  workers: int | None = None,
  shard_id: int = 0,
  num_shards: int = 1,
) -> None:
  """Draws text, learns the vocabulary, writes it and its manifest, says what it is.

  An interrupted drawing goes on where it stopped; a vocabulary that is there is kept.

  Args:
    vocabulary: its path, size, model type and character coverage say what to learn.
    sources: a task or mixture (drawn by its weights); or files and folders of text
      (.txt, .jsonl, .gz, .zst, .parquet), one or several, or a mapping of those to
      weights; without weights by their sizes.
    sample_bytes: how much text to learn from; None: 1 kB per piece, 4 MB at least.
    workers: processes that draw text side by side; None: one per core.
    shard_id, num_shards: this process's part of the drawing, over machines that share
      the folder of the vocabulary.

  Raises:
    UserError: nothing to learn from, sources that are not there, or numbers that make
      no sense.
  """
  workers = jobs.default_workers(workers)
  if sample_bytes is not None and not _is_positive(sample_bytes, 1):
    raise UserError(f'SAMPLE_BYTES = {sample_bytes!r}: it is 1 or more bytes, or None.')
  if vocabulary.exists():
    print(f'{vocabulary.path} is there already; delete it to learn it again.')
    _say(vocabulary)
    return
  sample = _sources(sources)
  done = learning.learn(
    vocabulary,
    sample,
    sources if isinstance(sources, str) else ', '.join(sources),
    None if sample_bytes is None else int(sample_bytes),
    progress=PrepareProgress(),
    workers=workers,
    shard_id=shard_id,
    num_shards=num_shards,
  )
  if done:
    _say(vocabulary)
  else:
    print(
      f'Shard {shard_id} of {num_shards} has drawn its text, and others are missing: '
      'run them; the last one learns the vocabulary.'
    )


def _is_registered(name: str) -> bool:
  import seqio

  return name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def _sources(sources: Any) -> list[vocabulary_sample.Source]:
  """See `vocab`."""
  if not sources:
    raise UserError(
      'There is nothing to learn a vocabulary from: pass --gin.SOURCES=... (a mixture '
      'of t5x tasks, or files such as raw/books).'
    )
  if isinstance(sources, str) and _is_registered(sources):
    return learning.vocabulary_sources(sources)
  if isinstance(sources, str):
    sources = [path.strip() for path in sources.split(',')]
  weights = sources if isinstance(sources, Mapping) else dict.fromkeys(sources)
  found = []
  for path, weight in weights.items():
    if not os.path.exists(os.path.expanduser(path)):
      raise UserError(
        f'SOURCES names {path!r}, which is neither a file or folder (seen from '
        f'{os.getcwd()}) nor a task or mixture of `t5x tasks`.'
      )
    if weight is not None and not _is_positive(weight):
      raise UserError(
        f'SOURCES gives {path!r} the weight {weight!r}: weights are numbers above 0; '
        'leave out what nothing is to be drawn from.'
      )
    parts = _parts(path)
    size = max(1, sum(part.num_bytes for part in parts))
    weight = size if weight is None else weight
    found.append(vocabulary_sample.Source(path, weight, parts))
  return found


def _is_positive(value: Any, least: float = 0.0) -> bool:
  """Whether it is a finite number above 0, and not below `least`."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  return value > 0 and value >= least and math.isfinite(value)


def _parts(path: str) -> list:
  """The documents of a folder or of one file."""
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.isfile(path):
    folder, name = os.path.split(path)
    return readers.Files(pattern=glob.escape(name)).parts(folder)
  return readers.Files().parts(path)


def _say(vocabulary: vocabulary_lib.SentencePieceVocabulary) -> None:
  """Where it is, and that it is what the paper asks for."""
  print(f'vocabulary   {vocabulary.path}')
  print(f'pieces       {vocabulary.codec.size:,}')
  print(f'hash         {vocabulary.hash}')
  text = 'In 2022, 780,000,000,000 tokens.\n\tx\u2581 = 1.5e-3\r\n\u00a0\U0001f9ea'
  pieces = [vocabulary.codec.piece(i) for i in vocabulary.encode(text)]
  print(f'for example  {" ".join(pieces)!r}')

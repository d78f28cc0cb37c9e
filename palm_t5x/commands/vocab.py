"""`t5x vocab`: learns a lossless SentencePiece vocabulary from a sample of text."""

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any

from palm_t5x.corpus import learning, readers, vocabulary_sample
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
    UserError: nothing to learn from, or sources that are not there.
  """
  if vocabulary.exists():
    print(f'{vocabulary.path} is there already; delete it to learn it again.')
    _say(vocabulary)
    return
  sample = _sources(sources)
  done = learning.learn(
    vocabulary,
    sample,
    sources if isinstance(sources, str) else ', '.join(sources),
    sample_bytes,
    progress=PrepareProgress(),
    workers=workers or os.cpu_count() or 1,
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
    parts = _parts(path)
    size = sum(part.num_bytes for part in parts)
    found.append(vocabulary_sample.Source(path, weight or size, parts))
  return found


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

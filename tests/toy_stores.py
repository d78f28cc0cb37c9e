"""Small token stores of a toy vocabulary, for tests; imports no TensorFlow.

Worker processes of the tests import this module, and so must find it quick to import.
"""

import dataclasses
import functools
import os
import pathlib
import time

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import store_builder, token_store
from palm_t5x.corpus.documents import Document, Part


class Bytes:
  """A vocabulary without SeqIO: id = byte + 3."""

  hash = 'bytes'
  vocab_size = 259
  eos_id = 1

  def encode_batch(self, texts):
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + 3 for t in texts]


def ids(text):
  return [b + 3 for b in text.encode()] + [1]


TEXTS = [f'document {i}: ' + 'é€ words ' * (i % 7) for i in range(60)]


def files(folder):
  folder = pathlib.Path(folder)
  return {
    str(f.relative_to(folder)): f.read_bytes()
    for f in sorted(folder.rglob('*'))
    if f.is_file()
  }


LAYOUT = token_store.Layout(tokens=256, chunk=32, offsets=16, hashes=8)
LAYOUT = dataclasses.replace(LAYOUT, inputs_lengths=16)
LIMITS = store_builder.Limits(run_bytes=1000, unit_bytes=2000, unit_files=2)


def read(numbers):
  """The documents of a part; some are empty, one is there twice."""
  time.sleep(float(os.environ.get('TOY_SECONDS', '0')))
  for i in numbers:
    yield TEXTS[i] if i % 2 else Document(str(i), TEXTS[i])
    if i % 10 == 0:
      yield ''
  if 7 in numbers:
    yield TEXTS[7]


def parts(*ranges):
  return [
    Part(f'part{i}', functools.partial(read, numbers), 1000)
    for i, numbers in enumerate(ranges)
  ]


THREE = parts(range(9), range(9, 13), range(13, len(TEXTS)))


def build(path, documents=THREE, **kwargs):
  options = {'task': 'toy', 'split': 'train', 'layout': LAYOUT, 'limits': LIMITS}
  vocabulary = kwargs.pop('vocabulary', Bytes())
  return store_builder.build(str(path), documents, vocabulary, **options | kwargs)


def build_shard(path, shard_id, num_shards):
  """`build` of one shard."""
  build(path, shard_id=shard_id, num_shards=num_shards)


def failing():
  """A part that cannot be read."""
  raise errors.Failure('line 3 of x.jsonl is no document')

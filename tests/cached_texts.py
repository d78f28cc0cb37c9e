"""Parts for tests of `t5x cache`, in a module that worker processes import quickly."""

import functools
import pathlib

from palm_t5x.corpus.documents import Part


def read(path):
  """The documents of a file of the fixture corpus, and an empty one."""
  yield from pathlib.Path(path).read_bytes().decode().split('\n%%\n')
  yield ''


def parts(folder, split):
  """One part for each file; validation is the first file alone."""
  paths = sorted(pathlib.Path(folder).glob('*.txt'))
  chosen = paths[:1] if split == 'validation' else paths[1:]
  return [
    Part(path.stem, functools.partial(read, str(path)), path.stat().st_size)
    for path in chosen
  ]

"""Folders of this run that tasks read from.

Tasks are registered when a Gin file imports them, before it is known where their data
lie; they ask here when they are read. `main` sets both from the macros DATA_DIR and
CORPUS_DIR (and --data_dir).
"""

import os

from palm_t5x.errors import UserError

_places: dict[str, str | None] = {'data_dir': None, 'corpus_dir': None}


def use(data_dir: str | None = None, corpus_dir: str | None = None) -> None:
  """Sets the folders; None for one that is not known."""
  _places.update(data_dir=data_dir, corpus_dir=corpus_dir)


def _absolute(path: str) -> str:
  if '://' in path:  # a bucket: whoever reads it says whether it can
    return path
  return os.path.abspath(os.path.expanduser(os.path.expandvars(path)))


def data_dir() -> str:
  """The folder of datasets in their original formats.

  Raises:
    UserError: none was named.
  """
  path = _places['data_dir']
  if not path:
    raise UserError(
      'This reads a dataset from its original files, and no folder was named: pass '
      '--data_dir=FOLDER.'
    )
  return _absolute(path)


def corpus_dir() -> str:
  """The folder of the sub-corpora that `t5x corpus` has made.

  Raises:
    UserError: none was named (never so in the t5x command, which has a default).
  """
  path = _places['corpus_dir']
  if not path:
    raise UserError(
      'No folder of sub-corpora was named: set CORPUS_DIR, or call palm_t5x.places.use.'
    )
  return _absolute(path)

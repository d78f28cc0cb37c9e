"""TensorFlow comes in quietly and leaves the accelerators alone.

TensorFlow only feeds data here. Its libraries print about CUDA and CPU instructions
before any of its settings takes effect, so stderr is held while they load, and what is
not such a line is passed on. Wherever the import happens, the first thing TensorFlow is
then told is to see no GPU: all of their memory is jax's.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_LIBRARIES = ('tensorflow', 'tensorflow_text')
_NOISE = re.compile(
  rb'^(WARNING: All log messages before absl::InitializeLog'
  rb'|[IWE]\d{4} \d\d:\d\d:|[IWE]0000 |To enable the following instructions'
  rb'|\d{4}-\d\d-\d\d .*: [IWE] )'
)


def install() -> None:
  """Makes later imports of TensorFlow quiet."""
  if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
  """Wraps the loaders of the noisy libraries."""

  def find_spec(self, fullname, path=None, target=None):
    if fullname not in _LIBRARIES:
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
    if spec is not None and spec.loader is not None:
      spec.loader = _Loader(spec.loader)
    return spec


class _Loader(importlib.abc.Loader):
  """Runs the real loader with stderr held, then steps out of the way."""

  def __init__(self, loader):
    self._loader = loader

  def create_module(self, spec):
    return self._loader.create_module(spec)

  def exec_module(self, module):
    module.__spec__.loader = module.__loader__ = self._loader
    with _held_stderr():
      self._loader.exec_module(module)
      if module.__name__ == 'tensorflow':
        sys.modules['tensorflow'].config.set_visible_devices([], 'GPU')


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
  """Holds back what is written to file descriptor 2, and drops the noise."""
  sys.stderr.flush()
  try:
    saved = os.dup(2)
  except OSError:  # There is no stderr to hold.
    yield
    return
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(saved, 2)
      os.close(saved)
      held.seek(0)
      for line in held:
        if not _NOISE.match(line):
          os.write(2, line)

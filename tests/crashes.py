"""Kills without processes: every change to a folder is a moment to die at.

`at(number, folder)` lets a block of code make `number` changes below `folder` (files
opened for writing, renames, removals, new folders), and raises `Killed` instead of the
next one and of every later one, as if the process had ended there. What the code has
written is then what a kill -9 would have left, at each point where it could differ.
"""

import contextlib
import os
import sys

_CHANGES = ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate')


class Killed(BaseException):
  """The process ended here; nothing that handles errors may handle this."""


class _Watch:
  """State of the one audit hook, which Python never lets go of."""

  def __init__(self):
    self.folder = None
    self.left = None
    self.changes = 0

  def __call__(self, event, args):
    if self.folder is None or not self._changes_something(event, args):
      return
    if self.left is not None and self.changes >= self.left:
      raise Killed(f'before change {self.changes}: {event} {args[0]}')
    self.changes += 1

  def _changes_something(self, event, args):
    if event == 'open':
      path, _, flags = args
      if not isinstance(path, str) or not flags & (os.O_WRONLY | os.O_RDWR):
        return False
    elif event not in _CHANGES:
      return False
    path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ''
    # shutil.rmtree names what it removes relative to an open folder.
    return not os.path.isabs(path) or path.startswith(self.folder)


_WATCH = _Watch()
sys.addaudithook(_WATCH)


@contextlib.contextmanager
def at(number, folder):
  """Dies at change `number`, counted from 0; None counts only. Gives the counter."""
  _WATCH.folder, _WATCH.left, _WATCH.changes = str(folder), number, 0
  try:
    yield _WATCH
  finally:
    _WATCH.folder = None


def dies(number, folder, function) -> bool:
  """Calls `function` and says whether it died at change `number`."""
  with at(number, folder):
    try:
      function()
    except Killed:
      return True
  return False

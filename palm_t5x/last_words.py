"""What a process says when jax's coordination service aborts it.

The service ends a process whose peer is lost with LOG(FATAL): no exception, a stack
trace of C++ as the last lines. Here standard error passes through a pipe, which keeps
the end of it and drops that trace, and SIGABRT is handled in the aborting thread: the
last lines are then ours. Nothing can be asked of the service in there, it holds its own
lock; so what it said is read back from standard error.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

_FATAL = b'JAX distributed service detected fatal errors'
_FRAME = re.compile(rb'^(    @ |\*\*\* Check failure stack trace)')
_MARK = b'\0t5x: end of standard error\n'
_KEPT = 16_384  # bytes of standard error that are remembered
_PIPE_BYTES = 1 << 20  # so that a writer never waits for the thread that reads
_HEAD = 'The following tasks are unhealthy (stopped sending heartbeats):'
_LIST = re.compile(r'The following tasks are unhealthy[^:]*:\s*([\d,\s]+)')
_ONE = re.compile(r'Task (\d+) heartbeat timeout')  # what a barrier under way says


class LastWords:
  """Standard error of this process, until `close`.

  Args:
    explain: what the service said -> the last line; called in the aborting thread, and
      the process then ends with exit code 1.
  """

  def __init__(self, explain: Callable[[str], str]):
    self._explain = explain
    self._tail, self._trace = b'', False
    self._drained = threading.Event()
    sys.stderr.flush()
    self._real = os.dup(2)
    self._pipe, write_end = os.pipe()
    with contextlib.suppress(ImportError, AttributeError, OSError):
      import fcntl

      fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    os.dup2(write_end, 2)
    os.close(write_end)
    threading.Thread(target=self._pump, daemon=True, name='stderr').start()
    # A handler of Python's would only run after abort() has ended the process.
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
    set_handler(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p).value)

  def _pump(self):
    left = b''
    while data := os.read(self._pipe, 65_536):
      if _MARK in data:
        self._forward(left + data.replace(_MARK, b''))
        left = b''
        self._drained.set()
        continue
      if self._trace:  # whole lines only, to tell which belong to the stack trace
        data, newline, left = (left + data).rpartition(b'\n')
        data += newline
      self._forward(data)

  def _forward(self, data: bytes):
    self._tail = (self._tail + data)[-_KEPT:]
    self._trace = self._trace or _FATAL in self._tail
    if self._trace:
      lines = data.splitlines(keepends=True)
      data = b''.join(line for line in lines if not _FRAME.match(line))
    with contextlib.suppress(OSError):
      while data:
        data = data[os.write(self._real, data) :]

  def _drain(self):
    """Waits until all that was written has been forwarded."""
    self._drained.clear()
    with contextlib.suppress(OSError):
      os.write(2, _MARK)
      self._drained.wait(2.0)

  def _aborted(self, number: int):
    self._drain()
    if not self._trace:  # an abort of another kind: it goes on as it would
      set_handler(number, 0)
      return
    text = self._tail.decode(errors='replace')
    said = text.rpartition(_FATAL.decode())[2]
    last = said.rpartition('absl::Status: ')[2].partition('*** Check failure')[0]
    with contextlib.suppress(OSError):
      os.write(self._real, (self._explain(last.strip()) + '\n').encode())
    os._exit(1)

  def close(self):
    """Forwards what there is and gives standard error back."""
    sys.stderr.flush()
    self._drain()
    os.dup2(self._real, 2)
    set_handler(signal.SIGABRT, 0)


def unhealthy(said: str) -> str | None:
  """The service's list of unhealthy tasks in one line, if that is what it said.

  'The following tasks are unhealthy (stopped sending heartbeats): 1, 3'
  """
  found = _LIST.search(said)
  tasks = re.findall(r'\d+', found[1]) if found else sorted(set(_ONE.findall(said)))
  return f'{_HEAD} {", ".join(tasks)}' if tasks else None


def set_handler(number: int, handler: int | None) -> int | None:
  """C's signal(): sets a handler by address (0 is the default), returns the one before.

  Python's own knows nothing of handlers that libraries have set in C.
  """
  function = ctypes.CDLL(None).signal
  function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
  return function(int(number), handler)

"""The platform that programs are compiled for: 'cpu', 'gpu' or 'tpu'.

It is that of this process's devices, except while a program is compiled ahead of time
for chips that are elsewhere. What chooses a dtype or a kernel by platform asks here.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_named: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform')


def platform() -> str:
  """The platform that programs are compiled for."""
  return _named.get(None) or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
  """Within it, and in this thread, `platform()` is `name`."""
  token = _named.set(name)
  try:
    yield
  finally:
    _named.reset(token)

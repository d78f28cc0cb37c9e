"""The train step, compiled for a batch size before the first batch of it arrives.

A batch-size ramp changes shapes, and a change of shapes compiles: minutes, at 540B, in
which every chip waits. So while one size trains, a thread compiles the next.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

logger = logging.getLogger(__name__)


class BySize:
  """A jitted step(state, batch, rng) with one executable per batch size.

  Sizes that nobody asked for ahead are compiled when they come, as by jax.jit.
  """

  def __init__(self, step: Callable[..., Any]):
    """Args: step: jitted, with `.lower`; its second argument is a tree of [B, ...]."""
    self._step = step
    self._compiled: dict[int, Any] = {}
    self._waiting: dict[int, _Compilation] = {}
    self._like: Any = None

  def __call__(self, state: Any, batch: Any, rng: Any) -> Any:
    """One step; raises what the compilation of its size raised."""
    size = len(next(iter(batch.values())))
    if size not in self._compiled:
      # One at a time: what was compiled for an earlier size is freed.
      self._compiled = {size: self._executable(size)}
      self._like = jax.tree.map(_abstract, (state, batch, rng))
    return self._compiled[size](state, batch, rng)

  def _executable(self, size: int) -> Callable[..., Any]:
    waiting = self._waiting.pop(size, None)
    return self._step if waiting is None else waiting.result(size)

  def compile_ahead(self, size: int):
    """Starts compiling for batches of `size`, like those of the step before."""
    if size in self._compiled or size in self._waiting or self._like is None:
      return
    state, batch, rng = self._like
    batch = jax.tree.map(
      lambda x: x.update(shape=(size, *x.shape[1:])) if x.ndim else x, batch
    )
    self._waiting[size] = _Compilation(self._step, (state, batch, rng))


class _Compilation:
  """A compilation in a thread, and what came of it."""

  def __init__(self, step: Any, arguments: tuple[Any, ...]):
    self._outcome: tuple[Any, BaseException | None] = (None, None)
    # A daemon: a run that ends or fails meanwhile does not wait for it.
    self._thread = threading.Thread(
      target=self._run, args=(step, arguments), daemon=True, name='compile-ahead'
    )
    self._thread.start()

  def _run(self, step: Any, arguments: tuple[Any, ...]):
    try:
      self._outcome = step.lower(*arguments).compile(), None
    except BaseException as error:  # raised again by `result`, where it is of use
      self._outcome = None, error

  def result(self, size: int) -> Any:
    began = time.monotonic()
    self._thread.join()
    waited = time.monotonic() - began
    if waited > 2:
      logger.info('waited %.0f s for the step at batch size %d.', waited, size)
    executable, error = self._outcome
    if error is not None:
      raise error
    return executable


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  """Shape, dtype and placement of an array, donated or not."""
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=x.sharding, weak_type=x.aval.weak_type
  )

"""Batches of rows from token stores: what the train loop and the evaluation read.

A batch is a pure function of (seed, example indices); nothing is shuffled, buffered or
saved.
"""

import queue
import threading

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import sampling

_DONE = object()


class MixtureReader:
  """Training rows of several token stores, mixed by weight.

  Example index -> (store, rank) by `sampling.MixtureSchedule`; rank -> (epoch, row) by
  a permutation of the store's rows that is fresh in every epoch. Row r predicts tokens
  r·T+1..(r+1)·T from tokens r·T..(r+1)·T-1; rows are full, so all weights are one.

  Args:
    stores: (name, TokenStore, weight) for each task; a weight of zero leaves it out.
    length: T, predicted tokens per row.
    seed: of the permutations.
  """

  def __init__(self, stores, length: int, seed: int = 0):
    stores = [entry for entry in stores if entry[2]]
    self.length, self.seed = int(length), seed
    self.names = [name for name, _, _ in stores]
    self._stores = [store for _, store, _ in stores]
    self.schedule = sampling.MixtureSchedule([weight for _, _, weight in stores])
    self._rows = [self._count_rows(number) for number in range(len(stores))]
    for name, store, rows in zip(self.names, self._stores, self._rows, strict=True):
      if not rows:
        raise errors.UserError(
          f"Task '{name}' has {store.num_tokens} tokens, fewer than one row of "
          f'{self.length} + 1: use shorter TASK_FEATURE_LENGTHS or more text.'
        )

  def _count_rows(self, number: int) -> int:
    return self._stores[number].num_rows(self.length)

  @property
  def rows_available(self) -> dict[str, int]:
    """How many rows of this length each task has."""
    return dict(zip(self.names, self._rows, strict=True))

  def epochs(self, num_examples: int) -> dict[str, float]:
    """How often each task is read through by the first `num_examples` examples."""
    task, _ = self.schedule.lookup(np.arange(num_examples % self.schedule.period))
    turns = num_examples // self.schedule.period
    counts = turns * self.schedule.counts + np.bincount(task, minlength=len(self.names))
    return {
      name: float(count / rows)
      for name, count, rows in zip(self.names, counts, self._rows, strict=True)
    }

  def locate(self, indices) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each store, (positions within `indices`, rows of the store) they read."""
    task, rank = self.schedule.lookup(indices)
    places = [np.flatnonzero(task == number) for number in range(len(self._stores))]
    return [
      (where, self._row(number, rank[where])) for number, where in enumerate(places)
    ]

  def _row(self, number: int, rank: np.ndarray) -> np.ndarray:
    epochs, position = np.divmod(rank, self._rows[number])
    rows = np.empty(len(rank), np.int64)
    for epoch in np.unique(epochs):
      keys = sampling.round_keys('rows', self.seed, self.names[number], int(epoch))
      now = epochs == epoch
      rows[now] = sampling.permute(position[now], self._rows[number], keys)
    return rows

  def examples(self, indices) -> dict[str, np.ndarray]:
    """The batch of these global example indices, in their order.

    Returns:
      decoder_input_tokens and decoder_target_tokens, int32 [n, T];
      decoder_loss_weights, float32 [n, T].
    """
    tokens = np.empty((len(indices), self.length + 1), np.int32)
    for store, (where, rows) in zip(self._stores, self.locate(indices), strict=True):
      if where.size:
        tokens[where] = store.rows(self.length, rows)
    return {
      'decoder_input_tokens': np.ascontiguousarray(tokens[:, :-1]),
      'decoder_target_tokens': np.ascontiguousarray(tokens[:, 1:]),
      'decoder_loss_weights': np.ones((len(indices), self.length), np.float32),
    }


class EvalReader:
  """A store's whole stream in order, every token of it predicted exactly once.

  Row r predicts tokens r·T..(r+1)·T-1, each from those before it in the row and the
  one before the row ([eod] before the first). The last row is padded, weights 0 there.

  Args:
    store: a TokenStore.
    length: T, predicted tokens per row.
  """

  def __init__(self, store, length: int):
    self._store, self.length = store, int(length)
    self.num_bytes = store.num_bytes
    self.num_tokens = store.num_tokens
    self.num_rows = -(-store.num_tokens // self.length)

  def examples(self, row_ids) -> dict[str, np.ndarray]:
    """Rows as `MixtureReader.examples` gives them; beyond the last, all padding.

    So that `range(step * batch, (step + 1) * batch)` always has one shape.
    """
    T = self.length
    tokens = np.zeros((len(row_ids), T + 1), np.int32)
    weights = np.zeros((len(row_ids), T), np.float32)
    for i, row in enumerate(row_ids):
      start, stop = row * T, min((row + 1) * T, self.num_tokens)
      if start >= stop:
        continue
      first = max(start - 1, 0)
      tokens[i, first - start + 1 : stop - start + 1] = self._store.read(
        first, stop - first
      )
      if not start:
        tokens[i, 0] = self._store.manifest.eos_id
      weights[i, : stop - start] = 1
    return {
      # The last target is never an input of its own row.
      'decoder_input_tokens': tokens[:, :-1] * (weights > 0),
      'decoder_target_tokens': np.ascontiguousarray(tokens[:, 1:]),
      'decoder_loss_weights': weights,
    }

  def num_batches(self, batch_size: int, max_batches: int | None = None) -> int:
    """How many batches `batches` gives."""
    count = -(-self.num_rows // batch_size)
    return count if max_batches is None else min(count, max_batches)

  def batches(self, batch_size: int, max_batches: int | None = None):
    """All rows in order, `batch_size` at a time, the last filled up with padding."""
    for step in range(self.num_batches(batch_size, max_batches)):
      yield self.examples(range(step * batch_size, (step + 1) * batch_size))


class Prefetcher:
  """Computes fn(step) for successive steps in one background thread, a few ahead.

  An iterator and a context manager. An exception in `fn` is raised by `next` in its
  turn; `close` (or leaving the with block) stops the thread and waits for it.

  Args:
    fn: step -> batch.
    start_step: the first step to compute.
    stop_step: one past the last, or None for no end.
    depth: how many results may wait.
  """

  def __init__(self, fn, start_step: int, stop_step: int | None = None, depth: int = 2):
    self._queue = queue.Queue(depth)
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._run, args=(fn, start_step, stop_step), daemon=True, name='prefetch'
    )
    self._thread.start()

  def _run(self, fn, step, stop_step) -> None:
    while not self._closed.is_set():
      if stop_step is not None and step >= stop_step:
        self._put((_DONE, None))
        return
      try:
        item = (fn(step), None)
      except BaseException as e:  # raised again by __next__
        item = (None, e)
      if not self._put(item) or item[1] is not None:
        return
      step += 1

  def _put(self, item) -> bool:
    while not self._closed.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __iter__(self):
    return self

  def __next__(self):
    while True:
      if self._closed.is_set():
        raise StopIteration
      try:
        value, error = self._queue.get(timeout=0.1)
        break
      except queue.Empty:
        continue
    if error is not None:
      self.close()
      raise error
    if value is _DONE:
      self.close()
      raise StopIteration
    return value

  def close(self) -> None:
    """Stops the thread and waits for the call of `fn` that is under way."""
    self._closed.set()
    if self._thread is not threading.current_thread():
      self._thread.join()

  def __enter__(self):
    return self

  def __exit__(self, *exc) -> None:
    self.close()

"""Which example a step reads: pure functions of (seed, index), with no state to save.

Three maps are composed. `BatchSchedule`: step -> global example indices (batch-size
ramp and skipped ranges). `MixtureSchedule`: global index -> (task, rank within the
task). `permute`: rank -> row, a fresh permutation of the task's rows in every epoch.
Each costs O(1) per index, so a run can resume or skip anywhere and replays nothing.
"""

import fractions
import hashlib
import heapq
import math

import numpy as np

from palm_t5x import errors

MAX_PERIOD = 100_000  # rows in the mixture's static table
_ROUNDS = 6  # Feistel rounds: four already mix well, six cost little more


def round_keys(*names) -> np.ndarray:
  """Feistel round keys from what identifies a permutation, such as (seed, name, epoch).

  Returns:
    uint64 [rounds]. Equal names give equal keys on every machine and version.
  """
  text = '\x1f'.join(str(name) for name in names)
  digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
  return np.frombuffer(digest, '<u8').astype(np.uint64)


def mix(x, key):
  """A keyed 64-bit mixing function, the finaliser of SplitMix64: uint64 to uint64.

  One to one for every key. Arrays overflow silently; scalars need np.errstate.
  """
  x = (x ^ key) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def permute(indices, n: int, keys) -> np.ndarray:
  """A keyed permutation of 0..n-1, evaluated at `indices` alone.

  A balanced Feistel network over the next even power of two at or above n; values that
  fall outside 0..n-1 walk the cycle until they come back (fewer than four rounds of
  walking on average, as the network's domain is below 4n).

  Args:
    indices: integers in [0, n), any shape.
    n: the size of the domain, at least 1 and below 2^62.
    keys: `round_keys(...)`; a row of keys per index ([..., rounds]) works too.

  Returns:
    int64, shaped as `indices`.
  """
  x = np.asarray(indices).astype(np.uint64)
  if n < 1 or (x.size and int(x.max()) >= n):
    raise ValueError(f'indices must lie in [0, {n})')
  keys = np.asarray(keys, np.uint64)
  keys = np.broadcast_to(keys, (*x.shape, _ROUNDS)).reshape(-1, _ROUNDS)
  shape, x = x.shape, x.reshape(-1)
  half = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
  mask = np.uint64((1 << int(half)) - 1)

  def network(x, keys):
    left, right = x >> half, x & mask
    for r in range(_ROUNDS):
      left, right = right, left ^ (mix(right, keys[:, r]) & mask)
    return (left << half) | right

  with np.errstate(over='ignore'):
    out = network(x, keys)
    walking = np.flatnonzero(out >= n)
    while walking.size:
      out[walking] = network(out[walking], keys[walking])
      walking = walking[out[walking] >= n]
  return out.astype(np.int64).reshape(shape)


def _period_counts(weights) -> list[int]:
  """How often each task occurs in one period: exact if the weights allow it."""
  exact = [fractions.Fraction(str(w)) for w in weights]
  total = sum(exact)
  shares = [w / total for w in exact]
  period = math.lcm(*(share.denominator for share in shares))
  if period > MAX_PERIOD:
    # Largest remainders; no task may vanish, so a tiny weight gets one row.
    period = MAX_PERIOD
    counts = [max(1, int(share * period)) for share in shares]
    by_remainder = sorted(
      range(len(shares)), key=lambda i: (counts[i] - shares[i] * period, i)
    )
    for i in range(period - sum(counts)):
      counts[by_remainder[i % len(counts)]] += 1
    while sum(counts) > period:
      counts[counts.index(max(counts))] -= 1
    return counts
  return [int(share * period) for share in shares]


def _interleave(counts) -> np.ndarray:
  """Orders the tasks of one period so that every prefix is within one row of its share.

  Tijdeman's quota method (The chairman assignment problem, 1980) as earliest-deadline
  scheduling: task i's j-th row may come no earlier than (j+d)/share, and is due by
  (j+1-d)/share, with d = 1/(2k-2) for k tasks. Any window then is within two rows.
  """
  period, k = sum(counts), len(counts)
  if k == 1:
    return np.zeros(period, np.int32)
  waiting = []
  for i, count in enumerate(counts):
    for j in range(count):
      # In units of 1/(2k-2), so that all is integer arithmetic.
      release = -((-((2 * k - 2) * j + 1) * period) // ((2 * k - 2) * count))
      due = ((2 * k - 2) * (j + 1) - 1) * period * 1.0 / ((2 * k - 2) * count)
      waiting.append((release, due, i))
  waiting.sort()
  order, ready, next_waiting = np.empty(period, np.int32), [], 0
  for slot in range(1, period + 1):
    while next_waiting < period and waiting[next_waiting][0] <= slot:
      heapq.heappush(ready, waiting[next_waiting][1:])
      next_waiting += 1
    order[slot - 1] = heapq.heappop(ready)[1]
  return order


class MixtureSchedule:
  """Which task a global example index reads, and the how-manieth of that task it is.

  One static period of at most 100,000 rows, exact for percentages, repeated for ever.
  Any window of consecutive indices holds each task within two rows of its share.
  """

  def __init__(self, weights):
    """Args: weights: one positive number per task, in any scale."""
    weights = list(weights)
    if not weights or any(not w > 0 or not math.isfinite(w) for w in weights):
      raise errors.UserError(
        f'Mixture weights must be positive numbers, got {weights}: leave out the tasks '
        'that are not to be read.'
      )
    self.counts = np.array(_period_counts(weights), np.int64)
    self._order = _interleave(self.counts.tolist())
    self._rank = np.empty(len(self._order), np.int64)
    for task, count in enumerate(self.counts):
      self._rank[self._order == task] = np.arange(count)

  @property
  def period(self) -> int:
    """After how many examples the pattern of tasks repeats."""
    return len(self._order)

  def lookup(self, indices) -> tuple[np.ndarray, np.ndarray]:
    """(task numbers int32, ranks within the task int64), each shaped as `indices`."""
    indices = np.asarray(indices, np.int64)
    turn, slot = np.divmod(indices, self.period)
    task = self._order[slot]
    return task, turn * self.counts[task] + self._rank[slot]


class BatchSchedule:
  """Which global example indices each step reads.

  Args:
    batch_size: sequences per step, or a ramp ((first_step, size), ...) that starts at
      step 0, such as PaLM's ((0, 512), (50_000, 1024), (115_000, 2048)).
    skips: half-open ranges of global example indices that are never read; how a
      checkpoint remembers them, so that a later change of the ramp moves nothing.
    skip_batches: the same as ranges of batch numbers of the unskipped run; what of
      them lies before `begun` has been read, and is left as it is.
    shift: examples that were read beyond those that this schedule counts, because the
      run began with another one; skipped examples are not among them.
    begun: the step that comes next.

  Attributes:
    skips: all ranges of example indices that are passed over, sorted and disjoint.
    missed: the parts of `skip_batches`, as example indices, that came too late.
  """

  def __init__(self, batch_size, skips=(), skip_batches=(), shift=0, begun=0):
    ramp = ((0, batch_size),) if isinstance(batch_size, int) else tuple(batch_size)
    try:
      ramp = tuple((int(start), int(size)) for start, size in ramp)
    except (TypeError, ValueError):
      ramp = ()
    starts = [start for start, _ in ramp]
    if (
      not ramp
      or starts[0] != 0
      or sorted(set(starts)) != starts
      or any(size < 1 for _, size in ramp)
    ):
      raise errors.UserError(
        f'BATCH_SIZE = {batch_size!r} is neither a positive number nor a ramp '
        '((0, size), (step, size), ...) with growing steps that starts at step 0.'
      )
    self.ramp = ramp
    self._shift = shift
    self.skips = _merge((int(start), int(stop)) for start, stop in skips)
    asked = [self._examples_of(start, stop) for start, stop in skip_batches]
    read = self.offset(begun) if begun else 0
    # A range behind the run must not enter: it would push everything after it along.
    self.missed = _without([(a, min(b, read)) for a, b in asked], self.skips)
    self.skips = _merge([*self.skips, *((max(a, read), b) for a, b in asked)])

  def size(self, step: int) -> int:
    """Sequences in the batch of `step`."""
    return [size for start, size in self.ramp if start <= step][-1]

  def _unskipped_offset(self, step: int) -> int:
    stops = [start for start, _ in self.ramp[1:]] + [step]
    return sum(
      max(0, min(stop, step) - start) * size
      for (start, size), stop in zip(self.ramp, stops, strict=True)
    )

  def _examples_of(self, start: int, stop: int) -> tuple[int, int]:
    if not 0 <= start < stop:
      raise errors.UserError(
        f'Cannot skip batches {start}:{stop}: a range a:b needs 0 <= a < b.'
      )
    first, last = self._unskipped_offset(start), self._unskipped_offset(stop)
    return max(0, first + self._shift), max(0, last + self._shift)

  def examples_of_steps(self, start: int, stop: int) -> tuple[int, int]:
    """The half-open range of example indices that steps start ... stop-1 read in."""
    return self.offset(start), int(self.indices(stop - 1)[-1]) + 1

  def batch_numbers(self, first: int, last: int) -> tuple[int, int]:
    """The batches of the unskipped run that hold examples first ... last-1."""
    return self._batch_of(first), self._batch_of(last - 1) + 1

  def _batch_of(self, example: int) -> int:
    example -= self._shift
    stops = [start for start, _ in self.ramp[1:]] + [None]
    for (start, size), stop in zip(self.ramp, stops, strict=True):
      if stop is None or example < (stop - start) * size:
        return start + example // size
      example -= (stop - start) * size
    raise AssertionError('the last stage of a ramp has no end')

  def next_size(self, step: int) -> int | None:
    """The first batch size after that of `step`; None if it stays."""
    later = [size for start, size in self.ramp if start > step]
    return later[0] if later else None

  def _past_skips(self, indices) -> np.ndarray:
    """Example numbers counted without the skipped ones -> global example indices."""
    indices = np.array(indices, np.int64)
    for start, stop in self.skips:
      indices += (stop - start) * (indices >= start)
    return indices

  def examples_read(self, step: int) -> int:
    """How many examples the steps before `step` read, skipped ones not counted."""
    return self._unskipped_offset(step) + self._shift

  def offset(self, step: int) -> int:
    """The global index of the first example of `step`."""
    return int(self._past_skips([self.examples_read(step)])[0])

  def indices(self, step: int) -> np.ndarray:
    """The global example indices of the batch of `step`, int64 [size(step)]."""
    first = self.examples_read(step)
    return self._past_skips(np.arange(first, first + self.size(step)))


def parse_ranges(texts) -> list[tuple[int, int]]:
  """'a:b' or 'a:b,c:d' or pairs of numbers -> half-open ranges of batch numbers.

  Raises:
    UserError: for what is no range, naming it.
  """
  texts = [texts] if isinstance(texts, str) else list(texts)
  ranges = []
  for text in texts:
    parts = text.split(',') if isinstance(text, str) else [text]
    for part in parts:
      pair = part.split(':') if isinstance(part, str) else part
      try:
        start, stop = (int(number) for number in pair)
      except (TypeError, ValueError):
        start, stop = 0, 0
      if not 0 <= start < stop:
        raise errors.UserError(
          f'--skip_batches={part}: a range of batches is a:b with 0 <= a < b, such as '
          '1000:1300; batch b is read again.'
        )
      ranges.append((start, stop))
  return ranges


def _without(ranges, taken) -> tuple[tuple[int, int], ...]:
  """What `ranges` cover and the sorted, disjoint `taken` do not."""
  left = []
  for start, stop in _merge(ranges):
    for first, last in taken:
      if first < stop and last > start:
        left.append((start, first))
        start = last
    left.append((start, stop))
  return _merge(left)


def _merge(ranges) -> tuple[tuple[int, int], ...]:
  """Sorted, disjoint, non-empty half-open ranges that cover the same numbers."""
  merged: list[tuple[int, int]] = []
  for start, stop in sorted(ranges):
    if start >= stop:
      continue
    if merged and start <= merged[-1][1]:
      merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
    else:
      merged.append((start, stop))
  return tuple(merged)

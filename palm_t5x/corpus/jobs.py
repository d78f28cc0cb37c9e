"""Long work as stages of independent units, each done once, whatever is killed.

A stage is a list of units; a unit is a function of a module and its arguments. A unit
first makes its output durable, then returns a few facts (JSON), which are written to
<folder>/<stage>/<unit>.json: that file is what "done" means. Output depends on the
units alone, never on how many processes or machines did them, nor in which order; a
unit done twice writes the same bytes twice.

Several machines share the work through a shared folder (`num_shards`, `shard_id`); the
same stages run under Apache Beam (`beam_runner`).
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import storage

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0  # between two signs of life of a shard
_ALIVE_SECONDS = 30.0  # how old the last one may be
_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]*')


@dataclasses.dataclass(frozen=True)
class Unit:
  """A piece of work.

  Attributes:
    name: unique in its stage; letters, digits, '-', '_' and '.' only.
    work: called with `args`; must pickle; returns JSON-able facts.
    args: its arguments.
    size: how much work it is, in bytes, for progress.
  """

  name: str
  work: Callable[..., Any]
  args: tuple = ()
  size: int = 1

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise ValueError(f'{self.name!r} cannot name a unit: it names a file')


@dataclasses.dataclass(frozen=True)
class Stage:
  """A set of units that may run in any order.

  Attributes:
    name: of the stage's folder.
    units: the job -> its units; called when all stages before it are done, so that it
      may read their facts.
    label: what progress calls it, such as 'tokenising books'.
    local: whether its units stay in the process that started the job, as what they
      read does not pickle. Only for the first stages.
  """

  name: str
  units: Callable[['Job'], Sequence[Unit]]
  label: str = ''
  local: bool = False


class Job:
  """The folder of a job: what of it is done, and with which settings.

  Args:
    folder: local or in a bucket; it is made.
    settings: JSON-able; a folder begun with other settings is refused.

  Raises:
    UserError: the folder holds a job with other settings.
  """

  def __init__(self, folder: str, settings: Mapping[str, Any] | None = None):
    self.folder = storage.normalise(folder)
    if settings is not None:
      self._check(json.loads(json.dumps(dict(settings), sort_keys=True)))

  def _check(self, settings: dict[str, Any]):
    path = storage.join(self.folder, 'settings.json')
    found = storage.read_bytes(path)
    if found is None and storage.exists(self.folder):
      # Killed while it was being deleted, unless another shard just began it.
      found = storage.read_bytes(path)
      if found is None:
        storage.delete_folder(self.folder)
    if found is None:
      text = json.dumps(settings, indent=2, sort_keys=True) + '\n'
      storage.write_bytes(path, text.encode())
      return
    try:
      before = json.loads(found)
    except ValueError:
      before = {}
    changed = sorted(
      f'{key} was {before.get(key)!r}, is {settings.get(key)!r}'
      for key in {*before, *settings}
      if before.get(key) != settings.get(key)
    )
    if changed:
      raise errors.UserError(
        f'{self.folder} was begun with other settings: {"; ".join(changed[:3])}'
        f'{f" and {len(changed) - 3} more" if len(changed) > 3 else ""}. Delete that '
        'folder to begin again, or name another one.'
      )

  def path(self, *names: str) -> str:
    """A file in the job's folder."""
    return storage.join(self.folder, *names)

  def facts_of(self, stage: str, unit: str) -> Any | None:
    """What the unit returned, or None if it is not done."""
    data = storage.read_bytes(self.path(stage, f'{unit}.json'))
    try:
      return None if data is None else json.loads(data)
    except ValueError:
      return None  # not whole: it is done again

  def done(self, stage: str) -> set[str]:
    """The names of the units of a stage that are done."""
    names = storage.list_names(self.path(stage))
    return {name.removesuffix('.json') for name in names if name.endswith('.json')}

  def facts(self, stage: str) -> dict[str, Any]:
    """Unit name -> facts, of all units that are done, sorted by name."""
    names = sorted(self.done(stage))
    ranges = [(f'{name}.json', 0, None) for name in names]
    data = storage.read_ranges(self.path(stage), ranges)
    return {name: json.loads(text) for name, text in zip(names, data, strict=True)}

  def perform(self, stage: str, unit: Unit) -> Any:
    """Does a unit and records that it is done; returns its facts."""
    facts = unit.work(*unit.args)
    text = json.dumps({} if facts is None else facts, sort_keys=True) + '\n'
    storage.write_bytes(self.path(stage, f'{unit.name}.json'), text.encode())
    return facts

  def delete(self) -> None:
    """Deletes the folder; its settings first, without which nothing in it counts."""
    storage.delete_file(self.path('settings.json'))
    storage.delete_folder(self.folder)


class Pool:
  """Worker processes, started when they are first needed; a context manager.

  For several jobs one after the other: starting a process takes a second.

  Args:
    workers: how many there may be at a time.
  """

  def __init__(self, workers: int):
    self.workers = max(1, workers)
    self._executor = None

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *exc_info) -> None:
    if self._executor is not None:
      self._executor.shutdown(wait=True, cancel_futures=True)
      self._executor = None

  def submit(self, function, *args) -> concurrent.futures.Future:
    """As concurrent.futures.Executor.submit."""
    if self._executor is None:
      # Not forked: TensorFlow's and JAX's threads do not survive a fork.
      self._executor = concurrent.futures.ProcessPoolExecutor(
        self.workers,
        mp_context=multiprocessing.get_context('spawn'),
        initializer=_die_with_parent,
        initargs=(os.getpid(),),
      )
    return self._executor.submit(function, *args)


def is_parallel(workers: int | Pool) -> bool:
  """Whether units are done in other processes than this one."""
  return (workers.workers if isinstance(workers, Pool) else workers) > 1


def check_shard(shard_id: int, num_shards: int) -> None:
  """Raises UserError if there is no such shard."""
  if not 0 <= shard_id < num_shards:
    raise errors.UserError(
      f'--shard_id={shard_id} with --num_shards={num_shards}: shards are numbered 0 to '
      f'{num_shards - 1}.'
    )


def run(
  job: Job,
  stages: Sequence[Stage],
  *,
  workers: int | Pool = 1,
  shard_id: int = 0,
  num_shards: int = 1,
  progress: Callable[[str, int, int], None] | None = None,
  finished: Callable[[], bool] | None = None,
) -> bool:
  """Does what is left of a job, or this shard's part of it.

  Shard i does the units i, i + num_shards, ... of every stage. A stage begins when the
  one before is done by all shards: a shard waits for others as long as they live. In
  all stages but the first, it takes over the units of shards that are not running.

  Args:
    job: its folder is shared by all shards.
    stages: in their order.
    workers: processes of this machine that do units side by side, or a pool of them;
      1: this process.
    shard_id, num_shards: which part of the job is this process's.
    progress: called as progress(label, done, total), in units' sizes.
    finished: whether what the job makes is whole, so that its folder may be gone.

  Returns:
    whether the whole job is done. False: other shards have yet to run, and do not now.

  Raises:
    UserError: no such shard.
    Failure: a worker process died; or what a unit raised.
  """
  check_shard(shard_id, num_shards)
  pool = workers if isinstance(workers, Pool) else Pool(workers)
  shards = _Shards(job, shard_id, num_shards, finished or (lambda: False))
  with contextlib.ExitStack() as stack:
    if pool is not workers:
      stack.enter_context(pool)
    stack.enter_context(shards)
    for number, stage in enumerate(stages):
      units = list(stage.units(job))
      mine = units[shard_id::num_shards]
      _perform(job, stage, mine, pool, progress)
      if num_shards == 1:
        continue
      done = _others(job, stage, units, number > 0, shards, pool, progress)
      if done is not None:
        return done
  return True


def _others(job, stage, units, take_over, shards, pool, progress) -> bool | None:
  """Waits for the other shards' units of a stage.

  Returns:
    None when all of them are done; True if the whole job is; False if nobody does them.
  """
  said = False
  while True:
    done, count = job.done(stage.name), shards.count
    left = [(i % count, u) for i, u in enumerate(units) if u.name not in done]
    if not left:
      return None
    if shards.finished():
      return True
    alive = shards.alive()
    if take_over:
      orphans = [unit for shard, unit in left if shard not in alive]
      if orphans:
        # A few at a time: a shard that comes back finds the rest undone.
        _perform(job, stage, orphans[: pool.workers], pool, progress)
        continue
    waiting = {shard for shard, _ in left}
    if not alive & waiting:
      return False
    if not said:
      names = ', '.join(map(str, sorted(waiting)[:8]))
      logger.info('shard %d waits for shard %s', shards.shard_id, names)
      said = True
    time.sleep(_BEAT_SECONDS / 5)


def _perform(job, stage, units, pool, progress) -> None:
  """Does those of the units that are not done."""
  done = job.done(stage.name)
  left = [unit for unit in units if unit.name not in done]
  total = sum(unit.size for unit in units)
  finished = total - sum(unit.size for unit in left)
  report = progress or (lambda *args: None)
  if left:
    report(stage.label or stage.name, finished, total)
  if pool.workers == 1 or stage.local or len(left) == 1:
    for unit in left:
      job.perform(stage.name, unit)
      finished += unit.size
      report(stage.label or stage.name, finished, total)
    return
  waiting, queue = {}, iter(left)
  try:
    while True:
      # A bounded queue: a corpus has more units than should be pickled at once.
      while len(waiting) < 2 * pool.workers and (unit := next(queue, None)) is not None:
        waiting[pool.submit(job.perform, stage.name, unit)] = unit
      if not waiting:
        return
      ready, _ = concurrent.futures.wait(
        waiting, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in ready:
        unit = waiting.pop(future)
        future.result()
        finished += unit.size
        report(stage.label or stage.name, finished, total)
  except concurrent.futures.process.BrokenProcessPool as e:
    raise errors.Failure(
      f'A worker process died while {stage.label or stage.name} (killed, or out of '
      'memory): run the same command again to go on, with fewer WORKERS if memory is '
      'short.'
    ) from e
  finally:
    for future in waiting:
      future.cancel()


def _die_with_parent(parent: int) -> None:
  """Ends a worker soon after the process that started it was killed."""

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(1)

  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
  threading.Thread(target=watch, daemon=True, name='parent').start()


class _Shards:
  """Shows the other shards that this one is running, and sees which of them are."""

  def __init__(self, job: Job, shard_id: int, count: int, finished):
    self.shard_id, self.count, self.finished = shard_id, count, finished
    self._job, self._stop = job, threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True, name='alive')
    self._seen: dict[int, tuple[bytes, float]] = {}

  def __enter__(self) -> '_Shards':
    if self.count > 1:
      self._thread.start()
    return self

  def __exit__(self, *exc_info) -> None:
    self._stop.set()
    if self.count > 1:
      self._thread.join()
      if not self.finished():
        self._say(b'0')

  def _beat(self):
    while not self._stop.is_set():
      self._say(str(time.time()).encode())
      self._stop.wait(_BEAT_SECONDS)

  def _say(self, text: bytes):
    with contextlib.suppress(errors.Failure):
      storage.write_bytes(self._job.path('alive', str(self.shard_id)), text)

  def alive(self) -> set[int]:
    """The other shards that show signs of life."""
    return {i for i in range(self.count) if i != self.shard_id and self._is_alive(i)}

  def _is_alive(self, shard: int) -> bool:
    data = storage.read_bytes(self._job.path('alive', str(shard)))
    if data in (None, b'0'):
      return False
    before, since = self._seen.get(shard, (b'', 0.0))
    if data != before:
      # Clocks differ from machine to machine: only a first sight goes by the time it
      # tells, from then on a shard lives as long as its sign changes.
      since = time.monotonic()
      with contextlib.suppress(ValueError):
        if not before and time.time() - float(data) > _ALIVE_SECONDS:
          since -= _ALIVE_SECONDS
      self._seen[shard] = (data, since)
    return time.monotonic() - since < _ALIVE_SECONDS


def default_workers(workers: int | None) -> int:
  """The number of worker processes: `workers`, or for None one per usable core.

  Raises:
    UserError: it is not a number of processes.
  """
  if workers is None:
    if hasattr(os, 'sched_getaffinity'):  # fewer than there are, in many containers
      return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
  if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
    raise errors.UserError(
      f'WORKERS = {workers!r}: it is a number of processes, or None.'
    )
  return workers

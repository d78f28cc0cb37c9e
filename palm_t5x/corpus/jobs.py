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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import storage

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0  # between two signs of life of a shard
_ALIVE_SECONDS = 30.0  # how old the last one may be


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


@dataclasses.dataclass(frozen=True)
class Stage:
  """A set of units that may run in any order.

  Attributes:
    name: of the stage's folder.
    units: the job -> its units; called when all stages before it are done, so that it
      may read their facts.
    label: what progress calls it, such as 'tokenising books'.
  """

  name: str
  units: Callable[['Job'], Sequence[Unit]]
  label: str = ''


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
    return {name: self.facts_of(stage, name) for name in sorted(self.done(stage))}

  def perform(self, stage: str, unit: Unit) -> Any:
    """Does a unit and records that it is done; returns its facts."""
    facts = unit.work(*unit.args)
    text = json.dumps({} if facts is None else facts, sort_keys=True) + '\n'
    storage.write_bytes(self.path(stage, f'{unit.name}.json'), text.encode())
    return facts


def run(
  job: Job,
  stages: Sequence[Stage],
  *,
  workers: int = 1,
  shard_id: int = 0,
  num_shards: int = 1,
  progress: Callable[[str, int, int], None] | None = None,
) -> bool:
  """Does what is left of a job, or this shard's part of it.

  Shard i does the units i, i + num_shards, ... of every stage. A stage begins when the
  one before is done by all shards: a shard waits for others as long as they live. In
  all stages but the first, it takes over the units of shards that are not running.

  Args:
    job: its folder is shared by all shards.
    stages: in their order.
    workers: processes of this machine that do units side by side; 1: this process.
    shard_id, num_shards: which part of the job is this process's.
    progress: called as progress(label, done, total), in units' sizes.

  Returns:
    whether the whole job is done. False: other shards have yet to run, and do not now.

  Raises:
    UserError: no such shard.
    Failure: a worker process died; or what a unit raised.
  """
  if not 0 <= shard_id < num_shards:
    raise errors.UserError(
      f'--shard_id={shard_id} with --num_shards={num_shards}: shards are numbered 0 to '
      f'{num_shards - 1}.'
    )
  with _alive(job, shard_id, num_shards), _executor(workers) as executor:
    for number, stage in enumerate(stages):
      units = list(stage.units(job))
      mine = units[shard_id::num_shards]
      _perform(job, stage, mine, executor, workers, progress)
      if num_shards > 1 and not _others(
        job, stage, units, number > 0, shard_id, num_shards, executor, workers, progress
      ):
        return False
  return True


def _others(
  job, stage, units, take_over, shard_id, num_shards, executor, workers, progress
) -> bool:
  """Waits for the other shards' units of a stage; whether all of them are done."""
  said = False
  while True:
    done = job.done(stage.name)
    left = [(i % num_shards, u) for i, u in enumerate(units) if u.name not in done]
    if not left:
      return True
    alive = _alive_shards(job, num_shards) - {shard_id}
    if take_over:
      orphans = [unit for shard, unit in left if shard not in alive]
      if orphans:
        # A few at a time: a shard that comes back finds the rest undone.
        _perform(job, stage, orphans[: max(workers, 1)], executor, workers, progress)
        continue
    if not alive & {shard for shard, _ in left}:
      return False
    if not said:
      waiting = ', '.join(map(str, sorted({shard for shard, _ in left})[:8]))
      logger.info('shard %d waits for shard %s', shard_id, waiting)
      said = True
    time.sleep(_BEAT_SECONDS / 5)


def _perform(job, stage, units, executor, workers, progress) -> None:
  """Does those of the units that are not done."""
  done = job.done(stage.name)
  left = [unit for unit in units if unit.name not in done]
  total = sum(unit.size for unit in units)
  finished = total - sum(unit.size for unit in left)
  report = progress or (lambda *args: None)
  if left:
    report(stage.label or stage.name, finished, total)
  if executor is None:
    for unit in left:
      job.perform(stage.name, unit)
      finished += unit.size
      report(stage.label or stage.name, finished, total)
    return
  waiting, queue = {}, iter(left)
  try:
    while True:
      # A bounded queue: a corpus has more units than should be pickled at once.
      while len(waiting) < 2 * workers and (unit := next(queue, None)) is not None:
        waiting[executor.submit(job.perform, stage.name, unit)] = unit
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


@contextlib.contextmanager
def _executor(workers: int):
  """A pool of worker processes, or None where this process does the work."""
  if workers <= 1:
    yield None
    return
  # Not forked: TensorFlow's and JAX's threads do not survive a fork.
  executor = concurrent.futures.ProcessPoolExecutor(
    workers,
    mp_context=multiprocessing.get_context('spawn'),
    initializer=_die_with_parent,
    initargs=(os.getpid(),),
  )
  try:
    yield executor
  finally:
    executor.shutdown(wait=True, cancel_futures=True)


def _die_with_parent(parent: int) -> None:
  """Ends a worker soon after the process that started it was killed."""

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(1)

  threading.Thread(target=watch, daemon=True, name='parent').start()


@contextlib.contextmanager
def _alive(job: Job, shard_id: int, num_shards: int):
  """Shows the other shards that this one is running."""
  if num_shards == 1:
    yield
    return
  path, stop = job.path('alive', str(shard_id)), threading.Event()

  def beat():
    while not stop.is_set():
      with contextlib.suppress(errors.Failure):
        storage.write_bytes(path, str(time.time()).encode())
      stop.wait(_BEAT_SECONDS)

  thread = threading.Thread(target=beat, daemon=True, name='alive')
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
    with contextlib.suppress(errors.Failure):
      storage.write_bytes(path, b'0')


def _alive_shards(job: Job, num_shards: int) -> set[int]:
  """The shards whose last sign of life is fresh."""
  alive, now = set(), time.time()
  for shard in range(num_shards):
    data = storage.read_bytes(job.path('alive', str(shard)))
    with contextlib.suppress(ValueError):
      if data is not None and now - float(data) < _ALIVE_SECONDS:
        alive.add(shard)
  return alive

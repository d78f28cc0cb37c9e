"""Builds token stores: on as many processes and machines as wished, to the same bytes.

Four stages over the work folder <store>.building: `tokenise` writes sorted runs
(`store_runs`), one unit per few parts of the corpus; `plan` adds up their indices and
makes the empty arrays; `assemble` writes whole files of them, each unit from the slices
of the runs that fall there; `finish` writes the manifest. Memory does not grow with the
corpus: a unit holds a run, or the tokens of `Limits.unit_files` files.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import codec, jobs, storage, store_runs, token_store
from palm_t5x.corpus.documents import Part
from palm_t5x.corpus.token_store import Layout, Manifest

_LONG = 400_000_000  # bytes of ids: putting fewer together is not worth a line


@dataclasses.dataclass(frozen=True)
class Limits:
  """How the work is cut up; a store's bytes do not depend on it.

  Attributes:
    run_bytes: documents that a process sorts in memory; it needs about four times that.
    unit_bytes: text of a tokenising unit, where parts are smaller.
    unit_files: files of tokens that an assembling unit writes.
  """

  run_bytes: int = 64 << 20
  unit_bytes: int = 64 << 20
  unit_files: int = 8


LAYOUT, LIMITS = Layout(), Limits()


@dataclasses.dataclass(frozen=True)
class _Build:
  """What all units know of the store; pickles."""

  path: str
  work: str
  order: store_runs.Order
  layout: Layout
  limits: Limits
  vocabulary_hash: str
  vocab_size: int
  eos_id: int

  @property
  def runs(self) -> str:
    return storage.join(self.work, 'runs')

  @property
  def tables(self) -> str:
    return storage.join(self.work, 'tables')


def build(
  path: str,
  documents,
  vocabulary,
  *,
  task: str,
  split: str,
  seed: int = 0,
  progress: Callable[[str, int, int], None] | None = None,
  workers: int | jobs.Pool = 1,
  shard_id: int = 0,
  num_shards: int = 1,
  runner: Callable[[jobs.Job, Sequence[jobs.Stage]], bool] | None = None,
  layout: Layout | None = None,
  limits: Limits | None = None,
) -> Manifest | None:
  """Tokenises documents into a store at `path`; a whole store there is kept as it is.

  A build that was interrupted goes on where it stopped, if it is started with the same
  parts and vocabulary. Processes that build the same local store take turns, unless
  they are shards of one build.

  Args:
    path: the store's own folder, local or gs://.
    documents: a list of `Part`s, which several processes can read; or an iterable of
      texts, or a function that returns either (called only if there is something to
      build), which is read in this process. Empty documents are left out. Instead of
      texts, examples that are tokenised already: dicts of the ids 'targets' and (in
      all or none) 'inputs', and 'bytes', the UTF-8 length of the targets' text.
    vocabulary: any SeqIO vocabulary; its `eos_id` ends every document.
    task, split, seed: names of the store, from which the documents' order derives.
    progress: called as progress(label, bytes done, bytes in all), 0 in all if unknown.
    workers: processes of this machine, or a pool of them.
    shard_id, num_shards: this machine's share of the work, see `jobs.run`.
    runner: does the stages instead of `jobs.run`, such as `beam_runner.Beam`.
    layout, limits: sizes of files and units; None: `LAYOUT` and `LIMITS`.

  Returns:
    the manifest, or None if other shards have yet to do their part.

  Raises:
    UserError: there are no documents, or they are of different kinds.
    Failure: the disk is full, the folder cannot be written to, a worker died.
  """
  jobs.check_shard(shard_id, num_shards)
  path = storage.normalise(path)
  work = work_folder(path)
  with contextlib.ExitStack() as stack:
    manifest = token_store.read_manifest(path)
    if manifest is None:
      stack.enter_context(token_store.only_builder(path, shared=num_shards > 1))
      manifest = token_store.read_manifest(path)
    if manifest is not None:
      if storage.exists(work):
        jobs.Job(work).delete()  # killed between the manifest and the end
      return manifest
    documents = documents() if callable(documents) else documents
    order = store_runs.Order(seed, task, split, _bits(documents))
    known = (codec.hash_of(vocabulary), vocabulary.vocab_size, vocabulary.eos_id)
    sizes = (layout or LAYOUT, limits or LIMITS)
    to_build = _Build(path, work, order, *sizes, known[0], *map(int, known[1:]))
    job = _job(to_build, documents, num_shards)
    try:
      stages = _stages(to_build, documents, vocabulary, job, workers, runner, progress)
      whole = lambda: token_store.read_manifest(path) is not None
      if runner is not None:
        done = runner(job, stages)
      else:
        shard = {'shard_id': shard_id, 'num_shards': num_shards, 'finished': whole}
        report = progress and functools.partial(_report, progress)
        done = jobs.run(job, stages, workers=workers, progress=report, **shard)
    except errors.UserError:
      if not _are_parts(documents):
        job.delete()  # there was one unit, and it failed
      raise
    except errors.Failure:
      # Another shard finished the store and deleted what this one was reading.
      if not whole():
        raise
      done = True
    if not done:
      return None
    job.delete()
    return token_store.read_manifest(path)


def work_folder(path: str) -> str:
  """Where a store is built before it is one."""
  return storage.normalise(path) + '.building'


def outstanding(path: str, num_shards: int) -> list[int]:
  """The shards that a build still waits for; the rest any of them does by itself."""
  work = work_folder(path)
  units = storage.read_bytes(storage.join(work, 'tables', 'units.json'))
  if units is None:
    return list(range(num_shards))
  done = jobs.Job(work).done('tokenise')
  names = json.loads(units)
  return sorted({i % num_shards for i, name in enumerate(names) if name not in done})


def _are_parts(documents) -> bool:
  return (
    isinstance(documents, list | tuple)
    and bool(documents)
    and all(isinstance(part, Part) for part in documents)
  )


def _bits(documents) -> int:
  """So many that the records of a bucket are few MB, for a corpus of any size."""
  size = sum(part.num_bytes for part in documents) if _are_parts(documents) else 0
  return min(12, max(8, math.ceil(math.log2(max(1, size / (256 << 20))))))


def _job(build: _Build, documents, num_shards: int) -> jobs.Job:
  """The work folder; begun anew where it was begun for something else."""
  parts = documents if _are_parts(documents) else []
  names = '\n'.join(f'{part.name} {part.num_bytes}' for part in parts)
  settings = {
    'format': token_store.FORMAT,
    'documents': f'{len(parts)} parts, {token_store.digest(names.encode())}',
    **dataclasses.asdict(build),
  }
  del settings['path'], settings['work']  # a mounted bucket has many names
  try:
    return jobs.Job(build.work, settings)
  except errors.UserError:
    if num_shards > 1:
      raise
    jobs.Job(build.work).delete()
    return jobs.Job(build.work, settings)


def _report(progress, label: str, done: int, total: int) -> None:
  """Says nothing of stages that last a moment."""
  if label.startswith('tokenising ') or total > _LONG:
    progress(label, done, total)


def _stages(build, documents, vocabulary, job, workers, runner, progress):
  parts = documents if _are_parts(documents) else None
  label = f'{build.order.task}/{build.order.split}'
  if parts is None:
    part = Part('documents', lambda: iter(documents))
    tick = progress and (lambda done: progress(f'tokenising {label}', done, 0))
    work = functools.partial(_tokenise_all, build, vocabulary, tick)
    units = [jobs.Unit('000000', work, ('000000', (part,)), 0)]
  else:
    stored = vocabulary
    if runner is not None or jobs.is_parallel(workers):
      stored = store_runs.store_vocabulary(job.path('vocabulary'), vocabulary)
    work = functools.partial(_tokenise, build, stored, None)
    units = [
      jobs.Unit(name, work, (name, group), sum(part.num_bytes for part in group))
      for name, group in _groups(parts, build.limits.unit_bytes)
    ]
  names = json.dumps([unit.name for unit in units])
  storage.write_bytes(job.path('tables', 'units.json'), names.encode())
  units_of = lambda job: units
  if runner is not None and parts is not None:
    # Read by a worker: a cluster takes pipelines of few MB only.
    storage.write_bytes(job.path('tables', 'units'), pickle.dumps(units))
    units_of = functools.partial(_stored_units, build)
  tokenise = jobs.Stage(
    'tokenise', units_of, f'tokenising {label}', local=parts is None
  )
  return [
    tokenise,
    jobs.Stage('plan', functools.partial(_plan_units, build)),
    jobs.Stage(
      'assemble', functools.partial(_assemble_units, build), f'writing {label}'
    ),
    jobs.Stage('finish', functools.partial(_finish_units, build)),
  ]


def _stored_units(build: _Build, job: jobs.Job) -> list[jobs.Unit]:
  return pickle.loads(_table(build, 'units'))


def _groups(
  parts: Sequence[Part], unit_bytes: int
) -> Iterator[tuple[str, tuple[Part, ...]]]:
  """Units of consecutive parts: small ones together, yet enough for all cores."""
  total = sum(part.num_bytes for part in parts)
  target = min(unit_bytes, max(unit_bytes // 64, total // 64))
  group, size, number = [], 0, 0
  for part in parts:
    group.append(part)
    size += part.num_bytes or target
    if size >= target:
      yield f'{number:06d}', tuple(group)
      group, size, number = [], 0, number + 1
  if group:
    yield f'{number:06d}', tuple(group)


def _tokenise(build: _Build, vocabulary, tick, name: str, parts) -> dict[str, Any]:
  """A unit of `tokenise`."""
  return store_runs.tokenise(
    build.runs, name, parts, vocabulary, build.order, build.limits.run_bytes, tick
  )


def _tokenise_all(build: _Build, vocabulary, tick, name: str, parts) -> dict[str, Any]:
  """The only unit of `tokenise`; not done unless it found something."""
  return _checked(build, [_tokenise(build, vocabulary, tick, name, parts)])[0]


def _checked(build: _Build, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The facts of tokenising units.

  Raises:
    UserError: all of them together have no documents, or documents of two kinds.
  """
  kinds = sorted({kind for facts in units for kind in facts['kinds']})
  if len(kinds) > 1:
    raise errors.UserError(
      f"Task '{build.order.task}' mixes documents of different kinds in its split "
      f"'{build.order.split}' ({', '.join(kinds)}): all or none must have 'inputs', "
      'and be tokenised.'
    )
  if not kinds:
    raise errors.UserError(
      f"Task '{build.order.task}' has no text in its split '{build.order.split}': "
      'there is nothing to tokenise. Check where the task reads its files from.'
    )
  return units


def _plan_units(build: _Build, job: jobs.Job) -> list[jobs.Unit]:
  return [jobs.Unit('plan', _plan, (build,))]


def _plan(build: _Build) -> dict[str, Any]:
  """Adds up the runs' indices and makes the empty arrays."""
  units = jobs.Job(build.work).facts('tokenise')
  found = _checked(build, [*units.values()])
  names = ('documents', 'tokens', 'bytes', 'empty')
  counts = {name: sum(facts[name] for facts in found) for name in names}
  runs = [f'{unit}-{i}' for unit, facts in units.items() for i in range(facts['runs'])]
  buckets = np.zeros(((1 << build.order.bits) + 1, 2), np.uint64)
  for data in storage.read_ranges(build.runs, [(f'{r}.index', 0, None) for r in runs]):
    buckets += np.frombuffer(data, '<u8').reshape(buckets.shape)
  facts = {**counts, 'has_inputs': any('inputs' in facts['kinds'] for facts in found)}
  facts['languages'] = _sum(facts['languages'] for facts in found)
  token_store.create_arrays(build.path, _lengths(facts), build.layout)
  storage.write_bytes(
    storage.join(build.tables, 'runs.json'), json.dumps(runs).encode()
  )
  storage.write_bytes(storage.join(build.tables, 'buckets'), buckets.tobytes())
  return facts


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
  total: collections.Counter[str] = collections.Counter()
  for some in counts:
    total.update(some)
  return dict(total)


def _lengths(facts: dict[str, Any]) -> dict[str, int]:
  """How long each array is."""
  count = facts['documents']
  lengths = {'tokens': facts['tokens'], 'offsets': count + 1, 'hashes': count}
  return lengths | ({'inputs_lengths': count} if facts['has_inputs'] else {})


def _assemble_units(build: _Build, job: jobs.Job) -> list[jobs.Unit]:
  facts = job.facts_of('plan', 'plan')
  layout, lengths = build.layout, _lengths(facts)
  step = layout.tokens * build.limits.unit_files
  units = [
    jobs.Unit(f'tokens-{i:08d}', _write_tokens, (build, facts, start, stop), 4 * step)
    for i, (start, stop) in enumerate(_ranges(lengths.pop('tokens'), step))
  ]
  step = max(getattr(layout, name) for name in lengths)
  units += [
    jobs.Unit(f'documents-{i:08d}', _write_documents, (build, facts, start, stop), step)
    for i, (start, stop) in enumerate(_ranges(lengths['offsets'], step))
  ]
  return units


def _ranges(length: int, step: int) -> list[tuple[int, int]]:
  return [(start, min(start + step, length)) for start in range(0, length, step)]


def _slice(build: _Build, column: int, start: int, stop: int) -> store_runs.Slice:
  """The documents that places start..stop-1 lie in, and some on both sides."""
  runs = json.loads(_table(build, 'runs.json'))
  buckets = np.frombuffer(_table(build, 'buckets'), np.uint64).reshape(-1, 2)
  buckets = buckets.astype(np.int64)
  return store_runs.read_slice(build.runs, runs, buckets, column, start, stop)


def _table(build: _Build, name: str) -> bytes:
  (data,) = storage.read_ranges(build.tables, [(name, 0, None)])
  return data


def _write_tokens(build: _Build, facts, start: int, stop: int) -> dict[str, Any]:
  """A unit of `assemble`: tokens start..stop-1, whole files of them."""
  found = _slice(build, 1, start, stop)
  begins = found.ends - found.records['length']
  wanted = slice(
    int(np.searchsorted(found.ends, start, 'right')),
    int(np.searchsorted(begins, stop, 'left')),
  )
  found, begins = found.among(wanted), begins[wanted]
  # A document may reach beyond the range on either side.
  cut = np.maximum(start - begins, 0)
  places = found.start + cut
  lengths = np.minimum(found.ends, stop) - begins - cut
  ids, places = store_runs.read_ids(build.runs, found, places, lengths)
  ends = np.cumsum(lengths)
  array = token_store.open_array(build.path, 'tokens', facts['tokens'], build.layout)
  digests = []
  for a, b in _ranges(stop - start, build.layout.tokens):
    first, last = np.searchsorted(ends, [a, b - 1], 'right')
    some = slice(int(first), int(last) + 1)
    skip = np.maximum(a - (ends[some] - lengths[some]), 0)
    count = np.minimum(ends[some], b) - (ends[some] - lengths[some]) - skip
    values = store_runs.gather(ids, places[some] + skip, count)
    digests.append(_write(build, array, start + a, values))
  return {'tokens': digests}


def _write_documents(build: _Build, facts, start: int, stop: int) -> dict[str, Any]:
  """A unit of `assemble`: entries start..stop-1 of `offsets` and its like."""
  count = facts['documents']
  found = _slice(build, 0, start, min(stop, count))
  found = found.among(slice(start - found.first, min(stop, count) - found.first))
  begins = found.ends - found.records['length']
  if stop > count:
    begins = np.append(begins, facts['tokens'])
  values = {'offsets': begins.astype(np.uint64)}
  values['hashes'] = found.records['hash']
  values['inputs_lengths'] = found.records['inputs'].astype(np.uint32)
  digests = {}
  for name, length in _lengths(facts).items():
    if name in values:
      array = token_store.open_array(build.path, name, length, build.layout)
      digests[name] = [
        _write(build, array, start + a, values[name][a:b])
        for a, b in _ranges(len(values[name]), getattr(build.layout, name))
      ]
  return digests


def _write(build: _Build, array, start: int, values: np.ndarray) -> str:
  """Writes one whole file of an array; returns the digest of its contents."""
  values = np.ascontiguousarray(values)
  with storage.writing(build.path):
    # TensorStore fsyncs the file, renames it, and fsyncs the folder.
    array[start : start + len(values)].write(values).result()
  return token_store.digest(values)


def _finish_units(build: _Build, job: jobs.Job) -> list[jobs.Unit]:
  return [jobs.Unit('manifest', _finish, (build,))]


def _finish(build: _Build) -> dict[str, Any]:
  """Writes the manifest."""
  job = jobs.Job(build.work)
  facts = job.facts_of('plan', 'plan')
  units = job.facts('assemble')
  digests: dict[str, list[str]] = {name: [] for name in _lengths(facts)}
  for name in sorted(units, key=lambda name: int(name.rpartition('-')[2])):
    for array, found in units[name].items():
      digests[array] += found
  for name, found in digests.items():
    files = storage.list_names(storage.join(build.path, name))
    if len(files) - 1 != len(found):  # zarr.json
      raise errors.Failure(
        f'{storage.join(build.path, name)} has {len(files) - 1} files, {len(found)} '
        f'were written: delete {build.work} and run again.'
      )
  manifest = Manifest(
    task=build.order.task,
    split=build.order.split,
    vocabulary_hash=build.vocabulary_hash,
    vocab_size=build.vocab_size,
    eos_id=build.eos_id,
    seed=build.order.seed,
    num_tokens=facts['tokens'],
    num_documents=facts['documents'],
    num_bytes=facts['bytes'],
    num_empty=facts['empty'],
    has_inputs=facts['has_inputs'],
    languages=facts['languages'],
    checksums={n: token_store.checksum(found) for n, found in digests.items()},
  )
  storage.write_bytes(storage.join(build.path, 'manifest.json'), manifest.to_json())
  return {}

"""One sub-corpus, from raw files to files of documents: read, refine, deduplicate.

Its stages (`jobs.Stage`) are:

  read         one unit per share of the raw files: reader, then steps; kept documents
               and the hashes of their texts go to the work folder, what was dropped is
               counted by reason
  duplicates   exact duplicates, by ranges of hashes
  near ...     near-duplicates, where asked for (near_duplicates)
  write        one unit per share: what is left, split into training and validation
               files, with the facts that the report is made of

and then manifest.json is written, which is what makes it a sub-corpus.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import documents, exact_duplicates, facts, jobs, near_duplicates

_SHARE_BYTES = 64 << 20  # of raw files that one unit reads
_EXAMPLES = 3  # of dropped documents that are kept for each reason and share
_EXCERPT = 300  # characters of them
SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Stream:
  """One kind of raw files of a sub-corpus and what is done to its documents.

  Attributes:
    reader: has `parts(folder)`; see `readers`.
    steps: called in turn with each document; see `documents.Dropped`.
    folder: where its files lie below the data directory; '' is that directory itself.
    optional: whether the sub-corpus can do without it, if its folder is not there.
  """

  reader: Any
  steps: Sequence[Any] = ()
  folder: str = ''
  optional: bool = False


@dataclasses.dataclass(frozen=True)
class SubCorpus:
  """What a sub-corpus is made of.

  Attributes:
    name: its folder below CORPUS_DIR and the name of its task.
    streams: its kinds of raw files.
    near_duplicates: a `near_duplicates.Options`, or None to keep near-duplicates.
    validation_share: of documents held out at random, by a hash of their text.
    max_broken: broken records that are tolerated, as a share of all records.
    salt: of the random split; another salt is another draw.
  """

  name: str
  streams: Sequence[Stream]
  near_duplicates: Any = None
  validation_share: float = 0.001
  max_broken: float = 0.01
  salt: str = 'split'

  def parts(self, data_dir: str) -> list[documents.Part]:
    """The raw files, in shares of about 64 MB that one worker reads each.

    Raises:
      UserError: a folder is missing or has nothing to read.
    """
    shares = []
    for number, stream in enumerate(self.streams):
      folder = os.path.join(data_dir, stream.folder)
      if stream.optional and not os.path.isdir(folder):
        continue
      prefix = f'{stream.folder}/' if len(self.streams) > 1 else ''
      for i, group in enumerate(_grouped(stream.reader.parts(folder))):
        read = functools.partial(_refined, group, tuple(stream.steps), prefix)
        size = sum(part.num_bytes for part in group)
        shares.append(documents.Part(f'{number}-{i:05d}', read, size))
    if not shares:
      folders = ', '.join(stream.folder or '.' for stream in self.streams)
      raise errors.UserError(
        f'There is nothing to make {self.name} from in {data_dir}: it has none of the '
        f'folders {folders}.'
      )
    return shares


def _grouped(parts) -> Iterator[tuple]:
  """Neighbouring small parts together, so that a million small files are few units."""
  group, size = [], 0
  for part in parts:
    if group and size + part.num_bytes > _SHARE_BYTES:
      yield tuple(group)
      group, size = [], 0
    group.append(part)
    size += part.num_bytes
  if group:
    yield tuple(group)


@dataclasses.dataclass(frozen=True)
class _Refined:
  """A record and what became of it."""

  id: str
  num_bytes: int
  excerpt: str
  outcomes: list


def _refined(parts, steps, prefix: str):
  """A `_Refined`, or a `Broken`, for every record of some parts."""
  for document in itertools.chain.from_iterable(part.read() for part in parts):
    if isinstance(document, documents.Broken):
      yield document
      continue
    document.id = prefix + document.id
    text = document.text = documents.clean(document.text)
    yield _Refined(
      document.id, len(text.encode()), text[:_EXCERPT], _through(document, steps)
    )


def _through(document, steps) -> list:
  """What is left of a document after all steps: documents, or one `Dropped`."""
  if not steps:
    return [document]
  outcome = steps[0](document)
  if isinstance(outcome, documents.Dropped):
    return [outcome]
  kept = outcome if isinstance(outcome, list) else [outcome]
  return [last for one in kept for last in _through(one, steps[1:])]


def stages(corpus: SubCorpus, parts, work: str, output: str) -> list[jobs.Stage]:
  """The stages that make `corpus` from `parts` (of `SubCorpus.parts`).

  Args:
    corpus: what to make.
    parts: its raw files.
    work: a folder for what is only needed on the way.
    output: the folder of the finished files.
  """
  names = [part.name for part in parts]

  def kept(part: int) -> str:
    return os.path.join(work, 'kept', f'{names[part]}.jsonl.zst')

  def hashes(part: int) -> str:
    return os.path.join(work, 'hashes', f'{names[part]}.npy')

  def read_units(job):
    return [
      jobs.Unit(part.name, _read, (part, kept(i), hashes(i)), part.num_bytes)
      for i, part in enumerate(parts)
    ]

  def num_kept(job) -> int:
    done = job.facts('read')
    _check_broken(corpus, done.values())
    return sum(facts['kept'] for facts in done.values())

  every = range(len(parts))
  duplicates = os.path.join(work, 'places')
  chain = [
    jobs.Stage('read', read_units, f'reading {corpus.name}'),
    exact_duplicates.stage(
      duplicates, lambda job: [hashes(i) for i in every], num_kept
    ),
  ]
  drops = functools.partial(exact_duplicates.dropped_of, duplicates)
  source, near = kept, None
  if corpus.near_duplicates is not None:
    unique = [os.path.join(work, 'unique', f'{name}.jsonl.zst') for name in names]
    near = os.path.join(work, 'near')

    def unique_units(job):
      return [
        jobs.Unit(names[i], _unique, (kept(i), i, drops, unique[i])) for i in every
      ]

    chain.append(jobs.Stage('unique', unique_units, 'leaving out duplicates'))
    chain += near_duplicates.stages(unique, near, corpus.near_duplicates)
    source = unique.__getitem__
    drops = None

  def write_units(job):
    return [
      jobs.Unit(
        names[i], _write, (source(i), i, drops, near, output, len(parts), corpus)
      )
      for i in every
    ]

  return [*chain, jobs.Stage('write', write_units, f'writing {corpus.name}')]


def _check_broken(corpus: SubCorpus, done) -> None:
  broken = sum(facts['broken'] for facts in done)
  records = broken + sum(facts['read'] for facts in done)
  if broken > corpus.max_broken * records:
    raise errors.Failure(
      f'{broken:,} of {records:,} records of {corpus.name} are broken, more than '
      f'SubCorpus.max_broken = {corpus.max_broken:g} allows: mend the files named '
      'above, or raise it.'
    )


def _read(part, kept: str, hashes: str) -> dict[str, Any]:
  """Unit of 'read'."""
  counts = {'read': 0, 'read_bytes': 0, 'kept': 0, 'kept_bytes': 0, 'broken': 0}
  dropped: dict[str, dict[str, Any]] = {}
  places, hash_file = [], exact_duplicates.HashFile()
  with documents.Writer(kept) as writer:
    for record in part.read():
      if isinstance(record, documents.Broken):
        counts['broken'] += 1
        if len(places) < 2 * _EXAMPLES:
          places.append(f'{record.place}: {record.reason}')
        continue
      counts['read'] += 1
      counts['read_bytes'] += record.num_bytes
      for outcome in record.outcomes:
        if isinstance(outcome, documents.Dropped):
          _count_dropped(dropped, outcome.reason, record)
          continue
        outcome.text = documents.clean(outcome.text)
        hash_file.add(outcome.hash())
        writer.add(outcome)
        counts['kept'] += 1
        counts['kept_bytes'] += len(outcome.text.encode())
  hash_file.write(hashes)
  return {**counts, 'dropped': dropped, 'broken_places': places}


def _count_dropped(dropped, reason: str, record: _Refined) -> None:
  entry = dropped.setdefault(reason, {'documents': 0, 'bytes': 0, 'examples': []})
  entry['documents'] += 1
  entry['bytes'] += record.num_bytes
  if len(entry['examples']) < _EXAMPLES:
    entry['examples'].append({'id': record.id, 'text': record.excerpt})


def _unique(source: str, part: int, drops, target: str) -> dict[str, int]:
  """Unit of 'unique': the documents of a share without the exact duplicates."""
  gone = drops(part)
  with documents.Writer(target) as writer:
    for ordinal, document in enumerate(documents.read(source)):
      if ordinal not in gone:
        writer.add(document)
  return {'documents': writer.num_documents}


def _write(source, part, drops, near, output, num_parts, corpus) -> dict[str, Any]:
  """Unit of 'write'."""
  gone = drops(part) if drops else set()
  near_gone = near_duplicates.dropped(near, part) if near else {}
  tally, near_examples = facts.Tally(), []
  files = {
    split: f'{split}-{part:05d}-of-{num_parts:05d}.jsonl.zst' for split in SPLITS
  }
  counts = {split: {'documents': 0, 'bytes': 0} for split in SPLITS}
  with (
    documents.Writer(os.path.join(output, files['train'])) as train,
    documents.Writer(os.path.join(output, files['validation'])) as validation,
  ):
    writers = {'train': train, 'validation': validation}
    for ordinal, document in enumerate(documents.read(source)):
      if ordinal in gone:
        continue
      if document.id in near_gone:
        if len(near_examples) < _EXAMPLES:
          near_examples.append([document.id, near_gone[document.id]])
        continue
      held = documents.uniform(corpus.salt, document.hash().hex())
      split = 'validation' if held < corpus.validation_share else 'train'
      writers[split].add(document)
      counts[split]['documents'] += 1
      counts[split]['bytes'] += len(document.text.encode())
      tally.add(document)
  return {
    'files': {
      split: {**counts[split], 'name': files[split], 'checksum': writer.checksum}
      for split, writer in writers.items()
    },
    'duplicates': len(gone),
    'near_duplicates': len(near_gone),
    'near_duplicate_examples': near_examples,
    'tally': tally.to_json(),
  }


def settings(corpus: SubCorpus, parts) -> dict[str, Any]:
  """What the outcome depends on, for `jobs.Job` and the manifest."""
  inputs = json.dumps([(part.name, part.num_bytes) for part in parts]).encode()
  return {
    'name': corpus.name,
    'streams': [repr(stream) for stream in corpus.streams],
    'near_duplicates': repr(corpus.near_duplicates),
    'validation_share': corpus.validation_share,
    'max_broken': corpus.max_broken,
    'salt': corpus.salt,
    'inputs': hashlib.blake2b(inputs, digest_size=8).hexdigest(),
  }


def finish(corpus: SubCorpus, job: jobs.Job, parts, output: str, settings):
  """Writes the facts, the report and, last, the manifest of a sub-corpus.

  Returns:
    the `processed.Manifest`.
  """
  counts = dict.fromkeys(
    ('read', 'read_bytes', 'kept', 'kept_bytes', 'broken', 'duplicates'), 0
  )
  dropped: dict[str, Any] = {}
  # In the order of the parts, so that it does not matter who did which.
  for part in parts:
    done = job.facts_of('read', part.name)
    for key in counts:
      counts[key] += done.get(key, 0)
    for reason, entry in done['dropped'].items():
      total = dropped.setdefault(reason, {'documents': 0, 'bytes': 0, 'examples': []})
      total['documents'] += entry['documents']
      total['bytes'] += entry['bytes']
      total['examples'] = (total['examples'] + entry['examples'])[:_EXAMPLES]
  written = [job.facts_of('write', part.name) for part in parts]
  found = job.facts('duplicates').values()
  counts['duplicates'] = sum(facts['duplicates'] for facts in found)
  counts['near_duplicates'] = sum(facts['near_duplicates'] for facts in written)
  tally = facts.Tally()
  for unit in written:
    tally.merge(facts.Tally.from_json(unit['tally']))
  manifest = processed.Manifest(
    name=corpus.name,
    settings=settings,
    splits={split: _split(written, split) for split in SPLITS},
    counts=counts,
    dropped=dropped,
  )
  corpus_report.write(output, manifest, tally)
  processed.write_manifest(output, manifest)
  return manifest


def _split(written, split: str) -> dict[str, Any]:
  files = [unit['files'][split] for unit in written]
  return {
    'documents': sum(file['documents'] for file in files),
    'bytes': sum(file['bytes'] for file in files),
    'files': files,
  }

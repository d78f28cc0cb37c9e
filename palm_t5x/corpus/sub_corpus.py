"""One sub-corpus, from raw files to files of documents: read, refine, deduplicate.

Its stages (`jobs.Stage`) are:

  read         one unit per share of the raw files: reader, then steps; kept documents
               and the hashes of their texts go to the work folder, what was dropped is
               counted by reason
  duplicates   exact duplicates, by ranges of hashes
  near ...     near-duplicates, where asked for (near_duplicates)
  write        one unit per share: what is left, split into training and validation
               files, with the facts that the report is made of
  finish       the report and, last, manifest.json, which makes it a sub-corpus
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import (
  corpus_report,
  documents,
  exact_duplicates,
  facts,
  jobs,
  near_duplicates,
  processed,
  quality_report,
  records,
)

_EXAMPLES = 3  # of dropped documents that are kept for each reason and share
_EXCERPT = 300  # characters of them
_DRAW = 'split_draw'  # in a document's meta, until it is written
SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Stream:
  """One kind of raw files of a sub-corpus and what is done to its documents.

  Attributes:
    reader: has `parts(folder)`; see `readers`.
    steps: called in turn with each document; see `documents.Dropped`. None is no step.
    folder: where its files lie below the data directory; '' is that directory itself.
    optional: whether the sub-corpus can do without it, if its folder is not there.
  """

  reader: Any
  steps: Sequence[Any] = ()
  folder: str = ''
  optional: bool = False

  @property
  def chain(self) -> tuple:
    """The steps, without those that are None."""
    return tuple(step for step in self.steps if step is not None)


@dataclasses.dataclass(frozen=True)
class SubCorpus:
  """What a sub-corpus is made of.

  Attributes:
    name: its folder below CORPUS_DIR and the name of its task.
    streams: its kinds of raw files.
    near_duplicates: a `near_duplicates.Options`, or None to keep near-duplicates.
    validation_share: of records held out at random, by a hash of their text, with all
      documents that are made of them; one document at least, unless it is 0.
    max_broken, max_broken_share: so many broken records of a share of the raw files
      are passed over, or so large a part of what was read of it, if that is more.
    salt: of the random split; another salt is another draw.
  """

  name: str
  streams: Sequence[Stream]
  near_duplicates: Any = None
  validation_share: float = 0.001
  max_broken: int = 100
  max_broken_share: float = 0.01
  salt: str = 'split'

  def __post_init__(self):
    if not self.name or not self.name.replace('_', '').replace('-', '').isalnum():
      raise errors.UserError(
        f'SubCorpus.name = {self.name!r}: it names a folder; letters, digits, - and _.'
      )
    if not 0 <= self.validation_share < 1:
      raise errors.UserError(
        f'VALIDATION_SHARE = {self.validation_share}: it is a share of the documents, '
        '0 or more and below 1.'
      )
    if self.max_broken < 0 or self.max_broken_share < 0:
      raise errors.UserError(
        f'MAX_BROKEN = {self.max_broken}, MAX_BROKEN_SHARE = {self.max_broken_share}: '
        'neither can be negative.'
      )
    if self.near_duplicates is not None and not hasattr(
      self.near_duplicates, 'settings'
    ):
      raise errors.UserError(
        f'NEAR_DUPLICATES = {self.near_duplicates!r}: it is None or '
        "'@near_duplicates.Options()'."
      )

  def shares(self, data_dir: str) -> list['Share']:
    """The raw files, in shares that one worker reads each.

    Raises:
      UserError: a folder is missing or has nothing to read.
    """
    found = []
    for number, stream in enumerate(self.streams):
      folder = os.path.join(data_dir, stream.folder)
      if stream.optional and not os.path.isdir(folder):
        continue
      prefix = f'{stream.folder or number}/' if len(self.streams) > 1 else ''
      found += [
        Share(f'{number}-{i:05d}', part, stream.chain, prefix)
        for i, part in enumerate(stream.reader.parts(folder))
      ]
    if not found:
      folders = ', '.join(stream.folder or '.' for stream in self.streams)
      raise errors.UserError(
        f'There is nothing to make {self.name} from in {data_dir}: it has none of the '
        f'folders {folders}.'
      )
    return found


@dataclasses.dataclass(frozen=True)
class Share:
  """A part of the raw files, and what is done to its documents."""

  name: str
  part: documents.Part
  steps: tuple
  prefix: str  # of the documents' ids


def _through(document, steps) -> list:
  """What is left of a document after all steps: documents, or one `Dropped`."""
  if not steps:
    return [document]
  outcome = steps[0](document)
  if isinstance(outcome, documents.Dropped):
    return [outcome]
  kept = outcome if isinstance(outcome, list) else [outcome]
  last = [end for one in kept for end in _through(one, steps[1:])]
  return last or [documents.Dropped('nothing left')]


def stages(corpus: SubCorpus, shares, work: str, output: str) -> list[jobs.Stage]:
  """The stages that make `corpus` from its `shares`.

  Args:
    corpus: what to make.
    shares: of `SubCorpus.shares`.
    work: a folder for what is only needed on the way.
    output: the folder of the finished files.
  """
  names, every = [share.name for share in shares], range(len(shares))

  def path(kind: str, ending: str, i: int) -> str:
    return os.path.join(work, kind, names[i] + ending)

  kept = functools.partial(path, 'kept', '.jsonl.zst')
  hashes = functools.partial(path, 'hashes', '.npy')
  unique = functools.partial(path, 'unique', '.jsonl.zst')
  places, near = os.path.join(work, 'places'), os.path.join(work, 'near')

  def read(job):
    del job
    return [
      jobs.Unit(names[i], _read, (share, corpus, kept(i), hashes(i)), _size(share))
      for i, share in enumerate(shares)
    ]

  def num_kept(job) -> int:
    return sum(facts['kept'] for facts in _each(job, 'read', shares))

  def unique_units(job):
    del job
    return [
      jobs.Unit(names[i], _unique, (kept(i), places, i, unique(i))) for i in every
    ]

  def write(job):
    del job
    limit = corpus.validation_share
    args = (corpus, shares, work, output)
    return [jobs.Unit(names[i], _write, (*_write_args(i, *args), limit)) for i in every]

  chain = [
    jobs.Stage('read', read, f'reading {corpus.name}'),
    exact_duplicates.stage(places, lambda job: [hashes(i) for i in every], num_kept),
  ]
  if corpus.near_duplicates is not None:
    chain.append(jobs.Stage('unique', unique_units, 'leaving out duplicates'))
    files = [unique(i) for i in every]
    chain += near_duplicates.stages(files, near, corpus.near_duplicates)

  def finish(job):
    args = (corpus, job.folder, tuple(shares), output)
    return [jobs.Unit('all', _finish, args)]

  return [
    *chain,
    jobs.Stage('write', write, f'writing {corpus.name}'),
    jobs.Stage('finish', finish, 'reporting'),
  ]


def _each(job: jobs.Job, stage: str, shares: Sequence[Share]) -> Iterator[Any]:
  """The facts of each share, one at a time: all together they may be large."""
  return (job.facts_of(stage, share.name) for share in shares)


def _size(share: Share) -> int:
  return max(share.part.num_bytes, 1)


def _read(share: Share, corpus: SubCorpus, kept: str, hashes: str) -> dict[str, Any]:
  """Unit of 'read'."""
  counts, hash_file, kept_bytes = records.Counts(), exact_duplicates.HashFile(), 0
  dropped: dict[str, dict[str, Any]] = {}
  scores = quality_report.Tally()
  source = records.tolerant(
    share.part.read(),
    counts,
    max_broken=corpus.max_broken,
    max_broken_share=corpus.max_broken_share,
  )
  with documents.Writer(kept) as writer:
    for document in source:
      document.id = share.prefix + document.id
      text = document.text = documents.clean(document.text)
      # Drawn for the record: what is made of one record stays on one side.
      draw = documents.uniform(corpus.salt, document.hash().hex())
      outcomes = _through(document, share.steps)
      scores.add(document, not isinstance(outcomes[0], documents.Dropped))
      gone = {o.reason for o in outcomes if isinstance(o, documents.Dropped)}
      for reason in sorted(gone):
        _count_dropped(dropped, reason, document.id, text)
      for outcome in outcomes:
        if isinstance(outcome, documents.Dropped):
          continue
        outcome.text = documents.clean(outcome.text)
        hash_file.add(outcome.hash())
        outcome.meta[_DRAW] = draw
        writer.add(outcome)
        kept_bytes += len(outcome.text.encode())
  hash_file.write(hashes)
  return {
    'counts': counts.facts(),
    'kept': writer.num_documents,
    'kept_bytes': kept_bytes,
    'dropped': dropped,
    'scores': scores.facts(),
  }


def _count_dropped(dropped, reason: str, name: str, text: str) -> None:
  entry = dropped.setdefault(reason, {'documents': 0, 'bytes': 0, 'examples': []})
  entry['documents'] += 1
  entry['bytes'] += len(text.encode())
  if len(entry['examples']) < _EXAMPLES:
    entry['examples'].append({'id': name, 'text': text[:_EXCERPT]})


def _unique(source: str, places: str, part: int, target: str) -> dict[str, int]:
  """Unit of 'unique': the documents of a share without the exact duplicates."""
  gone = exact_duplicates.dropped_of(places, part)
  with documents.Writer(target) as writer:
    for ordinal, document in enumerate(documents.read(source)):
      if ordinal not in gone:
        writer.add(document)
  return {'documents': writer.num_documents}


def _write_args(i: int, corpus: SubCorpus, shares, work: str, output: str) -> tuple:
  """Arguments of `_write` for share i, but for the last."""
  name = f'{shares[i].name}.jsonl.zst'
  if corpus.near_duplicates is None:
    places = os.path.join(work, 'places')
    return os.path.join(work, 'kept', name), i, places, None, output, len(shares)
  # Near-duplicates were looked for among the files without exact ones.
  near = os.path.join(work, 'near')
  return os.path.join(work, 'unique', name), i, None, near, output, len(shares)


def _write(source, part, places, near, output, num_parts, limit) -> dict[str, Any]:
  """Unit of 'write'; `places` or `near` is None where it has been applied already.

  Documents whose draw is below `limit` are held out.
  """
  gone = exact_duplicates.dropped_of(places, part) if places else set()
  near_gone = near_duplicates.dropped(near, part) if near else {}
  tally, near_examples, smallest = facts.Tally(), [], 1.0
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
      if ordinal in near_gone:
        if len(near_examples) < _EXAMPLES:
          near_examples.append(list(near_gone[ordinal]))
        continue
      draw = document.meta.pop(_DRAW)
      smallest = min(smallest, draw)
      split = 'validation' if draw < limit else 'train'
      writers[split].add(document)
      counts[split]['documents'] += 1
      counts[split]['bytes'] += len(document.text.encode())
      tally.add(document)
  return {
    'files': {
      split: {**counts[split], 'name': files[split], 'checksum': writer.checksum}
      for split, writer in writers.items()
    },
    'near_duplicates': len(near_gone),
    'near_duplicate_examples': near_examples,
    'tally': tally.to_json(),
    'smallest_draw': smallest,
  }


def settings(corpus: SubCorpus, shares: Sequence[Share]) -> dict[str, Any]:
  """What the outcome depends on, for `jobs.Job` and the manifest."""
  inputs = json.dumps([(s.name, s.part.num_bytes, _pieces(s.part)) for s in shares])
  near = corpus.near_duplicates
  return {
    'name': corpus.name,
    'streams': [_settings(stream) for stream in corpus.streams],
    'near_duplicates': None if near is None else near.settings(),
    'validation_share': corpus.validation_share,
    'salt': corpus.salt,
    'inputs': hashlib.blake2b(inputs.encode(), digest_size=8).hexdigest(),
  }


def _pieces(part: documents.Part) -> str:
  """What a part reads, wherever the raw files lie."""
  args = getattr(part.read, 'args', ())
  kept = [a for a in args if not (isinstance(a, str) and os.path.isabs(a))]
  return f'{part.name} {kept!r}'


def _step_settings(step) -> Any:
  # What a step has learned counts, not where that lies.
  if hasattr(step, 'settings'):
    return step.settings()
  if inspect.isfunction(step):
    return f'{step.__module__}.{step.__qualname__}'
  if ' at 0x' in repr(step):
    raise errors.UserError(
      f'The step {step!r} does not say what it is: make it a frozen dataclass, so that '
      'two of them can be told apart.'
    )
  return repr(step)


def _settings(stream: Stream) -> dict[str, Any]:
  steps = [_step_settings(step) for step in stream.chain]
  return {'reader': repr(stream.reader), 'folder': stream.folder, 'steps': steps}


def _hold_one_out(corpus: SubCorpus, job: jobs.Job, shares, output) -> dict[str, Any]:
  """Share -> its new facts, where nothing was held out by chance: one share at most."""
  held, smallest, part = 0, 1.0, 0
  for i, unit in enumerate(_each(job, 'write', shares)):
    held += unit['files']['validation']['documents']
    if unit['smallest_draw'] < smallest:
      smallest, part = unit['smallest_draw'], i
  if held or not corpus.validation_share or smallest == 1.0:
    return {}
  args = _write_args(part, corpus, shares, job.folder, output)
  return {shares[part].name: _write(*args, math.nextafter(smallest, 1.0))}


def _finish(corpus, folder: str, shares: Sequence[Share], output: str) -> None:
  """Unit of 'finish'."""
  job = jobs.Job(folder)
  again = _hold_one_out(corpus, job, shares, output)
  counts, tally = records.Counts(), facts.Tally()
  scores, kept = quality_report.Tally(), 0
  dropped: dict[str, Any] = {}
  # In the order of the shares, so that it does not matter who did which.
  for unit in _each(job, 'read', shares):
    counts.merge(records.Counts(**unit['counts']))
    scores.merge(quality_report.Tally(**unit['scores']))
    kept += unit['kept']
    for reason, entry in unit['dropped'].items():
      total = dropped.setdefault(reason, {'documents': 0, 'bytes': 0, 'examples': []})
      total['documents'] += entry['documents']
      total['bytes'] += entry['bytes']
      total['examples'] = (total['examples'] + entry['examples'])[:_EXAMPLES]
  splits = {split: {'documents': 0, 'bytes': 0, 'files': []} for split in SPLITS}
  near, near_examples = 0, []
  for share in shares:
    unit = again.get(share.name) or job.facts_of('write', share.name)
    tally.merge(facts.Tally.from_json(unit['tally']))
    near += unit['near_duplicates']
    near_examples = (near_examples + unit['near_duplicate_examples'])[:_EXAMPLES]
    for split, file in unit['files'].items():
      splits[split]['files'].append(file)
      for key in ('documents', 'bytes'):
        splits[split][key] += file[key]
  if not sum(split['documents'] for split in splits.values()):
    why = max(dropped, key=lambda reason: dropped[reason]['documents'], default=None)
    raise errors.UserError(
      f'Nothing is left of the {counts.documents:,} records of {corpus.name}, and '
      f'{sum(counts.broken.values()):,} broken ones'
      f'{f" (most were dropped for: {why})" if why else ""}: check the files, the '
      'steps, and the names of their fields.'
    )
  listed = {file['name'] for split in splits.values() for file in split['files']}
  for name in os.listdir(output):  # what a kill, or another number of shares, left
    stale = name.endswith('.jsonl.zst') and name not in listed
    if stale or name.endswith('.tmp'):
      os.unlink(os.path.join(output, name))
  manifest = processed.Manifest(
    name=corpus.name,
    settings=settings(corpus, shares),
    splits=splits,
    counts={
      'read': counts.documents,
      'read_bytes': counts.text_bytes,
      'broken': sum(counts.broken.values()),
      'ignored': sum(counts.ignored.values()),
      'kept': kept,
      'duplicates': sum(f['duplicates'] for f in job.facts('duplicates').values()),
      'near_duplicates': near,
    },
    broken={**counts.broken, **counts.ignored},
    broken_places=counts.places,
    dropped=dropped,
    near_duplicate_examples=near_examples,
  )
  corpus_report.write(output, manifest, tally, scores)
  processed.write_manifest(output, manifest)

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
import json
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
    validation_share: of documents held out at random, by a hash of their text; one at
      least, unless it is 0.
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
    draws = (facts['smallest_draw'] for facts in _each(job, 'read', shares))
    least = min(draws, default=0.0)
    limit = max(corpus.validation_share, least) if corpus.validation_share else -1.0
    draw = functools.partial(_split_of, corpus, limit)
    # Near-duplicates were looked for among the files without exact ones.
    how = (
      (kept, places, None) if corpus.near_duplicates is None else (unique, None, near)
    )
    return [
      jobs.Unit(names[i], _write, (how[0](i), i, *how[1:], output, len(shares), draw))
      for i in every
    ]

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
  scores, smallest = quality_report.Tally(), 1.0
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
      outcomes = _through(document, share.steps)
      scores.add(document, not isinstance(outcomes[0], documents.Dropped))
      for outcome in outcomes:
        if isinstance(outcome, documents.Dropped):
          _count_dropped(dropped, outcome.reason, document.id, text)
          continue
        outcome.text = documents.clean(outcome.text)
        text_hash = outcome.hash()
        hash_file.add(text_hash)
        smallest = min(smallest, _draw(corpus, text_hash))
        writer.add(outcome)
        kept_bytes += len(outcome.text.encode())
  hash_file.write(hashes)
  return {
    'counts': counts.facts(),
    'kept': writer.num_documents,
    'kept_bytes': kept_bytes,
    'dropped': dropped,
    'scores': scores.facts(),
    'smallest_draw': smallest,
  }


def _draw(corpus: SubCorpus, text_hash: bytes) -> float:
  """What decides about a document's split: below a limit it is held out."""
  return documents.uniform(corpus.salt, text_hash.hex())


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


def _split_of(corpus: SubCorpus, limit: float, document: documents.Document) -> str:
  return 'validation' if _draw(corpus, document.hash()) <= limit else 'train'


def _write(source, part, places, near, output, num_parts, split_of) -> dict[str, Any]:
  """Unit of 'write'; `places` or `near` is None where it has been applied already."""
  gone = exact_duplicates.dropped_of(places, part) if places else set()
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
      split = split_of(document)
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
  }


def settings(corpus: SubCorpus, shares: Sequence[Share]) -> dict[str, Any]:
  """What the outcome depends on, for `jobs.Job` and the manifest."""
  inputs = json.dumps([(s.name, s.part.name, s.part.num_bytes) for s in shares])
  near = corpus.near_duplicates
  return {
    'name': corpus.name,
    'streams': [_settings(stream) for stream in corpus.streams],
    'near_duplicates': None if near is None else near.settings(),
    'validation_share': corpus.validation_share,
    'salt': corpus.salt,
    'inputs': hashlib.blake2b(inputs.encode(), digest_size=8).hexdigest(),
  }


def _settings(stream: Stream) -> dict[str, Any]:
  # What a step has learned counts, not where that lies.
  steps = [
    step.settings() if hasattr(step, 'settings') else repr(step)
    for step in stream.chain
  ]
  return {'reader': repr(stream.reader), 'folder': stream.folder, 'steps': steps}


def _finish(corpus, folder: str, shares: Sequence[Share], output: str) -> None:
  """Unit of 'finish'."""
  job = jobs.Job(folder)
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
  for unit in _each(job, 'write', shares):
    tally.merge(facts.Tally.from_json(unit['tally']))
    near += unit['near_duplicates']
    near_examples = (near_examples + unit['near_duplicate_examples'])[:_EXAMPLES]
    for split, file in unit['files'].items():
      splits[split]['files'].append(file)
      for key in ('documents', 'bytes'):
        splits[split][key] += file[key]
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

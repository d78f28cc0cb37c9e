"""Sorted runs: what tokenising leaves on disk until a token store is put together.

A run holds as many documents as fit in memory, in the store's order: <name>.records
(one `RECORD` per document), <name>.tokens (their ids, one after the other) and
<name>.index (how many documents and tokens come before each bucket, where a bucket is
the documents whose keys share their top bits). What lies between two places of the
store is therefore one slice of each run, which can be read without the rest.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import codec, documents, storage, token_store

RECORD = np.dtype(
  [
    ('key', '<u8'),
    ('hash', 'u1', (16,)),
    ('length', '<u4'),  # tokens, inputs and end included
    ('inputs', '<u4'),  # of them inputs
  ]
)
_ID_BYTES = 4
_BATCH_BYTES = 4 << 20  # text tokenised in one call
_GATHER = 1 << 20  # tokens put into order at a time


@dataclasses.dataclass(frozen=True)
class Order:
  """What the order of documents is derived from, and how finely runs are indexed."""

  seed: int
  task: str
  split: str
  bits: int = 8  # of the key, that number the buckets


@dataclasses.dataclass(frozen=True)
class StoredVocabulary:
  """A vocabulary in a file, for processes that do not load TensorFlow.

  Attributes:
    path: of a SentencePiece model, or of any pickled SeqIO vocabulary.
    pickled: which of them.
    eos_id: ends every document.
  """

  path: str
  pickled: bool
  eos_id: int

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """One int32 array of ids per text, on one thread."""
    vocabulary = _load(self.path, self.pickled)
    if self.pickled:
      return codec.encode_batch(vocabulary, texts)
    return vocabulary.encode_batch(texts, num_threads=1)


@functools.lru_cache(maxsize=2)
def _load(path: str, pickled: bool):
  data = storage.read_bytes(path)
  if data is None:
    raise errors.Failure(f'Cannot read {path}: there is no such file.')
  return pickle.loads(data) if pickled else codec.Codec(data)


def store_vocabulary(path: str, vocabulary) -> StoredVocabulary:
  """Writes what other processes need of a vocabulary to `path`."""
  pickled = not isinstance(getattr(vocabulary, 'codec', None), codec.Codec)
  data = pickle.dumps(vocabulary) if pickled else storage.read_bytes(vocabulary.path)
  if storage.read_bytes(path) != data:
    storage.write_bytes(path, data)
  return StoredVocabulary(path, pickled, int(vocabulary.eos_id))


def sort_order(records: np.ndarray) -> np.ndarray:
  """Indices that put records into the store's order; equal ones stay in theirs."""
  # Bytes are ordered as the big-endian integers that they spell.
  halves = np.ascontiguousarray(records['hash']).view('>u8').astype(np.uint64)
  return np.lexsort([halves[:, 1], halves[:, 0], records['key']])


def gather(source: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """source[starts[i] : starts[i] + lengths[i]] for each i, one after the other."""
  ends = np.cumsum(lengths, dtype=np.int64)
  total = int(ends[-1]) if len(ends) else 0
  out = np.empty(total, source.dtype)
  for begin in range(0, total, _GATHER):  # an index is twice as large as what it finds
    end = min(begin + _GATHER, total)
    first, last = np.searchsorted(ends, [begin, end - 1], 'right')
    some = slice(first, last + 1)
    shift = np.asarray(starts[some], np.int64) - (ends[some] - lengths[some])
    counts = np.minimum(ends[some], end) - np.maximum(ends[some] - lengths[some], begin)
    out[begin:end] = source[np.repeat(shift, counts) + np.arange(begin, end)]
  return out


class _Tally:
  """Counts of what a unit of tokenising read."""

  def __init__(self):
    self.documents = self.tokens = self.bytes = self.empty = self.runs = 0
    self.kinds: set[str] = set()
    self.languages: dict[str, int] = {}  # tokens of documents that name theirs

  def facts(self) -> dict[str, Any]:
    return {**vars(self), 'kinds': sorted(self.kinds)}


class _Runs:
  """Gathers documents and writes a run whenever enough of them are pending."""

  def __init__(self, folder: str, name: str, order: Order, run_bytes: int, tally):
    self._folder, self._name, self._order = folder, name, order
    self._run_bytes, self._tally = run_bytes, tally
    self._clear()

  def _clear(self):
    self._ids, self._hashes, self._lengths, self._inputs = [], [], [], []
    self._pending = 0

  def add(self, rows: list[list[np.ndarray]], hashes: list[bytes], inputs: list[int]):
    """Documents: each one's ids in pieces, its hash, how many ids are inputs."""
    ids = np.concatenate([piece for row in rows for piece in row]).astype(np.uint32)
    self._ids.append(ids)
    self._hashes += hashes
    self._lengths += [sum(map(len, row)) for row in rows]
    self._inputs += inputs
    self._tally.documents += len(rows)
    self._tally.tokens += len(ids)
    self._pending += ids.nbytes + RECORD.itemsize * len(rows)
    if self._pending >= self._run_bytes:
      self.flush()

  def flush(self):
    if not self._lengths:
      return
    records = self._records()
    starts = np.cumsum(records['length'], dtype=np.int64) - records['length']
    ids = np.concatenate(self._ids)
    self._clear()
    order = sort_order(records)
    records, starts = records[order], starts[order]
    ids = gather(ids, starts, records['length'].astype(np.int64))
    where = storage.join(self._folder, f'{self._name}-{self._tally.runs}')
    storage.write_bytes(where + '.index', self._index(records).tobytes())
    storage.write_bytes(where + '.records', records.tobytes())
    storage.write_bytes(where + '.tokens', ids.tobytes())
    self._tally.runs += 1

  def _records(self) -> np.ndarray:
    records = np.empty(len(self._lengths), RECORD)
    rows = np.frombuffer(b''.join(self._hashes), np.uint8).reshape(-1, 16)
    order = self._order
    records['hash'] = rows
    records['key'] = token_store.document_keys(
      rows, order.seed, order.task, order.split
    )
    records['length'], records['inputs'] = self._lengths, self._inputs
    return records

  def _index(self, records: np.ndarray) -> np.ndarray:
    """uint64 [buckets + 1, 2]: documents and tokens before each bucket."""
    buckets = 1 << self._order.bits
    edges = np.arange(1, buckets, dtype=np.uint64) << np.uint64(64 - self._order.bits)
    found = np.searchsorted(records['key'], edges)
    index = np.empty((buckets + 1, 2), '<u8')
    index[:, 0] = [0, *found.tolist(), len(records)]
    ends = np.concatenate([[0], np.cumsum(records['length'], dtype=np.uint64)])
    index[:, 1] = ends[index[:, 0].astype(np.int64)]
    return index


def tokenise(
  folder: str,
  name: str,
  parts: Sequence[documents.Part],
  vocabulary,
  order: Order,
  run_bytes: int,
  tick: Callable[[int], None] | None = None,
) -> dict[str, Any]:
  """Reads parts of a corpus and writes the runs <folder>/<name>-0, -1, ...

  Args:
    parts: of `Document`s or texts, or of tokenised examples: dicts of the ids 'targets'
      and perhaps 'inputs', and 'bytes', the UTF-8 length of the targets' text.
    vocabulary: a `StoredVocabulary`, or any SeqIO vocabulary.
    order: of the documents in the store.
    run_bytes: how much of records and ids to gather for a run.
    tick: called with the bytes read so far.

  Returns:
    counts of documents, tokens, bytes, empty documents, runs; and the kinds read.
  """
  tally = _Tally()
  runs = _Runs(folder, name, order, run_bytes, tally)
  stream = itertools.chain.from_iterable(part.read() for part in parts)
  encode = functools.partial(_encode, vocabulary, int(vocabulary.eos_id))
  for batch, languages in _batches(stream, tally, min(_BATCH_BYTES, run_bytes)):
    rows, hashes, inputs = encode(batch)
    for language, row in zip(languages, rows, strict=True):
      if language is not None:
        count = tally.languages.get(language, 0)
        tally.languages[language] = count + sum(map(len, row))
    runs.add(rows, hashes, inputs)
    if tick:
      tick(tally.bytes)
  runs.flush()
  return tally.facts()


def _batches(
  stream: Iterable[Any], tally: _Tally, batch_bytes: int
) -> Iterator[tuple[list[tuple[Any, bytes]], list[str | None]]]:
  """Consecutive documents, a few MB at a time.

  Yields:
    (text or example, what is hashed) of each, and its language where it says so.
  """
  batch, languages, size = [], [], 0
  for document in stream:
    language = getattr(document, 'meta', {}).get('language')
    document = getattr(document, 'text', document)
    if not document:
      tally.empty += 1
      continue
    if isinstance(document, str):
      kind, (document, data) = 'text', _clean(document)
      count = len(data)
    else:
      kind = 'inputs' if 'inputs' in document else 'targets'
      data, count = _hashed(document), int(document['bytes'])
    tally.kinds.add(kind)
    if len(tally.kinds) > 1:
      return  # refused by whoever adds up the tallies
    tally.bytes += count
    batch.append((document, data))
    languages.append(language)
    size += len(data)
    if size >= batch_bytes:
      yield batch, languages
      batch, languages, size = [], [], 0
  if batch:
    yield batch, languages


def _clean(text: str) -> tuple[str, bytes]:
  """The text, and its UTF-8 bytes."""
  with contextlib.suppress(UnicodeEncodeError):
    return text, text.encode()
  text = documents.clean(text)
  return text, text.encode()


def _hashed(example: dict[str, Any]) -> bytes:
  inputs, targets = example.get('inputs', ()), example['targets']
  ids = np.concatenate([inputs, targets]).astype(np.uint32)
  return len(inputs).to_bytes(8, 'little') + ids.tobytes()


def _encode(vocabulary, eos_id: int, batch: list[tuple[Any, bytes]]):
  """(ids in pieces, hash, number of inputs) of each document, as three lists."""
  found = [hashlib.blake2b(data, digest_size=16).digest() for _, data in batch]
  end = np.array([eos_id], np.int32)
  if isinstance(batch[0][0], str):
    encoded = codec.encode_batch(vocabulary, [text for text, _ in batch])
    return [[ids, end] for ids in encoded], found, [0] * len(batch)
  rows = [_ended(example, end) for example, _ in batch]
  return rows, found, [len(row[0]) for row in rows]


def _ended(example: dict[str, Any], end: np.ndarray) -> list[np.ndarray]:
  """An example's inputs and targets, and the end unless its task has set one."""
  inputs, targets = (
    np.asarray(example.get(key, ()), np.int64) for key in ('inputs', 'targets')
  )
  ended = len(targets) and targets[-1] == end[0]
  return [inputs, targets] if ended else [inputs, targets, end]


@dataclasses.dataclass
class Slice:
  """Neighbouring documents of the store, and where the runs have them.

  Attributes:
    records: of the documents, in the store's order.
    ends: where each ends in the store, in tokens: int64.
    first: the number of the first document.
    runs: names of all runs.
    run, start: of each document, its run's number and where its tokens begin there.
  """

  records: np.ndarray
  ends: np.ndarray
  first: int
  runs: list[str]
  run: np.ndarray
  start: np.ndarray

  def among(self, wanted: slice) -> 'Slice':
    """Some of them."""
    return Slice(
      self.records[wanted],
      self.ends[wanted],
      self.first + wanted.start,
      self.runs,
      self.run[wanted],
      self.start[wanted],
    )


def read_slice(
  folder: str, runs: list[str], buckets: np.ndarray, column: int, start: int, stop: int
) -> Slice:
  """The documents of all buckets that places start..stop-1 of the store lie in.

  Args:
    folder: of the runs.
    runs: the names of all of them.
    buckets: int64 [buckets + 1, 2], the sum of their indices.
    column: whether places are counted in documents (0) or tokens (1).
  """
  low = int(np.searchsorted(buckets[:, column], start, 'right')) - 1
  high = int(np.searchsorted(buckets[:, column], stop, 'left'))
  row = 16  # bytes of an index for one bucket
  wanted = [
    (f'{run}.index', b * row, (b + 1) * row) for run in runs for b in (low, high)
  ]
  data = b''.join(storage.read_ranges(folder, wanted))
  edges = np.frombuffer(data, '<u8').astype(np.int64).reshape(len(runs), 2, 2)
  size = RECORD.itemsize
  wanted = [
    (f'{run}.records', int(a) * size, int(b) * size)
    for run, (a, b) in zip(runs, edges[:, :, 0], strict=True)
  ]
  pieces = [np.frombuffer(d, RECORD) for d in storage.read_ranges(folder, wanted)]
  records = np.concatenate(pieces)
  lengths = [piece['length'].astype(np.int64) for piece in pieces]
  starts = np.concatenate(
    [
      np.cumsum(length) - length + begin
      for length, begin in zip(lengths, edges[:, 0, 1], strict=True)
    ]
  )
  order = sort_order(records)
  number = np.repeat(np.arange(len(runs)), [len(piece) for piece in pieces])
  records = records[order]
  ends = buckets[low, 1] + np.cumsum(records['length'], dtype=np.int64)
  return Slice(records, ends, int(buckets[low, 0]), runs, number[order], starts[order])


def read_ids(
  folder: str, found: Slice, places: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The runs' tokens that documents lie in, and where in them each begins.

  Within a run documents that follow each other in the store do so too, so one read of
  it has them all.

  Args:
    folder: of the runs.
    found: the documents.
    places, lengths: the tokens of each that are wanted, as places in its run.

  Returns:
    (uint32 ids, int64 [documents] where each document's begin in them).
  """
  by_run = np.argsort(found.run, kind='stable')
  runs, first = np.unique(found.run[by_run], return_index=True)
  last = np.append(first[1:], len(by_run)) - 1
  low = places[by_run[first]]
  high = (places + lengths)[by_run[last]]
  begin = np.cumsum(high - low) - (high - low)  # of each run's tokens among those read
  wanted = [
    (f'{found.runs[run]}.tokens', _ID_BYTES * int(a), _ID_BYTES * int(b))
    for run, a, b in zip(runs, low, high, strict=True)
  ]
  ids = np.empty(int((high - low).sum()), np.uint32)
  data = storage.read_ranges(folder, wanted)
  for piece, at, count in zip(data, begin, high - low, strict=True):
    ids[at : at + count] = np.frombuffer(piece, '<u4')
  shift = np.zeros(len(found.runs), np.int64)
  shift[runs] = begin - low
  return ids, places + shift[found.run]

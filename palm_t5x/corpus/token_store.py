"""A task's documents, tokenised once, as one long array of ids.

In a folder or bucket: `tokens` (uint32), `offsets` (uint64 [documents + 1]), `hashes`
(uint8 [documents, 16], blake2b of each document) and, for examples with inputs,
`inputs_lengths` (uint32): TensorStore zarr3 arrays, sharded, zstd, crc32c. Then
`manifest.json`, written last: a folder without one is not a store, whatever is in it.
Documents lie in a seeded order, each ending with the vocabulary's end id. Nothing in a
store depends on when or on how many threads it was built.
"""

import contextlib
import dataclasses
import hashlib
import json
import os

import numpy as np
import tensorstore as ts

from palm_t5x import errors
from palm_t5x.corpus import codec, sampling, storage

FORMAT = 1
SHARD_TOKENS = 1 << 22  # tokens in a file: 16 MB before compression
CHUNK_TOKENS = 1 << 12  # tokens decompressed to read one row
_CACHE_BYTES = 128 << 20  # decompressed chunks and shard indices kept in memory
_BATCH_BYTES = 4 << 20  # text tokenised in one call
_MISSING = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a token store holds; everything but the arrays themselves."""

  task: str
  split: str
  vocabulary_hash: str
  vocab_size: int
  eos_id: int  # ends every document
  seed: int  # of the documents' order
  num_tokens: int  # ends of documents included
  num_documents: int
  num_bytes: int  # UTF-8 bytes of the text: what bits per byte are divided by
  has_inputs: bool  # whether documents are inputs followed by targets
  checksums: dict[str, str]  # array name -> blake2b-128 of its contents, in hex
  format: int = FORMAT


def _spec(path: str, name: str, shape, chunk, shard, dtype) -> dict:
  plain = {'name': 'bytes', 'configuration': {'endian': 'little'}}
  sharding = {
    'chunk_shape': chunk,
    'codecs': [
      plain,
      {'name': 'zstd', 'configuration': {'level': 3}},
      {'name': 'crc32c'},
    ],
    'index_codecs': [plain, {'name': 'crc32c'}],
  }
  return {
    'driver': 'zarr3',
    'kvstore': storage.kvstore_spec(storage.join(path, name)),
    'metadata': {
      'shape': shape,
      'data_type': dtype,
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': shard}},
      'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
      'fill_value': 255 if dtype == 'uint8' else _MISSING,
    },
    # A chunk that happens to equal the fill value must not count as missing.
    'store_data_equal_to_fill_value': True,
  }


class _Writer:
  """Appends to one zarr3 array, a whole shard at a time, and hashes what it wrote."""

  def __init__(self, path, name, dtype, shard, chunk=None, width=None):
    tail = [] if width is None else [width]
    self._shard, self._dtype, self._tail = shard, np.dtype(dtype), tail
    spec = _spec(path, name, [0, *tail], [chunk or shard, *tail], [shard, *tail], dtype)
    with storage.writing(path):
      self._array = ts.open(spec, create=True, delete_existing=True).result()
    self._path, self._pending, self._num_pending, self._written = path, [], 0, 0
    self._digest = hashlib.blake2b(digest_size=16)

  def append(self, values: np.ndarray) -> None:
    self._pending.append(np.ascontiguousarray(values, self._dtype))
    self._num_pending += len(values)
    if self._num_pending >= self._shard:
      self._flush(self._num_pending - self._num_pending % self._shard)

  def _flush(self, count: int) -> None:
    values = np.concatenate(self._pending)
    values, rest = values[:count], values[count:]
    self._pending, self._num_pending = [rest], len(rest)
    self._digest.update(values.tobytes())
    start, self._written = self._written, self._written + count
    with storage.writing(self._path):
      self._array = self._array.resize(exclusive_max=[self._written, *self._tail])
      self._array = self._array.result()
      self._array[start : self._written].write(values).result()

  def close(self) -> str:
    """Writes what is left; returns the checksum."""
    if self._num_pending:
      self._flush(self._num_pending)
    return self._digest.hexdigest()


@contextlib.contextmanager
def only_builder(path: str):
  """Lets one process at a time write `path`, if it is local; others wait.

  The lock dies with the process that holds it, however that dies.
  """
  if storage.is_remote(path):
    yield
    return
  try:
    import fcntl
  except ImportError:  # not a POSIX system: builds are not guarded against each other
    yield
    return
  with storage.writing(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock = os.open(path + '.lock', os.O_CREAT | os.O_RDWR)
  try:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield
  finally:
    os.close(lock)


def read_manifest(path: str) -> Manifest | None:
  """The manifest of the store at `path`, or None if there is no whole store."""
  data = storage.read_bytes(storage.join(storage.normalise(path), 'manifest.json'))
  if data is None:
    return None
  try:
    return Manifest(**json.loads(data))
  except (ValueError, TypeError) as e:
    raise _damaged(path, f'manifest.json cannot be understood ({e})') from e


def _damaged(path: str, what: str) -> errors.Failure:
  text = ' '.join(what.partition(' [tensorstore_spec=')[0].split())
  return errors.Failure(
    f'The token store at {path} is damaged: {text}. Delete that folder and run again '
    'to have it rebuilt.'
  )


def build(
  path: str,
  documents,
  vocabulary,
  *,
  task: str,
  split: str,
  seed: int = 0,
  progress=None,
) -> Manifest:
  """Tokenises `documents` into a store at `path`; a whole store there is kept as it is.

  A build that was interrupted is started afresh. Two processes that build the same
  local store take turns, and the second finds it built.

  Args:
    path: the store's own folder, local or gs://.
    documents: an iterable of str, or a function that returns one (called only if there
      is something to build). Empty documents are left out. Or of examples that are
      tokenised already: dicts of the ids 'targets' and (in all or none) 'inputs', and
      'bytes', the UTF-8 length of the targets' text.
    vocabulary: any SeqIO vocabulary; its `eos_id` ends every document.
    task, split: names for the manifest.
    seed: of the order in which the documents are stored.
    progress: called with (bytes done, bytes in all) as the build goes on.

  Returns:
    the manifest.

  Raises:
    UserError: there are no documents.
    Failure: the disk is full, or the folder cannot be written to.
  """
  path = storage.normalise(path)
  manifest = read_manifest(path)
  if manifest is not None:
    return manifest
  with only_builder(path):
    manifest = read_manifest(path)
    if manifest is not None:
      return manifest
    documents = documents() if callable(documents) else documents
    documents = [_clean(document) for document in documents if document]
    if not documents:
      raise errors.UserError(
        f"Task '{task}' has no text in its split '{split}': there is nothing to "
        'tokenise. Check where the task reads its files from.'
      )
    storage.delete_folder(path)
    return _build(path, documents, vocabulary, task, split, seed, progress)


def _build(path, documents, vocabulary, task, split, seed, progress) -> Manifest:
  keys = sampling.round_keys('document order', seed, task, split)
  order = sampling.permute(np.arange(len(documents)), len(documents), keys)
  examples = isinstance(documents[0], dict)
  has_inputs = examples and 'inputs' in documents[0]
  encode = _encode_examples if examples else _encode_texts
  writers = {
    'tokens': _Writer(path, 'tokens', 'uint32', SHARD_TOKENS, CHUNK_TOKENS),
    'offsets': _Writer(path, 'offsets', 'uint64', 1 << 20),
    'hashes': _Writer(path, 'hashes', 'uint8', 1 << 16, width=16),
  }
  if has_inputs:
    writers['inputs_lengths'] = _Writer(path, 'inputs_lengths', 'uint32', 1 << 20)
  num_tokens = num_bytes = 0
  total = sum(_num_bytes(document) for document in documents)
  writers['offsets'].append(np.zeros(1))
  for batch in _batches([documents[i] for i in order]):
    ids = encode(batch, vocabulary, int(vocabulary.eos_id))
    ends = num_tokens + np.cumsum([len(row) for row in ids])
    num_tokens, num_bytes = int(ends[-1]), num_bytes + sum(map(_num_bytes, batch))
    writers['tokens'].append(np.concatenate(ids))
    writers['offsets'].append(ends)
    writers['hashes'].append(np.stack([_hash(document) for document in batch]))
    if has_inputs:
      lengths = [len(document['inputs']) for document in batch]
      writers['inputs_lengths'].append(np.array(lengths))
    if progress:
      progress(num_bytes, total)
  manifest = Manifest(
    task=task,
    split=split,
    vocabulary_hash=codec.hash_of(vocabulary),
    vocab_size=int(vocabulary.vocab_size),
    eos_id=int(vocabulary.eos_id),
    seed=seed,
    num_tokens=num_tokens,
    num_documents=len(documents),
    num_bytes=num_bytes,
    has_inputs=has_inputs,
    checksums={name: writer.close() for name, writer in writers.items()},
  )
  text = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + '\n'
  storage.write_bytes(storage.join(path, 'manifest.json'), text.encode())
  return manifest


def _clean(document):
  """Half a surrogate pair, which JSON can hold, is not text: it becomes U+FFFD."""
  if isinstance(document, dict):
    return document
  try:
    document.encode()
  except UnicodeEncodeError:
    document = document.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return document


def _num_bytes(document) -> int:
  return document['bytes'] if isinstance(document, dict) else len(document.encode())


def _hash(document) -> np.ndarray:
  if isinstance(document, dict):
    inputs, targets = document.get('inputs', ()), document['targets']
    ids = np.concatenate([inputs, targets]).astype(np.uint32)
    data = len(inputs).to_bytes(8, 'little') + ids.tobytes()
  else:
    data = document.encode()
  return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint8)


def _batches(documents):
  """Consecutive documents, about `_BATCH_BYTES` of text at a time."""
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += _num_bytes(document)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _encode_texts(texts, vocabulary, eos_id) -> list[np.ndarray]:
  return [np.append(ids, eos_id) for ids in codec.encode_batch(vocabulary, texts)]


def _encode_examples(examples, vocabulary, eos_id) -> list[np.ndarray]:
  del vocabulary  # The task's own preprocessors have tokenised them.
  rows = []
  for example in examples:
    targets = np.asarray(example['targets'])
    if not targets.size or targets[-1] != eos_id:
      targets = np.append(targets, eos_id)
    rows.append(np.concatenate([example.get('inputs', ()), targets]))
  return rows


class TokenStore:
  """A whole token store, open for reading.

  Args:
    path: its folder, local or gs://.

  Raises:
    Failure: there is no whole store there, or it is damaged.
  """

  def __init__(self, path: str):
    self.path = storage.normalise(path)
    manifest = read_manifest(self.path)
    if manifest is None:
      raise errors.Failure(
        f'There is no whole token store at {self.path}: its manifest.json is missing.'
      )
    if manifest.format != FORMAT:
      raise errors.Failure(
        f'The token store at {self.path} has format {manifest.format}, this version '
        f'reads format {FORMAT}: delete that folder and run again to have it rebuilt.'
      )
    self.manifest = manifest
    self._context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}})
    lengths = {'tokens': manifest.num_tokens, 'offsets': manifest.num_documents + 1}
    self._arrays = {
      name: self._open(name, lengths.get(name, manifest.num_documents))
      for name in manifest.checksums
    }

  def _open(self, name: str, length: int):
    folder = storage.join(self.path, name)
    spec = {
      'driver': 'zarr3',
      'kvstore': storage.kvstore_spec(folder),
      # A shard that is gone must raise, not read as fill values.
      'fill_missing_data_reads': False,
    }
    with self._reading():
      array = ts.open(spec, open=True, read=True, context=self._context).result()
    if array.shape[0] != length:
      raise _damaged(
        self.path, f"'{name}' has {array.shape[0]} entries, the manifest says {length}"
      )
    return array

  @contextlib.contextmanager
  def _reading(self):
    try:
      yield
    except (ValueError, OSError) as e:
      raise _damaged(self.path, str(e)) from e

  @property
  def num_tokens(self) -> int:
    """How many tokens there are, ends of documents included."""
    return self.manifest.num_tokens

  @property
  def num_documents(self) -> int:
    """How many documents there are."""
    return self.manifest.num_documents

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the text that was tokenised."""
    return self.manifest.num_bytes

  def num_rows(self, length: int) -> int:
    """Rows of `length` predicted tokens: row r reads tokens r·length..(r+1)·length."""
    return max(0, (self.num_tokens - 1) // length)

  def read(self, start: int, count: int) -> np.ndarray:
    """Tokens start..start+count-1 as uint32 [count]; the range must lie inside."""
    return self._read('tokens', start, count)

  def _read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
    array = self._arrays[name]
    stop = array.shape[0] if count is None else start + count
    if not 0 <= start <= stop <= array.shape[0]:
      raise IndexError(f'{name}[{start}:{stop}] of {array.shape[0]} in {self.path}')
    with self._reading():
      return array[start:stop].read().result()

  def offsets(self) -> np.ndarray:
    """Where documents begin and end: int64 [documents + 1]."""
    return self._read('offsets').astype(np.int64)

  def inputs_lengths(self) -> np.ndarray:
    """How many tokens of each document are inputs: int64 [documents]."""
    if 'inputs_lengths' not in self._arrays:
      return np.zeros(self.num_documents, np.int64)
    return self._read('inputs_lengths').astype(np.int64)

  def hashes(self) -> np.ndarray:
    """blake2b-128 of each document's text, uint8 [documents, 16]."""
    return self._read('hashes')

  def rows(self, length: int, row_ids) -> np.ndarray:
    """Rows of the stream: uint32 [rows, length + 1], neighbours sharing one token."""
    starts = np.asarray(row_ids, np.int64) * length
    return self.spans(starts, np.full(len(starts), length + 1))

  def spans(self, starts, counts) -> np.ndarray:
    """Tokens starts[i]..starts[i]+counts[i]-1, one after the other: uint32.

    Equal counts give a matrix [spans, count], others one long array.
    """
    starts, counts = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    if not starts.size:
      return np.zeros(0, np.uint32)
    if starts.min() < 0 or (starts + counts).max() > self.num_tokens:
      raise IndexError(f'tokens beyond 0..{self.num_tokens} of {self.path}')
    tokens, spans = self._arrays['tokens'], zip(starts, starts + counts, strict=True)
    with self._reading():
      # One batch reads each chunk once, however many rows lie in it.
      with ts.Batch() as batch:
        reads = [tokens[start:stop].read(batch=batch) for start, stop in spans]
      parts = [read.result() for read in reads]
    equal = (counts == counts[0]).all()
    return np.stack(parts) if equal else np.concatenate(parts)

  def verify(self, progress=None) -> None:
    """Reads everything and compares it with the manifest's checksums.

    Args:
      progress: called with (tokens done, tokens in all).

    Raises:
      Failure: something differs; the message names the array and what to do.
    """
    for name, array in self._arrays.items():
      digest = hashlib.blake2b(digest_size=16)
      for start in range(0, array.shape[0], SHARD_TOKENS):
        stop = min(start + SHARD_TOKENS, array.shape[0])
        digest.update(np.ascontiguousarray(self._read(name, start, stop - start)))
        if progress and name == 'tokens':
          progress(stop, self.num_tokens)
      if digest.hexdigest() != self.manifest.checksums[name]:
        raise _damaged(self.path, f"the checksum of '{name}' does not match")

"""A task's documents, tokenised once, as one long array of ids.

In a folder or bucket: `tokens` (uint32), `offsets` (uint64 [documents + 1]), `hashes`
(uint8 [documents, 16], blake2b of each document) and, for examples with inputs,
`inputs_lengths` (uint32): TensorStore zarr3 arrays, sharded, zstd, crc32c. Then
`manifest.json`, written last: a folder without one is not a store, whatever is in it.

Documents lie in the order of `document_keys`, each ending with the vocabulary's end id.
What a store holds is a function of the set of documents, the vocabulary and the seed;
`store_builder` makes it.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from palm_t5x import errors
from palm_t5x.corpus import sampling, storage

logger = logging.getLogger(__name__)

FORMAT = 2
ARRAYS = ('tokens', 'offsets', 'hashes', 'inputs_lengths')
_CACHE_BYTES = 128 << 20  # decompressed chunks and shard indices kept in memory
_DTYPES = {'tokens': 'uint32', 'offsets': 'uint64', 'hashes': 'uint8'}
_MISSING = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Layout:
  """Entries in each file of an array; part of the format, smaller in tests only."""

  tokens: int = 1 << 22  # 16 MB before compression
  chunk: int = 1 << 12  # tokens decompressed to read one row
  offsets: int = 1 << 20
  hashes: int = 1 << 16
  inputs_lengths: int = 1 << 20


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
  num_empty: int  # documents without text, which are left out
  has_inputs: bool  # whether documents are inputs followed by targets
  languages: dict[str, int]  # tokens by language, of documents that name theirs
  checksums: dict[str, str]  # array name -> `checksum` of its files, in hex
  format: int = FORMAT

  def to_json(self) -> bytes:
    """The contents of manifest.json, with a checksum of their own."""
    fields = dataclasses.asdict(self)
    fields['checksum'] = _digest_of(fields)
    return (json.dumps(fields, indent=2, sort_keys=True) + '\n').encode()


def _digest_of(fields: dict) -> str:
  return digest(json.dumps(fields, sort_keys=True).encode())


def digest(data) -> str:
  """blake2b-128 of bytes or of an array's contents, in hex."""
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def checksum(digests: Sequence[str]) -> str:
  """An array's checksum: blake2b-128 over the digests of its files' contents in turn.

  Of their uncompressed entries, so that files can be checked in any order.
  """
  return digest(b''.join(map(bytes.fromhex, digests)))


def document_keys(hashes: np.ndarray, seed: int, task: str, split: str) -> np.ndarray:
  """What the documents of a store are ordered by; equal keys: by the hashes' bytes.

  Args:
    hashes: uint8 [documents, 16], as in the store.
    seed, task, split: as in the manifest.

  Returns:
    uint64 [documents]: mix(mix(a, k0) ^ b, k1) with `sampling.mix`, where a and b are
    the hash's halves as little-endian integers and k0, k1 the first two of
    sampling.round_keys('document order', seed, task, split).
  """
  first, second = sampling.round_keys('document order', seed, task, split)[:2]
  halves = np.ascontiguousarray(hashes).view('<u8').astype(np.uint64)
  with np.errstate(over='ignore'):
    return sampling.mix(sampling.mix(halves[:, 0], first) ^ halves[:, 1], second)


def create_arrays(path: str, lengths: dict[str, int], layout: Layout) -> None:
  """Makes the empty arrays of a store, of their final lengths, where they are not.

  An array of another shape, from a build that was given up, is deleted.
  """
  for name in ARRAYS:
    folder = storage.join(path, name)
    if name not in lengths:
      storage.delete_folder(folder)
      continue
    spec = _spec(path, name, lengths[name], layout)
    with storage.writing(path):
      try:
        ts.open(spec, create=True, open=True).result()
      except ValueError as e:
        if 'FAILED_PRECONDITION' not in str(e):
          raise
        storage.delete_folder(folder)
        ts.open(spec, create=True).result()


def open_array(path: str, name: str, length: int, layout: Layout):
  """An array that `create_arrays` made, to write whole files of it."""
  with storage.writing(path):
    return ts.open(_spec(path, name, length, layout), open=True).result()


def _spec(path: str, name: str, length: int, layout: Layout) -> dict:
  shard, tail = getattr(layout, name), [16] if name == 'hashes' else []
  chunk = layout.chunk if name == 'tokens' else shard
  dtype = _DTYPES.get(name, 'uint32')
  plain = {'name': 'bytes', 'configuration': {'endian': 'little'}}
  sharding = {
    'chunk_shape': [chunk, *tail],
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
      'shape': [length, *tail],
      'data_type': dtype,
      'chunk_grid': {
        'name': 'regular',
        'configuration': {'chunk_shape': [shard, *tail]},
      },
      'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
      'fill_value': 255 if dtype == 'uint8' else _MISSING,
    },
    # A chunk that happens to equal the fill value must not count as missing.
    'store_data_equal_to_fill_value': True,
  }


@contextlib.contextmanager
def only_builder(path: str, shared: bool = False):
  """Lets one process at a time write `path`, if it is local; others wait.

  The lock dies with the process that holds it, however that dies. Those that share it
  wait for the others only.
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
      kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
      try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
      except BlockingIOError:
        logger.info('waiting for another process that works on %s', path)
        fcntl.flock(lock, kind)
    yield
  finally:
    os.close(lock)


def read_manifest(path: str) -> Manifest | None:
  """The manifest of the store at `path`, or None if there is no whole store.

  Raises:
    Failure: it is of another format, or was damaged or edited.
  """
  path = storage.normalise(path)
  data = storage.read_bytes(storage.join(path, 'manifest.json'))
  if data is None:
    return None
  try:
    fields = dict(json.loads(data))
    if fields.get('format', FORMAT) != FORMAT:
      raise errors.Failure(
        f'The token store at {path} has format {fields["format"]}, this version reads '
        f'format {FORMAT}: delete that folder and run again to have it rebuilt.'
      )
    found = fields.pop('checksum', None)
    manifest = Manifest(**fields)
  except (ValueError, TypeError) as e:
    raise _damaged(path, f'manifest.json cannot be understood ({e})') from e
  if found != _digest_of(fields):
    raise _damaged(path, 'manifest.json was edited, its checksum does not match')
  return manifest


def _damaged(path: str, what: str) -> errors.Failure:
  text = ' '.join(what.partition(' [tensorstore_spec=')[0].split())
  return errors.Failure(
    f'The token store at {path} is damaged: {text}. Delete that folder and run again '
    'to have it rebuilt.'
  )


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

  def verify(self, progress=None, workers: int = 1) -> None:
    """Reads everything and compares it with the manifest's checksums.

    Args:
      progress: called with (tokens done, tokens in all).
      workers: threads that read and hash files side by side.

    Raises:
      Failure: something differs; the message names the array and what to do.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as threads:
      for name, array in self._arrays.items():
        shard = array.chunk_layout.write_chunk.shape[0]

        def of_file(start, name=name, shard=shard, length=array.shape[0]):
          values = self._read(name, start, min(shard, length - start))
          return digest(np.ascontiguousarray(values))

        digests = []
        for found in threads.map(of_file, range(0, array.shape[0], shard)):
          digests.append(found)
          if progress and name == 'tokens':
            progress(min(len(digests) * shard, self.num_tokens), self.num_tokens)
        if checksum(digests) != self.manifest.checksums[name]:
          raise _damaged(self.path, f"the checksum of '{name}' does not match")

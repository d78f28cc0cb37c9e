"""Documents whose texts are equal, byte for byte: all but the first are dropped.

First means first in the order of parts and of documents within them, so the outcome
does not depend on who did which part. Memory is bounded by the size of a bucket: the
hashes of each part are written in sorted order, and a bucket is a range of hashes.
"""

import os

import numpy as np

from palm_t5x.corpus import jobs, storage

_BUCKET_DOCUMENTS = 4_000_000  # about 100 MB of hashes and places at a time
_HASH = np.dtype([('high', '<u8'), ('low', '<u8'), ('ordinal', '<u8')])
_PLACE = np.dtype([('part', '<u8'), ('ordinal', '<u8')])


class HashFile:
  """Collects the hashes of a part's documents and writes them in sorted order."""

  def __init__(self):
    self._hashes = bytearray()

  def add(self, text_hash: bytes) -> None:
    """The 16 bytes of the next document's hash."""
    self._hashes += text_hash

  def write(self, path: str) -> None:
    """Writes the file whole, or not at all."""
    pairs = np.frombuffer(bytes(self._hashes), '>u8').reshape(-1, 2)
    rows = np.empty(len(pairs), _HASH)
    rows['high'], rows['low'] = pairs[:, 0], pairs[:, 1]
    rows['ordinal'] = np.arange(len(pairs))
    rows.sort(order=('high', 'low', 'ordinal'))
    save(path, rows)


def save(path: str, array: np.ndarray) -> None:
  """np.save, atomically and for good."""
  with storage.atomic(path) as f:
    np.save(f, array)


def stage(folder: str, hash_files, num_documents) -> jobs.Stage:
  """The stage that finds duplicates among the documents of many parts.

  Args:
    folder: where it writes <bucket>.npy, the places of the documents to drop.
    hash_files: job -> the paths of the parts' `HashFile`s, in the order of the parts.
    num_documents: job -> how many documents there are in all.
  """

  def units(job):
    files = tuple(hash_files(job))
    buckets = max(1, -(-num_documents(job) // _BUCKET_DOCUMENTS))
    return [
      jobs.Unit(f'{b:05d}', _find, (files, folder, b, buckets)) for b in range(buckets)
    ]

  return jobs.Stage('duplicates', units, 'finding duplicates')


def _find(files, folder: str, bucket: int, buckets: int) -> dict[str, int]:
  first, last = (bucket << 64) // buckets, ((bucket + 1) << 64) // buckets - 1
  found = []
  for part, path in enumerate(files):
    rows = np.load(path, mmap_mode='r')
    low = np.searchsorted(rows['high'], np.uint64(first), 'left')
    high = np.searchsorted(rows['high'], np.uint64(last), 'right')
    entries = np.empty(high - low, [*_HASH.descr, ('part', '<u8')])
    for name in _HASH.names:
      entries[name] = rows[low:high][name]
    entries['part'] = part
    found.append(entries)
  rows = np.concatenate(found)
  rows.sort(order=('high', 'low', 'part', 'ordinal'))
  same = (rows['high'][1:] == rows['high'][:-1]) & (rows['low'][1:] == rows['low'][:-1])
  dropped = rows[1:][same]
  places = np.empty(len(dropped), _PLACE)
  places['part'], places['ordinal'] = dropped['part'], dropped['ordinal']
  places.sort(order=('part', 'ordinal'))
  save(os.path.join(folder, f'{bucket:05d}.npy'), places)
  return {'duplicates': len(places)}


def dropped_of(folder: str, part: int) -> set[int]:
  """The ordinals of a part's documents that are to be dropped."""
  ordinals: set[int] = set()
  for name in sorted(os.listdir(folder)):
    if name.endswith('.npy'):
      places = np.load(os.path.join(folder, name), mmap_mode='r')
      edges = np.array([part, part + 1], '<u8')  # of another type, all are copied
      low, high = np.searchsorted(places['part'], edges)
      ordinals.update(places['ordinal'][low:high].tolist())
  return ordinals

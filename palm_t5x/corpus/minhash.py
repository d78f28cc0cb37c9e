"""Which documents may resemble each other: MinHash signatures and their bands.

A document is the set of its token n-grams; a MinHash signature keeps a fixed number of
slots of it, and two signatures agree in a share of slots that is about the Jaccard
similarity of the sets. Slots are cut into bands of `rows`; documents that agree in a
whole band are candidates. All hashes are pure functions of the bytes: they are the same
in every process, on every machine. Token hashes are computed for a batch of documents
at once in NumPy; the signatures are rensa's R-MinHash.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import rensa

# What is stored of a document per band. `location` is input << 32 | ordinal.
RECORD = np.dtype(
  [('band', '<u8'), ('key', '<u8'), ('location', '<u8'), ('length', '<u4')]
)
PAIR = np.dtype(
  [
    ('follower', '<u8'),
    ('leader', '<u8'),
    ('follower_key', '<u8'),
    ('leader_key', '<u8'),
  ]
)

_ODD = 0x9E3779B97F4A7C15
_INVERSE = pow(_ODD, -1, 1 << 64)
_U = np.uint64
_BATCH_CHARACTERS = 1 << 22  # of documents that are hashed together

_SPACE, _WORD, _MARK = 0, 1, 2
_CLASSES = np.full(256, _MARK, np.uint8)
_CLASSES[[0, 9, 10, 11, 12, 13, 32]] = _SPACE
_CLASSES[[c for c in range(256) if c >= 128 or chr(c).isalnum() or c == 95]] = _WORD


def key_of(document_id: str) -> int:
  """64 bits of a document's id: what clusters and groups are ordered by."""
  data = document_id.encode('utf-8', 'replace')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
  """odd**i and odd**-i modulo 2**64, for i < size."""
  tables = []
  for base in (_ODD, _INVERSE):
    table = np.full(size, base, _U)
    table[0] = 1
    tables.append(np.multiply.accumulate(table))
  return tables[0], tables[1]


def _mix(x: np.ndarray) -> np.ndarray:
  """A bijection of 64 bits that spreads them (splitmix64)."""
  x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
  return x ^ (x >> _U(31))


def _tokens(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where tokens begin in bytes that end in white space, and a hash of each.

  A token is a run of letters, digits, underscores and bytes above 127, or any other
  single byte that is not white space.
  """
  classes = _CLASSES[data]
  word = classes == _WORD
  begins = classes == _MARK
  begins[0] |= word[0]
  begins[1:] |= word[1:] & ~word[:-1]
  starts = np.flatnonzero(begins)
  breaks = np.flatnonzero(~word)
  ends = np.where(word[starts], breaks[np.searchsorted(breaks, starts)], starts + 1)
  # Prefix sums of byte * odd**i make the hash of any slice two look-ups.
  up, down = _powers(1 << max(16, len(data).bit_length()))
  sums = np.cumsum((data.astype(_U) + _U(1)) * up[: len(data)], dtype=_U)
  before = np.where(starts > 0, sums[starts - 1], _U(0))
  return starts, _mix((sums[ends - 1] - before) * down[starts])


def shingles(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
  """The hashes of all token n-grams of each text.

  The last tokens of a text begin n-grams that are filled up with a blank, so that a
  text has as many n-grams as tokens, however short it is.

  Returns:
    (hashes, offsets): text i has hashes[offsets[i]:offsets[i + 1]]; both uint64.
  """
  raw = [text.encode('utf-8', 'replace') for text in texts]
  ends = np.cumsum([len(data) + 1 for data in raw])
  starts, tokens = _tokens(np.frombuffer(b' '.join(raw) + b' ', np.uint8))
  owner = np.searchsorted(ends, starts, side='right')
  places = np.arange(len(starts)) + owner * (ngram - 1)
  spread = np.zeros(len(starts) + (len(texts) + 1) * ngram, _U)
  spread[places] = tokens
  hashes = np.zeros(len(starts), _U)
  for k in range(ngram):
    hashes = hashes * _U(0x9FB21C651E98DF25) + spread[places + k]
  counts = np.bincount(owner, minlength=len(texts))
  return _mix(hashes), np.concatenate([[0], np.cumsum(counts)]).astype(_U)


def signatures(
  texts: Sequence[str], *, ngram: int, slots: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """MinHash signatures, uint32 [texts, slots], and which texts have any token."""
  hashes, offsets = shingles(texts, ngram)
  matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
    hashes, offsets, slots, seed
  )
  rows = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), slots)
  return rows, np.diff(offsets.astype(np.int64)) > 0


def band_hashes(signature: np.ndarray, bands: int) -> np.ndarray:
  """uint64 [texts, bands]: equal where two texts agree in all slots of that band."""
  rows = signature.reshape(len(signature), bands, -1).astype(_U)
  hashes = np.broadcast_to(_mix(np.arange(1, bands + 1, dtype=_U)), rows.shape[:2])
  for k in range(rows.shape[2]):
    hashes = _mix(hashes * _U(_ODD) + rows[:, :, k])
  return hashes


def records(
  documents: Iterable[tuple[int, str, str]],
  *,
  ngram: int,
  bands: int,
  rows: int,
  seed: int,
) -> Iterator[np.ndarray]:
  """`RECORD`s, one per document and band, a batch of documents at a time.

  Args:
    documents: (location, id, text); one without any token has no records.
    ngram, bands, rows, seed: as in `near_duplicates.Options`.
  """
  for batch in _batches(documents):
    locations, ids, texts = zip(*batch, strict=True)
    signature, any_token = signatures(texts, ngram=ngram, slots=bands * rows, seed=seed)
    out = np.zeros((len(batch), bands), RECORD)
    out['band'] = band_hashes(signature, bands)
    out['location'] = np.array(locations, _U)[:, None]
    out['key'] = np.array([key_of(i) for i in ids], _U)[:, None]
    out['length'] = np.array([len(text) for text in texts], np.uint32)[:, None]
    yield out[any_token].ravel()


def _batches(documents):
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document[2])
    if size >= _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def candidates(found: np.ndarray, *, leaders: int, threshold: float) -> np.ndarray:
  """`PAIR`s of documents that share a band, each once, sorted.

  Every document of a group is paired with the `leaders` of the group only, which are
  the documents of the smallest keys: a group of a million files with the same
  boilerplate gives a few million pairs, not a trillion. Pairs whose lengths alone rule
  out the threshold are left out.

  Args:
    found: `RECORD`s with all members of their groups; any order.
    leaders: how many documents of a group the others are compared with.
    threshold: the smallest similarity that is wanted.
  """
  found = found[np.lexsort((found['location'], found['key'], found['band']))]
  index = np.arange(len(found))
  new = np.ones(len(found), bool)
  new[1:] = found['band'][1:] != found['band'][:-1]
  first = np.maximum.accumulate(np.where(new, index, 0))
  parts = [np.zeros(0, PAIR)]
  for k in range(leaders):
    follows = np.flatnonzero(first + k < index)
    follower, leader = found[follows], found[first[follows] + k]
    short = np.minimum(follower['length'], leader['length'])
    close = short >= threshold * np.maximum(follower['length'], leader['length'])
    close &= follower['location'] != leader['location']
    pairs = np.zeros(int(close.sum()), PAIR)
    for side, whole in (('follower', follower), ('leader', leader)):
      pairs[side] = whole['location'][close]
      pairs[f'{side}_key'] = whole['key'][close]
    parts.append(pairs)
  return unique_pairs(np.concatenate(parts))


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
  """Each pair once, sorted by the keys of its follower and leader."""
  order = np.lexsort(
    (pairs['leader'], pairs['leader_key'], pairs['follower'], pairs['follower_key'])
  )
  pairs = pairs[order]
  keep = np.ones(len(pairs), bool)
  keep[1:] = (pairs['follower'][1:] != pairs['follower'][:-1]) | (
    pairs['leader'][1:] != pairs['leader'][:-1]
  )
  return pairs[keep]

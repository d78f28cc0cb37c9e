"""Near-duplicate documents: candidates by MinHash, verified by Levenshtein similarity.

PaLM removed near-duplicate source files by the Levenshtein distance between files
(section 3); threshold and procedure are not published. Here documents that agree in a
band of their signatures are candidates (`minhash`), a pair is a duplicate if its
Levenshtein similarity reaches the threshold (`levenshtein`), and of the documents that
pairs connect, directly or through others, one is kept: the one whose id has the
smallest hash. The result depends on the documents only, not on their order, nor on how
they lie in files.

`find` does it in memory; `stages` does it over files of documents, in parallel and
restartably: sign -> candidates -> texts -> verify -> cluster. Its memory is bounded by
`bucket_bytes` and `text_bytes` per worker; the last stage alone holds something of the
whole corpus, about 200 bytes for every near-duplicate.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import rensa
import zstandard

from palm_t5x import errors
from palm_t5x.corpus import documents as documents_lib
from palm_t5x.corpus import jobs, levenshtein, minhash, storage

_FINE = 4096  # buckets that records are sorted into; a unit takes several of them
_LEVEL = 3  # of zstd


@dataclasses.dataclass(frozen=True)
class Options:
  """How near-duplicates are found.

  With the defaults, two texts whose sets of token 3-grams have a Jaccard similarity of
  0.5 are compared with a probability of 93 %, at 0.6 of 99.7 %, at 0.1 of 0.4 %.

  Attributes:
    threshold: smallest Levenshtein similarity of near-duplicates, by characters.
    ngram: tokens in a shingle.
    bands, rows: a signature has bands * rows slots; two documents are compared if all
      rows of any band agree.
    seed: of the signatures.
    leaders: how many documents of a group with an equal band the others are compared
      with; what bounds the cost of boilerplate.
    exact_chars: up to this length the similarity is exact (`levenshtein`).
    bucket_bytes: of signatures that a worker holds at once.
    text_bytes: of texts that a worker holds at once.

  Raises:
    UserError: a value that is out of range.
  """

  threshold: float = 0.8
  ngram: int = 3
  bands: int = 42
  rows: int = 4
  seed: int = 0
  leaders: int = 4
  exact_chars: int = 1 << 15
  bucket_bytes: int = 1 << 28
  text_bytes: int = 1 << 28

  def __post_init__(self):
    if not 0 < self.threshold <= 1:
      raise errors.UserError(
        f'near_duplicates.Options.threshold = {self.threshold}: a similarity lies in '
        '(0, 1]; 0.8 means that a fifth of the characters may differ.'
      )
    for field in dataclasses.fields(self)[1:]:
      low = 0 if field.name in ('seed', 'exact_chars') else 1
      if getattr(self, field.name) < low:
        raise errors.UserError(
          f'near_duplicates.Options.{field.name} = {getattr(self, field.name)}: give '
          f'at least {low}; the default is {field.default}.'
        )

  def settings(self) -> dict:
    """What a job's folder is only resumed with: all that the result depends on."""
    version = rensa.RMinHash.ALGORITHM_VERSION
    return {**dataclasses.asdict(self), 'rensa_algorithm': version}

  def _signing(self) -> dict:
    return {k: getattr(self, k) for k in ('ngram', 'bands', 'rows', 'seed')}


def find(
  documents: Iterable[documents_lib.Document], options: Options = Options()
) -> dict[str, str]:
  """Near-duplicates among documents that fit into memory.

  Returns:
    the id of each document to drop -> the id of the one kept in its place.
  """
  documents = list(documents)
  rows = ((i, d.id, d.text) for i, d in enumerate(documents))
  found = list(minhash.records(rows, **options._signing()))
  if not found:
    return {}
  pairs = _candidates(np.concatenate(found), options)
  pairs = similar(pairs, lambda i: documents[i].text, options)
  dropped, kept = clusters(pairs)
  return {
    documents[d].id: documents[k].id
    for d, k in zip(dropped.tolist(), kept.tolist(), strict=True)
  }


def _candidates(found: np.ndarray, options: Options) -> np.ndarray:
  return minhash.candidates(found, leaders=options.leaders, threshold=options.threshold)


def similar(
  pairs: np.ndarray, text_of: Callable[[int], str], options: Options
) -> np.ndarray:
  """Those of the candidate pairs that reach the threshold.

  A pair that others have connected already is not compared, and is left out.
  """
  parent: dict[int, int] = {}

  def root(x):
    while (above := parent.get(x, x)) != x:
      parent[x] = parent.get(above, above)
      x = above
    return x

  keep = np.zeros(len(pairs), bool)
  sides = zip(pairs['follower'].tolist(), pairs['leader'].tolist(), strict=True)
  for i, (follower, leader) in enumerate(sides):
    a, b = root(follower), root(leader)
    if a != b and levenshtein.similarity(
      text_of(follower),
      text_of(leader),
      threshold=options.threshold,
      exact_chars=options.exact_chars,
    ):
      keep[i], parent[a] = True, b
  return pairs[keep]


def clusters(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What `minhash.PAIR`s of near-duplicates connect.

  Returns:
    (dropped, kept): locations of all documents but one of each cluster, sorted, and of
    that one.
  """
  import scipy.sparse

  ends = np.concatenate([pairs['follower'], pairs['leader']])
  keys = np.concatenate([pairs['follower_key'], pairs['leader_key']])
  locations, first, numbers = np.unique(ends, return_index=True, return_inverse=True)
  keys, size = keys[first], len(locations)
  graph = scipy.sparse.coo_array(
    (np.ones(len(pairs), bool), np.split(numbers, 2)), shape=(size, size)
  )
  _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
  order = np.lexsort((locations, keys, labels))
  _, begins = np.unique(labels[order], return_index=True)
  kept = locations[order[begins]][labels]
  return locations[kept != locations], kept[kept != locations]


def stages(
  inputs: Sequence[str] | Callable[[jobs.Job], Sequence[str]],
  work: str,
  options: Options = Options(),
) -> list[jobs.Stage]:
  """The stages that leave a drop list of every input in `work`; see `dropped`.

  Args:
    inputs: files of documents (`documents.Writer`), or a function of the job that
      names them once the stages before are done; always in the same order.
    work: a folder on a local or shared disk for what passes between the stages.
    options: its `settings()` belong into those of the job.
  """

  def paths(job):
    return list(inputs(job) if callable(inputs) else inputs)

  def totals(job):
    facts = job.facts('near_sign').values()
    return {k: sum(f[k] for f in facts) for k in ('records', 'bytes')}

  def buckets(job):
    size = totals(job)['records'] * minhash.RECORD.itemsize
    return min(_FINE, -(-size // options.bucket_bytes) or 1)

  def verifiers(job):
    return min(_FINE, -(-totals(job)['bytes'] // options.text_bytes) or 1)

  def sign(job):
    return [
      jobs.Unit(_name(i), _sign, (path, work, i, options), os.path.getsize(path))
      for i, path in enumerate(paths(job))
    ]

  def candidates(job):
    number, args = buckets(job), (len(paths(job)), verifiers(job), options)
    return [jobs.Unit(_name(i), _pair, (work, i, number, *args)) for i in range(number)]

  def texts(job):
    number = verifiers(job)
    return [
      jobs.Unit(
        _name(i),
        _gather,
        (path, work, i, buckets(job), number, options.text_bytes // 4),
        os.path.getsize(path),
      )
      for i, path in enumerate(paths(job))
    ]

  def verify(job):
    args = (len(paths(job)), buckets(job), options)
    return [
      jobs.Unit(_name(i), _verify, (work, i, *args)) for i in range(verifiers(job))
    ]

  def cluster(job):
    return [jobs.Unit('all', _cluster, (work, len(paths(job)), verifiers(job)))]

  return [
    jobs.Stage('near_sign', sign, 'signing documents'),
    jobs.Stage('near_candidates', candidates, 'finding candidates'),
    jobs.Stage('near_texts', texts, 'gathering candidates'),
    jobs.Stage('near_verify', verify, 'comparing candidates'),
    jobs.Stage('near_cluster', cluster, 'clustering near-duplicates'),
  ]


def dropped(work: str, index: int) -> dict[int, tuple[str, str]]:
  """What to drop of input `index`: ids need not be unique, places are.

  Returns:
    the number of each document to drop -> (its id, the id of the one kept).

  Raises:
    Failure: the list is missing or damaged.
  """
  path = _path(work, 'dropped', index, 'json')
  try:
    with open(path, encoding='utf-8') as f:
      return {int(place): tuple(ids) for place, ids in json.load(f).items()}
  except (OSError, ValueError) as e:
    raise errors.Failure(
      f'The list of near-duplicates {path} cannot be read ({e}): delete the folder '
      f'{work} and run the command that wrote it (`t5x corpus`) again.'
    ) from e


# The units of the stages. Files between them are NumPy records sorted by the partition
# that the next stage reads, with the partitions' bounds in front.


def _sign(path: str, work: str, index: int, options: Options) -> dict:
  num_documents = num_bytes = 0

  def rows():
    nonlocal num_documents, num_bytes
    for ordinal, document in enumerate(documents_lib.read(path)):
      num_documents, num_bytes = ordinal + 1, num_bytes + len(document.text)
      yield index << 32 | ordinal, document.id, document.text

  parts = list(minhash.records(rows(), **options._signing()))
  found = np.concatenate([np.zeros(0, minhash.RECORD), *parts])
  found = found[np.lexsort((found['location'], found['band']))]
  _save(
    _path(work, 'signatures', index, 'bin'),
    found,
    _fine_bucket(found['band']),
    _FINE,
  )
  return {'documents': num_documents, 'bytes': num_bytes, 'records': len(found)}


def _fine_bucket(bands: np.ndarray) -> np.ndarray:
  return (bands >> np.uint64(64 - 12)).astype(np.int64)  # 12 bits: _FINE buckets


def _pair(work, bucket, num_buckets, num_inputs, num_verifiers, options) -> dict:
  first, last = (_FINE * (bucket + k) // num_buckets for k in (0, 1))
  found = [
    _load(_path(work, 'signatures', i, 'bin'), minhash.RECORD, first, last)
    for i in range(num_inputs)
  ]
  pairs = _candidates(np.concatenate(found), options)
  unit = (pairs['follower_key'] % np.uint64(num_verifiers)).astype(np.int64)
  order = np.argsort(unit, kind='stable')
  _save(_path(work, 'pairs', bucket, 'bin'), pairs[order], unit[order], num_verifiers)
  # Which texts each verifier needs: a pair is verified where its follower belongs.
  wanted = np.unique(
    np.concatenate(
      [
        np.rec.fromarrays([pairs[side], unit.astype('<u4')], dtype=_WANTED)
        for side in ('follower', 'leader')
      ]
    )
  )
  _save(
    _path(work, 'wanted', bucket, 'bin'),
    wanted,
    (wanted['location'] >> np.uint64(32)).astype(np.int64),
    num_inputs,
  )
  return {'pairs': len(pairs)}


_WANTED = np.dtype([('location', '<u8'), ('unit', '<u4')])


def _gather(path, work, index, num_buckets, num_verifiers, buffer_bytes) -> dict:
  """Puts the texts of one input that verifiers need where each finds its own."""
  wanted = [
    _load(_path(work, 'wanted', b, 'bin'), _WANTED, index, index + 1)
    for b in range(num_buckets)
  ]
  wanted = np.unique(np.concatenate(wanted))
  ordinals = (wanted['location'] & np.uint64(0xFFFFFFFF)).tolist()
  waiting = list(zip(ordinals, wanted['unit'].tolist(), strict=True))[::-1]
  segments, buffers, size = [], {}, 0
  with storage.atomic(_path(work, 'texts', index, 'zst')) as f:

    def flush():
      for unit in sorted(buffers):
        data = zstandard.compress(b''.join(buffers[unit]), _LEVEL)
        segments.append((unit, f.tell(), len(data)))
        f.write(data)
      buffers.clear()

    for ordinal, document in enumerate(documents_lib.read(path) if waiting else ()):
      if not waiting:
        break
      line = None
      while waiting and waiting[-1][0] == ordinal:
        if line is None:
          entry = [index << 32 | ordinal, document.id, document.text]
          line = json.dumps(entry, ensure_ascii=False).encode('utf-8', 'replace')
        buffers.setdefault(waiting.pop()[1], []).append(line + b'\n')
        size += len(line)
      if size >= buffer_bytes:
        flush()
        size = 0
    flush()
  segments = np.array(sorted(segments), '<u8').reshape(-1, 3)
  _save(
    _path(work, 'segments', index, 'bin'),
    np.rec.fromarrays(segments.T, dtype=_SEGMENT),
    segments[:, 0].astype(np.int64),
    num_verifiers,
  )
  return {'texts': len(wanted)}


_SEGMENT = np.dtype([('unit', '<u8'), ('begin', '<u8'), ('size', '<u8')])


def _verify(work, unit, num_inputs, num_buckets, options) -> dict:
  texts, ids = {}, {}
  for index in range(num_inputs):
    for line in _segments(work, index, unit):
      location, name, text = json.loads(line)
      texts[location], ids[location] = text, name
  pairs = [
    _load(_path(work, 'pairs', b, 'bin'), minhash.PAIR, unit, unit + 1)
    for b in range(num_buckets)
  ]
  pairs = minhash.unique_pairs(np.concatenate(pairs))
  found = similar(pairs, texts.__getitem__, options)
  _save(_path(work, 'similar', unit, 'bin'), found, np.zeros(len(found), int), 1)
  with storage.atomic(_path(work, 'ids', unit, 'json')) as f:
    near = sorted({*found['follower'].tolist(), *found['leader'].tolist()})
    f.write(json.dumps([[location, ids[location]] for location in near]).encode())
  return {'candidates': len(pairs), 'similar': len(found)}


def _segments(work, index, unit) -> Iterator[bytes]:
  places = _load(_path(work, 'segments', index, 'bin'), _SEGMENT, unit, unit + 1)
  with open(_path(work, 'texts', index, 'zst'), 'rb') as f:
    for _, begin, size in places.tolist():
      f.seek(begin)
      yield from zstandard.decompress(f.read(size)).splitlines()


def _cluster(work, num_inputs, num_verifiers) -> dict:
  pairs = [
    _load(_path(work, 'similar', unit, 'bin'), minhash.PAIR, 0, 1)
    for unit in range(num_verifiers)
  ]
  gone, kept = clusters(np.concatenate([np.zeros(0, minhash.PAIR), *pairs]))
  ids = {}
  for unit in range(num_verifiers):
    with open(_path(work, 'ids', unit, 'json'), encoding='utf-8') as f:
      ids.update(map(tuple, json.load(f)))
  bounds = np.searchsorted(gone >> np.uint64(32), np.arange(num_inputs + 1))
  for index in range(num_inputs):
    mine = slice(bounds[index], bounds[index + 1])
    both = zip(gone[mine].tolist(), kept[mine].tolist(), strict=True)
    with storage.atomic(_path(work, 'dropped', index, 'json')) as f:
      places = {d & 0xFFFFFFFF: (ids[d], ids[k]) for d, k in both}
      f.write(json.dumps(places, indent=0).encode())
  sizes = np.unique(kept, return_counts=True)[1] + 1
  return {
    'clusters': len(sizes),
    'dropped': len(gone),
    'largest': int(sizes.max(initial=0)),
  }


def _name(index: int) -> str:
  return f'{index:05d}'


def _path(work: str, kind: str, index: int, ending: str) -> str:
  return os.path.join(work, kind, f'{_name(index)}.{ending}')


def _save(path: str, rows: np.ndarray, partition: np.ndarray, num: int) -> None:
  """Records that are sorted by the partition, 0 to num - 1, they belong to."""
  bounds = np.searchsorted(partition, np.arange(num + 1)).astype('<u8')
  with storage.atomic(path) as f:
    f.write(np.array([num], '<u8').tobytes() + bounds.tobytes())
    f.write(rows.tobytes())


def _load(path: str, dtype: np.dtype, first: int, last: int) -> np.ndarray:
  """The records of partitions first..last-1."""
  with open(path, 'rb') as f:
    num = int(np.frombuffer(f.read(8), '<u8')[0])
    bounds = np.frombuffer(f.read(8 * (num + 1)), '<u8').tolist()
    f.seek(8 * (num + 2) + bounds[first] * dtype.itemsize)
    size = (bounds[last] - bounds[first]) * dtype.itemsize
    return np.frombuffer(f.read(size), dtype)

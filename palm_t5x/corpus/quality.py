"""How much a document resembles curated text, and sampling in proportion to that.

A linear model over hashed words and pairs of words tells curated documents (books,
Wikipedia, chosen sites) from crawled ones, as for GLaM (Du et al. 2022), whose web
pages the paper's are. Pages are then sampled in proportion to their score, so that
those of low score become rare rather than absent (App. D).

A model is a folder: weights (.npz, without pickles) and manifest.json, written last.
"""

import dataclasses
import functools
import hashlib
import heapq
import io
import json
import logging
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import documents, records, storage

logger = logging.getLogger(__name__)

_FORMAT = 1
_WORDS = re.compile(r'\w+')
# Scripts that put no spaces between words: each character counts as one.
_DENSE = (
  '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
)
_HAS_DENSE = re.compile(f'[{_DENSE}]')
_DENSE_WORDS = re.compile(f'[{_DENSE}]|[^\\W{_DENSE}]+')
_HELD_OUT = 0.1  # of the documents, for the manifest's accuracy
_READ_FOR_ONE = 10  # documents that are read of a part for each that is drawn
_REMEMBERED = 300_000


class _Hashes(dict):
  """Word -> hash, remembered for the words seen last: most are seen again."""

  def __missing__(self, word: str) -> int:
    if len(self) >= _REMEMBERED:
      self.clear()
    value = self[word] = zlib.crc32(word.encode('utf-8', 'replace'))
    return value


_hashes = _Hashes()


def words(text: str, max_characters: int) -> list[str]:
  """The words of a text's beginning, in lower case."""
  text = text[:max_characters].lower()
  if text.isascii() or not _HAS_DENSE.search(text):
    return _WORDS.findall(text)
  return _DENSE_WORDS.findall(text)


def features(text: str, num_features: int, max_characters: int) -> np.ndarray:
  """The features that a text has: its words and pairs of words, hashed.

  Not by scikit-learn's HashingVectorizer, whose checks take longer than the hashing of
  one document: words are hashed once, and pairs by arithmetic on their words' hashes.

  Args:
    text: any.
    num_features: a power of two.
    max_characters: so many are looked at.

  Returns:
    [occurrences], int64 below num_features.
  """
  found = words(text, max_characters)
  ones = np.fromiter(map(_hashes.__getitem__, found), np.uint64, len(found))
  pairs = (ones[:-1] << np.uint64(32)) + ones[1:] + np.uint64(1 << 63)
  keys = np.concatenate([ones, pairs])
  # Fibonacci hashing: the highest bits of the product depend on all bits of the key.
  keys = (keys ^ (keys >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
  return (keys >> np.uint64(65 - num_features.bit_length())).astype(np.int64)


def _matrix(texts: Sequence[str], num_features: int, max_characters: int):
  """Sparse [texts, num_features]: occurrences over the root of their sum."""
  from scipy import sparse

  columns = [features(text, num_features, max_characters) for text in texts]
  lengths = np.array([len(c) for c in columns], np.int64)
  values = np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths)
  ends = np.concatenate([[0], np.cumsum(lengths)])
  indices = np.concatenate(columns).astype(np.int32)
  matrix = sparse.csr_matrix(
    (values.astype(np.float32), indices, ends), (len(texts), num_features)
  )
  matrix.sum_duplicates()
  return matrix


@dataclasses.dataclass(frozen=True)
class _Draw:
  """The documents drawn from some parts.

  Attributes:
    texts: in the order of their hashes.
    hashes: of the texts, in hex.
    parts: name -> blake2b of the hashes of the documents drawn from it.
  """

  texts: list[str]
  hashes: list[str]
  parts: dict[str, str]


def _draw(
  parts, steps, max_documents: int, max_characters: int, seed: int, limits
) -> _Draw:
  """Some documents of every part, by their hashes, reading bounded shares of each."""
  chosen = sorted(parts, key=lambda part: documents.uniform(seed, part.name))
  chosen = chosen[:max_documents]
  found: dict[str, str] = {}
  hashes_of = {}
  for i, part in enumerate(chosen):
    number = (i + 1) * max_documents // len(chosen) - i * max_documents // len(chosen)

    def candidates(part=part, number=number):
      left = _READ_FOR_ONE * number
      for document in records.tolerant(part.read(), **limits):
        for one in _through(document, steps):
          name = one.hash().hex()
          yield documents.uniform(seed, name), name, one.text[:max_characters]
        left -= 1
        if not left:
          return

    drawn = heapq.nsmallest(number, candidates())
    names = sorted({name for _, name, _ in drawn})
    joined = hashlib.blake2b(''.join(names).encode(), digest_size=16)
    hashes_of[part.name] = joined.hexdigest()
    found.update((name, text) for _, name, text in drawn)
  hashes = sorted(found)
  return _Draw([found[name] for name in hashes], hashes, hashes_of)


def _through(
  document: documents.Document, steps: Sequence[Callable]
) -> Iterator[documents.Document]:
  """What steps make of a document."""
  if not steps:
    yield document
    return
  result = steps[0](document)
  if isinstance(result, documents.Document):
    result = [result]
  if isinstance(result, list):
    for one in result:
      yield from _through(one, steps[1:])


def train(
  curated: Sequence[documents.Part],
  crawled: Sequence[documents.Part],
  path: str,
  *,
  curated_steps: Sequence[Callable] = (),
  crawled_steps: Sequence[Callable] = (),
  max_documents: int = 50_000,
  num_features: int = 1 << 18,
  max_characters: int = 1500,
  inverse_penalty: float = 1.0,
  max_iterations: int = 200,
  seed: int = 0,
  max_broken: int = 100,
  max_broken_share: float = 0.01,
) -> dict[str, Any]:
  """Trains the model and writes it; returns its manifest.

  Args:
    curated, crawled: what scores should be high and low on; documents of all parts are
      drawn by their hashes. A text that is in both is left out.
    path: the model's folder, local or in a bucket.
    curated_steps, crawled_steps: applied to documents before they are looked at, such
      as `web.StripMarkup`: the same as before scoring.
    max_documents: of either kind. Memory is about 10 KB for each.
    num_features: of the hash; a power of two.
    max_characters: of each document's beginning that are looked at.
    inverse_penalty: `C` of scikit-learn's LogisticRegression; more makes scores more
      extreme.
    max_iterations: of its solver; 100,000 documents take a minute or two.
    seed: of the draw.
    max_broken, max_broken_share: see `records.tolerant`.

  Raises:
    UserError: there are too few documents of one kind.
    Failure: the model cannot be written.
  """
  import sklearn
  from sklearn import exceptions, linear_model

  if num_features & (num_features - 1) or num_features < 2:
    raise errors.UserError(f'num_features = {num_features} is no power of two.')
  limits = {'max_broken': max_broken, 'max_broken_share': max_broken_share}
  sizes = max_documents, max_characters, seed, limits
  good = _draw(curated, curated_steps, *sizes)
  bad = _draw(crawled, crawled_steps, *sizes)
  both = set(good.hashes) & set(bad.hashes)
  rows = [
    (name, text, label)
    for draw, label in ((good, 1), (bad, 0))
    for name, text in zip(draw.hashes, draw.texts, strict=True)
    if name not in both
  ]
  held_out = np.array(
    [documents.uniform(seed, 'held out', r[0]) < _HELD_OUT for r in rows], bool
  )
  y = np.array([label for _, _, label in rows], np.int8)
  _check_numbers(y, held_out)
  X = _matrix([text for _, text, _ in rows], num_features, max_characters)
  # Not by stochastic descent, which is ten times faster and whose scores are nearly all
  # 0 or 1: sampling in proportion would keep or drop, not make rare.
  model = linear_model.LogisticRegression(
    C=inverse_penalty, max_iter=max_iterations, class_weight='balanced'
  )
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    model.fit(X[~held_out], y[~held_out])
  weights = model.coef_[0].astype(np.float32)
  bias = float(model.intercept_[0])
  scores = np.array([_probability(x) for x in X[held_out] @ weights + bias])
  manifest = {
    'format': _FORMAT,
    'num_features': num_features,
    'max_characters': max_characters,
    'bias': bias,
    'options': {
      'max_documents': max_documents,
      'inverse_penalty': inverse_penalty,
      'max_iterations': max_iterations,
      'seed': seed,
      'curated_steps': [repr(step) for step in curated_steps],
      'crawled_steps': [repr(step) for step in crawled_steps],
    },
    'scikit_learn': sklearn.__version__,
    'data': {'curated': _facts(good), 'crawled': _facts(bad), 'in_both': len(both)},
    'held_out': _held_out(y[held_out], scores),
  }
  _write(path, weights, manifest)
  told = manifest['held_out']
  logger.info(
    'trained the quality classifier in %s: AUC %.3f on %d documents held out',
    path,
    told['auc'],
    told['documents'],
  )
  return manifest


def _check_numbers(y: np.ndarray, held_out: np.ndarray) -> None:
  for kind, label in (('curated', 1), ('crawled', 0)):
    for share, name in ((~held_out, 'train on'), (held_out, 'hold out')):
      if not np.any(share & (y == label)):
        raise errors.UserError(
          f'There are too few {kind} documents to {name}: {int((y == label).sum())} in '
          'all, not counting those that are both. Name more data.'
        )


def _facts(draw: _Draw) -> dict[str, Any]:
  joined = hashlib.blake2b(''.join(draw.hashes).encode(), digest_size=16)
  return {
    'documents': len(draw.hashes),
    'blake2b': joined.hexdigest(),
    'parts': draw.parts,
  }


def _held_out(y: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
  from sklearn import metrics

  return {
    'documents': len(y),
    'accuracy': round(float(np.mean((scores > 0.5) == y)), 4),
    'auc': round(float(metrics.roc_auc_score(y, scores)), 4),
    'mean_score_curated': round(float(scores[y == 1].mean()), 4),
    'mean_score_crawled': round(float(scores[y == 0].mean()), 4),
  }


def _write(path: str, weights: np.ndarray, manifest: dict[str, Any]) -> None:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, weights=weights)
  data = buffer.getvalue()
  digest = hashlib.blake2b(data, digest_size=16).hexdigest()
  folder = storage.normalise(path)
  name = f'weights-{digest[:12]}.npz'
  storage.write_bytes(storage.join(folder, name), data)
  manifest.update(weights=name, weights_blake2b=digest)
  text = json.dumps(manifest, indent=2, sort_keys=True) + '\n'
  storage.write_bytes(storage.join(folder, 'manifest.json'), text.encode())
  load.cache_clear()


def exists(path: str) -> bool:
  """Whether there is a model in the folder."""
  folder = storage.normalise(path)
  return storage.read_bytes(storage.join(folder, 'manifest.json')) is not None


def _probability(logit: float) -> float:
  # Rounded, so that what is kept follows from the score that is written down.
  return round(1 / (1 + math.exp(-min(max(float(logit), -60.0), 60.0))), 6)


class Quality:
  """Scores documents with a model that `train` wrote.

  Args:
    path: the model's folder.

  Attributes:
    manifest: what `train` returned.

  Raises:
    UserError: there is no model.
    Failure: it is damaged.
  """

  def __init__(self, path: str):
    folder = storage.normalise(path)
    text = storage.read_bytes(storage.join(folder, 'manifest.json'))
    if text is None:
      raise errors.UserError(
        f'There is no quality model in {folder}: name CURATED and CRAWLED text to '
        'train one, or a folder that has one.'
      )
    try:
      self.manifest = json.loads(text)
      if self.manifest['format'] != _FORMAT:
        raise ValueError(f'its format is {self.manifest["format"]}, not {_FORMAT}')
      data = storage.read_bytes(storage.join(folder, self.manifest['weights']))
      digest = hashlib.blake2b(data or b'', digest_size=16).hexdigest()
      if digest != self.manifest['weights_blake2b']:
        raise ValueError(f'{self.manifest["weights"]} is not what was written')
      with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        self._weights = arrays['weights'].astype(np.float64)
      self._num_features = int(self.manifest['num_features'])
      self._max_characters = int(self.manifest['max_characters'])
      self._bias = float(self.manifest['bias'])
      if self._weights.shape != (self._num_features,):
        raise ValueError('weights and manifest do not fit')
    except (ValueError, KeyError, TypeError) as e:
      raise errors.Failure(
        f'The quality model in {folder} is damaged ({e}): delete the folder and train '
        'it again.'
      ) from e

  def score(self, text: str) -> float:
    """How likely a text is curated, in [0, 1]."""
    found = features(text, self._num_features, self._max_characters)
    total = float(self._weights[found].sum()) / math.sqrt(max(len(found), 1))
    return _probability(total + self._bias)

  def scores(self, texts: Iterable[str]) -> list[float]:
    """`score` of several texts."""
    return [self.score(text) for text in texts]


@functools.cache
def load(path: str) -> Quality:
  """The model of a folder, read once per process."""
  return Quality(path)


def keep_probability(
  score: float, rule: str = 'proportional', alpha: float = 9
) -> float:
  """How likely a document of a score is kept; see `keeps`."""
  return score if rule == 'proportional' else (2 - score) ** -alpha


def keeps(
  score: float, draw: float, rule: str = 'proportional', alpha: float = 9
) -> bool:
  """Whether a document is kept.

  Args:
    score: in [0, 1].
    draw: uniform in [0, 1).
    rule: 'proportional', as the paper says; or 'pareto', as GLaM did it: kept if
      numpy.random.pareto(alpha) > 1 - score, so with probability (2 - score)^-alpha.
    alpha: of 'pareto'.
  """
  if rule == 'proportional':
    return draw < score
  return (1 - draw) ** (-1 / alpha) - 1 > 1 - score


@dataclasses.dataclass(frozen=True)
class QualityStep:
  """Scores documents (meta['quality']) and samples them by their score.

  Whether a document is kept depends on its text, the model and the salt alone. A
  dropped document has its score in meta too, for `quality_report.Tally`.

  Attributes:
    path: the model's folder.
    rule: 'proportional' or 'pareto', see `keeps`; 'none' keeps every document.
    alpha: of 'pareto'.
    salt: another one draws another sample.
  """

  path: str
  rule: str = 'proportional'
  alpha: float = 9.0
  salt: str = 'quality'

  def __post_init__(self):
    if self.rule not in ('proportional', 'pareto', 'none'):
      raise errors.UserError(
        f"QualityStep.rule = {self.rule!r}: it is 'proportional', 'pareto' or 'none'."
      )
    if not self.alpha > 0:
      raise errors.UserError(f'QualityStep.alpha = {self.alpha}: it must be above 0.')

  def settings(self) -> dict[str, Any]:
    """What the outcome depends on: the model itself, wherever it lies."""
    values = {**dataclasses.asdict(self), 'model': load(self.path).manifest}
    return {k: v for k, v in values.items() if k != 'path'}

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    score = load(self.path).score(document.text)
    document.meta['quality'] = score
    if self.rule != 'none':
      draw = documents.uniform(self.salt, document.hash().hex())
      if not keeps(score, draw, self.rule, self.alpha):
        return documents.Dropped('quality')
    return document

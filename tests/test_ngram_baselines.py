"""The baselines that a trained model is measured against, by counting in a dict."""

import collections
import itertools
import math

import ngram_baselines
import numpy as np
import pytest

V = 7


@pytest.fixture
def ids():
  rng = np.random.default_rng(0)
  return rng.integers(1, V, 400), rng.integers(1, V, 60)


def test_unigram(ids):
  train, valid = ids
  counts = collections.Counter(train.tolist())
  bits = sum(-math.log2((counts[w] + 1) / (len(train) + V)) for w in valid.tolist())
  found = ngram_baselines.unigram_bits_per_byte(train, valid, 123, V)
  assert found == pytest.approx(bits / 123)


@pytest.mark.parametrize('k', [0.01, 0.5])
def test_trigram(ids, k):
  train, valid = ([1, 1, *part.tolist()] for part in ids)
  grams = collections.Counter(zip(train, train[1:], train[2:], strict=False))
  contexts = collections.Counter(itertools.pairwise(train[:-1]))
  bits = sum(
    -math.log2((grams[u, v, w] + k) / (contexts[u, v] + k * V))
    for u, v, w in zip(valid, valid[1:], valid[2:], strict=False)
  )
  found = ngram_baselines.trigram_bits_per_byte(*ids, 123, V, k=k)
  assert found == pytest.approx(bits / 123)
  best = ngram_baselines.trigram_bits_per_byte(*ids, 123, V, k=(k, 0.1))
  assert best <= found

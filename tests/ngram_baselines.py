"""What an n-gram model reaches on the same tokens: the floor a trained model must beat.

Bits per byte are the sum of -log2 p over all validation tokens, end-of-document tokens
included, over the UTF-8 bytes of the validation text.
"""

import numpy as np


def unigram_bits_per_byte(
  train_ids, valid_ids, num_valid_bytes: int, vocab_size: int
) -> float:
  """Add-one unigram over the training tokens.

  Args:
    train_ids, valid_ids: integer arrays, 1-D: the streams of tokens.
    num_valid_bytes: UTF-8 bytes of the validation text.
    vocab_size: how many ids there are.
  """
  counts = np.bincount(train_ids, minlength=vocab_size) + 1.0
  bits = -np.log2(counts / counts.sum())
  return float(bits[valid_ids].sum() / num_valid_bytes)


def trigram_bits_per_byte(
  train_ids,
  valid_ids,
  num_valid_bytes: int,
  vocab_size: int,
  k=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
) -> float:
  """Add-k trigram, p(w | uv) = (c(uvw) + k) / (c(uv) + kV), at the best k of the grid.

  The best on the validation tokens themselves, which can only flatter the trigram.
  """
  contexts, ngrams = _codes(train_ids, vocab_size)
  context_codes, context_counts = np.unique(contexts, return_counts=True)
  ngram_codes, ngram_counts = np.unique(ngrams, return_counts=True)
  contexts, ngrams = _codes(valid_ids, vocab_size)
  seen_context = _lookup(context_codes, context_counts, contexts)
  seen_ngram = _lookup(ngram_codes, ngram_counts, ngrams)
  return min(
    float(
      -np.log2((seen_ngram + one) / (seen_context + one * vocab_size)).sum()
      / num_valid_bytes
    )
    for one in np.atleast_1d(k)
  )


def _codes(ids, vocab_size: int):
  """(u·V + v, (u·V + v)·V + w) for every token w; [eod] twice before the first."""
  ids = np.concatenate([[1, 1], np.asarray(ids)]).astype(np.int64)
  contexts = ids[:-2] * vocab_size + ids[1:-1]
  return contexts, contexts * vocab_size + ids[2:]


def _lookup(codes, counts, wanted):
  places = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
  return np.where(codes[places] == wanted, counts[places], 0)

"""Damaged training data for tests: chosen examples scrambled, or not even numbers.

`scrambled(monkeypatch, first, last)` makes every reader of running text give nonsense
for examples first ... last-1 of a run. Which nonsense depends on the example alone, so
that a run which passes over those examples reads clean data and no other.
"""

import numpy as np

from palm_t5x.corpus import reader


def scrambled(monkeypatch, first: int, last: int) -> None:
  """Has the examples of this half-open range read as random tokens."""
  clean = reader.MixtureReader.examples

  def examples(self, indices):
    batch = dict(clean(self, indices))
    bad = np.flatnonzero((indices >= first) & (indices < last))
    for name in ('decoder_input_tokens', 'decoder_target_tokens'):
      values = np.array(batch[name])
      for row in bad:
        noise = np.random.default_rng([int(indices[row]), len(name)])
        values[row] = noise.integers(3, 500, values.shape[1])
      batch[name] = values
    return batch

  monkeypatch.setattr(reader.MixtureReader, 'examples', examples)


def not_numbers(monkeypatch, first: int, last: int) -> None:
  """Has the examples of this half-open range give a loss and gradients that are NaN."""
  clean = reader.MixtureReader.examples

  def examples(self, indices):
    batch = dict(clean(self, indices))
    weights = np.array(batch['decoder_loss_weights'], np.float32)
    weights[(indices >= first) & (indices < last)] = np.nan
    return {**batch, 'decoder_loss_weights': weights}

  monkeypatch.setattr(reader.MixtureReader, 'examples', examples)

"""Tokens per second of the reader and of tokenisation, against SeqIO's own pipeline.

    python benchmarks/data.py [--megabytes 16] [--length 2048]

The same text (palm_tiny's corpus, from this machine) goes four ways: tokenised by the
vocabulary's batch call and by SeqIO's tokenize; read as rows of 2,048 tokens by example
index from a token store, and packed to such rows by SeqIO's LM feature converter. Only
ratios within one run mean anything.
"""

import argparse
import itertools
import os
import tempfile
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import palm_t5x.mixtures.pretrain  # noqa: F401  (registers the tasks)
import seqio
import tensorflow as tf

from palm_t5x.corpus import learning, store_builder, token_store
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.corpus.reader import MixtureReader

TASK = 'python_code'


def texts_of(megabytes: float) -> list[str]:
  """So much text of palm_tiny's largest sub-corpus, repeated if it has less."""
  documents = list(seqio.TaskRegistry.get(TASK).source.documents('train'))
  texts, size = [], 0
  for document in itertools.cycle(documents):
    if size > megabytes * 1e6:
      return texts
    texts.append(document)
    size += len(document.encode())


def rate(run, at_least: float = 2.0) -> float:
  """Tokens per second of `run`, which returns how many it made; the best round."""
  best, spent = 0.0, 0.0
  while spent < at_least:
    start = time.perf_counter()
    tokens = run()
    took = time.perf_counter() - start
    best, spent = max(best, tokens / took), spent + took
  return best


def seqio_tokenise(texts: list[str], vocabulary) -> int:
  """Tokens that SeqIO's tokenize makes of the texts."""
  feature = {'targets': seqio.Feature(vocabulary, add_eos=True)}
  dataset = tf.data.Dataset.from_tensor_slices({'targets': texts})
  dataset = seqio.preprocessors.tokenize(dataset, feature, copy_pretokenized=False)
  return sum(len(e['targets']) for e in dataset.as_numpy_iterator())


def seqio_rows(texts: list[str], vocabulary, length: int) -> int:
  """Real tokens in the rows that SeqIO's pipeline packs of the texts."""
  feature = {'targets': seqio.Feature(vocabulary, add_eos=True)}
  dataset = tf.data.Dataset.from_tensor_slices({'targets': texts})
  dataset = seqio.preprocessors.tokenize(dataset, feature, copy_pretokenized=False)
  dataset = seqio.preprocessors.append_eos(dataset, feature)
  # Documents are longer than rows: cut them up, as T5's pre-training does.
  dataset = _pieces(dataset, length)
  converter = seqio.LMFeatureConverter(pack=True)
  rows = converter(dataset, {'targets': length}).batch(64)
  return sum(
    int((batch['decoder_target_tokens'] > 0).sum())
    for batch in rows.as_numpy_iterator()
  )


def _pieces(dataset, length: int):
  """Each example cut into examples of at most `length` tokens."""

  def cut(example):
    ids = example['targets']
    count = (tf.size(ids) + length - 1) // length
    starts = tf.range(count) * length
    pieces = tf.data.Dataset.from_tensor_slices(starts)
    return pieces.map(lambda s: {'targets': ids[s : s + length]})

  return dataset.flat_map(cut)


def main():
  """Prints tokens per second and the two ratios."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--megabytes', type=float, default=16)
  parser.add_argument('--length', type=int, default=2048)
  options = parser.parse_args()
  texts = texts_of(options.megabytes)
  with tempfile.TemporaryDirectory() as folder:
    vocabulary = vocabulary_lib.SentencePieceVocabulary(
      os.path.join(folder, 'v.model'), vocab_size=4096, learn_from='palm_tiny'
    )
    learning.learn_vocabulary(vocabulary, folder)
    theirs = seqio.SentencePieceVocabulary(vocabulary.path)  # the same pieces, tf-text
    path = os.path.join(folder, 'store')
    store_builder.build(path, texts, vocabulary, task=TASK, split='train')
    store = token_store.TokenStore(path)
    reader = MixtureReader([(TASK, store, 1.0)], options.length)
    first = itertools.count(step=64)

    def read_batches() -> int:
      for _ in range(16):
        start = next(first)
        reader.examples(np.arange(start, start + 64))
      return 16 * 64 * options.length

    sample = texts[: max(1, len(texts) // 8)]
    pairs = [
      (
        'tokenise',
        rate(lambda: sum(map(len, vocabulary.encode_batch(texts)))),
        rate(lambda: seqio_tokenise(sample, theirs)),
      ),
      (
        f'rows of {options.length:,}',
        rate(read_batches),
        rate(lambda: seqio_rows(sample, theirs, options.length)),
      ),
    ]
  for name, ours, seqios in pairs:
    print(
      f'{name:16} {ours / 1e6:8.2f} M tokens/s  SeqIO {seqios / 1e6:6.2f} M tokens/s   '
      f'ratio {ours / seqios:.1f}'
    )


if __name__ == '__main__':
  main()

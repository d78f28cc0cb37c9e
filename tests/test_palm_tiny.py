"""The first thing a user runs, whole: palm_tiny on this machine's own text.

Slow (five to ten minutes). What it must reach is relative to n-gram models over the
same vocabulary and the same held-out text, every token and byte counted.
"""

import os
import pathlib
import subprocess
import sys

import ngram_baselines
import numpy as np
import pytest

from palm_t5x.corpus import prepare
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.metric_writers import read_metrics

ROOT = pathlib.Path(__file__).parent.parent


def _tokens(split, vocabulary, cache):
  """All ids of a split's stores, and the bytes they stand for."""
  import palm_t5x.mixtures.pretrain  # noqa: F401  (registers palm_tiny)

  stores = [s for _, s, _ in prepare.prepare('palm_tiny', split, vocabulary, cache)]
  ids = np.concatenate([s.read(0, s.num_tokens) for s in stores])
  return ids, sum(s.num_bytes for s in stores)


@pytest.mark.slow
def test_palm_tiny_beats_the_ngram_models(tmp_path):
  environment = dict(os.environ, PYTHONPATH=str(ROOT), NPROC='2')
  environment.pop('XLA_FLAGS', None)
  process = subprocess.run(
    [
      sys.executable,
      '-m',
      'palm_t5x',
      'train',
      '--gin_file=palm_tiny.gin',
      '--gin.MODEL_DIR=runs/palm_tiny',
      f'--gin.CACHE_DIR={tmp_path / "cache"}',
    ],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  rows = read_metrics(str(tmp_path / 'runs' / 'palm_tiny'))
  closing = [r for r in rows if r['split'] == 'training_eval/palm_tiny'][-1]
  vocabulary = vocabulary_lib.SentencePieceVocabulary(
    str(tmp_path / 'runs' / 'palm_tiny' / 'vocabulary.model'), vocab_size=4096
  )
  train_ids, _ = _tokens('train', vocabulary, str(tmp_path / 'cache'))
  valid_ids, num_bytes = _tokens('validation', vocabulary, str(tmp_path / 'cache'))
  assert closing['tokens'] == len(valid_ids), 'no token is dropped'
  baseline = (train_ids, valid_ids, num_bytes, 4096)
  unigram = ngram_baselines.unigram_bits_per_byte(*baseline)
  trigram = ngram_baselines.trigram_bits_per_byte(*baseline)
  found = closing['bits_per_byte']
  print(f'palm_tiny {found:.3f}, unigram {unigram:.3f}, trigram {trigram:.3f}')
  assert found < trigram
  assert found <= 0.60 * unigram
  few_shot = [r for r in rows if r['split'] == 'inference_eval/python_next_line'][-1]
  assert few_shot['step'] == closing['step'] and few_shot['questions'] == 48

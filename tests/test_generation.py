"""Prompts, stop strings, streaming."""

import functools

import jax
import numpy as np
import pytest
import seqio

from palm_t5x import adafactor, generation, models, network, partitioning
from palm_t5x.errors import UserError


@functools.cache
def _generator():
  config = network.TransformerConfig(
    vocab_size=256 + 3,
    dtype='float32',
    emb_dim=32,
    num_heads=2,
    num_layers=2,
    head_dim=16,
    mlp_dim=64,
  )
  model = models.DecoderOnlyModel(
    network.Decoder(config), seqio.ByteVocabulary(), adafactor.Adafactor()
  )
  params = model.get_initial_variables(jax.random.key(0))['params']
  return generation.Generator(model, partitioning.PjitPartitioner(), params)


def _full_forward_greedy(prompt, steps):
  """Argmax of a plain forward pass over the whole text, once per token."""
  ids = list(prompt)
  for _ in range(steps):
    padded = np.zeros((1, 16), np.int32)  # what is to the right changes nothing
    padded[0, : len(ids)] = ids
    ids.append(int(np.argmax(_forward()(padded)[0, len(ids) - 1])))
  return ids[len(prompt) :]


@functools.cache
def _forward():
  model, params = _generator()._model, _generator()._params
  return jax.jit(lambda ids: model.module.apply({'params': params}, ids))


def test_greedy_equals_a_plain_forward():
  config = generation.SamplingConfig(max_new_tokens=6)
  prompts = [np.asarray([1, 50, 60, 70]), np.asarray([1, 80, 81, 82, 83, 84, 85])]
  out = _generator().tokens(prompts, config)
  assert out.shape == (2, 1, 6)
  for row, prompt in zip(out, prompts, strict=True):
    expected = _full_forward_greedy(prompt, 6)
    end = expected.index(1) + 1 if 1 in expected else 6
    np.testing.assert_array_equal(row[0][:end], expected[:end])


def test_streaming_gives_the_same_text():
  config = generation.SamplingConfig(max_new_tokens=12)
  streamed = ''.join(_generator().stream('Some text', config))
  assert streamed == _generator().text(['Some text'], config)[0][0]


def test_samples_of_one_prompt_differ_and_repeat_by_seed():
  config = generation.SamplingConfig(max_new_tokens=8, temperature=1.0, num_samples=3)
  first = _generator().tokens([np.asarray([1, 70, 71])], config)
  again = _generator().tokens([np.asarray([1, 70, 71])], config)
  other = _generator().tokens([np.asarray([1, 70, 71])], config, seed=1)
  np.testing.assert_array_equal(first, again)
  assert len({tuple(row) for row in first[0].tolist()}) > 1
  assert (first != other).any()


@pytest.mark.parametrize(
  'text,stop,expected',
  [
    ('one\n\ntwo', ['\n\n'], ('one', True)),
    ('a Q: b A: c', ['A:', 'Q:'], ('a ', True)),
    ('nothing here', ['zzz', ''], ('nothing here', False)),
  ],
)
def test_earliest_stop_string_cuts(text, stop, expected):
  assert generation.truncate_at_stop(text, stop) == expected


@pytest.mark.parametrize(
  'text,stop,held', [('ab', ['bcd'], 1), ('ab\n', ['\n\n'], 1), ('ab', [], 0)]
)
def test_what_may_become_a_stop_string_is_withheld(text, stop, held):
  assert generation._withheld(text, stop) == held


@pytest.mark.parametrize('length,size', [(1, 32), (32, 32), (33, 64), (200, 256)])
def test_buckets(length, size):
  assert generation.bucket(length) == size


@pytest.mark.parametrize(
  'kwargs', [{'max_new_tokens': 0}, {'temperature': -1.0}, {'topp': 1.5}, {'topk': -2}]
)
def test_bad_sampling_is_refused(kwargs):
  with pytest.raises(UserError, match=next(iter(kwargs))):
    generation.SamplingConfig(**kwargs)

"""decoding: sampling distributions, prompts, and beam search against all sequences.

The "model" here is a table: next-token log-probabilities that depend on the last two
tokens and the position, with a cache that counts what it was fed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_t5x import decoding

EOS = 1


def table_model(table):
  """tokens_to_logits over table [positions, V, V, V]; cache: the token before."""

  def tokens_to_logits(state):
    rows = jnp.arange(state.cur_token.shape[0])
    before = state.cache['last'][0]
    token = state.cur_token[:, 0]
    logits = jnp.asarray(table)[state.cur_index % len(table), before, token]
    return logits[rows * 0 + rows], {'last': token[None]}

  return tokens_to_logits


def random_table(seed, vocab, positions=8, sharp=1.5):
  rng = np.random.default_rng(seed)
  table = rng.normal(size=(positions, vocab, vocab, vocab)) * sharp
  table[..., 0] = -1e9  # the padding id is never predicted
  return table.astype(np.float32)


def cache(batch, before=0):
  return {'last': jnp.full((1, batch), before, jnp.int32)}


def log_prob(table, start, tokens, before=0, at=0):
  """float64 log-probability of `tokens` after `start` fed at position `at`."""
  total, last = 0.0, start
  for i, token in enumerate(tokens):
    logits = table[(at + i) % len(table), before, last].astype(np.float64)
    total += logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    before, last = last, token
  return total


def all_sequences(vocab, longest):
  """Every sequence of real tokens that ends in EOS, of at most `longest` tokens."""
  others = [t for t in range(2, vocab)]
  for n in range(longest):
    for head in itertools.product(others, repeat=n):
      yield (*head, EOS)


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0])
@pytest.mark.parametrize('seed', range(3))
def test_beam_search_is_exhaustive_search(seed, alpha):
  """With as many beams as prefixes nothing is pruned: the best of all sequences."""
  vocab, steps, beams = 4, 4, 16
  table = random_table(seed, vocab)
  inputs = jnp.zeros((2, steps), jnp.int32).at[:, 0].set(jnp.array([2, 3]))
  search = jax.jit(
    functools.partial(
      decoding.beam_search,
      tokens_to_logits=table_model(table),
      eos_id=EOS,
      num_decodes=beams,
      alpha=alpha,
      cache_offset=1,
      initial_index=jnp.zeros(2, jnp.int32),
    )
  )
  found, scores = search(inputs, cache(2))
  assert np.all(np.diff(np.asarray(scores), axis=1) >= 0)
  for row, start in enumerate((2, 3)):
    ranked = sorted(
      (log_prob(table, start, s) / ((5 + len(s)) / 6) ** alpha, s)
      for s in all_sequences(vocab, steps)
    )[::-1]
    for place in range(3):
      score, sequence = ranked[place]
      got = np.asarray(found[row, -1 - place])
      assert tuple(got[: len(sequence)]) == sequence and not got[len(sequence) :].any()
      np.testing.assert_allclose(scores[row, -1 - place], score, rtol=1e-4)


def test_beam_search_with_prompts_of_unequal_length():
  """Row 1's prompt is longer: scores count what was generated, after each prompt."""
  vocab, table = 4, random_table(5, 4)
  inputs = jnp.array([[2, 0, 0, 0, 0, 0], [3, 2, 3, 0, 0, 0]])
  found, scores = decoding.beam_search(
    inputs,
    {'last': jnp.array([[0, 2]])},
    table_model(table),
    EOS,
    num_decodes=16,
    alpha=0.6,
    cache_offset=1,
    initial_index=jnp.array([0, 2]),
    max_decode_steps=3,
  )
  for row, (start, before, at) in enumerate(((2, 0, 0), (3, 2, 2))):
    best = max(
      (log_prob(table, start, s, before, at) / ((5 + len(s)) / 6) ** 0.6, s)
      for s in all_sequences(vocab, 3)
    )
    got = decoding.remove_prefix(found, jnp.array([0, 2]))[row, -1]
    assert tuple(np.asarray(got[: len(best[1])])) == best[1]
    np.testing.assert_allclose(scores[row, -1], best[0], rtol=1e-4)


def test_beam_search_forces_the_prompt_from_its_start():
  table = random_table(6, 5)
  inputs = jnp.array([[2, 4, 3, 0, 0, 0]])
  run = functools.partial(
    decoding.beam_search,
    tokens_to_logits=table_model(table),
    eos_id=EOS,
    num_decodes=3,
    cache_offset=1,
  )
  whole, scores = run(inputs, cache(1))
  assert np.asarray(whole[0, :, :2]).tolist() == [[4, 3]] * 3
  later, late_scores = run(
    inputs, {'last': jnp.array([[4]])}, initial_index=jnp.array([2])
  )
  np.testing.assert_array_equal(whole, later)
  np.testing.assert_allclose(scores, late_scores, rtol=1e-5)


def test_beams_without_an_end_come_back_as_they_are():
  table = random_table(0, 4)
  table[..., EOS] = -1e9
  found, scores = decoding.beam_search(
    jnp.array([[2, 0, 0, 0]]), cache(1), table_model(table), EOS, 2, 0.0, cache_offset=1
  )
  assert np.all(np.asarray(found) > 1) and np.all(np.asarray(scores) > -100)


def sample(table, inputs, **kwargs):
  inputs = jnp.asarray(inputs)
  defaults = {'cache_offset': 1, 'topk': 0}
  return decoding.temperature_sample(
    inputs, cache(len(inputs)), table_model(table), EOS, **defaults | kwargs
  )


def test_greedy_follows_the_argmax_to_eos():
  table = random_table(3, 6)
  tokens, _ = sample(table, [[2, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]], temperature=0.0)
  for row, start in enumerate((2, 3)):
    before, last, want = 0, start, []
    for i in range(6):
      before, last = last, int(np.argmax(table[i, before, last]))
      want.append(last)
      if last == EOS:
        break
    got = np.asarray(tokens[row, 0])
    assert got[: len(want)].tolist() == want and not got[len(want) :].any()


def test_topk_one_is_greedy_and_t5xs_default():
  table = random_table(3, 6)
  start = jnp.array([[2, 0, 0, 0, 0]])
  greedy, _ = sample(table, start, temperature=0.0)
  by_default, _ = decoding.temperature_sample(
    start, cache(1), table_model(table), EOS, jax.random.key(7), cache_offset=1
  )
  np.testing.assert_array_equal(greedy, by_default)


def test_the_prompt_is_kept_and_not_scored():
  table = random_table(4, 6)
  prompt = [[2, 5, EOS, 3, 0, 0, 0]]
  tokens, scores = sample(table, prompt, temperature=0.0, rescale_log_probs=False)
  assert np.asarray(tokens[0, 0, :3]).tolist() == [5, EOS, 3]
  made = [t for t in np.asarray(tokens[0, 0, 3:]).tolist() if t]
  want = log_prob(table, 3, made, before=EOS, at=3)
  np.testing.assert_allclose(scores[0, 0], want, rtol=1e-4)


def test_steps_are_counted_after_each_prompt():
  table = random_table(4, 6)
  table[..., EOS] = -1e9
  prompts = [[2, 0, 0, 0, 0, 0, 0, 0], [2, 3, 4, 0, 0, 0, 0, 0]]
  for limit in (
    {'max_decode_steps': 2},
    {'max_decode_steps': 9, 'max_decode_steps_hard_limit': 2},
  ):
    tokens, _ = sample(table, prompts, temperature=0.0, **limit)
    assert (np.asarray(tokens[:, 0]) > 0).sum(1).tolist() == [2, 2 + 2]


@pytest.mark.parametrize(
  'options, changed',
  [
    ({}, lambda p: p),
    ({'temperature': 0.5}, lambda p: p**2),
    ({'topk': 2}, lambda p: np.where(p >= np.sort(p)[-2], p, 0)),
    ({'topp': 0.7}, 'nucleus'),
    ({'topp': 0.95, 'temperature': 0.8}, 'nucleus-warm'),
  ],
)
def test_samples_follow_the_distribution(options, changed):
  """20,000 draws against the distribution by hand (p = .95, T = .8: paper §6.4)."""
  p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
  if isinstance(changed, str):
    want = p ** (1 / options.get('temperature', 1.0))
    want /= want.sum()
    keep = np.cumsum(want) - want < options['topp']
    want = want * keep
  else:
    want = changed(p)
  want = want / want.sum()
  n = 20_000
  logits = jnp.log(jnp.tile(jnp.asarray(p, jnp.float32), (n, 1)))
  tokens, log_probs = decoding.sample_logits(logits, jax.random.key(0), **options)
  seen = np.bincount(np.asarray(tokens), minlength=5) / n
  np.testing.assert_allclose(seen, want, atol=0.015)
  np.testing.assert_allclose(
    np.asarray(log_probs),
    np.log(np.maximum(want, 1e-30))[np.asarray(tokens)],
    atol=1e-3,
  )


def test_scores_without_rescaling_are_the_models():
  logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
  token, score = decoding.sample_logits(
    logits, jax.random.key(0), 0.0, rescale_log_probs=False
  )
  np.testing.assert_allclose(
    [int(token[0]), float(score[0])], [0, np.log(0.5)], rtol=1e-5
  )


def test_each_row_has_its_own_temperature():
  logits = jnp.tile(jnp.asarray([0.0, 0.1, 0.2]), (2000, 1))
  warmth = jnp.where(jnp.arange(2000) < 1000, 0.0, 1.0)
  tokens, _ = decoding.sample_logits(logits, jax.random.key(0), warmth)
  assert np.all(np.asarray(tokens[:1000]) == 2)
  assert len(np.unique(np.asarray(tokens[1000:]))) == 3


def test_several_samples_of_a_prompt_differ_and_are_sorted():
  table = random_table(8, 8, sharp=0.5)
  run = lambda seed: sample(
    table, [[2, 0, 0, 0, 0]] * 2, decode_rng=jax.random.key(seed), num_decodes=5
  )
  tokens, scores = run(0)
  assert tokens.shape == (2, 5, 5) and scores.shape == (2, 5)
  assert len({tuple(t) for t in np.asarray(tokens[0])}) > 1
  assert np.all(np.diff(np.asarray(scores), axis=1) >= 0)
  np.testing.assert_array_equal(tokens, run(0)[0])
  assert not np.array_equal(tokens, run(1)[0])


def test_callbacks_change_logits_and_state():
  table = random_table(8, 6)
  tokens, _ = sample(
    table,
    [[2, 0, 0, 0]],
    temperature=0.0,
    logit_callback_fn=lambda logits, state: logits.at[:, 4].set(1e3),
  )
  assert np.all(np.asarray(tokens) == 4)
  stop = lambda state: state.replace(ended=state.ended | (state.step >= 1))
  tokens, _ = sample(
    table,
    [[2, 0, 0, 0]],
    temperature=0.0,
    logit_callback_fn=lambda logits, state: logits.at[:, 4].set(1e3),
    state_callback_fn=stop,
  )
  assert np.asarray(tokens[0, 0]).tolist() == [4, 0, 0, 0]


def test_prefixes_are_shifted_out():
  got = decoding.remove_prefix(jnp.array([[[5, 6, 7]], [[8, 9, 0]]]), jnp.array([1, 0]))
  assert got.tolist() == [[[6, 7, 0]], [[8, 9, 0]]]

"""Decoding over an explicit cache: temperature_sample and beam_search, T5X's keywords.

Both take a padded prompt, a cache that already holds it, and a function from a
`DecodingState` to next-token logits and the new cache. They know nothing of the model.

Sequences are [.., T + 1] inside: index i holds the token that is fed at position i, so
the token sampled from its logits goes to i + 1. The first is dropped on return, as in
T5X: output[j] is what follows input[j].
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

NEG_INF = -1.0e7
MIN_TEMPERATURE = 1e-4  # below it, greedy: 1/temperature would overflow


@flax.struct.dataclass
class DecodingState:
  """What `tokens_to_logits` may look at; rows are batch * num_decodes.

  Attributes:
    cur_index: [rows] position of the current token.
    sequences: [rows, T] tokens so far.
    cur_token: [rows, 1] the tokens at cur_index.
    cache: the decode cache.
  """

  cur_index: jax.Array
  sequences: jax.Array
  cur_token: jax.Array
  cache: Any


@flax.struct.dataclass
class SamplingLoopState:
  """State of temperature_sample's loop, given to the callbacks.

  Attributes:
    step: scalar, steps done.
    cur_index, cache, cur_token: as in DecodingState.
    sequences: [rows, T + 1] tokens so far.
    ended: [rows] bool.
    rng: key of the next step.
    log_prob: [rows] log-probability of what was sampled.
  """

  step: jax.Array
  cur_index: jax.Array
  sequences: jax.Array
  cache: Any
  cur_token: jax.Array
  ended: jax.Array
  rng: jax.Array
  log_prob: jax.Array


def topk_mask(logits, k):
  """Logits below each row's k-th largest are masked out; 0 keeps all."""
  if not k or k >= logits.shape[-1]:
    return logits
  threshold = lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits < threshold, NEG_INF, logits)


def topp_mask(logits, p):
  """Keeps the fewest likeliest tokens that hold probability p; 0 or 1 keeps all."""
  if not p or p >= 1.0:
    return logits
  ordered = -jnp.sort(-logits, axis=-1)
  before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
  before -= jax.nn.softmax(ordered, axis=-1)
  threshold = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < threshold, NEG_INF, logits)


def _log_prob_of(logits, tokens):
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def sample_logits(
  logits, rng, temperature=1.0, topk=0, topp=0.0, rescale_log_probs=True
):
  """(token [rows], its log-probability [rows]) from logits [rows, V].

  Args:
    logits: fp32.
    rng: key; not used where temperature is 0.
    temperature: a number, or one for each row; 0 (below 1e-4) is greedy.
    topk: sample among the k likeliest only; 0: all.
    topp: then among the likeliest that hold this probability; 0: all.
    rescale_log_probs: report under the changed distribution, not the model's.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if isinstance(temperature, (int, float)) and temperature < MIN_TEMPERATURE:
    plain = jnp.zeros(greedy.shape, jnp.float32)
    return greedy, plain if rescale_log_probs else _log_prob_of(logits, greedy)
  warmth = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), greedy.shape)
  scaled = logits / jnp.maximum(warmth, MIN_TEMPERATURE)[:, None]
  scaled = topp_mask(topk_mask(scaled, topk), topp)
  is_greedy = warmth < MIN_TEMPERATURE
  token = jax.random.categorical(rng, scaled, axis=-1).astype(jnp.int32)
  token = jnp.where(is_greedy, greedy, token)
  if not rescale_log_probs:
    return token, _log_prob_of(logits, token)
  return token, jnp.where(is_greedy, 0.0, _log_prob_of(scaled, token))


def _expand(tree, n, axis):
  """Every row n times in a row, along `axis` of every array."""
  return tree if n == 1 else jax.tree.map(lambda x: jnp.repeat(x, n, axis), tree)


def _limits(inputs_BT, initial_index, max_decode_steps):
  """(first position to feed, position of the last token to write), [B] each."""
  T = inputs_BT.shape[1]
  prompt_last = jnp.max(jnp.where(inputs_BT != 0, jnp.arange(T), 0), axis=1)
  if initial_index is None:
    initial_index = jnp.zeros_like(prompt_last)
  last = jnp.full_like(prompt_last, T)
  if max_decode_steps is not None:
    start = jnp.maximum(prompt_last, initial_index)
    last = jnp.minimum(last, start + max_decode_steps)
  return initial_index.astype(jnp.int32), last


def _token_at(sequences, index):
  return jnp.take_along_axis(sequences, index[..., None], axis=-1)[..., 0]


def temperature_sample(
  inputs,
  cache,
  tokens_to_logits,
  eos_id,
  decode_rng=None,
  num_decodes=1,
  temperature=1.0,
  topk=1,
  topp=0.0,
  cache_offset=0,
  initial_index=None,
  max_decode_steps=None,
  max_decode_steps_hard_limit=None,
  rescale_log_probs=True,
  state_callback_fn=None,
  logit_callback_fn=None,
):
  """Samples continuations token by token (T5X: decoding.temperature_sample).

  Args:
    inputs: [B, T] prompts, 0 where to generate; T is the total length. Their tokens
      are kept: where a prompt goes on, what was sampled is dropped.
    cache: pytree whose arrays have the batch at axis `cache_offset`; holds the prompt
      up to, and maybe including, `initial_index`.
    tokens_to_logits: DecodingState -> (logits [rows, V], cache).
    eos_id: ends a sequence; 0 follows it.
    decode_rng: key; not needed where temperature is 0 or topk is 1.
    num_decodes: samples for each prompt, sharing its cache's prefix.
    temperature, topk, topp, rescale_log_probs: see `sample_logits`. T5X's default
      topk=1 is greedy.
    initial_index: [B] position of the first token to feed; None: 0.
    max_decode_steps: tokens to generate at most; None: up to T.
    max_decode_steps_hard_limit: caps max_decode_steps.
    state_callback_fn: SamplingLoopState -> SamplingLoopState, before each step.
    logit_callback_fn: (logits, SamplingLoopState) -> logits.

  Returns:
    ([B, num_decodes, T] tokens, prompt shifted by one included; [B, num_decodes]
    log-probabilities), likeliest last.
  """
  B, T = inputs.shape
  decode_rng = jax.random.key(0) if decode_rng is None else decode_rng
  if max_decode_steps is not None and max_decode_steps_hard_limit:
    max_decode_steps = jnp.minimum(max_decode_steps, max_decode_steps_hard_limit)
  first, last = _limits(inputs, initial_index, max_decode_steps)
  padded = jnp.pad(inputs.astype(jnp.int32), ((0, 0), (0, 1)))
  padded, first, last = _expand((padded, first, last), num_decodes, 0)
  if not isinstance(temperature, (int, float)) and jnp.ndim(temperature) == 1:
    temperature = jnp.repeat(temperature, num_decodes)
  rows = jnp.arange(B * num_decodes)

  def body(state):
    if state_callback_fn is not None:
      state = state_callback_fn(state)
    next_rng, rng = jax.random.split(state.rng)
    logits, cache = tokens_to_logits(
      DecodingState(
        state.cur_index, state.sequences[:, :-1], state.cur_token, state.cache
      )
    )
    if logit_callback_fn is not None:
      logits = logit_callback_fn(logits, state)
    token, log_prob = sample_logits(
      logits, rng, temperature, topk, topp, rescale_log_probs
    )
    index = state.cur_index + 1
    given = _token_at(padded, index)
    sampled = (given == 0) & ~state.ended
    token = jnp.where(given == 0, token, given)
    old = _token_at(state.sequences, index)
    sequences = state.sequences.at[rows, index].set(jnp.where(state.ended, old, token))
    ended = state.ended | (sampled & (token == eos_id)) | (index >= last)
    index = jnp.where(ended, state.cur_index, index)  # an ended row stands still
    return SamplingLoopState(
      state.step + 1,
      index,
      sequences,
      cache,
      _token_at(sequences, index)[:, None],
      ended,
      next_rng,
      state.log_prob + jnp.where(sampled, log_prob, 0.0),
    )

  state = SamplingLoopState(
    jnp.zeros((), jnp.int32),
    first,
    padded,
    _expand(cache, num_decodes, cache_offset),
    _token_at(padded, first)[:, None],
    first >= last,
    decode_rng,
    jnp.zeros(first.shape, jnp.float32),
  )
  state = lax.while_loop(lambda s: ~jnp.all(s.ended), body, state)
  if state_callback_fn is not None:
    state = state_callback_fn(state)
  log_prob = state.log_prob.reshape(B, num_decodes)
  order = jnp.argsort(log_prob, axis=1)
  by_score = lambda x: jax.vmap(lambda row, index: row[index])(x, order)
  return by_score(state.sequences[:, 1:].reshape(B, num_decodes, T)), by_score(log_prob)


def brevity_penalty(alpha, length):
  """((5 + length) / 6)^alpha: what a beam's log-probability is divided by."""
  return jnp.power((5.0 + length) / 6.0, alpha)


@flax.struct.dataclass
class BeamState:
  """State of beam_search: K live and K finished hypotheses for each row."""

  cur_index: jax.Array  # [B] position of the current token
  live_logprobs: jax.Array  # [B, K]
  live_seqs: jax.Array  # [B, K, T + 1]
  finished_scores: jax.Array  # [B, K]; NEG_INF: an empty slot
  finished_seqs: jax.Array  # [B, K, T + 1]
  done: jax.Array  # [B]
  cache: Any  # rows B * K


def _keep_best(scores, seqs, k):
  """The k best of [B, n], worst first: scores, their sequences, their indices."""
  best, index = lax.top_k(scores, k)
  best, index = jnp.flip(best, 1), jnp.flip(index, 1)
  return best, jnp.take_along_axis(seqs, index[:, :, None], axis=1), index


def _candidates(logits, state, given_B, eos_id):
  """The 2K best one-token extensions of K live beams: if K of them end, K go on.

  Args:
    logits: [B * K, V] after each beam's current token.
    state: the beams.
    given_B: the prompt's next token, 0 where it has ended.
    eos_id: ends a hypothesis.

  Returns:
    log-probabilities [B, n], sequences [B, n, T + 1], source beam [B, n], ended [B, n].
  """
  B, K, length = state.live_seqs.shape
  V = logits.shape[-1]
  log_probs = jax.nn.log_softmax(logits, axis=-1).reshape(B, K, V)
  log_probs = (log_probs + state.live_logprobs[:, :, None]).reshape(B, K * V)
  log_probs, index = lax.top_k(log_probs, min(2 * K, K * V))
  beams, tokens = index // V, index % V
  # Inside the prompt the one beam that is alive goes on, at no cost.
  forced = (given_B != 0)[:, None]
  alive = jnp.where(jnp.arange(index.shape[1])[None] == 0, 0.0, NEG_INF)
  log_probs = jnp.where(forced, alive, log_probs)
  tokens = jnp.where(forced, given_B[:, None], tokens)
  beams = jnp.where(forced, K - 1, beams)
  seqs = jnp.take_along_axis(state.live_seqs, beams[:, :, None], axis=1)
  here = jnp.arange(length)[None] == state.cur_index[:, None] + 1
  seqs = jnp.where(here[:, None], tokens[:, :, None], seqs)
  return log_probs, seqs, beams, (tokens == eos_id) & ~forced


def beam_search(
  inputs,
  cache,
  tokens_to_logits,
  eos_id,
  num_decodes=4,
  alpha=0.6,
  max_decode_len=None,
  max_decode_step=-1,
  min_log_prob=NEG_INF,
  decode_rng=None,
  cache_offset=0,
  initial_index=None,
  max_decode_steps=None,
):
  """Beam search with a length penalty (T5X: decoding.beam_search).

  A hypothesis is finished by eos_id and scores log p / ((5 + n) / 6)^alpha over its n
  generated tokens. Rows without a finished one return their live beams.

  Args:
    inputs, cache, tokens_to_logits, eos_id, cache_offset, initial_index: see
      `temperature_sample`.
    num_decodes: beams, and sequences returned.
    alpha: strength of the penalty; 0: the likeliest sequence.
    max_decode_len: total length; None: T.
    max_decode_step: tokens to generate at most; -1: up to the length. Also by the
      name max_decode_steps, as in `temperature_sample`.
    min_log_prob: hypotheses below it are dropped.
    decode_rng: not used.

  Returns:
    ([B, num_decodes, T] tokens, [B, num_decodes] scores), best last.
  """
  del decode_rng
  if max_decode_steps is None and max_decode_step >= 0:
    max_decode_steps = max_decode_step
  (B, T), K = inputs.shape, num_decodes
  first, last = _limits(inputs, initial_index, max_decode_steps)
  if max_decode_len is not None:
    last = jnp.minimum(last, max_decode_len)
  padded = jnp.pad(inputs.astype(jnp.int32), ((0, 0), (0, 1)))
  prompt_last = jnp.max(jnp.where(inputs != 0, jnp.arange(T), first[:, None]), axis=1)
  penalty = lambda index: brevity_penalty(alpha, jnp.maximum(index - prompt_last, 1))

  def body(state):
    index = jnp.repeat(state.cur_index, K)
    sequences = state.live_seqs.reshape(B * K, T + 1)
    current = _token_at(sequences, index)[:, None]
    logits, cache = tokens_to_logits(
      DecodingState(index, sequences[:, :-1], current, state.cache)
    )
    index = state.cur_index + 1
    given = _token_at(padded, index)
    log_probs, seqs, beams, ended = _candidates(logits, state, given, eos_id)
    scores = jnp.where(
      ended & (log_probs > min_log_prob), log_probs / penalty(index)[:, None], NEG_INF
    )
    finished_scores, finished_seqs, _ = _keep_best(
      jnp.concatenate([state.finished_scores, scores], axis=1),
      jnp.concatenate([state.finished_seqs, seqs], axis=1),
      K,
    )
    live = jnp.where(ended, NEG_INF, log_probs)
    live_logprobs, live_seqs, kept = _keep_best(live, seqs, K)
    source = jnp.take_along_axis(beams, kept, axis=1) + jnp.arange(B)[:, None] * K
    cache = jax.tree.map(
      lambda c: jnp.take(c, source.reshape(-1), axis=cache_offset), cache
    )
    # A live beam can at best keep its log-probability and grow to the longest length.
    hope = live_logprobs[:, -1] / penalty(last)
    done = (index >= last) | (jnp.min(finished_scores, axis=1) > hope)
    new = (index, live_logprobs, live_seqs, finished_scores, finished_seqs, done)
    old = (state.cur_index, state.live_logprobs, state.live_seqs)
    old += (state.finished_scores, state.finished_seqs, state.done)
    hold = lambda was, now: jnp.where(
      state.done.reshape(B, *(1,) * (now.ndim - 1)), was, now
    )
    return BeamState(*map(hold, old, new), cache)

  state = BeamState(
    first,
    jnp.tile(jnp.where(jnp.arange(K) == K - 1, 0.0, NEG_INF), (B, 1)),
    jnp.repeat(padded[:, None], K, axis=1),
    jnp.full((B, K), NEG_INF),
    jnp.zeros((B, K, T + 1), jnp.int32),
    first >= last,
    _expand(cache, K, cache_offset),
  )
  state = lax.while_loop(lambda s: ~jnp.all(s.done), body, state)
  finished = (jnp.max(state.finished_scores, axis=1) > NEG_INF)[:, None]
  live_scores = state.live_logprobs / penalty(last)[:, None]
  seqs = jnp.where(finished[..., None], state.finished_seqs, state.live_seqs)
  return seqs[:, :, 1:], jnp.where(finished, state.finished_scores, live_scores)


def remove_prefix(sequences, prefix_lengths_B):
  """[B, ..., T] shifted left by each row's prefix, zeros at the end."""
  T = sequences.shape[-1]
  shift = prefix_lengths_B.reshape(-1, *([1] * (sequences.ndim - 1)))
  index = jnp.arange(T) + shift
  moved = jnp.take_along_axis(
    sequences, jnp.broadcast_to(jnp.minimum(index, T - 1), sequences.shape), axis=-1
  )
  return jnp.where(index < T, moved, 0)

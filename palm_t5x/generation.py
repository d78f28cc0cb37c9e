"""Prompts in, text out: what samples during training, `infer` and `complete` share.

Prompts start with [eod] (a document begins), are left-aligned in a bucket of a few
fixed lengths so that compilations are few, and are prefilled once however many samples
are drawn. Stop strings are found in the decoded text, so they may span tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from palm_t5x import decoding
from palm_t5x.errors import UserError


@dataclasses.dataclass
class SamplingConfig:
  """How to continue a prompt.

  Attributes:
    max_new_tokens: tokens to generate at most.
    temperature: 0 is greedy.
    topk: sample among the k likeliest tokens; 0 is all.
    topp: sample among the likeliest tokens that hold this much probability; 0 is all.
    num_samples: continuations per prompt; they share one prefill.
    stop: strings that end a continuation (not part of it).
    seed: of the sampling.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  topk: int = 0
  topp: float = 0.0
  num_samples: int = 1
  stop: Sequence[str] = ()
  seed: int = 0

  def __post_init__(self):
    if self.max_new_tokens < 1 or self.num_samples < 1:
      raise UserError(
        f'max_new_tokens={self.max_new_tokens} and num_samples={self.num_samples} '
        'must be 1 or more.'
      )
    if self.temperature < 0 or not 0 <= self.topp <= 1 or self.topk < 0:
      raise UserError(
        f'temperature={self.temperature}, topp={self.topp}, topk={self.topk}: '
        'temperature and topk are 0 or more, topp is between 0 and 1.'
      )


def bucket(length: int, smallest: int = 32) -> int:
  """The next power of two, from `smallest` on: few shapes, so few compilations."""
  size = smallest
  while size < length:
    size *= 2
  return size


def truncate_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
  """Cuts text before the earliest stop string; tells whether one was found."""
  places = [p for p in (text.find(s) for s in stop if s) if p >= 0]
  return (text[: min(places)], True) if places else (text, False)


class Generator:
  """Continues prompts with one set of parameters."""

  def __init__(self, model: Any, partitioner: Any, params: Any):
    self._model, self._partitioner, self._params = model, partitioner, params
    self._compiled: dict[Any, Any] = {}

  def _generate_fn(self, config: SamplingConfig):
    key = (
      config.max_new_tokens,
      config.temperature,
      config.topk,
      config.topp,
      config.num_samples,
    )
    if key not in self._compiled:

      def generate(params, tokens_BT, lengths_B, rng):
        return self._model.generate(
          params,
          tokens_BT,
          lengths_B,
          rng=rng,
          max_decode_steps=config.max_new_tokens,
          num_decodes=config.num_samples,
          temperature=config.temperature,
          topk=config.topk,
          topp=config.topp,
        )

      self._compiled[key] = self._partitioner.partition(
        generate, out_shardings=self._partitioner.sharding(())
      )
    return self._compiled[key]

  def tokens(
    self, prompts: Sequence[np.ndarray], config: SamplingConfig, seed: int | None = None
  ) -> np.ndarray:
    """Continues token prompts.

    Args:
      prompts: one 1-D array of ids per prompt, [eod] first.
      config: how.
      seed: overrides config.seed.

    Returns:
      [B, num_samples, max_new_tokens] ids; 0 after the end of a document.
    """
    longest = bucket(max(len(p) for p in prompts))
    batch = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(batch, prompts, strict=True):
      row[: len(prompt)] = prompt
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    rng = jax.random.key(config.seed if seed is None else seed)
    out = self._generate_fn(config)(self._params, batch, lengths, rng)
    return np.asarray(jax.device_get(out[0]))

  def text(self, prompts: Sequence[str], config: SamplingConfig) -> list[list[str]]:
    """Continues text prompts: `num_samples` continuations of each."""
    vocabulary = self._model.output_vocabulary
    encoded = [encode_prompt(vocabulary, prompt) for prompt in prompts]
    out = self.tokens(encoded, config)
    return [[self.decode(sample, config.stop) for sample in samples] for samples in out]

  def stream(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
    """One continuation, in pieces as they are generated.

    A piece is withheld while it may be the beginning of a stop string, or while its
    bytes are not yet a whole character.
    """
    vocabulary = self._model.output_vocabulary
    ids = encode_prompt(vocabulary, prompt)
    width = bucket(len(ids))
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    max_len = width + bucket(config.max_new_tokens)
    prefill, step = self._stream_fns(config, max_len)
    cache = prefill(self._params, tokens, np.asarray([len(ids)], np.int32))
    rng, position, token = jax.random.key(config.seed), len(ids) - 1, int(ids[-1])
    generated: list[int] = []
    shown = ''
    for n in range(config.max_new_tokens):
      at = np.asarray([position + n], np.int32)
      key = jax.random.fold_in(rng, n)
      token_B, cache = step(self._params, cache, np.asarray([token], np.int32), at, key)
      token = int(token_B[0])
      if token in (0, vocabulary.eos_id):
        break
      generated.append(token)
      text, stopped = truncate_at_stop(vocabulary.decode(generated), config.stop)
      if stopped:
        yield text[len(shown) :]
        return
      safe = len(text) - _withheld(text, config.stop)
      if safe > len(shown):
        yield text[len(shown) : safe]
        shown = text[:safe]
    yield vocabulary.decode(generated)[len(shown) :]

  def _stream_fns(self, config: SamplingConfig, max_len: int):
    key = ('stream', max_len, config.temperature, config.topk, config.topp)
    if key not in self._compiled:

      def prefill(params, tokens_BT, lengths_B):
        return self._model.prefill(params, tokens_BT, lengths_B, max_len)

      def step(params, cache, tokens_B, positions_B, rng):
        logits, cache = self._model.decode_step(params, cache, tokens_B, positions_B)
        token, _ = decoding.sample_logits(
          logits, rng, config.temperature, config.topk, config.topp
        )
        return token, cache

      partition = self._partitioner.partition
      everywhere = self._partitioner.sharding(())
      self._compiled[key] = (
        partition(prefill),
        partition(step, out_shardings=(everywhere, None), donate_argnums=(1,)),
      )
    return self._compiled[key]

  def decode(self, ids: np.ndarray, stop: Sequence[str] = ()) -> str:
    """Generated ids as text, up to [eod] or a stop string."""
    vocabulary = self._model.output_vocabulary
    return truncate_at_stop(decode_until_eos(vocabulary, ids), stop)[0]


def _withheld(text: str, stop: Sequence[str]) -> int:
  """How many last characters of text may still turn into something else."""
  held = len(text) - len(text.rstrip('\ufffd'))
  for string in stop:
    for size in range(len(string) - 1, held, -1):
      if text.endswith(string[:size]):
        held = size
        break
  return held


def encode_prompt(vocabulary: Any, text: str) -> np.ndarray:
  """[eod], then the text's ids."""
  return np.asarray([vocabulary.eos_id, *vocabulary.encode(text)], np.int32)


def decode_until_eos(vocabulary: Any, ids: np.ndarray) -> str:
  """Text of the ids before the first [eod] or padding."""
  ids = np.asarray(ids)
  ends = np.flatnonzero((ids == vocabulary.eos_id) | (ids == 0))
  return vocabulary.decode(ids[: ends[0]].tolist() if len(ends) else ids.tolist())

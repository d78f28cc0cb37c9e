"""`t5x complete`: a prompt in, its continuation out, as it is generated."""

import sys
from collections.abc import Sequence
from typing import Any

from palm_t5x import generation, processes, utils
from palm_t5x.errors import UserError
from palm_t5x.restored import restore_params


def complete(
  *,
  model: Any,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: Any,
  prompt: Sequence[str] | str = (),
  max_new_tokens: int = 128,
  temperature: float = 0.7,
  topk: int = 40,
  topp: float = 0.0,
  num_samples: int = 1,
  stop: Sequence[str] = (),
  seed: int = 0,
) -> list[str]:
  """Continues a prompt and prints it; one sample streams, several are listed.

  Args:
    model: a models.BaseModel.
    restore_checkpoint_cfg: the checkpoint, or a run directory (its newest).
    partitioner: the mesh and its rules.
    prompt: the text (words are joined by spaces); '-' reads standard input.
    max_new_tokens: tokens to generate at most.
    temperature: 0 is greedy.
    topk: sample among the k likeliest tokens; 0 is all.
    topp: sample among the likeliest tokens that hold this much probability; 0 is all.
    num_samples: continuations.
    stop: strings that end one.
    seed: of the sampling.

  Returns:
    The continuations.

  Raises:
    UserError: without a prompt, or for a checkpoint that does not fit.
  """
  text = prompt if isinstance(prompt, str) else ' '.join(prompt)
  if text == '-':
    text = processes.decide(_stdin)
  # Bytes of the command line that are no UTF-8 come as half surrogate pairs.
  text = text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
  if not text:
    raise UserError("no prompt: t5x complete --gin_file=... 'Once upon a time'")
  config = generation.SamplingConfig(
    max_new_tokens, temperature, topk, topp, num_samples, tuple(stop), seed
  )
  say = print if processes.index() == 0 else lambda *args, **kwargs: None
  restored = restore_params(model, partitioner, restore_checkpoint_cfg)
  generator = generation.Generator(model, partitioner, restored.params)
  if num_samples > 1:
    continuations = generator.text([text], config)[0]
    for number, continuation in enumerate(continuations, 1):
      say(f'--- {number}\n{text}{continuation}')
    return continuations
  say(text, end='', flush=True)
  pieces = []
  for piece in generator.stream(text, config):
    say(piece, end='', flush=True)
    pieces.append(piece)
  say()
  return [''.join(pieces)]


def _stdin() -> str:
  """Standard input as text; what is no UTF-8 becomes U+FFFD, as in training data."""
  if hasattr(sys.stdin, 'reconfigure'):
    sys.stdin.reconfigure(encoding='utf-8', errors='replace')
  return sys.stdin.read()

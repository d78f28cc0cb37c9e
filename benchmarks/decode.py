"""Tokens per second of prefill and of decoding, over what the machine allows.

    python benchmarks/decode.py [--size 100m] [--batches 1,8,32] [--mode float32]

A decode step reads every parameter once, whatever the batch, and the cache of each row:
bytes over the machine's memory bandwidth bound its time from below. A prefill is bound
by matmuls. Both bounds are measured in the same run.
"""

import argparse
import os
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
from palm_t5x import environment

environment.keep_freed_memory()  # as the t5x command does

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from train_step import best_seconds, make_config

from palm_t5x import adafactor, metrics, models, network
from palm_t5x.checkpoints import param_count

PROMPT = 256


def bandwidth(seconds: float = 1.0) -> float:
  """Bytes per second of reading 512 MB of fp32 by a reduction, the best round."""
  x = jnp.ones((128, 1_000_000), jnp.float32)
  read = jax.jit(lambda x: x.sum(axis=1))
  jax.block_until_ready(read(x))
  best, spent = float('inf'), 0.0
  while spent < seconds:
    start = time.perf_counter()
    jax.block_until_ready(read(x))
    took = time.perf_counter() - start
    best, spent = min(best, took), spent + took
  return x.nbytes / best


def main():
  """Prints one row per batch size."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', default='100m')
  parser.add_argument('--batches', default='1,8,32')
  parser.add_argument('--mode', default='float32')
  options = parser.parse_args()
  config = make_config(options.size, options.mode)
  model = models.DecoderOnlyModel(
    network.Decoder(config), seqio.ByteVocabulary(), adafactor.Adafactor()
  )
  params = jax.jit(model.get_initial_variables)(jax.random.key(0))['params']
  count = param_count(params)
  weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  max_len = 2 * PROMPT
  prefill = jax.jit(lambda p, t, n: model.prefill(p, t, n, max_len))
  step = jax.jit(model.decode_step)
  print(f'{count:,} parameters, {weight_bytes / 1e6:.0f} MB, mode {options.mode}')
  for rows in map(int, options.batches.split(',')):
    tokens = np.ones((rows, PROMPT), np.int32)
    lengths = np.full((rows,), PROMPT, np.int32)
    peak, memory = metrics.measure_gemm_flops(), bandwidth()
    cache = prefill(params, tokens, lengths)
    filled = best_seconds(lambda: prefill(params, tokens, lengths), 3)  # noqa: B023
    last, at = np.ones((rows,), np.int32), lengths
    stepped = best_seconds(lambda: step(params, cache, last, at), 10)  # noqa: B023
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    bound = max((weight_bytes + cache_bytes) / memory, 2 * count * rows / peak)
    prefill_bound = 2 * count * rows * PROMPT / peak
    print(
      f'batch {rows:3}  prefill {rows * PROMPT / filled:8.0f} tokens/s '
      f'({prefill_bound / filled:.2f} of the matmul bound)   '
      f'decode {rows / stepped:7.1f} tokens/s ({bound / stepped:.2f} of the bound: '
      f'{memory / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s)',
      flush=True,
    )


if __name__ == '__main__':
  main()

"""Model FLOP/s of a PaLM train step over the machine's own matmul peak.

    python benchmarks/train_step.py [--sizes 25m,100m] [--modes float32,fast]

Peak and step are measured in turn in this process, so the ratio holds on a machine
whose speed drifts. FLOPs are those of the model (PaLM App. B): 6N + 12LHQT per token,
with no discount for causality and none for the optimizer's work. Where the rest goes is
shown by timing the parts of the step on their own.
"""

import argparse
import functools
import os
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
from palm_t5x import environment

environment.keep_freed_memory()  # as the t5x command does

import jax
import jax.numpy as jnp
import numpy as np
import seqio

from palm_t5x import adafactor, metrics, models, network, partitioning, trainer
from palm_t5x.train_state import TrainStateInitializer

# (layers, heads, d_model, tokens per row, rows); d_ff = 4 d_model, heads of 64.
SIZES = {
  '5m': (4, 4, 256, 256, 16),
  '25m': (6, 8, 512, 512, 8),
  '100m': (12, 12, 768, 512, 8),
}
VOCABULARY = 8192


def make_config(size: str, mode: str) -> network.TransformerConfig:
  """The model of a size, computing in `mode`."""
  layers, heads, emb_dim, _, _ = SIZES[size]
  return network.TransformerConfig(
    vocab_size=VOCABULARY,
    dtype=mode,
    emb_dim=emb_dim,
    num_heads=heads,
    num_layers=layers,
    head_dim=64,
    mlp_dim=4 * emb_dim,
  )


def make_trainer(size: str, mode: str) -> tuple[trainer.Trainer, dict, int]:
  """A trainer, one batch for it, and the model FLOPs of a step."""
  config = make_config(size, mode)
  *_, length, rows = SIZES[size]
  optimizer = adafactor.Adafactor(
    factored=False,
    beta1=0.9,
    global_norm_clip_threshold=1.0,
    weight_decay_rate_lr_exponent=2.0,
  )
  model = models.DecoderOnlyModel(
    network.Decoder(config),
    seqio.ByteVocabulary(),
    optimizer,
    z_loss=1e-4,
    loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
  )
  partitioner = partitioning.PjitPartitioner()
  initializer = TrainStateInitializer(
    model, partitioner, {'decoder_input_tokens': (rows, length)}
  )
  one = trainer.Trainer(
    model,
    initializer.from_scratch(jax.random.key(0)),
    partitioner,
    train_state_axes=initializer.axes,
    learning_rate_fn=lambda step: 1e-2,
  )
  tokens = np.random.default_rng(0).integers(3, VOCABULARY, (rows, length + 1))
  batch = {
    'decoder_input_tokens': tokens[:, :-1].astype(np.int32),
    'decoder_target_tokens': tokens[:, 1:].astype(np.int32),
    'decoder_loss_weights': np.ones((rows, length), np.float32),
  }
  batch = partitioner.shard_batch(rows, lambda r: {k: v[r] for k, v in batch.items()})
  return one, batch, int(model.flops_per_token(length) * rows * length)


def best_seconds(run, rounds: int, at_least: float = 1.0) -> float:
  """Fastest of `rounds` calls, or of as many as `at_least` seconds hold."""
  best, spent, calls = float('inf'), 0.0, 0
  while calls < rounds or spent < at_least:
    start = time.perf_counter()
    jax.block_until_ready(run())
    took = time.perf_counter() - start
    best, spent, calls = min(best, took), spent + took, calls + 1
  return best


def parts(one: trainer.Trainer, batch) -> dict[str, float]:
  """Seconds of the step's parts, each compiled and timed on its own."""
  model, params = one.model, jax.tree.map(jnp.copy, one.train_state.params)
  forward = jax.jit(lambda p, b: model.sum_loss_fn(p, b, None)[0])
  gradient = jax.jit(
    lambda p, b: jax.grad(model.sum_loss_fn, has_aux=True)(p, b, None)[0]
  )
  optimizer = model.optimizer_def.bind(model.param_logical_axes())
  grads = gradient(params, batch)
  state = optimizer.init(params)
  update = jax.jit(functools.partial(optimizer.update, learning_rate=1e-2))
  return {
    'forward': best_seconds(lambda: forward(params, batch), 3),
    'forward and backward': best_seconds(lambda: gradient(params, batch), 3),
    'optimizer': best_seconds(lambda: update(grads, state, params), 3),
  }


def measure(size: str, mode: str, rounds: int) -> tuple[float, float]:
  """(step FLOP/s, peak FLOP/s), the best of alternating rounds of each."""
  one, batch, flops = make_trainer(size, mode)
  jax.block_until_ready(one.train(batch))
  operand = 'bfloat16' if mode == 'fast' else 'float32'
  peak = step = 0.0
  for _ in range(rounds):
    peak = max(peak, metrics.measure_gemm_flops(operand, seconds=1.0))
    step = max(step, flops / best_seconds(lambda: one.train(batch), 3, 2.0))
  print(
    f'{size:>6} {mode:>8}  step {step / 1e9:7.0f} GFLOP/s  peak {peak / 1e9:7.0f} '
    f'GFLOP/s  ratio {step / peak:.2f}',
    flush=True,
  )
  whole = flops / step
  for name, seconds in parts(one, batch).items():
    print(f'{"":16}  {name:22} {100 * seconds / whole:5.0f} % of the step', flush=True)
  return step, peak


def main():
  """Measures what the command line names."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', default='25m,100m')
  parser.add_argument('--modes', default='float32,fast')
  parser.add_argument('--rounds', type=int, default=3)
  options = parser.parse_args()
  for size in options.sizes.split(','):
    for mode in options.modes.split(','):
      measure(size, mode, options.rounds)


if __name__ == '__main__':
  main()

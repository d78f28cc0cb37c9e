"""Splash attention against XLA's, in the interpreter that needs no TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_t5x import layers, partitioning, tpu_kernels


def _inputs(B=2, T=256, H=4, G=1, K=32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(B, T, H, K), draw(B, T, G, K), draw(B, T, G, K)


def _float64(q, k, v):
  """softmax(q k / sqrt(K)) v, causal, by NumPy in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  R = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, R, axis=2), np.repeat(v, R, axis=2)
  scores = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(q.shape[-1])
  scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  return np.einsum('bhts,bshk->bthk', probs, v)


@pytest.mark.parametrize('G', [1, 2, 4])
def test_equals_attention_in_float64(G):
  inputs = _inputs(G=G)
  found = jax.jit(tpu_kernels.causal_attention)(*inputs)
  np.testing.assert_allclose(found, _float64(*inputs), atol=2e-5)


def test_gradients_equal_those_of_xla():
  inputs, target = _inputs(), _inputs()[0][..., ::-1]
  loss = lambda kernel: lambda *x: jnp.sum(layers.attention(*x, kernel=kernel) * target)
  found = jax.jit(jax.grad(loss('splash'), argnums=(0, 1, 2)))(*inputs)
  expected = jax.jit(jax.grad(loss('xla'), argnums=(0, 1, 2)))(*inputs)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize('G', [1, 4])
@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 2, 4), (1, 8, 1)])
def test_equals_xla_on_a_mesh(shape, G):
  partitioner = partitioning.PjitPartitioner(ici_mesh_shape=shape)
  inputs = _inputs(B=8, T=128, H=8, G=G, K=16)
  expected = layers.attention(*inputs, kernel='xla')
  run = partitioner.partition(lambda *x: layers.attention(*x, kernel='splash'))
  np.testing.assert_allclose(run(*inputs), expected, atol=2e-5)


def test_rows_that_blocks_do_not_divide_go_to_xla():
  inputs = _inputs(T=96)
  found = layers.attention(*inputs, kernel='splash')
  np.testing.assert_allclose(found, _float64(*inputs), atol=2e-5)
  assert tpu_kernels.fits(2048) and not tpu_kernels.fits(96)


@pytest.mark.parametrize('T', [2048, 3072])
def test_long_rows(T):
  inputs = _inputs(B=1, T=T, H=1, K=16)
  found = jax.jit(tpu_kernels.causal_attention)(*inputs)
  np.testing.assert_allclose(found, _float64(*inputs), atol=2e-5)

"""layers and cpu_kernels: norm, projections, rotary, attention, gate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import palm_reference as reference
import pytest
from jax.test_util import check_grads

from palm_t5x import cpu_kernels, layers


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('kind', ['rms', 'layer_norm'])
def test_norm_is_the_papers(kind):
  x, scale = normal(0, 3, 16) * 5 + 2, normal(1, 16)
  want = reference.norm(x.astype(np.float64), scale, kind)
  np.testing.assert_allclose(layers.normalize(x, scale, kind), want, atol=2e-5)


def test_norm_statistics_are_fp32():
  x = jnp.full((1, 8192), 1.0, jnp.bfloat16)
  assert layers.normalize(x).dtype == jnp.bfloat16
  # In bf16 the sum of 8192 ones would stop growing at 256.
  np.testing.assert_allclose(np.asarray(layers.normalize(x), np.float32), 1.0)


def test_rotary_is_the_rotation():
  x, positions = normal(0, 1, 5, 2, 8), np.array([[0, 3, 4, 250, 2047]])
  got = layers.rotate(jnp.asarray(x), layers.rotary_tables(positions, 8))
  for h in range(2):
    want = reference.rope(x[0, :, h].astype(np.float64), positions[0])
    np.testing.assert_allclose(got[0, :, h], want, atol=2e-4)


def test_rotary_knows_position_257_from_256():
  """bf16 rounds 257 to 256: tables come from integers, in fp32, in every mode."""
  x = jnp.ones((1, 2, 1, 256), jnp.bfloat16)
  sin, _ = layers.rotary_tables(jnp.array([[256, 257]]), 256)
  assert sin.dtype == jnp.float32
  np.testing.assert_allclose(sin[0, :, 0, 0], np.sin([256.0, 257.0]), atol=1e-4)
  turned = layers.rotate(x, layers.rotary_tables(jnp.array([[256, 257]]), 256))
  assert np.abs(np.asarray(turned[0, 0] - turned[0, 1], np.float32)).max() > 0.5


def test_rotary_scores_depend_on_distance_only():
  q, k = normal(0, 1, 1, 1, 64), normal(1, 1, 1, 1, 64)

  def score(p, s):
    turn = lambda x, at: layers.rotate(x, layers.rotary_tables(np.array([[at]]), 64))
    return float(jnp.sum(turn(jnp.asarray(q), p) * turn(jnp.asarray(k), s)))

  np.testing.assert_allclose(score(7, 3), score(2007, 2003), rtol=2e-3, atol=2e-3)


def test_rotary_gradient():
  tables = layers.rotary_tables(np.arange(3)[None], 8)
  check_grads(lambda x: layers.rotate(x, tables), (normal(0, 1, 3, 2, 8),), 1, ['rev'])


@pytest.mark.parametrize('activation', ['swish', 'gelu', 'relu', 'linear'])
def test_gate_and_its_gradient(activation):
  a, b = normal(0, 4, 6), normal(1, 4, 6)
  gate = lambda a, b: layers.gate([a, b], (activation, 'linear'))
  if activation == 'swish':
    want = reference.swish(a.astype(np.float64)) * b
    np.testing.assert_allclose(gate(a, b), want, atol=1e-6)
  check_grads(gate, (a, b), 1, ['rev'], atol=2e-2, rtol=2e-2)


def test_swish_gradient_at_large_inputs():
  a = jnp.array([-90.0, -20.0, 20.0, 90.0])
  got = jax.grad(lambda a: layers.gate([a, jnp.ones(4)], ('swish', 'linear')).sum())(a)
  x = np.asarray(a, np.float64)
  s = 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(got, s + x * s * (1 - s), atol=1e-5)


@pytest.mark.parametrize('rows', [1, 6, 64, 100])
@pytest.mark.parametrize('shape', [(8, 20), (20, 8)])
def test_matmul_and_its_gradients(rows, shape):
  x, w, g = normal(0, rows, shape[0]), normal(1, *shape), normal(2, rows, shape[1])
  y, vjp = jax.vjp(lambda x, w: cpu_kernels.matmul(x, w, jnp.float32), x, w)
  dx, dw = vjp(g)
  for got, want in ((y, x @ w), (dx, g @ w.T), (dw, x.T @ g)):
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_fast_mode_rounds_operands_and_nothing_else():
  """fp32 results of bf16 operands, both ways: exact matmuls of rounded inputs."""
  x, w, g = normal(0, 128, 96), normal(1, 96, 64), normal(2, 128, 64)
  rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w, g)]
  y, vjp = jax.vjp(lambda x, w: layers.project(x, w, 'fast'), x, w)
  dx, dw = vjp(g)
  assert y.dtype == dx.dtype == dw.dtype == jnp.float32
  xr, wr, gr = rounded
  for got, want in ((y, xr @ wr), (dx, gr @ wr.T), (dw, xr.T @ gr)):
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize('length', [2, 12])  # fewer and more tokens than D = 8
@pytest.mark.parametrize('mode', ['float32', 'fast', 'bfloat16'])
def test_split_and_joined_projections_are_the_fused_ones(mode, length):
  x, w, out = normal(0, 2, length, 8), normal(1, 8, 4, 10), normal(2, 4, 10, 8)

  def both(x, w, out):
    parts = layers.project_split(x, w, [4, 3, 3], mode)
    assert [p.shape[-1] for p in parts] == [4, 3, 3]
    return layers.project_joined(parts, out, mode).astype(jnp.float32)

  fused = lambda x, w, out: np.einsum(
    'bthf,hfd->btd', np.einsum('btd,dhf->bthf', x, w), out
  )
  tolerance = 1e-4 if mode == 'float32' else 1.0
  got, vjp = jax.vjp(both, *map(jnp.asarray, (x, w, out)))
  np.testing.assert_allclose(got, fused(x, w, out), atol=tolerance)
  g = normal(3, 2, length, 8)
  dx, dw, dout = vjp(jnp.asarray(g))
  dparts = np.einsum('btd,hfd->bthf', g, out)
  np.testing.assert_allclose(
    dx, np.einsum('bthf,dhf->btd', dparts, w), atol=2 * tolerance
  )
  np.testing.assert_allclose(
    dw, np.einsum('btd,bthf->dhf', x, dparts), atol=2 * tolerance
  )
  parts = np.einsum('btd,dhf->bthf', x, w)
  np.testing.assert_allclose(
    dout, np.einsum('bthf,btd->hfd', parts, g), atol=2 * tolerance
  )


def by_hand(q, k, v, seen):
  """[T, H, K] of one row, a head at a time, without rotary."""
  H, G = q.shape[1], k.shape[1]
  out = np.empty(q.shape)
  for h in range(H):
    scores = q[:, h].astype(np.float64) @ k[:, h * G // H].T / np.sqrt(q.shape[-1])
    out[:, h] = reference.softmax(np.where(seen, scores, -1e30)) @ v[:, h * G // H]
  return out


@pytest.mark.parametrize('kernel', ['xla', 'blocked'])
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('length', [8, 70, 128])
def test_causal_attention(kernel, kv_heads, length):
  q = normal(0, 2, length, 4, 8)
  k, v = normal(1, 2, length, kv_heads, 8), normal(2, 2, length, kv_heads, 8)
  attend = jax.jit(functools.partial(layers.attention, kernel=kernel))
  got = attend(q, k, v)
  seen = np.tril(np.ones((length, length), bool))
  for b in range(2):
    np.testing.assert_allclose(got[b], by_hand(q[b], k[b], v[b], seen), atol=1e-5)


def test_fast_blocked_attention_rounds_operands():
  q, k, v = normal(0, 1, 64, 4, 8), normal(1, 1, 64, 1, 8), normal(2, 1, 64, 1, 8)

  def run(mode):
    attend = lambda *qkv: layers.attention(*qkv, kernel='blocked', mode=mode)
    out, vjp = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
    return out, *vjp(jnp.ones_like(out))

  for got, want in zip(run('fast'), run('float32'), strict=True):
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - np.asarray(want)).max()
    assert 0 < error < 0.02 * np.abs(np.asarray(want)).max()


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_blocked_attention_has_the_gradients_of_the_plain_one(kv_heads):
  q, g = normal(0, 2, 128, 4, 8), normal(3, 2, 128, 4, 8)
  k, v = normal(1, 2, 128, kv_heads, 8), normal(2, 2, 128, kv_heads, 8)
  assert cpu_kernels.num_blocks(128) == 2

  def gradients(kernel):
    attend = lambda q, k, v: layers.attention(q, k, v, kernel=kernel)
    return jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))(q, k, v, g)

  for got, want in zip(gradients('blocked'), gradients('xla'), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_blocks_divide_any_length():
  for length in (1, 7, 64, 100, 127, 256, 2048, 2050):
    blocks = cpu_kernels.num_blocks(length)
    assert 1 <= blocks <= 8 and length % blocks == 0
  assert cpu_kernels.num_blocks(256) == 4
  assert cpu_kernels.num_blocks(2048) == 8


def test_masks():
  assert layers.training_mask(4) is None
  segments, prefix = np.array([[1, 1, 2, 2]]), np.array([[1, 1, 0, 0]])
  got = layers.training_mask(4, segments)
  assert got[0].astype(int).tolist() == [
    [1, 0, 0, 0],
    [1, 1, 0, 0],
    [0, 0, 1, 0],
    [0, 0, 1, 1],
  ]
  got = layers.training_mask(4, None, prefix)
  assert got[0].astype(int).tolist() == [
    [1, 1, 0, 0],
    [1, 1, 0, 0],
    [1, 1, 1, 0],
    [1, 1, 1, 1],
  ]


def test_bf16_attention_runs_on_cpu():
  """XLA:CPU has no batched bf16 dot: there the same numbers come by way of fp32."""
  q, k, v = (normal(i, 1, 6, h, 8) for i, h in enumerate((4, 1, 1)))
  got = jax.jit(layers.attention)(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
  assert got.dtype == jnp.bfloat16
  want = layers.attention(*map(jnp.asarray, (q, k, v)))
  np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=5e-2)

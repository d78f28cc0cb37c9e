"""losses: values against NumPy, gradients against finite differences, chunking."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import palm_reference as reference
import pytest

from palm_t5x import errors, losses

B, T, D, V, REAL = 2, 7, 8, 20, 17


def inputs(seed=0, rows=V):
  rng = np.random.default_rng(seed)
  return (
    jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
    jnp.asarray(rng.normal(size=(rows, D)), jnp.float32),
    jnp.asarray(rng.integers(0, REAL, (B, T)), jnp.int32),
    jnp.asarray(rng.integers(0, 3, (B, T)) / 2, jnp.float32),
  )


def in_float64(hidden, embedding, targets, weights, scale, z_loss, smoothing=0.0):
  """The loss as a formula: the oracle of values and, by differences, of gradients."""
  logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T * scale
  logits = logits[..., :REAL]
  cross, z = reference.token_losses(logits, targets, z_loss, REAL)
  if smoothing:
    low = smoothing / (REAL - 1)
    target = np.full(logits.shape, low)
    np.put_along_axis(target, np.asarray(targets)[..., None], 1 - smoothing, -1)
    log_probs = np.log(reference.softmax(logits))
    entropy = -(1 - smoothing) * np.log(1 - smoothing) - smoothing * np.log(low)
    cross = -(target * log_probs).sum(-1) - entropy
  return float(((cross + z) * np.asarray(weights)).sum()), cross, z


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('chunk', [None, 1, 3, 7, 50])
def test_value_in_any_chunking(chunk, smoothing):
  args = inputs()
  loss, tokens = losses.chunked_cross_entropy(
    *args,
    scale=0.7,
    z_loss=0.01,
    label_smoothing=smoothing,
    num_real_tokens=REAL,
    chunk_length=chunk,
  )
  want, cross, z = in_float64(*args, 0.7, 0.01, smoothing)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(tokens['cross_entropy'], cross, atol=1e-5)
  np.testing.assert_allclose(tokens['z_loss'], z, atol=1e-5)
  logits = np.asarray(args[0]) @ np.asarray(args[1]).T
  right = logits[..., :REAL].argmax(-1) == np.asarray(args[2])
  np.testing.assert_array_equal(tokens['correct'], right)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
@pytest.mark.parametrize('chunk', [2, 50])
def test_gradient_by_finite_differences(chunk, smoothing):
  """Both gradients, z-loss and all, against central differences in float64."""
  hidden, embedding, targets, weights = inputs()
  loss = lambda h, e: losses.chunked_cross_entropy(
    h,
    e,
    targets,
    weights,
    scale=0.7,
    z_loss=0.05,
    label_smoothing=smoothing,
    num_real_tokens=REAL,
    chunk_length=chunk,
  )[0]
  d_hidden, d_embedding = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, embedding)
  formula = lambda h, e: in_float64(h, e, targets, weights, 0.7, 0.05, smoothing)[0]
  h64, e64 = np.asarray(hidden, np.float64), np.asarray(embedding, np.float64)
  rng = np.random.default_rng(1)
  for _ in range(5):
    dh, de = rng.normal(size=h64.shape), rng.normal(size=e64.shape)
    step = 1e-5
    up, down = formula(h64 + step * dh, e64), formula(h64 - step * dh, e64)
    np.testing.assert_allclose(np.sum(d_hidden * dh), (up - down) / 2e-5, rtol=1e-4)
    up, down = formula(h64, e64 + step * de), formula(h64, e64 - step * de)
    np.testing.assert_allclose(np.sum(d_embedding * de), (up - down) / 2e-5, rtol=1e-4)


def test_gradient_is_the_closed_form():
  """d/dlogits = (1 + 2 c log Z) softmax - onehot, times the weight."""
  logits = np.random.default_rng(0).normal(size=(5, V))
  targets, c = np.array([0, 3, 16, 2, 2]), 0.03
  total = lambda x: sum(
    jnp.sum(part) for part in losses.cross_entropy_with_z_loss(x, targets, c)
  )
  got = jax.grad(total)(jnp.asarray(logits, jnp.float32))
  logz = np.log(np.exp(logits).sum(-1, keepdims=True))
  want = (1 + 2 * c * logz) * reference.softmax(logits) - np.eye(V)[targets]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_padded_rows_are_neither_predicted_nor_trained():
  hidden, embedding, targets, weights = inputs()
  run = functools.partial(
    losses.chunked_cross_entropy, z_loss=0.1, label_smoothing=0.1, chunk_length=3
  )
  loss = lambda e: run(hidden, e, targets, weights, num_real_tokens=REAL)[0]
  value, grad = jax.value_and_grad(loss)(embedding)
  assert not np.any(np.asarray(grad[REAL:])) and np.all(np.any(grad[:REAL], axis=1))
  # The same as if the rows did not exist.
  shorter = run(hidden, embedding[:REAL], targets, weights)[0]
  np.testing.assert_allclose(value, shorter, rtol=1e-6)


def test_no_array_of_all_logits_exists():
  hidden, embedding, targets, weights = inputs()
  grad = jax.grad(
    lambda h: losses.chunked_cross_entropy(
      h, embedding, targets, weights, chunk_length=2
    )[0]
  )
  text = jax.jit(grad).lower(hidden).compile().as_text()
  assert f'[{B * 2},{V}]' in text
  assert f'[{B * T},{V}]' not in text and f'[{B},{T},{V}]' not in text


def test_zero_weights_leave_tokens_out():
  hidden, embedding, targets, weights = inputs()
  weights = weights.at[:, 3:].set(0.0)
  loss = lambda h: losses.chunked_cross_entropy(h, embedding, targets, weights)[0]
  value, grad = jax.value_and_grad(loss)(hidden)
  other = loss(hidden.at[:, 3:].set(9.0))
  np.testing.assert_allclose(value, other, rtol=1e-6)
  assert not np.any(np.asarray(grad[:, 3:]))


@pytest.mark.parametrize('dtype', ['fast', 'bfloat16'])
def test_bf16_operands(dtype):
  args = inputs()
  cast = jnp.bfloat16 if dtype == 'bfloat16' else jnp.float32
  hidden = args[0].astype(cast)
  run = lambda h, e: losses.chunked_cross_entropy(
    h, e, *args[2:], num_real_tokens=REAL, dtype=dtype
  )[0]
  loss, (dh, de) = jax.value_and_grad(run, argnums=(0, 1))(hidden, args[1])
  assert loss.dtype == jnp.float32 and dh.dtype == cast and de.dtype == jnp.float32
  np.testing.assert_allclose(loss, in_float64(*args, 1.0, 0.0)[0], rtol=2e-2)


def test_large_logits_stay_finite():
  logits = jnp.asarray([[1e4, -1e4, 0.0], [3e4, 3e4, 3e4]])
  cross, z = losses.cross_entropy_with_z_loss(logits, jnp.asarray([1, 0]), 1e-4)
  np.testing.assert_allclose(cross, [2e4, np.log(3)], atol=4e-3)
  assert np.all(np.isfinite(np.asarray(z)))


def test_weights_per_sequence():
  weights = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1]], jnp.float32)
  got = losses.per_sequence_weights(weights)
  np.testing.assert_allclose(got, [[0.5, 0.5, 0, 0], [0.25] * 4])
  segments = jnp.asarray([[1, 1, 2, 0], [1, 2, 2, 2]])
  got = losses.per_sequence_weights(weights, segments)
  np.testing.assert_allclose(
    got, [[0.5, 0.5, 0, 0], [1, 1 / 3, 1 / 3, 1 / 3]], rtol=1e-6
  )


def test_normalizing_factors_by_name():
  enum = losses.SpecialLossNormalizingFactor
  assert (
    losses.normalizing_factor('num_real_target_tokens') is enum.NUM_REAL_TARGET_TOKENS
  )
  assert losses.normalizing_factor(None) is None and losses.normalizing_factor(8) == 8.0
  for wrong in ('NUM_REAL_TOKENS', 0, -1):
    with pytest.raises(errors.UserError, match='NUM_REAL_TARGET_TOKENS'):
      losses.normalizing_factor(wrong)

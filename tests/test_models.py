"""models: T5X's contract, loss and normalisers, prediction, scoring, Gin files."""

import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import palm_reference as reference
import pytest

from palm_t5x import (
  adafactor,
  decoding,
  errors,
  metrics,
  models,
  network,
  network_config,
)

VOCABULARY = types.SimpleNamespace(eos_id=1, vocab_size=40)
CONFIG = network.TransformerConfig(
  vocab_size=40,
  num_real_tokens=37,
  dtype='float32',
  emb_dim=16,
  num_heads=4,
  num_layers=2,
  head_dim=8,
  mlp_dim=32,
)
SIZES = {
  'num_heads': 4,
  'num_layers': 2,
  'head_dim': 8,
  'mlp_dim': 32,
  'norm': 'rms',
  'parallel_block': True,
}
MEAN = 'NUM_REAL_TARGET_TOKENS'


def make(config=CONFIG, **kwargs):
  kwargs = {'z_loss': 1e-2, 'loss_normalizing_factor': MEAN} | kwargs
  return models.DecoderOnlyModel(network.Decoder(config), VOCABULARY, None, **kwargs)


PARAMS = jax.jit(make().get_initial_variables)(jax.random.key(0))['params']


def batch(rows=4, length=6, seed=0):
  rng = np.random.default_rng(seed)
  ids = rng.integers(2, 37, (rows, length + 1)).astype(np.int32)
  weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
  return {
    'decoder_input_tokens': ids[:, :-1],
    'decoder_target_tokens': ids[:, 1:],
    'decoder_loss_weights': weights,
  }


def by_hand(data, z_loss=1e-2):
  logits = reference.forward(PARAMS, data['decoder_input_tokens'], SIZES)
  return reference.token_losses(logits, data['decoder_target_tokens'], z_loss, 37)


def test_loss_and_metrics_are_the_papers():
  data = batch()
  loss, got = jax.jit(make().loss_fn)(PARAMS, data, None)
  cross, z = by_hand(data)
  w = data['decoder_loss_weights']
  np.testing.assert_allclose(loss, ((cross + z) * w).sum() / w.sum(), rtol=1e-5)
  want = {
    'loss': ((cross + z) * w).sum() / w.sum(),
    'cross_ent_loss': (cross * w).sum() / w.sum(),
    'z_loss': (z * w).sum() / w.sum(),
    'nonpadding_fraction': (w > 0).mean(),
  }
  for name, value in want.items():
    assert isinstance(got[name], metrics.Ratio)
    np.testing.assert_allclose(got[name].value(), value, rtol=1e-5)
  assert got['loss'].weight == w.sum() and 0 <= got['accuracy'].value() <= 1


def test_gradient_of_the_whole_model():
  """Directional derivatives of the NumPy model: embeddings, kernels, norms, z-loss."""
  data = batch(rows=2, length=4)
  grads = jax.jit(jax.grad(lambda p: make().loss_fn(p, data, None)[0]))(PARAMS)
  weights = data['decoder_loss_weights']

  def loss(params):
    logits = reference.forward(params, data['decoder_input_tokens'], SIZES)
    parts = reference.token_losses(logits, data['decoder_target_tokens'], 1e-2, 37)
    return (sum(parts) * weights).sum() / weights.sum()

  start = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
  rng = np.random.default_rng(0)
  for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS):
    move = jax.tree_util.tree_map_with_path(
      lambda p, x, path=path: rng.normal(size=x.shape) * (p == path), start
    )
    up = jax.tree.map(lambda x, m: x + 1e-5 * m, start, move)
    down = jax.tree.map(lambda x, m: x - 1e-5 * m, start, move)
    want = (loss(up) - loss(down)) / 2e-5
    got = sum(
      float(np.sum(g * m))
      for g, m in zip(jax.tree.leaves(grads), jax.tree.leaves(move), strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
  'factor, normalizer',
  [
    (None, 1.0),
    (8, 8.0),
    (MEAN, 'weights'),
    ('NUM_TOTAL_TARGET_TOKENS', 24.0),
  ],
)
def test_normalizers(factor, normalizer):
  data, model = batch(), make(loss_normalizing_factor=factor)
  cross, z = by_hand(data)
  w = data['decoder_loss_weights']
  total = ((cross + z) * w).sum()
  if normalizer == 'weights':
    normalizer = w.sum()
  loss, _ = model.loss_fn(PARAMS, data, None)
  np.testing.assert_allclose(loss, total / normalizer, rtol=1e-5)


def test_average_per_sequence():
  data = batch()
  data['decoder_loss_weights'][:, 0] = 1.0
  w = data['decoder_loss_weights']
  cross, z = by_hand(data)
  want = np.mean(((cross + z) * w).sum(1) / w.sum(1))
  model = make(loss_normalizing_factor='AVERAGE_PER_SEQUENCE')
  np.testing.assert_allclose(model.loss_fn(PARAMS, data, None)[0], want, rtol=1e-5)


def test_microbatches_add_up_to_the_batch():
  """Sums of unequal token counts, normalised once, are the loss of the whole batch."""
  data, model = batch(), make()
  half = lambda i: {k: v[i : i + 2] for k, v in data.items()}
  sums = [model.sum_loss_fn(PARAMS, half(i), None) for i in (0, 2)]
  total = metrics.sum_metrics(sums[0][1], sums[1][1])
  got = (sums[0][0] + sums[1][0]) / model.loss_normalizer(total)
  np.testing.assert_allclose(got, model.loss_fn(PARAMS, data, None)[0], rtol=1e-5)


def test_a_batch_without_targets_has_no_nan():
  data = batch() | {'decoder_loss_weights': np.zeros((4, 6), np.float32)}
  loss, grads = jax.value_and_grad(lambda p: make().loss_fn(p, data, None)[0])(PARAMS)
  assert loss == 0 and not any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


def test_dropout_in_training_and_not_in_evaluation():
  model = make(CONFIG.__class__(**CONFIG.__dict__ | {'dropout_rate': 0.5}))
  run = jax.jit(model.loss_fn)
  plain, _ = make().loss_fn(PARAMS, batch(), None)
  np.testing.assert_allclose(model.eval_fn(PARAMS, batch())[0], plain, rtol=1e-6)
  assert abs(float(run(PARAMS, batch(), jax.random.key(0))[0] - plain)) > 1e-4


def test_a_model_of_ones_own_trains():
  """It writes loss_fn and get_initial_variables, and nothing else."""

  class Mine(models.BaseModel):
    def loss_fn(self, params, batch, dropout_rng):
      loss = jnp.mean((batch['x'] * params['w'] - 1.0) ** 2)
      return loss, {'loss': metrics.Ratio(loss, 1.0)}

    def get_initial_variables(self, rng, input_shapes, input_types=None):
      return {'params': {'w': jnp.zeros((3,))}}

  mine = Mine(None)
  data = {'x': jnp.ones((2, 3))}
  params = mine.get_initial_variables(jax.random.key(0), {})['params']
  loss, got = mine.sum_loss_fn(params, data, None)
  assert loss == 1.0 and mine.loss_normalizer(got) == 1.0
  assert mine.eval_fn(params, data)[0] == 1.0
  assert mine.param_logical_axes() == {'w': (None,)}
  with pytest.raises(errors.UserError, match='Mine'):
    mine.predict_batch(params, data)


# -- Scoring and prediction --


def test_scores_are_log_likelihoods():
  data = batch()
  cross, _ = by_hand(data)
  scores, more = make().score_batch(PARAMS, data, return_intermediates=True)
  np.testing.assert_allclose(
    scores, -(cross * data['decoder_loss_weights']).sum(1), rtol=1e-4
  )
  np.testing.assert_allclose(more['token_scores'], -cross, atol=1e-4)


def greedy(prompt, steps):
  """Continues a list of ids with the NumPy model, the whole prefix every time."""
  ids = list(prompt)
  for _ in range(steps):
    logits = reference.forward(PARAMS, np.array([ids]), SIZES)[0, -1, :37]
    ids.append(int(logits.argmax()))
    if ids[-1] == VOCABULARY.eos_id:
      break
  return ids[len(prompt) :]


PROMPTS = np.array([[1, 5, 9, 0, 0], [1, 7, 0, 0, 0], [1, 20, 21, 22, 23]], np.int32)
LENGTHS = np.array([3, 2, 5])


def test_generation_is_the_models():
  model = make()
  run = jax.jit(
    lambda p, t, n: model.generate(p, t, n, max_decode_steps=6, temperature=0.0)
  )
  tokens, scores = run(PARAMS, PROMPTS, LENGTHS)
  assert tokens.shape == (3, 1, 6) and scores.shape == (3, 1)
  for row in range(3):
    want = greedy(PROMPTS[row, : LENGTHS[row]], 6)
    assert [t for t in np.asarray(tokens[row, 0]).tolist() if t] == want


def test_generation_ignores_what_lies_after_a_prompt():
  dirty = np.where(np.arange(5) < LENGTHS[:, None], PROMPTS, 11)
  model = make()
  a = model.generate(PARAMS, PROMPTS, LENGTHS, max_decode_steps=4)[0]
  b = model.generate(PARAMS, dirty, LENGTHS, max_decode_steps=4)[0]
  np.testing.assert_array_equal(a, b)


def test_beam_search_over_the_model_finds_the_likeliest():
  """Four steps, every sequence of a 5-token vocabulary scored by the full forward."""
  config = network.TransformerConfig(
    vocab_size=8,
    num_real_tokens=5,
    dtype='float32',
    emb_dim=8,
    num_heads=2,
    num_layers=2,
    head_dim=4,
    mlp_dim=8,
  )
  model = make(config)
  params = jax.jit(model.get_initial_variables)(jax.random.key(3))['params']
  steps, prompt = 3, [1, 3]
  run = jax.jit(
    lambda p: model.generate(
      p,
      jnp.array([prompt]),
      jnp.array([2]),
      max_decode_steps=steps,
      num_decodes=64,
      decode_fn=decoding.beam_search,
      alpha=0.0,
    )
  )
  tokens, scores = run(params)
  sizes = SIZES | {'num_heads': 2, 'head_dim': 4, 'mlp_dim': 8}
  best = (-math.inf, None)
  grid = np.stack(np.meshgrid(*[np.arange(5)] * steps, indexing='ij'), -1)
  for sequence in grid.reshape(-1, steps).tolist():
    if 1 not in sequence:
      continue
    sequence = sequence[: sequence.index(1) + 1]
    ids = prompt + sequence
    logits = reference.forward(params, np.array([ids[:-1]]), sizes)
    cross, _ = reference.token_losses(logits[0, 1:], ids[2:], 0.0, 5)
    best = max(best, (-cross.sum(), sequence))
  np.testing.assert_allclose(scores[0, -1], best[0], rtol=1e-4)
  assert np.asarray(tokens[0, -1]).tolist()[: len(best[1])] == best[1]


def test_predict_continues_the_inputs():
  """T5X's: decoder_causal_attention marks the first token and the inputs."""
  data = {
    'decoder_input_tokens': np.pad(PROMPTS, ((0, 0), (0, 3)), constant_values=13),
    'decoder_causal_attention': (np.arange(8) < LENGTHS[:, None]).astype(np.int32),
  }
  model = make()
  ids, aux = jax.jit(model.predict_batch_with_aux)(PARAMS, data)
  assert ids.shape == (3, 8) and aux['scores'].shape == (3,)
  np.testing.assert_array_equal(ids, model.predict_batch(PARAMS, data))
  for row in range(3):
    want = greedy(PROMPTS[row, : LENGTHS[row]], 8 - LENGTHS[row] + 1)
    assert [t for t in np.asarray(ids[row]).tolist() if t] == want
  ids, aux = model.predict_batch_with_aux(
    PARAMS,
    data,
    jax.random.key(0),
    return_all_decodes=True,
    num_decodes=2,
    decoder_params={'topk': 0, 'temperature': 0.8},
  )
  assert ids.shape == (3, 2, 8) and aux['scores'].shape == (3, 2)


def test_prefill_and_steps_stream():
  """What `complete` does: prefill, then one token at a time on the host."""
  model = make()
  cache = model.prefill(PARAMS, PROMPTS[:1, :3], jnp.array([3]), 12)
  token, made = PROMPTS[0, 2], []
  for i in range(4):
    logits, cache = model.decode_step(
      PARAMS, cache, jnp.array([token]), jnp.array([2 + i])
    )
    token = int(np.argmax(logits[0]))
    made.append(token)
  assert made == greedy(PROMPTS[0, :3], 4)[:4]


def test_bidirectional_inputs():
  model = make(inputs_bidirectional_attention=True)
  data = batch() | {
    'decoder_causal_attention': np.array([[1, 1, 1, 0, 0, 0]] * 4, np.int32)
  }
  logits = reference.forward(
    PARAMS,
    data['decoder_input_tokens'],
    SIZES,
    prefix=data['decoder_causal_attention'],
  )
  cross, _ = reference.token_losses(logits, data['decoder_target_tokens'], 0.0, 37)
  _, got = model.score_batch(PARAMS, data, return_intermediates=True)
  np.testing.assert_allclose(got['token_scores'], -cross, atol=1e-4)
  first = np.asarray(model.predict_batch(PARAMS, data))[:, 0]
  np.testing.assert_array_equal(first, logits[:, 2, :37].argmax(-1))


def test_flops_and_parameters_are_the_papers():
  model = make()
  kernels = 2 * (2 * 16 * 32 + 2 * 16 * 8 + 3 * 16 * 32)
  assert model.num_params() == kernels + 37 * 16
  want = 6 * model.num_params() + 12 * 2 * 4 * 8 * 100
  assert model.flops_per_token(100) == want


@pytest.mark.parametrize(
  'size, printed, teraflops',
  [('8b', 8.63, 0.0550), ('62b', 62.50, 0.388), ('540b', 540.35, 3.28)],
)
def test_gin_files_are_the_papers(size, printed, teraflops):
  model = from_gin(size)
  assert round(model.num_params() / 1e9, 2) == printed
  per_token = model.flops_per_token(2048) / 1e12
  assert float(f'{per_token:.3g}') == teraflops
  assert model.config.real_tokens == model.output_vocabulary.vocab_size == 256_000


def test_palm_tiny_is_what_its_header_says():
  model = from_gin('tiny')
  assert model.num_params() == 4_849_664
  assert round(model.flops_per_token(256) / 1e6, 1) == 32.2


def from_gin(size):
  """The model that gin/models/palm_<size>.gin binds, as the command would build it."""
  import importlib.util  # noqa: F401 (gin's resource reader forgets to)
  import pathlib

  import gin

  root = pathlib.Path(__file__).resolve().parent.parent / 'gin'
  gin.clear_config()
  gin.add_config_file_search_path(str(root))
  try:
    gin.parse_config_files_and_bindings(
      [f'models/palm_{size}.gin'],
      ["CACHE_DIR = '/nowhere'", "MIXTURE_OR_TASK_NAME = 'none'"],
      finalize_config=False,
    )
    gin.parse_config(
      """
      from __gin__ import dynamic_registration
      import test_models
      test_models.take.model = %MODEL
      """
    )
    return gin.get_configurable(take)()
  finally:
    gin.clear_config()


def take(model):
  """Returns what Gin binds."""
  return model


def test_encoder_decoders_are_refused_by_name():
  with pytest.raises(errors.UserError, match='DecoderOnlyModel'):
    models.EncoderDecoderModel(module=None)


def test_importing_models_is_light():
  """No TensorFlow, no seqio: the feature converter comes on first use."""
  code = (
    'import sys, palm_t5x.models\n'
    'print([m for m in ("tensorflow", "seqio") if m in sys.modules])'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert out.stdout.strip() == '[]', out.stdout + out.stderr


def test_feature_converter_is_seqios():
  import seqio

  assert make().FEATURE_CONVERTER_CLS is seqio.DecoderFeatureConverter
  assert make(feature_converter_cls=int).FEATURE_CONVERTER_CLS is int


def _dot_flops(jaxpr):
  """FLOPs of the matrix products of a jaxpr: (plain ones, batched ones)."""
  found = np.zeros(2)
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), (batch, _) = equation.params['dimension_numbers']
      depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
      found[int(bool(batch))] += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    times = equation.params['length'] if equation.primitive.name == 'scan' else 1
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          found += times * _dot_flops(inner)
  return found


@pytest.mark.parametrize('policy', network_config.REMAT_POLICIES)
def test_recomputed_flops_are_those_of_the_gradient(policy):
  """HFU's FLOPs against the products in the gradient's program, JAX's own account."""
  B, T = 2, 128
  config = network.TransformerConfig(
    vocab_size=384,
    dtype='bfloat16',
    emb_dim=32,
    num_heads=4,
    num_layers=3,
    head_dim=16,
    mlp_dim=64,
    remat_policy=policy,
    attention_kernel='xla',
  )
  model = models.DecoderOnlyModel(
    network.Decoder(config), VOCABULARY, adafactor.Adafactor(factored=False)
  )
  params = jax.eval_shape(model.get_initial_variables, jax.random.key(0))['params']
  names = ('decoder_input_tokens', 'decoder_target_tokens')
  batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in names}
  loss = lambda params, batch: model.sum_loss_fn(params, batch, None)[0]
  plain, batched = _dot_flops(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr)
  batched /= 2  # each product of attention is there for the CPU and for the others
  assert (plain + batched) / (B * T) == model.hardware_flops_per_token(T)

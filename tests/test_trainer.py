"""One step: microbatches, meshes and restarts must not change what is learned."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

from palm_t5x import adafactor, models, network, partitioning, trainer
from palm_t5x.errors import UserError
from palm_t5x.train_state import TrainStateInitializer


@functools.cache
def _model(dropout_rate=0.0):
  config = network.TransformerConfig(
    vocab_size=384,
    dtype='float32',
    emb_dim=32,
    num_heads=8,
    num_layers=2,
    head_dim=4,
    mlp_dim=64,
    dropout_rate=dropout_rate,
  )
  optimizer = adafactor.Adafactor(
    factored=False,
    beta1=0.9,
    global_norm_clip_threshold=1.0,
    weight_decay_rate_lr_exponent=2.0,
  )
  return models.DecoderOnlyModel(
    network.Decoder(config),
    seqio.ByteVocabulary(),
    optimizer,
    z_loss=1e-4,
    loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
  )


def _batch(step, rows=8, length=16):
  rng = np.random.default_rng(step)
  tokens = rng.integers(3, 100, size=(rows, length + 1)).astype(np.int32)
  # Unequal token counts: row r has its last r*2 targets masked out.
  weights = (np.arange(length) < length - 2 * np.arange(rows)[:, None] % length).astype(
    np.float32
  )
  return {
    'decoder_input_tokens': tokens[:, :-1],
    'decoder_target_tokens': tokens[:, 1:],
    'decoder_loss_weights': weights,
  }


def _trainer(partitioner, seed=0, dropout_rate=0.0, **kwargs):
  model = _model(dropout_rate)
  initializer = TrainStateInitializer(
    model, partitioner, {'decoder_input_tokens': (8, 16)}
  )
  return trainer.Trainer(
    model,
    initializer.from_scratch(jax.random.key(seed)),
    partitioner,
    train_state_axes=initializer.axes,
    rng=jax.random.key(7),
    learning_rate_fn=lambda step: 1e-2,
    **kwargs,
  )


def _run(one, steps=3):
  losses = []
  for step in range(steps):
    batch = one.partitioner.shard_batch(
      8, lambda rows, step=step: {k: v[rows] for k, v in _batch(step).items()}
    )
    losses.append(float(one.train(batch)['loss'].value()))
  return losses, jax.device_get(one.train_state.params)


def _max_difference(a, b):
  differences = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a, b)
  return max(jax.tree.leaves(differences))


@functools.cache
def _reference():
  return _run(_trainer(partitioning.PjitPartitioner()))


@pytest.mark.parametrize('num_microbatches', [2, 4, 8])
def test_microbatches_give_the_same_update(num_microbatches):
  losses, params = _run(
    _trainer(
      partitioning.PjitPartitioner(num_partitions=8), num_microbatches=num_microbatches
    )
  )
  np.testing.assert_allclose(losses, _reference()[0], rtol=1e-5)
  assert _max_difference(params, _reference()[1]) < 1e-5


MESHES = [
  (pods, data, n // pods // data)
  for n in (1, 2, 4, 8)
  for pods in (1, 2, 4, 8)
  for data in (1, 2, 4, 8)
  if n % (pods * data) == 0
]


# One of each kind; `make test-slow` has them all.
EVERY_TIME = [(1, 1, 1), (1, 8, 1), (1, 1, 8), (8, 1, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize(
  'shape',
  [
    shape if shape in EVERY_TIME else pytest.param(shape, marks=pytest.mark.slow)
    for shape in MESHES
  ],
  ids=lambda shape: 'x'.join(map(str, shape)),
)
def test_every_mesh_gives_the_same_losses(shape):
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=shape,
    logical_axis_rules=partitioning.standard_logical_axis_rules(2, 2),
    devices=jax.devices()[: math.prod(shape)],
  )
  losses, params = _run(_trainer(partitioner))
  np.testing.assert_allclose(losses, _reference()[0], rtol=1e-5)
  assert _max_difference(params, _reference()[1]) < 1e-5


@pytest.mark.parametrize('dims', [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize('microbatches', [1, 2])
def test_every_rule_table_gives_the_same_losses(dims, microbatches):
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=(2, 2, 2),
    logical_axis_rules=partitioning.standard_logical_axis_rules(*dims),
  )
  losses, params = _run(_trainer(partitioner, num_microbatches=microbatches))
  np.testing.assert_allclose(losses, _reference()[0], rtol=1e-5)
  assert _max_difference(params, _reference()[1]) < 1e-5


def test_gradients_between_pods_may_be_rounded():
  """bfloat16 halves the bytes that cross; what is learned differs a little."""
  pods = partitioning.PjitPartitioner(ici_mesh_shape=(2, 4, 1))
  losses, params = _run(_trainer(pods, pod_gradient_dtype='bfloat16'))
  np.testing.assert_allclose(losses, _reference()[0], rtol=1e-2)
  assert 1e-6 < _max_difference(params, _reference()[1]) < 1e-2


def test_the_same_mesh_twice_is_bit_identical():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  first, second = _run(_trainer(partitioner)), _run(_trainer(partitioner))
  assert first[0] == second[0] and _max_difference(first[1], second[1]) == 0.0


def test_parameters_are_sharded_as_the_rules_say():
  rules = partitioning.standard_logical_axis_rules(2, 2)
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=(2, 4), logical_axis_rules=rules
  )
  state = _trainer(partitioner).train_state
  kernel = state.params['layers']['q_wi_fused']
  assert kernel.addressable_shards[0].data.size == kernel.size // 8
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
  assert len(moments) == 2, 'Adafactor without factoring keeps m and v'
  for moment in moments:
    assert moment.sharding == kernel.sharding


def test_dropout_depends_on_seed_and_step_alone():
  partitioner = partitioning.PjitPartitioner()
  first = _run(_trainer(partitioner, dropout_rate=0.3))
  again = _run(_trainer(partitioner, dropout_rate=0.3))
  assert first[0] == again[0]
  assert first[0] != _reference()[0]


def test_the_step_reports_learning_rate_and_gradient_norm():
  one = _trainer(partitioning.PjitPartitioner())
  batch = one.partitioner.shard_batch(
    8, lambda rows: {k: v[rows] for k, v in _batch(0).items()}
  )
  model, params = one.model, jax.device_get(one.train_state.params)
  grads = jax.grad(lambda p: model.loss_fn(p, _batch(0), None)[0])(params)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  metrics = one.train(batch)
  assert float(metrics['learning_rate'].value()) == pytest.approx(1e-2)
  assert float(metrics['grad_norm'].value()) == pytest.approx(norm, rel=1e-4)


def test_weight_metrics():
  computer = trainer.WeightMetricsComputer()
  tree = {'a': jnp.full((2, 2), 3.0)}
  zero = {'a': jnp.zeros((2, 2))}
  values = {k: float(v.value()) for k, v in computer(zero, zero, tree).items()}
  assert values == {
    'weight_rms/a': 3.0,
    'weight_gradient_rms/a': 0.0,
    'weight_update_rms/a': 3.0,
  }


class _State:
  step = 10


def test_nan_action_stops_only_on_its_metric():
  action = trainer.TerminateOnNanAction(task='train')
  assert not action.run(_State, {'train': {'loss': 1.0}})
  assert not action.run(_State, {'other': {'loss': float('nan')}})
  assert action.run(_State, {'train': {'loss': float('nan')}})


def test_early_stopping_waits_for_patience():
  action = trainer.EarlyStoppingAction(('text', 'loss'), 'min', patience=2, atol=0.1)
  losses = [3.0, 2.0, 1.95, 1.5, 1.49, 1.48]
  stops = [action.run(_State, {'text': {'loss': loss}}) for loss in losses]
  assert stops == [False, False, False, False, False, True]
  with pytest.raises(UserError, match='mode'):
    trainer.EarlyStoppingAction(('text', 'loss'), 'down')

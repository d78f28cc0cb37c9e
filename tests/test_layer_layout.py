"""Checkpoints of stacked layers serve models of separate ones, and the reverse."""

import jax
import numpy as np
import optax
import pytest
from runs import here, losses

from palm_t5x import adafactor, checkpoints, models, network, optimizers, partitioning
from palm_t5x.errors import UserError
from palm_t5x.metric_writers import read_metrics
from palm_t5x.train_state import TrainState, TrainStateInitializer

SIZES = {
  'vocab_size': 64,
  'emb_dim': 128,
  'num_heads': 2,
  'num_layers': 3,
  'head_dim': 64,
  'mlp_dim': 256,
  'dtype': 'float32',
}
OPTIMIZERS = {
  'palm': lambda: adafactor.Adafactor(factored=False, beta1=0.9),
  'factored': lambda: adafactor.Adafactor(beta1=0.9),
  'adamw': lambda: optimizers.adamw(),
  'chain': lambda: optimizers.chain([optax.scale_by_adam(), optax.scale(-1e-3)]),
}


def initializer(scan, optimizer, partitions):
  config = network.TransformerConfig(**SIZES, scan_layers=scan)
  model = models.DecoderOnlyModel(
    network.Decoder(config), vocabulary=None, optimizer_def=OPTIMIZERS[optimizer]()
  )
  rules = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
  partitioner = partitioning.PjitPartitioner(
    num_partitions=partitions, logical_axis_rules=rules
  )
  shapes = {'decoder_input_tokens': (8, 16)}
  return TrainStateInitializer(model, partitioner, shapes)


def numbered(state):
  """The state with a value of its own in every place, as NumPy arrays."""
  leaves, treedef = jax.tree.flatten(state)
  rng = np.random.default_rng(0)
  values = [rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  placed = [jax.device_put(v, x.sharding) for v, x in zip(values, leaves, strict=True)]
  return jax.tree.unflatten(treedef, placed)


def by_layer(tree):
  """{path: array}, with the layers of both layouts named alike."""
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    keys = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    place = [i for i, key in enumerate(keys) if key.startswith('layers')]
    if place and keys[place[0]] == 'layers':
      for layer, part in enumerate(np.asarray(leaf)):
        keys[place[0]] = f'layers_{layer}'
        found['/'.join(keys)] = part
    else:
      found['/'.join(keys)] = np.asarray(leaf)
  return found


def _cases():
  """Both ways for every optimizer; two of them are enough for a quick look."""
  for optimizer in OPTIMIZERS:
    for scan in (True, False):
      quick = (optimizer, scan) in (('palm', True), ('factored', False))
      yield pytest.param(optimizer, scan, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(('optimizer', 'scan'), list(_cases()))
def test_every_bit_comes_over(tmp_path, optimizer, scan):
  """Parameters and optimizer state, onto another mesh at the same time."""
  meshes = (1, 2) if scan else (2, 1)
  before = initializer(scan, optimizer, meshes[0])
  state = numbered(before.from_scratch(jax.random.key(0)))
  state = TrainState(jax.numpy.int32(5), state.params, state.opt_state)
  with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
    checkpointer.save(state, {'step': 5})
  after = initializer(not scan, optimizer, meshes[1])
  with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
    restored, _ = checkpointer.restore_newest(after.abstract())
  expected, found = by_layer(state.to_tree()), by_layer(restored.to_tree())
  assert expected.keys() == found.keys() and len(expected) > 20
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert jax.tree.structure(restored) == jax.tree.structure(after.shapes)
  for leaf, sharding in zip(
    jax.tree.leaves(restored), jax.tree.leaves(after.shardings), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


SCAN = 'network.TransformerConfig.scan_layers'


@pytest.mark.slow
@pytest.mark.parametrize('first', [True, False])
def test_runs_resume_evaluate_and_start_across_layouts(workspace, first):
  """The same numbers to rounding as the run that keeps its layout."""
  there, other = (f'{SCAN}={first}', f'{SCAN}={not first}')
  one, two = workspace / f'keeps_{first}', workspace / f'changes_{first}'
  assert here(workspace, 'train', one, there, 'TRAIN_STEPS=4').code == 0
  assert here(workspace, 'train', two, there, 'TRAIN_STEPS=2').code == 0
  resumed = here(workspace, 'train', two, other, 'TRAIN_STEPS=4')
  assert resumed.code == 0, resumed.err
  assert f'{SCAN} {first} -> {not first}' in resumed.err.replace('unset', 'True')
  np.testing.assert_allclose(
    list(losses(two).values()), list(losses(one).values()), rtol=2e-5
  )
  closing = read_metrics(str(one), 'training_eval/fixture_text')[-1]['loss']
  again = read_metrics(str(two), 'training_eval/fixture_text')[-1]['loss']
  assert again == pytest.approx(closing, rel=2e-5)
  started = here(
    *(workspace, 'train', workspace / f'starts_{first}', other, 'TRAIN_STEPS=5'),
    f'utils.RestoreCheckpointConfig.path="{one}"',
  )
  assert started.code == 0, started.err
  assert 'checkpoint_4 with its optimizer state, at step 4' in started.err


def test_another_number_of_layers_is_named(tmp_path):
  before = initializer(True, 'palm', 1)
  state = before.from_scratch(jax.random.key(0))
  with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
    checkpointer.save(state, {'step': 0})
  SIZES['num_layers'] = 2
  try:
    after = initializer(False, 'palm', 1)
  finally:
    SIZES['num_layers'] = 3
  with pytest.raises(UserError, match='another model'):
    checkpoints.load(tmp_path / 'checkpoint_0', {'target': after.abstract().params})

"""Checkpoints come back whole, resharded, or not at all."""

import json
import os
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palm_t5x import checkpoints
from palm_t5x.errors import Failure, UserError
from palm_t5x.train_state import TrainState


def _sharding(devices, spec):
  mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1), ('data',))
  return NamedSharding(mesh, spec)


def _state(step, devices=4):
  values = np.random.default_rng(step).normal(size=(8, 6)).astype(np.float32)
  kernel = jax.device_put(values, _sharding(devices, P('data')))
  moments = {'step': jnp.int32(step), 'param_states': ({'kernel': kernel * 2}, ())}
  return TrainState(jnp.int32(step), {'kernel': kernel}, moments)


def _abstract(state, devices, spec=None):
  def one(x):
    sharding = _sharding(devices, spec if spec and x.ndim else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, state)


def _save(directory, *steps, keep=None):
  with checkpoints.Checkpointer(str(directory), keep=keep) as checkpointer:
    for step in steps:
      checkpointer.save(_state(step), {'step': step})


def _equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize('devices,spec', [(1, P()), (2, P('data')), (8, P('data'))])
def test_restores_every_bit_onto_another_mesh(tmp_path, devices, spec):
  _save(tmp_path, 3)
  with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
    state, metadata = checkpointer.restore_newest(_abstract(_state(3), devices, spec))
  _equal(state, _state(3))
  assert metadata == {'step': 3}
  assert len(state.params['kernel'].sharding.device_set) == devices


def test_keeps_the_newest(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, keep=2)
  assert checkpoints.steps_in(tmp_path) == [3, 4]


def test_parameters_alone(tmp_path):
  _save(tmp_path, 5)
  abstract = {'target': _abstract(_state(5), 2).params}
  folder = checkpoints.find(tmp_path)
  loaded = checkpoints.load(folder, abstract, dtype='bfloat16')['target']
  assert loaded['kernel'].dtype == jnp.bfloat16
  expected = np.asarray(_state(5).params['kernel']).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(loaded['kernel']), expected)


def _damage(folder, kind, rng):
  files = sorted(
    p
    for p in folder.rglob('*')
    if p.is_file() and p.name not in ('commit_success.txt',)
  )
  files = [p for p in files if p.name != '_CHECKPOINT_METADATA' and p.stat().st_size]
  victim = rng.choice(files)
  if kind == 'removed':
    victim.unlink()
  else:
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(bytes(data))
  return victim


@pytest.mark.parametrize('kind', ['flipped', 'removed'])
@pytest.mark.parametrize('seed', range(6))
def test_damage_is_never_loaded(tmp_path, caplog, kind, seed):
  _save(tmp_path, 1, 2)
  _damage(tmp_path / 'checkpoint_2', kind, random.Random(seed))
  with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
    state, _ = checkpointer.restore_newest(_abstract(_state(1), 1))
  _equal(state, _state(1))
  assert 'checkpoint_2 is damaged' in caplog.text
  with pytest.raises(Failure, match='damaged'):
    checkpoints.load(
      tmp_path / 'checkpoint_2', {'target': _abstract(_state(2), 1).params}
    )
  assert checkpoints.find(tmp_path).name == 'checkpoint_1'


def test_all_damaged_is_a_failure_not_a_fresh_start(tmp_path):
  _save(tmp_path, 1)
  _damage(tmp_path / 'checkpoint_1', 'removed', random.Random(0))
  with (
    checkpoints.Checkpointer(str(tmp_path)) as checkpointer,
    pytest.raises(Failure, match='Move them away'),
  ):
    checkpointer.restore_newest(_abstract(_state(1), 1))


def test_interrupted_save_is_cleaned_and_ignored(tmp_path):
  _save(tmp_path, 1)
  leftover = tmp_path / 'checkpoint_2.orbax-checkpoint-tmp'
  leftover.mkdir()
  with checkpoints.Checkpointer(str(tmp_path)) as checkpointer:
    checkpointer.clean()
    _, metadata = checkpointer.restore_newest(_abstract(_state(1), 1))
  assert metadata['step'] == 1 and not leftover.exists()


def test_another_model_is_named_by_its_parameters(tmp_path):
  _save(tmp_path, 1)
  other = _abstract(_state(1), 1)
  other.params['kernel'] = jax.ShapeDtypeStruct(
    (8, 7), np.float32, sharding=_sharding(1, P())
  )
  with (
    checkpoints.Checkpointer(str(tmp_path)) as checkpointer,
    pytest.raises(UserError) as e,
  ):
    checkpointer.restore_newest(other)
  assert 'target/kernel is (8, 6) there, (8, 7) here' in str(e.value)


def test_missing_checkpoint_names_near_ones(tmp_path):
  _save(tmp_path, 7)
  with pytest.raises(UserError, match=r'\[7\]'):
    checkpoints.find(tmp_path / 'checkpoint_8')
  with pytest.raises(UserError, match='no checkpoint at'):
    checkpoints.find(tmp_path / 'nowhere')


def test_unwritable_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch):
  _save(tmp_path, 1)
  before = checkpoints.damage(tmp_path / 'checkpoint_1')

  def full(folder):
    raise OSError(28, os.strerror(28))

  monkeypatch.setattr(checkpoints, '_write_checksums', full)
  with (
    pytest.raises(Failure, match='No space left on device'),
    checkpoints.Checkpointer(str(tmp_path)) as checkpointer,
  ):
    checkpointer.save(_state(2), {'step': 2})
    checkpointer.wait()
  assert before is None and checkpoints.damage(tmp_path / 'checkpoint_1') is None
  assert checkpoints.steps_in(tmp_path) == [1]


def test_checksums_cover_every_array_file(tmp_path):
  _save(tmp_path, 1)
  folder = pathlib.Path(tmp_path) / 'checkpoint_1'
  recorded = json.loads((folder / checkpoints.CHECKSUMS).read_text())
  arrays = [p for p in (folder / 'state').rglob('*') if p.is_file()]
  names = {p.relative_to(folder).as_posix() for p in arrays}
  assert {n for n in names if '/d/' in n} <= recorded.keys()
  assert 'metadata/metadata' in recorded

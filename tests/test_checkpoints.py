"""Checkpoints come back whole, resharded, or not at all."""

import json
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crashes import at, dies
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


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'keep': 2}, [11, 12]),
    ({'keep': 2, 'keep_period': 5}, [5, 10, 11, 12]),
    ({'keep': 2, 'keep_period': 20}, [11, 12]),
    ({'keep_period': 5}, list(range(1, 13))),
    ({'keep': 1, 'reach': 4}, [8, 9, 10, 11, 12]),
    ({'keep': 1, 'reach': 40}, list(range(1, 13))),
    ({'keep': 8, 'reach': 2}, list(range(5, 13))),
    ({'keep': 1, 'reach': 2, 'keep_period': 6}, [6, 10, 11, 12]),
  ],
)
def test_keeps_the_newest_and_every_so_many(tmp_path, settings, expected):
  """The same whether all are there at the end or each save deletes what it may."""
  checkpointer = checkpoints.Checkpointer(str(tmp_path), **settings)
  try:
    there = []
    for step in range(1, 13):
      there.append(step)
      gone = checkpointer._superfluous(there) if settings.get('keep') else []
      there = [s for s in there if s not in gone]
  finally:
    checkpointer.close()
  assert there == expected


def test_a_deletion_that_is_killed_leaves_no_half_of_a_checkpoint(tmp_path):
  _save(tmp_path / 'before', 1, 2)
  one = shutil.copytree(tmp_path / 'before', tmp_path / 'one')
  with at(None, one) as watch:
    checkpoints._remove(one / 'checkpoint_1')
  assert checkpoints.steps_in(one) == [2] and watch.changes > 3
  for number in range(watch.changes):
    folder = tmp_path / f'killed_{number}'
    shutil.copytree(tmp_path / 'before', folder)
    assert dies(
      number, folder, lambda f=folder: checkpoints._remove(f / 'checkpoint_1')
    )
    for step in checkpoints.steps_in(folder):
      assert checkpoints.damage(folder / f'checkpoint_{step}') is None
    checkpointer = checkpoints.Checkpointer(str(folder))
    checkpointer.clean()
    checkpointer.close()
    names = {path.name for path in folder.iterdir()}
    assert names <= {'checkpoint_1', 'checkpoint_2'}


def test_parameters_alone(tmp_path):
  _save(tmp_path, 5)
  abstract = {'target': _abstract(_state(5), 2).params}
  folder = checkpoints.find(tmp_path)
  loaded = checkpoints.load(folder, abstract, dtype='bfloat16')['target']
  assert loaded['kernel'].dtype == jnp.bfloat16
  expected = np.asarray(_state(5).params['kernel']).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(loaded['kernel']), expected)


def _damage(folder, rng):
  """Flips, cuts, empties or removes one file of a checkpoint, any of them."""
  victim = rng.choice(sorted(p for p in folder.rglob('*') if p.is_file()))
  data = bytearray(victim.read_bytes())
  kind = rng.choice(['flipped', 'bytes', 'cut', 'emptied', 'removed'])
  if kind == 'flipped' and data:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif kind == 'bytes' and data:
    for _ in range(rng.randrange(1, 9)):
      place = rng.randrange(len(data))
      data[place] = (data[place] + rng.randrange(1, 256)) % 256
  elif kind == 'cut' and data:
    del data[rng.randrange(len(data)) :]
  elif kind == 'emptied' and data:
    data.clear()
  else:
    victim.unlink()
    return f'{victim.name} removed'
  victim.write_bytes(bytes(data))
  return f'{victim.name} {kind}'


def _never_loaded(tmp_path, caplog, seeds):
  """Damages the newer of two checkpoints again and again; the older is what loads."""
  run, spare = tmp_path / 'run', tmp_path / 'spare'
  _save(run, 1, 2)
  shutil.copytree(run / 'checkpoint_2', spare)
  abstract = _abstract(_state(1), 1)
  hit = set()
  with checkpoints.Checkpointer(str(run)) as checkpointer:
    for seed in seeds:
      hit.add(what := _damage(run / 'checkpoint_2', random.Random(seed)))
      caplog.clear()
      state, metadata = checkpointer.restore_newest(abstract)
      _equal(state, _state(1))
      assert metadata == {'step': 1}, what
      assert 'checkpoint_2 is damaged' in caplog.text, what
      assert checkpoints.find(run).name == 'checkpoint_1', what
      with pytest.raises(Failure, match='damaged'):
        checkpoints.load(run / 'checkpoint_2', {'target': abstract.params})
      shutil.rmtree(run / 'checkpoint_2')
      shutil.copytree(spare, run / 'checkpoint_2')
    state, _ = checkpointer.restore_newest(abstract)
    _equal(state, _state(2))
  return {what.rsplit(' ', 1)[0] for what in hit}


def test_damage_is_never_loaded(tmp_path, caplog):
  hit = _never_loaded(tmp_path, caplog, range(40))
  assert len(hit) > 6, 'the damages reach files of every kind'


@pytest.mark.slow
def test_hundreds_of_damages_are_never_loaded(tmp_path, caplog):
  hit = _never_loaded(tmp_path, caplog, range(100, 900))
  assert {'_CHECKPOINT_METADATA', 'checksums.json', 'commit_success.txt'} <= hit
  assert {'metadata', '_METADATA', 'manifest.ocdbt'} <= hit


def test_a_file_that_nobody_wrote_is_damage(tmp_path):
  _save(tmp_path, 1)
  (tmp_path / 'checkpoint_1' / 'state' / 'more').write_text('x')
  assert 'state/more is in no checksums.json' in checkpoints.damage(
    tmp_path / 'checkpoint_1'
  )


def test_older_checkpoints_without_two_checksums_are_whole(tmp_path):
  _save(tmp_path, 1)
  path = tmp_path / 'checkpoint_1' / checkpoints.CHECKSUMS
  recorded = json.loads(path.read_text())
  for name in ('_CHECKPOINT_METADATA', 'commit_success.txt'):
    del recorded[name]
  path.write_text(json.dumps(recorded))
  assert checkpoints.damage(tmp_path / 'checkpoint_1') is None


def test_all_damaged_is_a_failure_not_a_fresh_start(tmp_path):
  _save(tmp_path, 1)
  _damage(tmp_path / 'checkpoint_1', random.Random(0))
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

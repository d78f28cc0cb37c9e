"""Batches as pure functions of (seed, step), checked against the stream itself."""

import time

import numpy as np
import pytest
from toy_stores import Bytes

from palm_t5x import errors
from palm_t5x.corpus import reader, sampling, store_builder, token_store

T = 8


def make(path, name, texts):
  store_builder.build(str(path / name), texts, Bytes(), task=name, split='train')
  return token_store.TokenStore(str(path / name))


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  path = tmp_path_factory.mktemp('stores')
  long = make(path, 'long', [f'a longer text, number {i}' for i in range(50)])
  short = make(path, 'short', [f'brief {i}' for i in range(12)])
  return [('long', long, 0.8), ('short', short, 0.2)]


def test_every_row_once_per_epoch(stores):
  mixed = reader.MixtureReader(stores, T, seed=1)
  rows = mixed.rows_available
  assert rows['long'] == (stores[0][1].num_tokens - 1) // T
  seen = {0: [], 1: []}
  for start in range(0, 3 * sum(rows.values()), 7):
    for number, (_, found) in enumerate(mixed.locate(np.arange(start, start + 7))):
      seen[number].extend(found.tolist())
  orders = []
  for number, name in enumerate(rows):
    for epoch in range(len(seen[number]) // rows[name]):
      order = seen[number][epoch * rows[name] : (epoch + 1) * rows[name]]
      assert sorted(order) == list(range(rows[name])), 'a row repeats within an epoch'
      orders.append(order)
  assert orders[0] != orders[1], 'a new epoch has a new order'


def test_examples_are_the_stream_shifted_by_one(stores):
  mixed = reader.MixtureReader(stores, T, seed=1)
  indices = np.array([5, 0, 17, 4])
  batch = mixed.examples(indices)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'decoder_input_tokens': ((4, T), 'int32'),
    'decoder_target_tokens': ((4, T), 'int32'),
    'decoder_loss_weights': ((4, T), 'float32'),
  }
  assert batch['decoder_loss_weights'].min() == 1
  for (_, store, _), (where, rows) in zip(stores, mixed.locate(indices), strict=True):
    stream = store.read(0, store.num_tokens)
    for i, r in zip(where, rows, strict=True):
      np.testing.assert_array_equal(
        batch['decoder_input_tokens'][i], stream[r * T : r * T + T]
      )
      np.testing.assert_array_equal(
        batch['decoder_target_tokens'][i], stream[r * T + 1 : r * T + T + 1]
      )


def test_any_subset_of_steps_reads_the_same_batches(stores):
  schedule = sampling.BatchSchedule(((0, 2), (5, 4)), skip_batches=[(7, 9)])
  straight = reader.MixtureReader(stores, T, seed=1)
  whole = [straight.examples(schedule.indices(step)) for step in range(20)]
  fresh = reader.MixtureReader(stores, T, seed=1)
  for step in (13, 2, 19, 8):
    batch = fresh.examples(schedule.indices(step))
    for key, value in batch.items():
      np.testing.assert_array_equal(value, whole[step][key])
  other = reader.MixtureReader(stores, T, seed=2)
  assert (
    other.examples(schedule.indices(6))['decoder_input_tokens']
    != whole[6]['decoder_input_tokens']
  ).any()


def test_epochs(stores):
  mixed = reader.MixtureReader(stores, T)
  count = 5 * mixed.rows_available['short']
  assert mixed.epochs(count)['short'] == pytest.approx(1, abs=0.1)


def test_too_little_text(stores):
  with pytest.raises(errors.UserError, match=r"'long' has .* fewer than one row"):
    reader.MixtureReader(stores, 4000)


def test_zero_weight_is_left_out(stores):
  only = reader.MixtureReader([(n, s, float(n == 'long')) for n, s, _ in stores], T)
  assert only.names == ['long']


@pytest.mark.parametrize('length', [1, 5, 8, 1000])
def test_evaluation_predicts_every_token_once(stores, length):
  store = stores[1][1]
  stream = store.read(0, store.num_tokens)
  rows = reader.EvalReader(store, length)
  targets, inputs = [], []
  for batch in rows.batches(3):
    assert batch['decoder_input_tokens'].shape == (3, length)
    mask = batch['decoder_loss_weights'] > 0
    targets.extend(batch['decoder_target_tokens'][mask])
    inputs.extend(batch['decoder_input_tokens'][mask])
    assert not batch['decoder_target_tokens'][~mask].any()
    assert not batch['decoder_input_tokens'][~mask].any()
  np.testing.assert_array_equal(targets, stream)
  np.testing.assert_array_equal(inputs, [1, *stream[:-1]])
  assert rows.num_bytes == store.num_bytes
  assert len(list(rows.batches(3, max_batches=1))) == 1


def test_prefetcher_keeps_order_and_stops():
  with reader.Prefetcher(lambda step: step * step, 3, stop_step=8) as batches:
    assert list(batches) == [9, 16, 25, 36, 49]
  batches = reader.Prefetcher(lambda step: step, 0)
  assert [next(batches) for _ in range(3)] == [0, 1, 2]
  batches.close()
  assert not batches._thread.is_alive()
  with pytest.raises(StopIteration):
    next(batches)


def test_prefetcher_raises_in_turn():
  def fn(step):
    if step == 2:
      raise errors.Failure('broken shard')
    return step

  batches = reader.Prefetcher(fn, 0)
  time.sleep(0.05)
  assert [next(batches), next(batches)] == [0, 1]
  with pytest.raises(errors.Failure, match='broken shard'):
    next(batches)
  batches.close()


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_any_number_of_hosts_reads_the_same_batches(stores, hosts):
  """Each host has a reader of its own and reads the rows of its devices."""
  schedule = sampling.BatchSchedule(((0, 4), (3, 8)))
  straight = reader.MixtureReader(stores, T, seed=3)
  readers = [reader.MixtureReader(stores, T, seed=3) for _ in range(hosts)]
  for step in (0, 2, 3, 7):
    indices = schedule.indices(step)
    whole = straight.examples(indices)
    shares = np.split(np.arange(len(indices)), hosts)
    parts = [r.examples(indices[rows]) for r, rows in zip(readers, shares, strict=True)]
    for key, value in whole.items():
      found = np.concatenate([part[key] for part in parts])
      np.testing.assert_array_equal(found, value)

"""Batches by step: any subset of steps, any resumption, any mesh reads the same."""

import dataclasses

import fixture_tasks
import numpy as np
import pytest

from palm_t5x import datasets, partitioning, utils
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.errors import UserError


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(autouse=True)
def vocabulary():
  found = fixture_tasks.vocabulary()
  with vocabulary_lib.using(found):
    yield found


def _config(batch_size=8, name='fixture_mixture', lengths=None):
  return utils.DatasetConfig(name, lengths or {'targets': 64}, 'train', batch_size)


def _rows(dataset, step):
  return dataset.read(step, np.arange(dataset.batch_size(step)))


def test_any_order_of_steps_reads_the_same(cache, vocabulary):
  one = datasets.TrainDataset(_config(), vocabulary, cache, seed=3)
  other = datasets.TrainDataset(_config(), vocabulary, cache, seed=3)
  in_order = {step: _rows(one, step) for step in range(6)}
  for step in (5, 0, 3):
    for name, value in _rows(other, step).items():
      np.testing.assert_array_equal(value, in_order[step][name])


def test_batch_size_changed_on_resume_skips_and_repeats_nothing(cache, vocabulary):
  straight = datasets.TrainDataset(_config(8), vocabulary, cache, seed=0)
  expected = np.concatenate(
    [_rows(straight, step)['decoder_input_tokens'] for step in range(8)]
  )
  position = datasets.Position.from_json(straight.position(4).to_json())
  resumed = datasets.TrainDataset(_config(16), vocabulary, cache, 0, position)
  found = np.concatenate(
    [_rows(resumed, step)['decoder_input_tokens'] for step in (4, 5)]
  )
  np.testing.assert_array_equal(found, expected[32:])


def test_skipped_examples_are_passed_over(cache, vocabulary):
  straight = datasets.TrainDataset(_config(8), vocabulary, cache, seed=0)
  position = datasets.Position(2, 16, ((16, 40),))
  skipping = datasets.TrainDataset(_config(8), vocabulary, cache, 0, position)
  np.testing.assert_array_equal(
    _rows(skipping, 2)['decoder_input_tokens'],
    _rows(straight, 5)['decoder_input_tokens'],
  )
  assert skipping.position(3) == datasets.Position(3, 24, ((16, 40),))


@pytest.mark.parametrize('partitions', [1, 4, 8])
def test_every_mesh_reads_the_same_batches(cache, vocabulary, partitions):
  dataset = datasets.TrainDataset(_config(8), vocabulary, cache, seed=0)
  partitioner = partitioning.PjitPartitioner(num_partitions=partitions)
  with dataset.batches(partitioner, start=2) as batches:
    for step in (2, 3):
      batch = next(batches)
      for name, value in _rows(dataset, step).items():
        np.testing.assert_array_equal(np.asarray(batch[name]), value)


def test_tasks_with_inputs_are_packed_with_loss_on_targets(cache, vocabulary):
  cfg = utils.DatasetConfig(
    'fixture_sums', {'inputs': 32, 'targets': 16}, 'train', 4, pack=True
  )
  dataset = datasets.TrainDataset(cfg, vocabulary, cache, seed=0)
  batch = _rows(dataset, 0)
  assert batch['decoder_input_tokens'].shape == (4, 48)
  assert batch['decoder_segment_ids'].max() > 1, 'several examples share a row'
  weights, prefix = batch['decoder_loss_weights'], batch['decoder_causal_attention']
  assert 0 < weights.sum() < (batch['decoder_target_tokens'] > 0).sum()
  starts = (prefix[:, 1:] == 0) & (prefix[:, :-1] == 1)
  assert starts.any() and prefix[:, 0].all()


def test_inputs_need_a_length(cache, vocabulary):
  with pytest.raises(UserError, match='does not say how long'):
    datasets.TrainDataset(_config(4, 'fixture_sums'), vocabulary, cache, seed=0)


@pytest.mark.parametrize('size', [0, -3, 'eight', 2.5, True])
def test_bad_batch_sizes_are_refused(size):
  with pytest.raises(UserError, match='BATCH_SIZE'):
    _config(size)


def test_unknown_task_gets_a_near_miss():
  with pytest.raises(UserError, match='fixture_mixture'):
    utils.get_mixture_or_task('fixture_mixtur')


def test_every_validation_token_is_predicted_once(cache, vocabulary):
  cfg = utils.DatasetConfig('fixture_text', {'targets': 64}, 'validation', 8)
  (reader,) = datasets.eval_readers(cfg, vocabulary, cache, 0).values()
  weights = sum(b['decoder_loss_weights'].sum() for b in reader.batches(8))
  assert weights == reader.num_tokens


def test_reading_twice_is_refused_unless_allowed(cache, vocabulary):
  """The first step too many, counted row by row, is the first that is refused."""
  cfg = _config(8)
  strict = dataclasses.replace(cfg, allow_repeats=False)
  dataset = datasets.TrainDataset(strict, vocabulary, cache, seed=0)
  rows = dataset.reader.rows_available
  names, seen, steps = list(rows), dict.fromkeys(rows, 0), 0
  while all(seen[name] <= rows[name] for name in names):
    steps += 1
    task, _ = dataset.reader.schedule.lookup(np.arange(8 * steps))
    seen = {name: int((task == i).sum()) for i, name in enumerate(dataset.reader.names)}
  dataset.check_repeats(steps - 1)
  (short,) = [name for name in names if seen[name] > rows[name]]
  missing = 64 * (seen[short] - rows[short])
  with pytest.raises(UserError, match=rf'{short} has .* \({missing:,} short'):
    dataset.check_repeats(steps)
  datasets.TrainDataset(cfg, vocabulary, cache, seed=0).check_repeats(10 * steps)

"""Packed fine-tuning rows, against SeqIO's own converter and a brute-force packer."""

import itertools
import pathlib

import fixture_tasks
import numpy as np
import pytest
import seqio

from palm_t5x import errors
from palm_t5x.corpus import packing, prepare, token_store, vocabulary

INPUTS, TARGETS = 12, 6


@pytest.fixture(scope='module')
def vocab():
  return fixture_tasks.vocabulary()


@pytest.fixture
def store(tmp_path, vocab):
  ((_, store, _),) = prepare.prepare('fixture_sums', 'train', vocab, tmp_path)
  return store


def test_first_fit_by_hand():
  items, starts = packing.first_fit([6, 5, 4, 3, 2, 10, 1], 10)
  rows = [items[a:b].tolist() for a, b in itertools.pairwise(starts)]
  assert rows == [[0, 2], [1, 3, 4], [5], [6]]


def test_first_fit_with_few_open_rows():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 50, 500)
  items, starts = packing.first_fit(lengths, 64, open_rows=4)
  assert sorted(items) == list(range(500))
  fill = [lengths[items[a:b]].sum() for a, b in itertools.pairwise(starts)]
  assert max(fill) <= 64 and np.mean(fill) > 0.85 * 64
  items, starts = packing.first_fit(lengths, 64, open_rows=0)
  assert len(starts) == 501


def test_one_example_per_row_equals_seqios_converter(store, vocab):
  """The same arrays as DecoderFeatureConverter(pack=False, bos_id=1)."""
  with vocabulary.using(vocab):
    theirs = list(
      seqio.get_dataset(
        'fixture_sums',
        {'inputs': INPUTS, 'targets': TARGETS},
        seqio.DecoderFeatureConverter(pack=False, bos_id=1),
        dataset_split='train',
        shuffle=False,
      ).as_numpy_iterator()
    )
  rows = packing.PackedRows(store, INPUTS, TARGETS, pack=False)
  assert rows.num_rows == len(theirs)
  ours = rows.examples(range(rows.num_rows))
  keys = list(theirs[0])
  for example in theirs:  # SeqIO leaves the last target as an input of padding
    real = example['decoder_target_tokens'] > 0
    example['decoder_input_tokens'] = example['decoder_input_tokens'] * real
  assert set(keys) <= set(ours)
  flat = lambda example: tuple(
    int(n) for key in sorted(keys) for n in np.asarray(example[key])
  )
  mine = [flat({key: ours[key][i] for key in keys}) for i in range(rows.num_rows)]
  assert sorted(mine) == sorted(map(flat, theirs))


def test_packed_rows_hold_every_example_once(store, vocab):
  rows = packing.PackedRows(store, 40, 24)
  batch = rows.examples(range(rows.num_rows))
  assert batch['decoder_target_tokens'].shape == (rows.num_rows, 64)
  found = []
  for r in range(rows.num_rows):
    row = {key: value[r] for key, value in batch.items()}
    for segment in range(1, row['decoder_segment_ids'].max() + 1):
      at = row['decoder_segment_ids'] == segment
      targets = row['decoder_target_tokens'][at]
      weights = row['decoder_loss_weights'][at]
      inputs = row['decoder_input_tokens'][at]
      np.testing.assert_array_equal(inputs, [1, *targets[:-1]])
      np.testing.assert_array_equal(row['decoder_positions'][at], np.arange(at.sum()))
      count = int((weights == 0).sum())
      prefix = row['decoder_causal_attention'][at]
      assert prefix.sum() == count + 1 and prefix[: count + 1].all()
      found.append((vocab.decode(targets[:count]), vocab.decode(targets[count:])))
    padding = row['decoder_segment_ids'] == 0
    assert not any(value[padding].any() for value in row.values())
  expected = [(e['inputs'], e['targets']) for e in fixture_tasks.sums('train')]
  assert sorted(found) == sorted(expected)
  fill = (batch['decoder_segment_ids'] > 0).mean()
  assert fill > 0.85


def test_long_features_are_cut_as_seqio_cuts_them(store):
  rows = packing.PackedRows(store, 3, 2, pack=False)
  batch = rows.examples(range(rows.num_rows))
  assert batch['decoder_target_tokens'].shape[1] == 5
  assert batch['decoder_loss_weights'].sum(1).max() == 2
  assert (batch['decoder_target_tokens'] > 0).all()


def test_the_plan_is_kept_and_mended(store):
  first = packing.PackedRows(store, INPUTS, TARGETS).examples([0, 1])
  (path,) = pathlib.Path(store.path).glob('packing-12-6.npz')
  data = path.read_bytes()
  path.write_bytes(data[:-7] + b'garbage')
  again = packing.PackedRows(store, INPUTS, TARGETS).examples([0, 1])
  assert path.read_bytes() == data
  for key, value in first.items():
    np.testing.assert_array_equal(value, again[key])
  token_store.TokenStore(store.path).verify()


def test_reader_mixes_and_repeats_nothing_within_an_epoch(store):
  mixed = packing.SupervisedReader([('sums', store, 1.0)], INPUTS, TARGETS, seed=3)
  rows = mixed.rows_available['sums']
  flat = lambda batch: [r.tobytes() for r in batch['decoder_target_tokens']]
  epoch = flat(mixed.examples(np.arange(rows)))
  assert len(set(epoch)) == rows
  second = flat(mixed.examples(np.arange(rows, 2 * rows)))
  assert sorted(second) == sorted(epoch) and second != epoch
  assert flat(mixed.examples(np.array([5, 2]))) == [epoch[5], epoch[2]]


def test_text_in_a_supervised_mixture_is_all_targets(tmp_path, store, vocab):
  ((_, text, _),) = prepare.prepare('fixture_code', 'validation', vocab, tmp_path)
  mixed = packing.SupervisedReader(
    [('sums', store, 1.0), ('code', text, 1.0)], INPUTS, TARGETS
  )
  batch = mixed.examples(np.arange(8))
  assert all(len(value) == 8 for value in batch.values())
  weights = packing.PackedRows(text, INPUTS, TARGETS).examples([0])
  assert (weights['decoder_loss_weights'] == (weights['decoder_segment_ids'] > 0)).all()


def test_evaluation_sees_every_example(store):
  rows = packing.SupervisedEvalReader(store, INPUTS, TARGETS)
  total = sum(batch['decoder_loss_weights'].sum() for batch in rows.batches(7))
  targets = np.diff(store.offsets()) - store.inputs_lengths()
  assert total == targets.sum()
  assert rows.num_bytes == store.num_bytes


def test_no_room_for_targets(store):
  with pytest.raises(errors.UserError, match='no room for a target'):
    packing.PackedRows(store, 8, 0)

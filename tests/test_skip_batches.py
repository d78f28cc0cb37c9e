"""`t5x train --skip_batches`: the batches named are left out, once and for good."""

import numpy as np
import pytest
from runs import arrays, here, losses

from palm_t5x import checkpoints
from palm_t5x.corpus import reader

BATCH = 8


@pytest.fixture(scope='module')
def without(workspace):
  """A run on data that never held batches 4, 5 and 9: (MODEL_DIR, what it read)."""
  everything = reader.MixtureReader.examples
  rows = []

  def shorter(self, indices):
    indices = np.asarray(indices)
    for first, last in ((4, 6), (9, 10)):
      indices = indices + (last - first) * BATCH * (indices >= first * BATCH)
    rows.extend(indices.tolist())
    return everything(self, indices)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reader.MixtureReader, 'examples', shorter)
    assert here(workspace, 'train', workspace / 'without').code == 0
  return workspace / 'without', rows


def same(one, other):
  expected, found = (arrays(folder / 'checkpoint_12') for folder in (one, other))
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert losses(one) == losses(other)


SKIP = ('--skip_batches=4:6', '--skip_batches=9:10')


def test_a_run_that_skips_is_a_run_without_these_batches(workspace, without):
  done = here(workspace, 'train', workspace / 'skipping', *SKIP)
  assert done.code == 0, done.err
  same(without[0], workspace / 'skipping')
  stored = checkpoints.read_metadata(workspace / 'skipping' / 'checkpoint_12')['data']
  assert stored['skips'] == [[32, 48], [72, 80]] and stored['examples_read'] == 96
  kept = [batch for batch in range(15) if batch not in (4, 5, 9)]
  expected = [BATCH * batch + row for batch in kept for row in range(BATCH)]
  assert without[1][: len(expected)] == expected


@pytest.mark.slow
def test_the_same_command_again_and_one_without_the_flag_go_on(workspace, without):
  model_dir = workspace / 'again'
  assert here(workspace, 'train', model_dir, 'TRAIN_STEPS=3', '--skip_batches=4:6,9:10')
  again = here(workspace, 'train', model_dir, 'TRAIN_STEPS=6', *SKIP)
  assert again.code == 0 and 'already' not in again.err
  last = here(workspace, 'train', model_dir)
  assert last.code == 0
  same(without[0], model_dir)


def test_what_is_read_already_is_named_and_the_rest_skipped(workspace):
  model_dir = workspace / 'late'
  assert here(workspace, 'train', model_dir, 'TRAIN_STEPS=3').code == 0
  done = here(workspace, 'train', model_dir, 'TRAIN_STEPS=6', '--skip_batches=1:5')
  assert done.code == 0
  assert 'batches 1:3 have been trained on already' in done.err
  stored = checkpoints.read_metadata(model_dir / 'checkpoint_6')['data']
  assert stored['skips'] == [[24, 40]]


@pytest.mark.parametrize('text', ['7', '9:4', 'x:y'])
def test_a_bad_range_is_refused_before_anything_is_made(workspace, text):
  done = here(workspace, 'train', workspace / 'bad', f'--skip_batches={text}')
  assert done.code == 2 and f'--skip_batches={text}' in done.error
  assert not (workspace / 'bad').exists()


def test_only_training_skips(workspace):
  done = here(workspace, 'eval', workspace / 'bad', '--skip_batches=1:2')
  assert done.code == 2 and 'belongs to t5x train' in done.error

"""One batch whose gradient is NaN: what it does to a run, and the two remedies."""

import numpy as np
import planted
import pytest
from runs import arrays, here, losses

BATCH = 8
SETTINGS = ('TRAIN_STEPS=8', 'CHECKPOINT_PERIOD=1', 'CHECKPOINT_KEEP=None')


@pytest.fixture
def bad_batch(monkeypatch):
  """Batch 4, which step 5 reads."""
  planted.not_numbers(monkeypatch, 4 * BATCH, 5 * BATCH)


@pytest.mark.slow
def test_one_bad_batch_ruins_a_run(workspace, bad_batch):
  assert here(workspace, 'train', workspace / 'nan', *SETTINGS).code == 0
  assert [losses(workspace / 'nan')[s] is None for s in range(4, 9)] == [False] + [
    True
  ] * 4


def test_one_line_of_gin_skips_its_update(workspace, bad_batch):
  model_dir = workspace / 'nan_skipped'
  wrapper = 'OPTIMIZER=@optimizers.skip_nonfinite()'
  assert here(workspace, 'train', model_dir, *SETTINGS, wrapper).code == 0
  found = losses(model_dir)
  assert [step for step in found if found[step] is None] == [5]
  before, after = (arrays(model_dir / f'checkpoint_{step}') for step in (4, 5))
  for name, value in before.items():
    if name != 'state.step':
      np.testing.assert_array_equal(after[name], value, err_msg=name)
  later = arrays(model_dir / 'checkpoint_6')
  assert not np.array_equal(later['target.embedding'], before['target.embedding'])
  assert int(later['state.optimizer_step']) == 5 and int(later['state.step']) == 6


@pytest.mark.slow
def test_recovery_passes_it_over(workspace, bad_batch, monkeypatch):
  model_dir, by_hand = workspace / 'nan_recovered', workspace / 'nan_by_hand'
  done = here(
    *(workspace, 'train', model_dir, *SETTINGS),
    'LOSS_SPIKE_RECOVERY=@spikes.LossSpikeRecovery()',
    'spikes.LossSpikeRecovery.rewind_steps=1',
    'spikes.LossSpikeRecovery.skip_batches=6',
  )
  assert done.code == 0 and 'Back to step 3; batches 3:9 are skipped' in done.out
  assert here(workspace, 'train', by_hand, *SETTINGS, '--skip_batches=3:9').code == 0
  assert losses(model_dir) == losses(by_hand)


@pytest.mark.slow
def test_a_run_that_cannot_recover_says_so(workspace, monkeypatch):
  planted.not_numbers(monkeypatch, 4 * BATCH, 99 * BATCH)
  done = here(
    *(workspace, 'train', workspace / 'nan_for_ever', *SETTINGS),
    'LOSS_SPIKE_RECOVERY=@spikes.LossSpikeRecovery()',
    'spikes.LossSpikeRecovery.rewind_steps=1',
    'spikes.LossSpikeRecovery.skip_batches=6',
    'spikes.LossSpikeRecovery.max_rewinds=1',
  )
  assert done.code == 1 and 'spiked at step 4 (not finite)' in done.error
  assert 'LOSS_SPIKE_RECOVERY=None' in done.error

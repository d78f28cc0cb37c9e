"""Fine-tuning: whose parameters, which optimizer state, and loss on targets alone.

With a learning rate of zero nothing new reaches the parameters, so that what one step
leaves can be computed from what was there before.
"""

import fixture_tasks
import numpy as np
import pytest
import runs

from palm_t5x.metric_writers import read_metrics

STILL = (
  "utils.create_learning_rate_scheduler.factors='constant'",
  'utils.create_learning_rate_scheduler.base_learning_rate=0.0',
  'utils.create_learning_rate_scheduler.min_learning_rate=0.0',
)
SUMS = (
  'MIXTURE_OR_TASK_NAME=fixture_sums',
  "TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 6}",
)


@pytest.fixture(scope='module')
def tuned(workspace, straight, tmp_path_factory):
  """One step from the tiny run's last checkpoint: {reset: arrays after it}, folders."""
  folder = tmp_path_factory.mktemp('tuned')
  found = {}
  for reset, step in ((True, 1), (False, 13)):
    done = runs.here(
      workspace,
      'train',
      folder / str(reset),
      *SUMS,
      *STILL,
      f'utils.RestoreCheckpointConfig.path={straight[0]}',
      f'utils.RestoreCheckpointConfig.reset_optimizer={reset}',
      f'TRAIN_STEPS={step}',
    )
    assert done.code == 0, done.err
    kept = (
      'a fresh optimizer, at step 0' if reset else 'its optimizer state, at step 12'
    )
    assert f'checkpoint_{runs.STEPS} with {kept}' in done.err
    found[reset] = runs.arrays(folder / str(reset) / f'checkpoint_{step}')
  return folder, found


@pytest.fixture(scope='module')
def before(straight):
  return runs.arrays(straight[0] / f'checkpoint_{runs.STEPS}')


def test_parameters_are_the_checkpoints(tuned, before):
  """Exactly, if the optimizer is fresh; else less nine tenths of its momentum."""
  names = [name for name in before if name.startswith('target.')]
  assert len(names) == 5
  for name in names:
    momentum = before[name.replace('target.', 'state.param_states.m.')]
    np.testing.assert_array_equal(tuned[1][True][name], before[name], err_msg=name)
    moved = before[name] - 0.9 * momentum
    np.testing.assert_allclose(tuned[1][False][name], moved, rtol=1e-5, atol=1e-7)


def test_optimizer_is_fresh_or_kept(tuned, before):
  """At its first step Adafactor's beta2 is 0; at the 13th it is 1 - 13^-0.8."""
  fresh, kept = tuned[1][True], tuned[1][False]
  assert (int(fresh['state.optimizer_step']), int(fresh['state.step'])) == (1, 1)
  assert (int(kept['state.optimizer_step']), int(kept['state.step'])) == (13, 13)
  names = [n for n in before if n.startswith('state.param_states.v.')]
  assert names
  beta2 = 1 - 13**-0.8
  for name in names:
    squares = fresh[name]  # of the gradients, which are the same in both
    expected = beta2 * before[name] + (1 - beta2) * squares
    np.testing.assert_allclose(kept[name], expected, rtol=1e-4, atol=1e-12)


def test_loss_is_of_the_targets_alone(workspace, straight, tuned, tmp_path):
  """The closing evaluation's loss is minus the mean score of a target's token."""
  row = read_metrics(str(tuned[0] / 'True'), 'training_eval/fixture_sums')[-1]
  encode = fixture_tasks.vocabulary().encode
  examples = list(fixture_tasks.sums('validation'))
  tokens = sum(len(encode(example['targets'])) + 1 for example in examples)
  assert row['tokens'] == tokens
  done = runs.here(
    workspace,
    'infer',
    straight[0],
    *SUMS,
    "infer.mode='score'",
    f'INFER_OUTPUT_DIR={tmp_path}',
  )
  assert done.code == 0, done.err
  (path,) = tmp_path.glob('*-of-00001')
  scores = [line['score'] for line in runs.json_lines(path)]
  assert row['loss'] == pytest.approx(-sum(scores) / tokens, rel=1e-5)


def test_rows_of_training_count_targets_alone(tuned):
  row = read_metrics(str(tuned[0] / 'True'), 'train')[-1]
  assert 0 < row['tokens'] < 0.6 * 8 * 18, 'inputs take up more than a third'

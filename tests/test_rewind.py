"""Going back past a loss spike: it mends the run, and no kill in it loses anything."""

import itertools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import planted
import pytest
from crashes import at, dies
from runs import arrays, hashes, here, json_lines, losses

from palm_t5x import checkpoints, datasets, rewind, timeline
from palm_t5x.corpus.sampling import BatchSchedule
from palm_t5x.errors import Failure
from palm_t5x.metric_writers import read_metrics
from palm_t5x.spikes import LossSpikeRecovery, Spike
from palm_t5x.train_state import TrainState

BATCH = 8  # of runs.CONFIG


def recovery(**settings):
  """Bindings that turn recovery on."""
  yield 'LOSS_SPIKE_RECOVERY=@spikes.LossSpikeRecovery()'
  for name, value in settings.items():
    yield f'spikes.LossSpikeRecovery.{name}={value}'


ON = (
  *recovery(window=15, rewind_steps=5, skip_batches=20, patience=3),
  'CHECKPOINT_PERIOD=10',
  'CHECKPOINT_KEEP=None',
)
LONG = (
  'TRAIN_STEPS=90',
  'RANDOM_SEED=1',
  'utils.create_learning_rate_scheduler.base_learning_rate=3.0',
)


def closing_loss(model_dir):
  return read_metrics(str(model_dir), 'training_eval/fixture_text')[-1]['loss']


@pytest.fixture(scope='module')
def planted_run(workspace):
  """90 steps: 'saved' from corrupted batches 50:62, 'other' that skips as it does."""
  folders = {}

  def go(name, *bindings):
    folders[name] = workspace / f'planted_{name}'
    done = here(workspace, 'train', folders[name], *LONG, *bindings)
    assert done.code == 0, done.err[-2000:]
    return done

  go('other', 'CHECKPOINT_PERIOD=None', '--skip_batches=45:65')
  with pytest.MonkeyPatch.context() as patch:
    planted.scrambled(patch, 50 * BATCH, 62 * BATCH)
    folders['said'] = go('saved', *ON).out
  return folders


@pytest.mark.slow
def test_a_run_with_corrupted_batches_recovers(workspace, planted_run, monkeypatch):
  clean, hurt = workspace / 'planted_clean', workspace / 'planted_hurt'
  assert here(workspace, 'train', clean, *LONG, 'CHECKPOINT_PERIOD=None').code == 0
  planted.scrambled(monkeypatch, 50 * BATCH, 62 * BATCH)
  assert here(workspace, 'train', hurt, *LONG, 'CHECKPOINT_PERIOD=None').code == 0
  folders = {**planted_run, 'clean': clean, 'hurt': hurt}
  loss = {n: closing_loss(folders[n]) for n in ('clean', 'other', 'hurt', 'saved')}
  # What other data of the same amount makes of it is the noise of a run this short.
  noise = max(abs(loss['other'] - loss['clean']), 0.01)
  assert abs(loss['saved'] - loss['clean']) < 3 * noise
  assert loss['hurt'] - loss['clean'] > 10 * noise


def test_a_rewind_is_the_run_that_skips_from_the_start(planted_run):
  """To the last bit: going back replays nothing and forgets nothing."""
  saved, other = planted_run['saved'], planted_run['other']
  expected, found = arrays(other / 'checkpoint_90'), arrays(saved / 'checkpoint_90')
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert losses(saved) == losses(other)
  rows = read_metrics(str(saved), 'train')
  assert [row['step'] for row in rows] == list(range(1, 91)), 'no step is there twice'


def test_a_rewind_says_what_it_did(planted_run):
  saved = planted_run['saved']
  (event,) = json_lines(saved / 'events.jsonl')
  assert event['event'] == 'rewind' and event['number'] == 1
  assert (event['spike_began'], event['step']) == (51, 53)
  assert event['checkpoint'] == 40 and event['skipped_from_step'] == 45
  assert event['skipped_batches'] == [45, 65]
  assert event['skipped_examples'] == [[45 * BATCH, 65 * BATCH]]
  assert event['loss'] > event['limit'] > event['median'] > 0 < event['deviation']
  assert 'T' in event['time']
  assert 'Loss spike from step 51' in planted_run['said']
  assert 'Back to step 40; batches 45:65 are skipped' in planted_run['said']
  metadata = checkpoints.read_metadata(saved / 'checkpoint_90')
  assert metadata['data']['skips'] == [[45 * BATCH, 65 * BATCH]]
  assert metadata['rewinds'] == 1 and len(metadata['losses']['window']) == 15


SHORT = (
  *recovery(window=8, rewind_steps=3, skip_batches=10, patience=2),
  *('spikes.LossSpikeRecovery.threshold=0.5', 'spikes.LossSpikeRecovery.min_rise=1.0'),
  'TRAIN_STEPS=24',
  'CHECKPOINT_PERIOD=4',
  'CHECKPOINT_KEEP=None',
  'utils.create_learning_rate_scheduler.base_learning_rate=3.0',
)


@pytest.fixture
def two_spikes(monkeypatch):
  """Batches 14:16 are corrupted, and 27:29, which the first rewind leads to."""
  planted.scrambled(monkeypatch, 14 * BATCH, 16 * BATCH)
  planted.scrambled(monkeypatch, 27 * BATCH, 29 * BATCH)


def same_run(one, other, step=24):
  """Asserts that two runs ended alike, times apart."""
  expected, found = (arrays(folder / f'checkpoint_{step}') for folder in (one, other))
  assert expected.keys() == found.keys() and len(expected) > 5
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert losses(one) == losses(other)
  assert checkpoints.steps_in(one) == checkpoints.steps_in(other)
  events = [json_lines(folder / 'events.jsonl') for folder in (one, other)]
  for rows in events:
    for row in rows:
      del row['time']
  assert events[0] == events[1]
  assert not list(other.glob('*tmp*'))


def crash_in_rewind(workspace, name, number, monkeypatch):
  """Dies at the given change of the first rewind; then runs to the end."""
  go_back = rewind_of_runs()
  model_dir = workspace / name

  def dying(run, spike):
    with at(number, model_dir):
      return go_back(run, spike)

  with monkeypatch.context() as patch:
    patch.setattr('palm_t5x.training_run.TrainingRun._go_back', dying)
    died = dies_whole(workspace, model_dir)
  done = here(workspace, 'train', model_dir, *SHORT)
  assert done.code == 0, done.err[-2000:]
  return died


def rewind_of_runs():
  from palm_t5x.training_run import TrainingRun

  return TrainingRun._go_back


def dies_whole(workspace, model_dir):
  from crashes import Killed

  try:
    here(workspace, 'train', model_dir, *SHORT)
  except Killed:
    return True
  return False


@pytest.fixture(scope='module')
def rewound(workspace):
  """A run that goes back twice, not interrupted; and how much each rewind changes."""
  changes = []
  go_back = rewind_of_runs()
  model_dir = workspace / 'rewound'

  def counting(run, spike):
    with at(None, model_dir) as watch:
      step = go_back(run, spike)
    changes.append(watch.changes)
    return step

  with pytest.MonkeyPatch.context() as patch:
    planted.scrambled(patch, 14 * BATCH, 16 * BATCH)
    planted.scrambled(patch, 27 * BATCH, 29 * BATCH)
    patch.setattr('palm_t5x.training_run.TrainingRun._go_back', counting)
    done = here(workspace, 'train', model_dir, *SHORT)
  assert done.code == 0 and len(changes) == 2, done.out
  return model_dir, changes


def test_a_second_spike_adds_to_the_first(rewound):
  first, second = json_lines(rewound[0] / 'events.jsonl')
  assert first['skipped_batches'] == [11, 21] and first['number'] == 1
  # 18 steps further on, in data that is ten batches ahead of the unskipped run.
  assert second['spike_began'] == 18 and second['skipped_batches'] == [24, 34]
  skips = checkpoints.read_metadata(rewound[0] / 'checkpoint_24')['data']['skips']
  assert skips == [[11 * BATCH, 21 * BATCH], [24 * BATCH, 34 * BATCH]]


def test_a_kill_in_a_rewind_loses_nothing(workspace, rewound, two_spikes, monkeypatch):
  straight, changes = rewound
  assert crash_in_rewind(workspace, 'crash', changes[0] // 3, monkeypatch)
  same_run(straight, workspace / 'crash')


@pytest.mark.slow
@pytest.mark.soak
def test_a_kill_at_every_instant_of_a_rewind_loses_nothing(
  workspace, rewound, two_spikes, monkeypatch
):
  straight, _ = rewound
  for number in itertools.count():
    died = crash_in_rewind(workspace, f'every_{number}', number, monkeypatch)
    same_run(straight, workspace / f'every_{number}')
    shutil.rmtree(workspace / f'every_{number}')
    if not died:  # there is no such change: all have been moments of death
      break
  assert number >= 25


# -- the same without training: every instant, in a second --


class _Data:
  """What `Recovery.record` asks of the training data."""

  def __init__(self, skips=()):
    schedule = BatchSchedule(4, skips=skips)
    self.skips, self.examples = schedule.skips, schedule.examples_of_steps
    self.batch_numbers = schedule.batch_numbers


def _state(step):
  kernel = jnp.full((4,), float(step))
  return TrainState(jnp.int32(step), {'kernel': kernel}, {'step': jnp.int32(step)})


def _abstract():
  import jax

  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), _state(0)
  )


CONFIG = LossSpikeRecovery(rewind_steps=10, skip_batches=20, patience=3, max_rewinds=2)
SPIKE = Spike(step=48, began=45, loss=9.0, median=3.0, deviation=0.1, limit=3.6)


@pytest.fixture(scope='module')
def before(tmp_path_factory):
  """A run folder with checkpoints of steps 10 ... 50, read only."""
  folder = tmp_path_factory.mktemp('before')
  with checkpoints.Checkpointer(str(folder)) as checkpointer:
    for step in range(10, 60, 10):
      data = datasets.Position(step, 4 * step).to_json()
      checkpointer.save(_state(step), {'step': step, 'data': data, 'rewinds': 0})
  return folder


def _copy(before, tmp_path, name):
  return shutil.copytree(before, tmp_path / name)


def _record(folder, spike=SPIKE, data=None, config=CONFIG):
  steps = checkpoints.steps_in(folder)
  found = rewind.Recovery(config, str(folder))
  return found.record(spike, data or _Data(), steps, origin=0)


def _resume(folder):
  """What a start of the run does: the step it goes on from, and what it skips."""
  checkpointer = checkpoints.Checkpointer(str(folder))
  try:
    checkpointer.clean()
    entries = rewind.settle(str(folder))
    newest = checkpointer.restore_newest(_abstract())
  finally:
    checkpointer.close()
  if newest is None:
    return 0, timeline.skips(entries, 0)
  state, stored = newest
  np.testing.assert_array_equal(state.params['kernel'], float(state.step))
  return int(state.step), timeline.skips(entries, stored['rewinds'])


def _whole(folder):
  """A folder's files; the one time in it is left out."""
  found = hashes(folder)
  rewinds = timeline.read(folder)
  for entry in rewinds:
    del entry['event']['time']
  events = json_lines(folder / 'events.jsonl')
  assert [e.pop('number') for e in events] == [1]
  return {k: v for k, v in found.items() if '.json' not in k}, rewinds


def test_every_instant_of_a_rewind(before, tmp_path):
  def go_back(folder):
    _record(folder)
    return _resume(folder)

  straight = _copy(before, tmp_path, 'straight')
  with at(None, straight) as watch:
    assert go_back(straight) == (30, [(34 * 4, 54 * 4)])
  total = watch.changes
  assert checkpoints.steps_in(straight) == [10, 20, 30] and total > 10
  outcomes = set()
  for number in range(total):
    folder = _copy(before, tmp_path, str(number))
    assert dies(number, folder, lambda f=folder: go_back(f)), number
    if timeline.read(folder):
      outcomes.add('new')
    else:
      # Nothing has happened yet: the run resumes in its spike, and sees it again.
      outcomes.add('old')
      assert _resume(folder) == (50, [])
      _record(folder)
    assert _resume(folder) == (30, [(34 * 4, 54 * 4)])
    assert _whole(folder) == _whole(straight)
    assert not list(folder.glob('*tmp*'))
    shutil.rmtree(folder)
  assert outcomes == {'old', 'new'}


def test_a_checkpoint_left_behind_is_never_found(before, tmp_path):
  """Not even by a reader of the run's folder before anything is cleaned up."""
  folder = _copy(before, tmp_path, 'run')
  _record(folder)
  assert (folder / 'checkpoint_50').exists()
  assert checkpoints.steps_in(folder) == [10, 20, 30]
  assert checkpoints.find(folder).name == 'checkpoint_30'


def test_goes_back_to_the_newest_whole_one_that_is_old_enough(before, tmp_path):
  folder = _copy(before, tmp_path, 'damaged')
  (folder / 'checkpoint_30' / 'metadata' / 'metadata').write_text('{}')
  event = _record(folder)
  assert event['checkpoint'] == 20 and event['skipped_batches'] == [34, 54]


def test_goes_back_to_the_oldest_where_none_is_old_enough(before, tmp_path):
  folder = _copy(before, tmp_path, 'young')
  for step in (10, 20, 30):
    shutil.rmtree(folder / f'checkpoint_{step}')
  event = _record(folder)
  assert event['checkpoint'] == 40 and event['skipped_batches'] == [40, 60]


def test_goes_back_to_the_beginning_without_a_checkpoint(tmp_path):
  event = _record(tmp_path)
  assert event['checkpoint'] == 0 and event['skipped_from_step'] == 34
  assert _resume(tmp_path) == (0, [(34 * 4, 54 * 4)])


def test_the_number_of_rewinds_is_bounded(before, tmp_path):
  folder = _copy(before, tmp_path, 'bounded')
  _record(folder)
  _record(folder, data=_Data([(34 * 4, 54 * 4)]))
  saved = hashes(folder)
  with pytest.raises(Failure, match='2 times already, which is max_rewinds'):
    _record(folder)
  assert hashes(folder) == saved


def test_a_spike_that_is_not_a_number_is_written_as_none(tmp_path):
  nan = float('nan')
  event = _record(tmp_path, Spike(48, 48, nan, nan, nan, float('inf')))
  assert event['loss'] is event['median'] is event['limit'] is None
  assert json.loads((tmp_path / 'rewinds.json').read_text())
  assert 'not finite at step 48' in rewind.say(event, 20)


def test_unreadable_rewinds_are_a_failure(before, tmp_path):
  folder = _copy(before, tmp_path, 'torn')
  (folder / 'rewinds.json').write_text('[{"checkpoint": 3')
  with pytest.raises(Failure, match=r'rewinds\.json is unreadable'):
    _resume(folder)


def test_the_loss_is_read_one_step_late_but_before_a_save(tmp_path):
  class Ratio:
    def __init__(self, loss):
      self.loss = loss

    def value(self):
      read.append(self.loss)
      return self.loss

  read = []
  found = rewind.Recovery(LossSpikeRecovery(), str(tmp_path))
  hook = found.hook(lambda step: step == 3)
  for step in (1, 2, 3, 4):
    hook(step, {'loss': Ratio(float(step))})
    assert read == [[], [1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]][step - 1]
  assert found.metadata()['losses']['window'] == [1.0, 2.0, 3.0, 4.0]


def test_a_run_without_recovery_still_counts_its_rewinds(before, tmp_path):
  """Turned off later: its checkpoints belong to the new timeline all the same."""
  folder = _copy(before, tmp_path, 'off')
  _record(folder)
  found = rewind.Recovery(None, str(folder))
  found.hook(lambda step: True)(51, {})
  assert found.metadata() == {'rewinds': 1}


def test_timelines_by_hand():
  entries = [{'checkpoint': 30}, {'checkpoint': 20}, {'checkpoint': 60}]
  gone = {
    (rewinds, step)
    for rewinds in range(4)
    for step in (10, 20, 30, 40, 60, 70)
    if timeline.left_behind(entries, step, rewinds)
  }
  assert gone == {
    *((0, s) for s in (30, 40, 60, 70)),
    *((1, s) for s in (30, 40, 60, 70)),
    (2, 70),
  }

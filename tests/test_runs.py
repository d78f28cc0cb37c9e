"""The shipped runs: every mode of each is complete, and says what the paper says."""

import os
import sys

import gin
import pytest

from palm_t5x import command_line, environment, main, modes, t5x_alias
from palm_t5x.corpus.sampling import BatchSchedule
from palm_t5x.errors import UserError

RUNS = ('palm_tiny', 'palm_8b', 'palm_62b', 'palm_540b')


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
  """An empty folder, and gin as it was."""
  monkeypatch.chdir(tmp_path)
  for name in ('JAX_COMPILATION_CACHE_DIR', 'TF_ENABLE_ONEDNN_OPTS'):
    monkeypatch.setenv(name, 'x')
  before = list(sys.meta_path)
  yield
  t5x_alias.uninstall()
  sys.meta_path[:] = before
  gin.clear_config()


def configure(mode, *args):
  """The configuration that a mode would use."""
  return main.configure(command_line.parse([mode, *args]))[1]


def macro(reached, name):
  """The value of a macro."""
  return reached.config[name, 'gin.macro']['value']


@pytest.mark.parametrize('run', RUNS)
@pytest.mark.parametrize('mode', sorted(modes.MODES))
def test_every_mode_is_complete(run, mode):
  reached = configure(mode, f'--gin_file={run}.gin')
  assert reached.uses[0].configurable.wrapped is modes.load(mode)
  assert not os.listdir()


@pytest.mark.parametrize('run', RUNS)
def test_configuration_as_text_says_the_same(run, tmp_path):
  text = configure('train', f'--gin_file={run}.gin').text()
  (tmp_path / 'again.gin').write_text(text)
  assert configure('train', '--gin_file=again.gin').text() == text


@pytest.mark.parametrize(
  ('run', 'tokens', 'last_batch'),
  [
    ('palm_8b', '780.0', 512),
    ('palm_62b', '795.0', 1024),
    ('palm_540b', '775.9', 2048),
  ],
)
def test_training_tokens_are_the_papers(run, tokens, last_batch):
  """In billions, to the printed digits, by hand and by what the run will read."""
  reached = configure('train', f'--gin_file={run}.gin')
  steps, schedule = macro(reached, 'TRAIN_STEPS'), macro(reached, 'BATCH_SIZE')
  ends = [first for first, _ in schedule[1:]] + [steps]
  sequences = sum(
    (end - first) * n for (first, n), end in zip(schedule, ends, strict=True)
  )
  assert macro(reached, 'TASK_FEATURE_LENGTHS') == {'targets': 2048}
  assert f'{sequences * 2048 / 1e9:.1f}' == tokens
  assert BatchSchedule(schedule).examples_read(steps) == sequences
  assert schedule[-1][1] == last_batch


@pytest.mark.parametrize('run', [run for run in RUNS if run != 'palm_tiny'])
def test_learning_rate_is_the_papers(run):
  configure('train', f'--gin_file={run}.gin')
  from palm_t5x import utils

  schedule = gin.get_configurable(utils.create_learning_rate_scheduler)()
  for step, rate in ((0, 1e-2), (9_999, 1e-2), (40_000, 5e-3), (255_000, 1.98e-3)):
    assert float(schedule(step)) == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize('run', RUNS)
def test_loss_and_optimizer_are_the_papers(run):
  reached = configure('train', f'--gin_file={run}.gin')
  assert macro(reached, 'Z_LOSS') == 1e-4
  assert macro(reached, 'LABEL_SMOOTHING') == 0.0
  assert macro(reached, 'DROPOUT_RATE') == 0.0
  assert macro(reached, 'LOSS_NORMALIZING_FACTOR') == 'NUM_REAL_TARGET_TOKENS'
  adafactor = next(u.bindings for u in reached.uses if u.name.endswith('Adafactor'))
  assert adafactor['factored'] is False and adafactor['beta1'] == 0.9
  assert adafactor['decay_rate'] == 0.8
  assert adafactor['global_norm_clip_threshold'] == 1.0
  assert adafactor['weight_decay_rate_lr_exponent'] == 2.0


@pytest.mark.parametrize('run', RUNS)
def test_loss_spikes_are_recovered_from_unless_one_line_says_no(run):
  from palm_t5x.spikes import LossSpikeRecovery

  recovery = gin.get_configurable(LossSpikeRecovery)
  reached = configure('train', f'--gin_file={run}.gin')
  assert macro(reached, 'LOSS_SPIKE_RECOVERY').configurable.wrapped is LossSpikeRecovery
  # The paper's: about 100 steps back, 200 to 500 batches skipped, some 20 times.
  settings = recovery()
  assert settings.rewind_steps == 100 and 200 <= settings.skip_batches <= 500
  assert settings.max_rewinds == 20
  off = ('--gin.LOSS_SPIKE_RECOVERY=None',)
  assert macro(configure('train', f'--gin_file={run}.gin', *off), off[0][6:-5]) is None


def test_mesh_of_540b_is_the_papers():
  reached = configure('train', '--gin_file=palm_540b.gin')
  mesh = next(u.bindings for u in reached.uses if u.name.endswith('PjitPartitioner'))
  assert mesh['ici_mesh_shape'] == (1, 256, 12) and mesh['dcn_mesh_shape'] == (2, 1, 1)


def test_own_files_build_a_run_too():
  with pytest.raises(UserError) as caught:
    configure('train', '--gin_file=models/palm_8b.gin', '--gin_file=runs/pretrain.gin')
  listed = str(caught.value).partition('values for: ')[2].partition('. Bind')[0]
  assert {part.split()[0] for part in listed.split(', ')} == {
    'MODEL_DIR',
    'MIXTURE_OR_TASK_NAME',
    'TASK_FEATURE_LENGTHS',
    'TRAIN_STEPS',
  }


def test_finetuning_a_run_resets_the_optimizer():
  given = ['MODEL_DIR=m', 'MIXTURE_OR_TASK_NAME=t', 'INITIAL_CHECKPOINT_PATH=c']
  given += ['TRAIN_STEPS=9', "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"]
  files = ['--gin_file=models/palm_8b.gin', '--gin_file=runs/finetune.gin']
  reached = configure('train', *files, *(f'--gin.{text}' for text in given))
  restore = next(
    u.bindings for u in reached.uses if u.name.endswith('RestoreCheckpointConfig')
  )
  assert restore['reset_optimizer'] is True
  assert macro(reached, 'DROPOUT_RATE') == 0.1


def test_every_gin_file_of_ours_reads(tmp_path):
  from palm_t5x import gin_files

  root = environment.package_gin_dir()
  for folder, _, names in os.walk(root):
    for name in names:
      if name.endswith('.gin'):
        path = os.path.relpath(os.path.join(folder, name), root)
        assert gin_files.scan([path], gin_files.SearchPath()).texts

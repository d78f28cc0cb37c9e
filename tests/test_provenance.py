"""A checkpoint says what made it, and a start under other settings what differs."""

import logging
import shutil
import subprocess

import pytest
from runs import HERE, here, losses

from palm_t5x import checkpoints, provenance


@pytest.fixture(scope='module')
def made(workspace, straight):
  """A run of twelve steps, to go on with."""
  return shutil.copytree(straight[0], workspace / 'made')


def test_a_checkpoint_says_what_made_it(made):
  stored = checkpoints.read_metadata(made / 'checkpoint_12')
  head = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=HERE, capture_output=True, text=True, check=False
  )
  if head.returncode == 0:
    assert head.stdout.startswith(stored['code']['commit'].removesuffix('-dirty'))
  assert stored['settings']['train/utils.DatasetConfig.batch_size'] == '8'
  assert "'fixture_text'" in stored['config']
  assert stored['data'] == {'step': 12, 'examples_read': 96, 'skips': []}
  assert len(stored['vocabulary']) == 32


def differences(done):
  lines = [line for line in done.err.splitlines() if 'other settings' in line]
  return [line.partition('other settings: ')[2] for line in lines]


def test_what_differs_is_named_old_and_new(workspace, made):
  same = here(
    workspace, 'train', made, 'TRAIN_STEPS=13', 'EVAL_STEPS=1', 'CHECKPOINT_KEEP=9'
  )
  assert same.code == 0 and differences(same) == []
  other = here(
    *(workspace, 'train', made, 'TRAIN_STEPS=14', 'BATCH_SIZE=16'),
    'adafactor.Adafactor.beta1=0.8',
  )
  assert other.code == 0
  assert differences(other) == [
    'adafactor.Adafactor.beta1 0.9 -> 0.8; BATCH_SIZE 8 -> 16.'
  ]
  assert sorted(losses(made)) == list(range(1, 15))


def test_evaluation_compares_the_network_alone(workspace, made):
  bindings = ('BATCH_SIZE=16', 'DROPOUT_RATE=0.5')
  done = here(workspace, 'eval', made, *bindings, f'EVAL_OUTPUT_DIR={made / "eval"}')
  assert done.code == 0 and differences(done) == ['DROPOUT_RATE 0.0 -> 0.5.']


def warned(caplog, stored, settings, macros=()):
  with caplog.at_level(logging.INFO):
    provenance.warn_settings({'step': 7, **stored}, settings, dict(macros))
  return caplog.text


def test_a_message_stays_short(caplog):
  before = {f'a.b{i}': '1' for i in range(9)}
  after = {f'a.b{i}': '2' * 500 for i in range(9)}
  text = warned(caplog, {'settings': before}, after)
  assert 'and 4 more' in text and len(text) < 700


def test_what_is_set_in_one_of_the_two_only(caplog):
  text = warned(caplog, {'settings': {'a.b': '1'}}, {'a.c': '2'})
  assert 'a.b 1 -> unset; a.c unset -> 2' in text


def test_older_checkpoints_say_nothing_of_settings(caplog):
  assert warned(caplog, {}, {'a.b': '1'}) == ''


@pytest.mark.parametrize(
  'name',
  [
    'train.train.total_steps',
    'train.train.model_dir',
    'utils.SaveCheckpointConfig.keep',
    'train_eval/utils.DatasetConfig.batch_size',
    'train.train.eval_period',
  ],
)
def test_what_changes_no_training_is_not_named(caplog, name):
  assert warned(caplog, {'settings': {name: '1'}}, {name: '2'}) == ''


@pytest.mark.parametrize(
  'name',
  [
    'train/utils.DatasetConfig.batch_size',
    'network.TransformerConfig.dropout_rate',
    'models.DecoderOnlyModel.z_loss',
    'train.train.random_seed',
  ],
)
def test_what_changes_training_is_named(caplog, name):
  assert f'{name} 1 -> 2' in warned(caplog, {'settings': {name: '1'}}, {name: '2'})


def test_another_code_is_named(caplog):
  now = {'seed': 0, 'code': {'version': '0.2', 'commit': 'abc'}}
  with caplog.at_level(logging.INFO):
    provenance.warn_differences(
      {'seed': 0, 'code': {'version': '0.1', 'commit': None}}, now
    )
  assert 'made by palm_t5x 0.1, this is 0.2 (commit abc)' in caplog.text


def test_of_versions_only_those_that_differ_are_named(caplog):
  now = {'seed': 0, 'code': {}, 'versions': {'jax': '2', 'flax': '1'}}
  stored = {'seed': 0, 'code': {}, 'versions': {'jax': '1', 'flax': '1'}}
  provenance.warn_differences(stored, now)
  assert '(versions jax 1 -> 2)' in caplog.text and 'flax' not in caplog.text

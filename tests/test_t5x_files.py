"""Configurations written for Google's T5X run unchanged under `t5x`.

The Gin texts here are ours, with the constructs that T5X's own files use: scripts from
`__main__`, modules from `t5x`, its includes, scopes, macros and deprecated parameters.
"""

import importlib
import sys

import gin
import pytest

from palm_t5x import command_line, main, t5x_alias
from palm_t5x.errors import UserError

MODEL = """
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import decoding
from t5x import models
from t5x.examples.decoder_only import network

Z_LOSS = 0.0001
LABEL_SMOOTHING = 0.0
LOSS_NORMALIZING_FACTOR = None
DROPOUT_RATE = %gin.REQUIRED
VOCABULARY = @seqio.ByteVocabulary()

OPTIMIZER = @adafactor.Adafactor()
adafactor.Adafactor:
  decay_rate = 0.8
  step_offset = 0
  logical_factor_rules = @adafactor.standard_logical_factor_rules()

MODEL = @models.DecoderOnlyModel()
models.DecoderOnlyModel:
  module = @network.DecoderWrapper()
  vocabulary = %VOCABULARY
  optimizer_def = %OPTIMIZER
  decode_fn = @decoding.temperature_sample
  z_loss = %Z_LOSS
  label_smoothing = %LABEL_SMOOTHING
  loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR
decoding.temperature_sample:
  temperature = 1.0
  topk = 40

network.DecoderWrapper.config = @network.TransformerConfig()
network.TransformerConfig:
  vocab_size = 384
  dtype = 'bfloat16'
  emb_dim = 64
  num_heads = 2
  num_layers = 2
  head_dim = 32
  mlp_dim = 128
  mlp_activations = ('gelu', 'linear')
  dropout_rate = %DROPOUT_RATE
  logits_via_embedding = True
"""

# As a user of T5X who brings their own network module would write it.
OWN_MODEL = MODEL.replace('t5x.examples.decoder_only', 't5x')

RUN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import checkpoints
from t5x import gin_utils
from t5x import partitioning
from t5x import trainer
from t5x import utils
import t5x_files_toy

include 'model.gin'
include 't5x/configs/runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = 'toy'
MIXTURE_OR_TASK_MODULE = 't5x_files_toy'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 16}
TRAIN_STEPS = 10
DROPOUT_RATE = 0.0
BATCH_SIZE = 8

train_script.train:
  eval_period = 5
  use_orbax = True
  concurrent_metrics = False
  get_dataset_fn = @utils.get_dataset
  train_eval_get_dataset_fn = @utils.get_training_eval_datasets
  train_state_initializer_cls = @utils.TrainStateInitializer
  verify_matching_vocabs_fn = None
utils.SaveCheckpointConfig:
  period = 5
  checkpointer_cls = @checkpoints.SaveBestCheckpointer
  checkpoint_manager_cls = @checkpoints.OrbaxCheckpointManagerInterface
  keep_dataset_checkpoints = 1
checkpoints.SaveBestCheckpointer.metric_name_to_monitor = 'train/loss'
train/utils.DatasetConfig.use_custom_packing_ops = False
partitioning.PjitPartitioner.model_parallel_submesh = (1, 1, 1, 1)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """An empty folder with a T5X user's files, and no aliases from other tests."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'model.gin').write_text(OWN_MODEL)
  (tmp_path / 'run.gin').write_text(RUN)
  (tmp_path / 't5x_files_toy.py').write_text('from t5x import utils\n')
  before = list(sys.meta_path)
  for name in ('JAX_COMPILATION_CACHE_DIR', 'TF_ENABLE_ONEDNN_OPTS'):
    monkeypatch.setenv(name, 'x')
  t5x_alias.install()
  yield tmp_path
  t5x_alias.uninstall()
  sys.meta_path[:] = before
  sys.modules.pop('t5x_files_toy', None)
  gin.clear_config()


def configure(*args):
  """What a call of the mode would use."""
  return main.configure(command_line.parse(list(args)))[1]


def bound(reached, name):
  """Bindings of a configurable, by scope and last name."""
  return next(use.bindings for use in reached.uses if use.name.endswith(name))


def error(*args):
  with pytest.raises(UserError) as caught:
    configure(*args)
  return str(caught.value)


# --- Modules.

SHARED = """
  utils models partitioning trainer adafactor decoding gin_utils optimizers losses
  metrics checkpoints train_state train infer
"""


@pytest.mark.parametrize('name', SHARED.split())
def test_t5x_modules_are_ours(name):
  alias = importlib.import_module(f't5x.{name}')
  own = importlib.import_module(f'palm_t5x.{name}')
  assert alias is own
  assert own.__spec__.name == f'palm_t5x.{name}'
  assert own.__name__ == f'palm_t5x.{name}'


def test_import_t5x_itself():
  import t5x

  import palm_t5x

  assert t5x is palm_t5x
  import t5x.utils

  assert t5x.utils is sys.modules['palm_t5x.utils']


def test_a_users_module_gets_the_same_objects():
  import t5x_files_toy

  from palm_t5x import utils

  assert t5x_files_toy.utils is utils


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('t5x.examples.t5.network', 'encoder-decoder'),
    ('t5x.examples.scalable_t5.network', 'encoder-decoder'),
    ('t5x.contrib.moe.models', 't5x.utils'),
    ('t5x.partitoning', 'Did you mean partitioning'),
  ],
)
def test_what_is_not_here_says_what_is(name, expected):
  with pytest.raises(ImportError) as caught:
    importlib.import_module(name)
  assert isinstance(caught.value, UserError)
  assert name.split('.')[1] in str(caught.value) and expected in str(caught.value)


def test_without_the_command_t5x_is_not_ours():
  t5x_alias.uninstall()
  with pytest.raises(ImportError):
    importlib.import_module('t5x')


# --- Gin files.


def test_a_t5x_configuration_resolves(capsys):
  reached = configure('--run_mode=train', '--gin_file=run.gin', '--gin.MODEL_DIR="m"')
  train = bound(reached, 'train.train')
  assert train['eval_period'] == 5 and train['eval_steps'] == 20
  assert bound(reached, 'Adafactor')['decay_rate'] == 0.8
  assert bound(reached, 'TransformerConfig')['emb_dim'] == 64
  text = reached.text()
  assert 'palm_t5x import train' in text and "MODEL_DIR = 'm'" in text
  note = capsys.readouterr().err
  assert note.count('\n') == 1 and note.startswith('t5x: note: ')
  for name in (
    'train.use_orbax',
    'train.concurrent_metrics',
    'train.verify_matching_vocabs_fn',
    'SaveCheckpointConfig.checkpointer_cls',
    'SaveCheckpointConfig.checkpoint_manager_cls',
    'SaveCheckpointConfig.keep_dataset_checkpoints',
    'SaveBestCheckpointer.metric_name_to_monitor',
  ):
    assert note.count(name) == 1


@pytest.mark.parametrize(
  ('flag', 'use', 'name', 'value'),
  [
    ('--gin.train_script.train.eval_period=7', 'train.train', 'eval_period', 7),
    ('--gin.train.eval_period=7', 'train.train', 'eval_period', 7),
    ('--gin.train/utils.DatasetConfig.seed=3', 'train/utils.DatasetConfig', 'seed', 3),
    ('--gin.utils.SaveCheckpointConfig.period=9', 'SaveCheckpointConfig', 'period', 9),
    ('--gin.trainer.Trainer.num_microbatches=2', 'Trainer', 'num_microbatches', 2),
    ('--gin.PjitPartitioner.num_partitions=2', 'Partitioner', 'num_partitions', 2),
    ('--gin.network.TransformerConfig.mlp_dim=4', 'TransformerConfig', 'mlp_dim', 4),
  ],
)
def test_names_on_the_command_line(flag, use, name, value):
  reached = configure('train', '--gin_file=run.gin', '--gin.MODEL_DIR=m', flag)
  assert bound(reached, use)[name] == value


def test_files_in_t5x_order_without_dynamic_registration(folder):
  (folder / 'large.gin').write_text(
    "include 'model.gin'\nnetwork.TransformerConfig:\n  emb_dim = 128\n"
  )
  reached = configure(
    'train',
    '--gin_file=large.gin',
    '--gin_file=t5x/configs/runs/pretrain.gin',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
    '--gin.MIXTURE_OR_TASK_NAME="toy"',
    '--gin.MODEL_DIR="runs/m"',
    '--gin.TRAIN_STEPS=10',
    '--gin.DROPOUT_RATE=0.1',
  )
  assert bound(reached, 'TransformerConfig')['emb_dim'] == 128


REQUIRED = {
  'pretrain': (
    'train',
    'MIXTURE_OR_TASK_NAME TASK_FEATURE_LENGTHS TRAIN_STEPS MODEL_DIR',
  ),
  'finetune': (
    'train',
    'MIXTURE_OR_TASK_NAME TASK_FEATURE_LENGTHS TRAIN_STEPS MODEL_DIR'
    ' INITIAL_CHECKPOINT_PATH',
  ),
  'eval': ('eval', 'MIXTURE_OR_TASK_NAME CHECKPOINT_PATH EVAL_OUTPUT_DIR'),
  'infer': (
    'infer',
    'MIXTURE_OR_TASK_NAME TASK_FEATURE_LENGTHS CHECKPOINT_PATH INFER_OUTPUT_DIR',
  ),
}


@pytest.mark.parametrize('name', sorted(REQUIRED))
def test_run_files_require_what_t5xs_require(name):
  mode, macros = REQUIRED[name]
  files = ['--gin_file=models/palm_8b.gin', f'--gin_file=t5x/configs/runs/{name}.gin']
  message = error(mode, *files)
  listed = message.partition('values for: ')[2].partition('. Bind')[0]
  assert {part.split()[0] for part in listed.split(', ')} == set(macros.split())
  assert 'MODEL (' in error(mode, files[1])


DEFAULTS = {
  'pretrain': {
    'train/utils.DatasetConfig': {'split': 'train', 'pack': True, 'seed': None},
    'train_eval/utils.DatasetConfig': {'split': 'validation', 'seed': 42},
    'PjitPartitioner': {'num_partitions': 1, 'model_parallel_submesh': None},
    'SaveCheckpointConfig': {'period': 1000, 'keep': None, 'dtype': 'float32'},
    'create_learning_rate_scheduler': {
      'factors': 'constant * rsqrt_decay',
      'base_learning_rate': 1.0,
      'warmup_steps': 10000,
    },
    'train.train': {'eval_steps': 20, 'eval_period': 1000},
  },
  'finetune': {
    'infer_eval/utils.DatasetConfig': {'pack': False, 'task_feature_lengths': None},
    'SaveCheckpointConfig': {'period': 5000},
    'RestoreCheckpointConfig': {'mode': 'specific', 'dtype': 'float32'},
    'create_learning_rate_scheduler': {
      'factors': 'constant',
      'base_learning_rate': 0.001,
      'warmup_steps': 1000,
    },
  },
  'eval': {'DatasetConfig': {'split': 'test', 'batch_size': 32, 'seed': 42}},
  'infer': {
    'DatasetConfig': {'split': 'test', 'batch_size': 32, 'seed': 0},
    'infer.infer': {'mode': 'predict', 'checkpoint_period': 100, 'num_shards': 1},
    'RestoreCheckpointConfig': {'mode': 'specific', 'dtype': 'bfloat16'},
  },
}


@pytest.mark.parametrize('name', sorted(DEFAULTS))
def test_run_files_have_t5xs_defaults(name):
  mode, macros = REQUIRED[name]
  given = [f'--gin.{macro}=1' for macro in macros.split()]
  files = ['--gin_file=models/palm_8b.gin', f'--gin_file=t5x/configs/runs/{name}.gin']
  reached = configure(mode, *files, *given)
  for use, expected in DEFAULTS[name].items():
    found = bound(reached, use)
    assert {key: found[key] for key in expected} == expected
  text = reached.text()
  assert 'USE_CACHED_TASKS = True' not in text
  if mode == 'train':
    assert 'USE_CACHED_TASKS = False' in text and 'BATCH_SIZE = 128' in text


def test_precompile_file_is_well_formed():
  from palm_t5x import gin_files

  scan = gin_files.scan(['t5x/configs/runs/precompile.gin'], gin_files.SearchPath())
  assert set(scan.macros) == {
    'MODEL_DIR',
    'MIXTURE_OR_TASK_NAME',
    'TASK_FEATURE_LENGTHS',
    'BATCH_SIZE',
    'USE_CACHED_TASKS',
    'RANDOM_SEED',
  }


# --- What T5X has and we have not.


def test_t5xs_own_architecture_is_refused_before_anything_is_built(folder):
  (folder / 'model.gin').write_text(MODEL)
  message = error('train', '--gin_file=run.gin', '--gin.MODEL_DIR=m')
  assert 'decoder_only' in message and "not PaLM's" in message and 'palm_8b' in message


def test_t5xs_model_file_with_a_palm_model_on_top(folder):
  (folder / 'model.gin').write_text(MODEL + "include 'models/palm_tiny.gin'\n")
  reached = configure('train', '--gin_file=run.gin', '--gin.MODEL_DIR=m')
  assert bound(reached, 'network.TransformerConfig')['emb_dim'] == 256


def test_t5xs_network_raises_when_it_is_used():
  from t5x.examples.decoder_only import network

  for call in (lambda: network.TransformerConfig(1), lambda: network.DecoderWrapper(1)):
    with pytest.raises(UserError, match='serial blocks'):
      call()


def test_encoder_decoder_is_refused_by_name(folder):
  (folder / 'model.gin').write_text(
    OWN_MODEL.replace('DecoderOnlyModel', 'EncoderDecoderModel')
  )
  message = error('train', '--gin_file=run.gin', '--gin.MODEL_DIR=m')
  assert 'EncoderDecoderModel' in message and 'decoder-only' in message


def test_t5xs_model_files_are_not_shipped(folder):
  message = error('train', '--gin_file=t5x/examples/t5/t5_1_1/base.gin')
  assert "T5X's own model files" in message


def test_a_parameter_that_changes_results_is_not_dropped(folder):
  text = (folder / 'run.gin').read_text() + 'train_script.train.use_gold = 1\n'
  (folder / 'run.gin').write_text(text)
  assert 'use_gold' in error('train', '--gin_file=run.gin', '--gin.MODEL_DIR=m')

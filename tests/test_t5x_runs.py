"""Files written the way T5X's users write them train, fine-tune, evaluate and infer.

The Gin texts are ours, in T5X's style: scripts from `__main__`, modules from `t5x`, its
includes, its deprecated parameters, SeqIO's own vocabularies, a relative MODEL_DIR.
"""

import fixture_tasks
import numpy as np
import pytest
import runs

from palm_t5x import checkpoints
from palm_t5x.metric_writers import read_metrics

MODEL = """
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import decoding
from t5x import models
from t5x import network

Z_LOSS = 0.0001
LABEL_SMOOTHING = 0.0
LOSS_NORMALIZING_FACTOR = None
DROPOUT_RATE = %gin.REQUIRED
VOCABULARY = @seqio.SentencePieceVocabulary()
seqio.SentencePieceVocabulary.sentencepiece_model_file = '{vocabulary}'

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
  topk = 1

network.DecoderWrapper.config = @network.TransformerConfig()
network.TransformerConfig:
  vocab_size = 640  # rounded up, as T5X's files do
  dtype = 'float32'
  emb_dim = 32
  num_heads = 2
  num_layers = 2
  head_dim = 16
  mlp_dim = 64
  mlp_activations = ('swish', 'linear')
  dropout_rate = %DROPOUT_RATE
  logits_via_embedding = True
"""

PRETRAIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import checkpoints
from t5x import partitioning
from t5x import trainer
from t5x import utils
import fixture_tasks

include 'model.gin'
include 't5x/configs/runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = 'fixture_mixture'
TASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 32}
TRAIN_STEPS = 4
DROPOUT_RATE = 0.0
BATCH_SIZE = 16

train_script.train:
  eval_period = 2
  eval_steps = 1
  use_orbax = True
  concurrent_metrics = False
  use_hardware_rng = False
utils.SaveCheckpointConfig:
  period = 2
  keep = 2
  checkpointer_cls = @checkpoints.SaveBestCheckpointer
  keep_dataset_checkpoints = 1
trainer.Trainer.num_microbatches = 2
partitioning.PjitPartitioner.num_partitions = 2
"""

FINETUNE = """
from __gin__ import dynamic_registration
import __main__ as train_script
import fixture_tasks

include 'model.gin'
include 't5x/configs/runs/finetune.gin'

MIXTURE_OR_TASK_NAME = 'fixture_sums'
TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 6}
USE_CACHED_TASKS = True  # T5X's default
TRAIN_STEPS = 6  # 4 of pre-training, and 2
INITIAL_CHECKPOINT_PATH = 'runs/pre/checkpoint_4'
BATCH_SIZE = 8
EVAL_PERIOD = 1
EVAL_STEPS = 1
"""

EVAL = """
from __gin__ import dynamic_registration
import __main__ as eval_script
from t5x import utils
import fixture_tasks

include 'model.gin'
include 't5x/configs/runs/eval.gin'

MIXTURE_OR_TASK_NAME = 'fixture_sums'
TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 6}
DROPOUT_RATE = 0.0
CHECKPOINT_PATH = 'runs/tuned/checkpoint_6'
utils.DatasetConfig.split = 'validation'
"""

INFER = """
from __gin__ import dynamic_registration
import __main__ as infer_script
from t5x import models
from t5x import utils
import fixture_tasks

include 'model.gin'
include 't5x/configs/runs/infer.gin'

MIXTURE_OR_TASK_NAME = 'fixture_sums'
TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 6}
DROPOUT_RATE = 0.0
CHECKPOINT_PATH = 'runs/tuned/checkpoint_6'
infer_script.infer:
  mode = 'predict_with_aux'
  checkpoint_period = 2
  num_shards = 1
models.DecoderOnlyModel.predict_batch_with_aux.num_decodes = 2
utils.DatasetConfig:
  split = 'validation'
  batch_size = 16
"""

BYTES = """
from __gin__ import dynamic_registration
import seqio
import __main__ as train_script
from t5x import network
import t5x_runs_tasks

include 'model.gin'
include 't5x/configs/runs/pretrain.gin'

VOCABULARY = @seqio.ByteVocabulary()
MIXTURE_OR_TASK_NAME = 't5x_runs_bytes'
TASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 32}
TRAIN_STEPS = 2
DROPOUT_RATE = 0.1
BATCH_SIZE = 8
network.TransformerConfig.vocab_size = 384
train_script.train.eval_steps = 1
"""

TASKS = """
import seqio

def lines(split, shuffle_files=False, seed=None):
  import tensorflow as tf
  texts = [f'{split} line number {n} of this text' for n in range(60)]
  return tf.data.Dataset.from_tensor_slices({'targets': texts})

VOCABULARY = seqio.ByteVocabulary()
seqio.TaskRegistry.add(
  't5x_runs_bytes',
  source=seqio.FunctionDataSource(lines, splits=['train', 'validation']),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={'targets': seqio.Feature(VOCABULARY, add_eos=True)},
)
"""


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A T5X user's folder, as the current one, with a cache of its own."""
  folder = tmp_path_factory.mktemp('t5x')
  (folder / 'model.gin').write_text(MODEL.format(vocabulary=runs.VOCABULARY))
  for name in ('PRETRAIN', 'FINETUNE', 'EVAL', 'INFER', 'BYTES'):
    (folder / f'{name.lower()}.gin').write_text(globals()[name])
  (folder / 't5x_runs_tasks.py').write_text(TASKS)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
    yield folder


@pytest.fixture(scope='module')
def pretrained(home):
  done = runs.t5x(
    '--run_mode=train', '--gin_file=pretrain.gin', '--gin.MODEL_DIR="runs/pre"'
  )
  assert done.code == 0, done.err
  return done


@pytest.fixture(scope='module')
def tuned(home, pretrained):
  done = runs.t5x(
    '--run_mode=train', '--gin_file=finetune.gin', '--gin.MODEL_DIR="runs/tuned"'
  )
  assert done.code == 0, done.err
  return done


def test_pretraining(home, pretrained):
  run = home / 'runs' / 'pre'
  assert checkpoints.steps_in(run) == [2, 4]
  assert [row['step'] for row in read_metrics(str(run), 'train')] == [1, 2, 3, 4]
  evaluated = read_metrics(str(run), 'training_eval/fixture_mixture')
  assert [row['step'] for row in evaluated] == [2, 4]
  notes = [x for x in pretrained.err.splitlines() if x.startswith('t5x: note:')]
  for name in ('use_orbax', 'checkpointer_cls', 'keep_dataset_checkpoints'):
    assert sum(name in note for note in notes) == 1
  assert 'fixture_mixture' in (run / 'config.gin').read_text()


def test_the_loss_is_normalised_as_t5x_does(home, pretrained):
  """A sum over tokens: gradients of LOSS_NORMALIZING_FACTOR None are that large."""
  rows = read_metrics(str(home / 'runs' / 'pre'), 'train')
  assert all(row['tokens'] == 16 * 32 for row in rows)
  assert all(row['grad_norm'] > 50 for row in rows)


def test_the_same_command_goes_on(home, pretrained):
  done = runs.t5x('train', '--gin_file=pretrain.gin', '--gin.MODEL_DIR="runs/pre"')
  assert done.code == 0 and 'already has all its 4 steps' in done.out


def test_finetuning_with_task_metrics(home, pretrained, tuned):
  run = home / 'runs' / 'tuned'
  assert checkpoints.steps_in(run) == [6]
  assert [row['step'] for row in read_metrics(str(run), 'train')] == [5, 6]
  evaluated = read_metrics(str(run), 'inference_eval/fixture_sums')
  assert [row['step'] for row in evaluated] == [5, 6]
  assert all(0 <= row['accuracy'] <= 100 for row in evaluated)
  lines = runs.json_lines(run / 'inference_eval' / 'fixture_sums-000006.jsonl')
  assert len(lines) == len(list(fixture_tasks.sums('validation')))
  assert 'checkpoint_4 with its optimizer state, at step 4' in tuned.err
  assert tuned.err.count('SeqIO has no cache of fixture_sums') == 1


def test_finetuning_goes_on_with_the_optimizer(home, tuned):
  """T5X's finetune.gin keeps what Adafactor has gathered."""
  state = runs.arrays(home / 'runs' / 'tuned' / 'checkpoint_6')
  assert int(state['state.step']) == 6 and int(state['state.optimizer_step']) == 6


def test_evaluation(home, tuned):
  done = runs.t5x(
    '--run_mode=eval', '--gin_file=eval.gin', '--gin.EVAL_OUTPUT_DIR="out/eval"'
  )
  assert done.code == 0, done.err
  (row,) = runs.json_lines(home / 'out' / 'eval' / 'inference_eval' / 'results.jsonl')
  closing = read_metrics(str(home / 'runs' / 'tuned'), 'inference_eval/fixture_sums')
  assert (row['step'], row['accuracy']) == (6, closing[-1]['accuracy'])


def test_inference(home, tuned):
  done = runs.t5x(
    '--run_mode=infer', '--gin_file=infer.gin', '--gin.INFER_OUTPUT_DIR="out/infer"'
  )
  assert done.code == 0, done.err
  name = 'fixture_sums-predict_with_aux.jsonl-00000-of-00001'
  lines = runs.json_lines(home / 'out' / 'infer' / name)
  examples = list(fixture_tasks.sums('validation'))
  assert [x['inputs']['inputs_pretokenized'] for x in lines] == [
    example['inputs'] for example in examples
  ]
  assert all(np.isfinite(line['aux']['scores']) for line in lines)


def test_a_users_own_task_with_bytes_for_ids(home):
  done = runs.t5x('train', '--gin_file=bytes.gin', '--gin.MODEL_DIR="runs/bytes"')
  assert done.code == 0, done.err
  closing = read_metrics(str(home / 'runs' / 'bytes'), 'training_eval/t5x_runs_bytes')
  texts = [f'validation line number {n} of this text' for n in range(60)]
  assert closing[-1]['bytes'] == sum(map(len, texts))
  assert closing[-1]['tokens'] == sum(len(text) + 1 for text in texts)

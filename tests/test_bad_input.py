"""Mistakes and failures: one line that says what to do, and earlier files as they were.

What the command finds before it builds anything (unknown flags, macros, files) is in
test_main and test_gin_utils; here is what a run finds.
"""

import contextlib
import json
import pathlib
import random
import resource
import shutil

import fixture_tasks
import jax
import pytest
import runs

from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.metric_writers import read_metrics

SUMS = (
  'INFER_MIXTURE_OR_TASK_NAME=fixture_sums',
  "INFER_TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 6}",
)
MORE = 'TRAIN_STEPS=24'


@pytest.fixture(scope='module')
def finished(straight, tmp_path_factory):
  """A finished run that no mistake may touch."""
  folder = tmp_path_factory.mktemp('finished') / 'run'
  shutil.copytree(straight[0], folder)
  return folder


@pytest.fixture(scope='module')
def other_vocabulary(tmp_path_factory):
  """A vocabulary of the right size that the run was not trained with."""
  path = tmp_path_factory.mktemp('vocabulary') / 'other.model'
  texts = [text[::-1] for text in fixture_tasks.documents('train')]
  vocabulary_lib.train(texts, str(path), fixture_tasks.VOCAB_SIZE)
  return path


@pytest.fixture
def copy(straight, tmp_path):
  """A finished run to damage."""
  shutil.copytree(straight[0], tmp_path / 'run')
  return tmp_path / 'run'


# (mode, bindings, what the line must say). {file} is a file, {run} the run, {other} a
# vocabulary it was not trained with.
MISTAKES = [
  ('train', ['BATCH_SIZE=12', MORE], 'BATCH_SIZE=12 does not divide by 8|Use 8 or 16'),
  ('train', ['MICROBATCHES=3', MORE], 'BATCH_SIZE=8|3 microbatches|Use 24 or 48'),
  ('train', ['MICROBATCHES=0', MORE], 'MICROBATCHES=0|1 or more'),
  ('train', ['BATCH_SIZE=eight', MORE], "BATCH_SIZE='eight'|whole number"),
  ('train', ['EVAL_BATCH_SIZE=9', MORE], 'EVAL_BATCH_SIZE=9|Use 8 or 16'),
  ('eval', ['EVAL_BATCH_SIZE=9'], 'EVAL_BATCH_SIZE=9|Use 8 or 16'),
  ('infer', ['INFER_BATCH_SIZE=9'], 'INFER_BATCH_SIZE=9|Use 8 or 16'),
  ('train', ['PjitPartitioner.num_partitions=3'], 'num_partitions=3|[1, 2, 4, 8]'),
  ('train', ['PjitPartitioner.num_partitions=8'], 'does not divide by the 8 devices'),
  ('train', ['TRAIN_STEPS=5'], 'TRAIN_STEPS=5|12 steps|raise TRAIN_STEPS'),
  ('train', ['TRAIN_STEPS=-1'], 'TRAIN_STEPS=-1|1 or more'),
  ('train', ['TRAIN_STEPS=many'], "takes a whole number, not TRAIN_STEPS='many'"),
  ('train', ['EVAL_PERIOD=-3', MORE], 'EVAL_PERIOD=-3|0 or more'),
  ('train', ['CHECKPOINT_PERIOD=0', MORE], 'period=0|1 or more, or None'),
  (
    'train',
    ['utils.SaveCheckpointConfig.dtype=float7', MORE],
    "SaveCheckpointConfig.dtype='float7'|'bfloat16'",
  ),
  (
    'train',
    ['network.TransformerConfig.emb_dim=32', MORE],
    'of another model|target/layers/q_wi_fused is (2, 64, 2, 160) there, (2, 32, 2, '
    '160) here|another MODEL_DIR',
  ),
  (
    'train',
    ['network.TransformerConfig.num_layers=3', MORE],
    'target/layers/q_wi_fused is (2, 64, 2, 160) there, (3, 64, 2, 160) here',
  ),
  ('eval', ['network.TransformerConfig.mlp_dim=64'], 'of another model|q_wi_fused'),
  (
    'train',
    ['network.TransformerConfig.vocab_size=256'],
    'has 512 ids|made for 256|vocab_size = 512',
  ),
  (
    'train',
    ['network.TransformerConfig.vocab_size=4096'],
    'has 512 ids|made for 4096|num_real_tokens = 512',
  ),
  ('train', ['VOCABULARY_PATH={other}', MORE], 'another vocabulary|{other}|config.gin'),
  ('eval', ['VOCABULARY_PATH={other}'], 'another vocabulary|VOCABULARY_PATH'),
  ('infer', ['VOCABULARY_PATH={other}', *SUMS], 'another vocabulary|VOCABULARY_PATH'),
  ('train', ['TASK_FEATURE_LENGTHS=64', MORE], "LENGTHS=64|{'inputs': 512"),
  ('train', ["TASK_FEATURE_LENGTHS={'targets': 0}", MORE], '1 or more'),
  ('train', ["TASK_FEATURE_LENGTHS={'targets': 'x'}", MORE], 'whole numbers'),
  ('train', ["TASK_FEATURE_LENGTHS={'inputs': 64}", MORE], 'has no "targets"'),
  (
    'train',
    ["TASK_FEATURE_LENGTHS={'targets': 90000}", MORE],
    "'fixture_text' has|fewer than one row of 90000|shorter",
  ),
  (
    'train',
    ["TASK_FEATURE_LENGTHS={'targets': 64", MORE],
    "no Gin value|{'targets': 256}",
  ),
  ('train', ["MIXTURE_OR_TASK_NAME='fixture_text"], 'unbalanced quotes'),
  ('train', ['MIXTURE_OR_TASK_NAME=fixture_txt'], "Did you mean 'fixture_text'"),
  ('eval', ['EVAL_MIXTURE_OR_TASK_NAME=sums'], "no task or mixture 'sums'|t5x tasks"),
  ('train', ['MIXTURE_OR_TASK_NAME=fixture_empty'], "'fixture_empty' has no text"),
  ('train', ['MIXTURE_OR_TASK_NAME=fixture_bytes'], 'ByteVocabulary|of 512 ids'),
  ('eval', ['EVAL_MIXTURE_OR_TASK_NAME=fixture_bytes'], 'ByteVocabulary|of 512 ids'),
  (
    'infer',
    ['INFER_MIXTURE_OR_TASK_NAME=fixture_bytes', SUMS[1]],
    'another vocabulary than the model|ByteVocabulary',
  ),
  ('eval', ['EVAL_SPLIT=validation[:5]'], "'validation[:5]'|Use 'validation'"),
  ('infer', ['INFER_SPLIT=train[:9]', *SUMS], "'train[:9]'|Use 'train'"),
  (
    'train',
    ['train/utils.DatasetConfig.module=my_taskz', MORE],
    "MIXTURE_OR_TASK_MODULE='my_taskz'|no such module",
  ),
  ('eval', ['EVAL_SPLIT=test'], "no split 'test'|train, validation"),
  ('infer', ['INFER_SPLIT=test', *SUMS], "no split 'test'|train, validation"),
  ('infer', ['infer.mode=generate', *SUMS], "mode='generate'|predict, score"),
  ('infer', [], "no inputs|TASK_FEATURE_LENGTHS={'inputs'"),
  ('infer', ['--shard_id=2', '--num_shards=2'], 'shard_id=2 must be in 0..1'),
  ('infer', ['infer.checkpoint_period=0', *SUMS], 'checkpoint_period=0|1 batch'),
  ('eval', ['CHECKPOINT_PATH={run}/checkpoint_7'], 'no checkpoint at|[6, 9, 12]'),
  ('eval', ['eval/utils.RestoreCheckpointConfig.mode=best'], "mode='best'|'latest'"),
  ('eval', ['EVAL_OUTPUT_DIR={file}/x'], 'EVAL_OUTPUT_DIR={file}/x|Not a directory'),
  ('infer', ['INFER_OUTPUT_DIR={file}', *SUMS], 'INFER_OUTPUT_DIR={file}|it is a file'),
  ('complete', ['TEMPERATURE=-1', 'PROMPT=hi'], 'temperature=-1|0 or more'),
  ('complete', ['MAX_NEW_TOKENS=0', 'PROMPT=hi'], 'max_new_tokens=0|1 or more'),
]


@pytest.mark.parametrize(
  ('mode', 'bindings', 'said'), MISTAKES, ids=lambda x: x if isinstance(x, str) else ''
)
def test_mistakes_change_nothing(
  workspace, finished, other_vocabulary, mode, bindings, said
):
  names = {
    '{file}': finished / 'metrics.jsonl',
    '{run}': finished,
    '{other}': other_vocabulary,
  }
  for name, path in names.items():
    bindings = [binding.replace(name, str(path)) for binding in bindings]
    said = said.replace(name, str(path))
  before, files = runs.hashes(finished), runs.hashes(workspace / 'cache')
  done = runs.here(workspace, mode, finished, *bindings)
  assert done.code == 2, done.err
  for part in said.split('|'):
    assert part in done.error
  # A mode may make the folder for its output; what was there is as it was.
  after = runs.hashes(finished)
  assert after == before
  assert runs.hashes(workspace / 'cache').items() >= files.items()


@pytest.mark.parametrize('mode', ['eval', 'infer', 'complete'])
def test_no_checkpoint(workspace, tmp_path, mode):
  more = SUMS if mode == 'infer' else ()
  words = ['hi'] if mode == 'complete' else []
  done = runs.here(workspace, mode, tmp_path / 'no', *more, words=words)
  assert done.code == 2
  assert f'no checkpoint at {tmp_path / "no"}' in done.error
  assert 'Name a checkpoint or a run folder' in done.error


def test_no_checkpoint_to_start_from(workspace, finished, tmp_path):
  path = finished / 'checkpoint_7'
  binding = f'utils.RestoreCheckpointConfig.path={path}'
  done = runs.here(workspace, 'train', tmp_path / 'new', binding)
  assert done.code == 2
  assert f'no checkpoint at {path}' in done.error and '[6, 9, 12]' in done.error


@pytest.mark.parametrize(
  ('place', 'reason'),
  [
    ('{file}', 'it is a file'),
    ('{file}/run', 'Not a directory'),
    ('/proc/run', 'No such file'),
    ("''", 'empty'),
  ],
)
def test_unwritable_model_dir(workspace, finished, place, reason):
  place = place.replace('{file}', str(finished / 'metrics.jsonl'))
  before = runs.hashes(finished)
  done = runs.here(workspace, 'train', place)
  assert done.code == 2
  assert 'MODEL_DIR' in done.error and reason in done.error
  assert runs.hashes(finished) == before


def test_unwritable_cache(workspace, finished, tmp_path):
  place = finished / 'metrics.jsonl' / 'cache'
  done = runs.here(workspace, 'train', tmp_path / 'new', f'CACHE_DIR={place}')
  assert done.code == 1
  assert str(place) in done.error and 'name another folder' in done.error


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    (None, 'matches no file'),
    ('', 'there is no text in them'),
    (' \n\n', 'there is no text in them'),
    ('A short text.\n', 'fewer than one row'),
  ],
)
def test_text_files_without_text(tmp_path, text, said):
  if text is not None:
    (tmp_path / 'a.txt').write_text(text)
  done = runs.t5x(
    'train',
    '--gin_file=palm_tiny.gin',
    f'--gin.TEXT_FILES={tmp_path}/*.txt',
    f'--gin.MODEL_DIR={tmp_path}/run',
    f'--gin.CACHE_DIR={tmp_path}/cache',
  )
  assert done.code == 2
  assert said in done.error
  assert text == 'A short text.\n' or f'{tmp_path}/*.txt' in done.error


def test_a_file_that_is_no_vocabulary(workspace, tmp_path):
  path = tmp_path / 'junk.model'
  path.write_bytes(b'junk' * 100)
  done = runs.here(workspace, 'train', tmp_path / 'new', f'VOCABULARY_PATH={path}')
  assert done.code == 1
  assert str(path) in done.error and 'name another file' in done.error


def test_no_vocabulary(workspace, tmp_path):
  done = runs.here(workspace, 'train', tmp_path / 'new', 'VOCABULARY_PATH=gone.model')
  assert done.code == 2
  assert 'no vocabulary file at' in done.error and 'gone.model' in done.error


# --- Damage.


@pytest.mark.parametrize('mode', ['eval', 'complete'])
def test_a_damaged_checkpoint_is_passed_over(workspace, copy, mode):
  runs.damage(copy / 'checkpoint_12', random.Random(0))
  before = runs.hashes(copy)
  words = ['hi'] if mode == 'complete' else []
  done = runs.here(workspace, mode, copy, words=words)
  assert done.code == 0, done.err
  assert 'warning: checkpoint' in done.err and 'checkpoint_12 is damaged' in done.err
  assert 'checkpoint_9 (step 9)' in done.err
  assert runs.hashes(copy).items() >= before.items()


def test_training_goes_on_from_the_one_before(workspace, copy, straight):
  runs.damage(copy / 'checkpoint_12', random.Random(0))
  done = runs.here(workspace, 'train', copy)
  assert done.code == 0, done.err
  assert 'checkpoint_12 is damaged' in done.err and 'from step 9' in done.err
  found, expected = runs.losses(copy), runs.losses(straight[0])
  assert found == pytest.approx(expected, rel=1e-4), 'steps 10 to 12 were done again'


@pytest.mark.parametrize('mode', ['train', 'eval', 'infer', 'complete'])
def test_all_checkpoints_damaged(workspace, copy, mode):
  for step in (6, 9, 12):
    runs.damage(copy / f'checkpoint_{step}', random.Random(step))
  before = runs.hashes(copy)
  words = ['hi'] if mode == 'complete' else []
  more = SUMS if mode == 'infer' else ()
  done = runs.here(workspace, mode, copy, *more, words=words)
  assert done.code == 1
  assert f'all 3 checkpoints in {copy} are damaged' in done.error
  assert runs.hashes(copy) == before


def test_a_damaged_checkpoint_that_was_asked_for(workspace, copy):
  runs.damage(copy / 'checkpoint_12', random.Random(0))
  path = copy / 'checkpoint_12'
  done = runs.here(workspace, 'eval', copy, f'CHECKPOINT_PATH={path}')
  assert done.code == 1
  assert f'{path} is damaged' in done.error and 'Use an older one' in done.error


def test_a_file_in_a_checkpoints_place(workspace, copy):
  shutil.rmtree(copy / 'checkpoint_12')
  (copy / 'checkpoint_12').write_text('mine')
  done = runs.here(workspace, 'train', copy)
  assert done.code == 1
  assert 'could not be written' in done.error and 'Not a directory' in done.error
  assert (copy / 'checkpoint_12').read_text() == 'mine'


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 1
  path.write_bytes(bytes(data))


def _tokens(store):
  files = [p for p in (store / 'tokens').rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


DAMAGES = {
  'manifest cut': lambda store: (store / 'manifest.json').write_text('{"task":'),
  'manifest of another': lambda store: (store / 'manifest.json').write_text(
    json.dumps(json.loads((store / 'manifest.json').read_text()) | {'num_tokens': 9})
  ),
  'token flipped': lambda store: _flip(_tokens(store)),
  'tokens cut': lambda store: _tokens(store).write_bytes(b'short'),
  'tokens gone': lambda store: _tokens(store).unlink(),
  'description gone': lambda store: (store / 'tokens' / 'zarr.json').unlink(),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_token_store(workspace, straight, copy, tmp_path, damage):
  cache = tmp_path / 'cache'
  shutil.copytree(workspace / 'cache', cache)
  (store,) = (cache / 'token_stores' / 'fixture_text').glob('train-*/')
  DAMAGES[damage](store)
  before = runs.hashes(cache)
  done = runs.here(workspace, 'train', copy, f'CACHE_DIR={cache}', MORE)
  assert done.code == 1
  assert str(store) in done.error and 'is damaged' in done.error
  assert 'Delete that folder and run again' in done.error and len(done.error) < 700
  assert runs.hashes(cache) == before
  assert _checkpoints(copy) == _checkpoints(straight[0])
  shutil.rmtree(store)
  assert runs.here(workspace, 'train', copy, f'CACHE_DIR={cache}', MORE).code == 0


# --- A full disk: no file may grow beyond a limit, which says 'File too large' where a
# full disk says 'No space left on device'.


@contextlib.contextmanager
def no_file_beyond(size):
  """Inside the block no file of this process can be longer than `size` bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # jax would leave the beginnings of programs in the cache that all tests share.
  written_from = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', written_from)


def _checkpoints(folder: pathlib.Path) -> dict[str, str]:
  return {k: v for k, v in runs.hashes(folder).items() if k.startswith('checkpoint_')}


def test_no_room_for_a_checkpoint(workspace, straight, copy):
  with no_file_beyond(60_000):
    done = runs.here(workspace, 'train', copy, MORE)
  assert done.code == 1
  assert f'under {copy}: File too large' in done.error
  assert '[6, 9, 12] are intact' in done.error and 'free space' in done.error
  assert _checkpoints(copy) == _checkpoints(straight[0]), 'and no half of another'
  assert read_metrics(str(copy), 'train')[:12] == read_metrics(straight[0], 'train')
  again = runs.here(workspace, 'train', copy, MORE)
  assert again.code == 0 and 'resumed from step 12' in again.err


def test_no_room_for_the_first_checkpoint(workspace, tmp_path):
  with no_file_beyond(60_000):
    done = runs.here(workspace, 'train', tmp_path / 'run')
  assert done.code == 1
  assert 'Checkpoints of steps [] are intact' in done.error


def test_no_room_for_metrics(workspace, straight, copy):
  path = copy / 'metrics.jsonl'
  row = json.dumps({'step': 1, 'split': 'of old', 'loss': 1.0}) + '\n'
  with path.open('a') as f:
    f.write(row * (200_000 // len(row)))
  before = path.read_bytes()
  with no_file_beyond(len(before) + 10):
    done = runs.here(workspace, 'train', copy, MORE)
  assert done.code == 1
  assert f'Cannot write {path}: File too large' in done.error
  assert 'Make room' in done.error
  assert path.read_bytes().startswith(before)
  assert _checkpoints(copy) == _checkpoints(straight[0])


def test_no_room_for_a_token_store(workspace, tmp_path):
  cache, run = tmp_path / 'cache', tmp_path / 'run'
  with no_file_beyond(20_000):
    done = runs.here(workspace, 'train', run, f'CACHE_DIR={cache}')
  assert done.code == 1
  assert f'Cannot write {cache}' in done.error and 'the disk is full' in done.error
  assert not list(cache.rglob('manifest.json')), 'nothing passes for a whole store'
  done = runs.here(workspace, 'train', run, f'CACHE_DIR={cache}', 'TRAIN_STEPS=3')
  assert done.code == 0, done.err


def test_no_room_for_predictions(workspace, straight, tmp_path):
  bindings = (
    "INFER_TASK_FEATURE_LENGTHS={'inputs': 20, 'targets': 4}",
    f'INFER_OUTPUT_DIR={tmp_path}',
    'INFER_BATCH_SIZE=64',
  )
  with no_file_beyond(19_000):
    done = runs.here(workspace, 'infer', straight[0], *bindings)
  assert done.code == 1
  assert 'chunk-000000.jsonl could not be written (File too large)' in done.error
  names = set(runs.hashes(tmp_path))
  assert not any(name.endswith(('.tmp', '0.jsonl', '-of-00001')) for name in names)
  done = runs.here(workspace, 'infer', straight[0], *bindings)
  assert done.code == 0, done.err


@pytest.mark.parametrize(
  ('task', 'length'), [('fixture_text', 64), ('fixture_sums', 6)]
)
def test_no_room_for_results(workspace, straight, tmp_path, task, length):
  bindings = (
    f'EVAL_MIXTURE_OR_TASK_NAME={task}',
    f'EVAL_OUTPUT_DIR={tmp_path}',
    f"EVAL_TASK_FEATURE_LENGTHS={{'inputs': 12, 'targets': {length}}}",
  )
  place = tmp_path / 'inference_eval'
  place.mkdir()
  if task == 'fixture_text':
    (place / 'results.jsonl').write_text('{}\n' * 10_000)
  before = runs.hashes(place)
  with no_file_beyond(30_000 if task == 'fixture_text' else 9_000):
    done = runs.here(workspace, 'eval', straight[0], *bindings)
  assert done.code == 1
  assert str(place) in done.error and 'File too large' in done.error
  assert 'Make room' in done.error
  assert runs.hashes(place).items() >= before.items()

"""`t5x cache` through its door, and what training makes of its stores."""

import functools
import pathlib
import resource
import shutil

import cached_texts
import fixture_tasks
import pytest
import runs
import seqio

from palm_t5x import errors
from palm_t5x.corpus import beam_runner, prepare, sources, store_builder, token_store

FOLDER = str(fixture_tasks.CORPUS)
TASK = 'cached_parts'


@pytest.fixture(scope='module', autouse=True)
def task():
  """A task of parts, registered for these tests."""
  parts = functools.partial(cached_texts.parts, FOLDER)
  sources.add_text_task(TASK, sources.DocumentSource(parts=parts))
  yield
  seqio.TaskRegistry.remove(TASK)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  runs.write_config(folder)
  return folder


def cache(config, folder, *flags, name=TASK):
  """`t5x cache` with its cache in `folder`."""
  flags = [f'--gin.MIXTURE_OR_TASK_NAME={name}', f'--gin.CACHE_DIR={folder}', *flags]
  return runs.t5x('cache', f'--gin_file={config / "tiny.gin"}', *flags)


@pytest.fixture(scope='module')
def built(config, tmp_path_factory):
  """(cache folder, what the command said), by one process."""
  folder = tmp_path_factory.mktemp('built')
  return folder, cache(config, folder, '--gin.WORKERS=1')


def stores(folder):
  """Every file of the stores, by its path, without locks."""
  found = runs.hashes(pathlib.Path(folder) / 'token_stores')
  return {name: value for name, value in found.items() if not name.endswith('.lock')}


def test_it_says_what_is_in_the_stores(built):
  folder, done = built
  assert done.code == 0, done.err
  for split in ('train', 'validation'):
    parts = cached_texts.parts(FOLDER, split)
    texts = [text for part in parts for text in part.read() if text]
    size = sum(len(text.encode()) for text in texts)
    codec = fixture_tasks.vocabulary().codec
    tokens = sum(len(codec.encode(text)) + 1 for text in texts)
    empty = f'{len(parts)} empty document' + ('s' if len(parts) > 1 else '')
    assert (
      f'{TASK}/{split}: {len(texts):,} documents, {tokens:,} tokens, '
      f'{size / tokens:.2f} bytes per token; left out: {empty}\n'
    ) in done.out
  assert 't5x train' in done.out.splitlines()[-1]
  assert not list(folder.rglob('*.building'))


@pytest.fixture
def small_units(monkeypatch):
  """So that the fixture corpus is more than one unit."""
  limits = store_builder.Limits(unit_bytes=5000)
  monkeypatch.setattr(store_builder, 'LIMITS', limits)


@pytest.mark.usefixtures('small_units')
def test_worker_processes_and_shards_give_the_same_bytes(config, built, tmp_path):
  first = cache(config, tmp_path, '--gin.WORKERS=2', '--num_shards=3', '--shard_id=2')
  assert first.code == 0, first.err
  assert f'{TASK}/train: not whole yet; to be done: shard 0 and 1\n' in first.out
  assert '--num_shards=3 --shard_id=0 and --shard_id=1.' in first.out
  for shard in (1, 0):
    flags = ('--num_shards=3', f'--shard_id={shard}', '--gin.WORKERS=1')
    last = cache(config, tmp_path, *flags)
  assert last.out.splitlines()[-1] == built[1].out.splitlines()[-1]
  assert stores(tmp_path) == stores(built[0])


@pytest.mark.usefixtures('small_units')
def test_beam_gives_the_same_bytes(config, built, tmp_path):
  done = cache(config, tmp_path, '--gin.BEAM_RUNNER=DirectRunner')
  assert done.code == 0, done.err
  assert stores(tmp_path) == stores(built[0])


def test_training_reads_them(config, built):
  before = runs.hashes(built[0])
  vocabulary = fixture_tasks.vocabulary()
  for split in ('train', 'validation'):
    ((_, store, _),) = prepare.prepare(TASK, split, vocabulary, str(built[0]))
    assert store.num_tokens
  assert runs.hashes(built[0]) == before
  again = cache(config, built[0])
  assert 'tokenising' not in again.out and f'{TASK}/train: ' in again.out
  assert runs.hashes(built[0]) == before


def test_a_mixture_without_one_of_the_splits(config, tmp_path):
  done = cache(config, tmp_path, "--gin.cache_script.cache.splits=('train', 'test')")
  assert done.code == 0 and f"'{TASK}' has no split 'test'." in done.out
  done = cache(config, tmp_path, "--gin.cache_script.cache.splits=('test',)")
  assert done.code == 2 and 'has none of the splits test: it has train' in done.error


# --- Verifying.


@pytest.fixture
def copied(built, tmp_path):
  """(cache folder, the training store in it)."""
  shutil.copytree(built[0], tmp_path / 'cache')
  (store,) = (tmp_path / 'cache' / 'token_stores' / TASK).glob('train-*-v2')
  return tmp_path / 'cache', store


def test_verify(config, copied):
  done = cache(config, copied[0], '--verify')
  assert done.code == 0, done.err
  assert done.out.count(': whole: ') == 2


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _edit(path):
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


@pytest.mark.parametrize(
  ('file', 'damage', 'said'),
  [
    ('tokens/c/0', _flip, 'is damaged'),
    ('tokens/c/0', lambda path: path.write_bytes(path.read_bytes()[:50]), 'is damaged'),
    ('hashes/c/0/0', lambda path: path.unlink(), 'is damaged'),
    ('manifest.json', _edit, 'was edited'),
    ('manifest.json', lambda path: path.unlink(), 'not built'),
  ],
)
def test_verify_names_what_is_damaged(config, copied, file, damage, said):
  folder, store = copied
  damage(store / file)
  before = runs.hashes(folder)
  done = cache(config, folder, '--verify')
  assert done.code == 1 and 'of 2 token stores, ' in done.error
  (line,) = (line for line in done.out.splitlines() if said in line)
  assert line.startswith(f'{TASK}/train: ') and str(store) in line
  assert f'{TASK}/validation: whole' in done.out
  assert runs.hashes(folder) == before


def test_a_store_of_another_vocabulary(config, copied):
  """Renamed by hand, to where this vocabulary's would lie."""
  folder, store = copied
  other = seqio.ByteVocabulary()
  path = prepare.store_path(str(folder), seqio.TaskRegistry.get(TASK), 'train', other)
  store.rename(path)
  with pytest.raises(errors.Failure, match='made with another vocabulary'):
    prepare.prepare(TASK, 'train', other, str(folder))


# --- Mistakes.


def test_mistakes(config, tmp_path):
  for flags, said in (
    (('--num_shards=2', '--shard_id=2'), '--shard_id=2 with --num_shards=2'),
    (('--gin.WORKERS=0',), 'WORKERS = 0'),
    (('--gin.VOCABULARY_PATH=/no/v.model',), 'no vocabulary file at /no/v.model'),
  ):
    done = cache(config, tmp_path, *flags)
    assert done.code == 2 and said in done.error
  done = cache(config, tmp_path, name='fixture_empty')
  assert done.code == 2 and "no text in its split 'train'" in done.error
  assert not stores(tmp_path)


def test_full_disk(config, built, tmp_path):
  """What was built before is as it was, and when there is room it goes on."""
  shutil.copytree(built[0], tmp_path / 'cache')
  (store,) = (tmp_path / 'cache' / 'token_stores' / TASK).glob('train-*-v2')
  shutil.rmtree(store)
  before = stores(tmp_path / 'cache')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    done = cache(config, tmp_path / 'cache', '--gin.WORKERS=1')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert done.code == 1
  assert f'Cannot write {store}' in done.error and 'the disk is full' in done.error
  after = stores(tmp_path / 'cache')
  assert after.items() >= before.items() and not (store / 'manifest.json').exists()
  assert cache(config, tmp_path / 'cache', '--gin.WORKERS=1').code == 0
  assert stores(tmp_path / 'cache') == stores(built[0])


def test_without_beam(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'apache_beam', None)
  assert beam_runner.make(None) is None
  with pytest.raises(errors.UserError, match=r"pip install 'palm_t5x\[beam\]'"):
    beam_runner.make('DirectRunner')


# --- Where the text is not.


def test_stores_of_a_text_that_is_not_here(built, tmp_path):
  text = {'here': 'abc'}

  def documents(split):
    if not text['here']:
      raise errors.UserError('CORPUS_DIR is not set')
    return [f'{split} of {text["here"]}']

  source = sources.DocumentSource(documents, fingerprint=lambda split: text['here'])
  sources.add_text_task('elsewhere', source)
  vocabulary = fixture_tasks.vocabulary()
  get = lambda seed=0: prepare.prepare(
    'elsewhere', 'train', vocabulary, str(tmp_path), seed=seed
  )[0][1]
  try:
    first = get()
    text['here'] = None
    assert get().path == first.path
    with pytest.raises(errors.UserError, match='CORPUS_DIR is not set'):
      get(seed=5)
    text['here'] = 'def'
    second = get()
    text['here'] = None
    with pytest.raises(errors.UserError, match='several token stores') as e:
      get()
    assert all(pathlib.Path(s.path).name in str(e.value) for s in (first, second))
    shutil.rmtree(first.path)
    assert get().path == second.path
  finally:
    seqio.TaskRegistry.remove('elsewhere')
  assert token_store.read_manifest(second.path)

"""Building token stores: the same bytes by every way, and what the bytes must be."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs
import sentencepiece
import toy_stores
from toy_stores import LIMITS, TEXTS, THREE, build, build_shard, files, parts

from palm_t5x import errors
from palm_t5x.corpus import beam_runner, jobs, storage, store_builder, token_store
from palm_t5x.corpus.documents import Document, Part


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The store, and its files."""
  path = tmp_path_factory.mktemp('whole') / 'store'
  build(path)
  return path, files(path)


# --- What a store holds.


def mix(x, key):
  """SplitMix64's finaliser, in Python's integers."""
  x = (x ^ key) * 0xBF58476D1CE4E5B9 % 2**64
  x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
  return x ^ x >> 31


def order_of(texts, seed, task, split):
  """The documented order, in plain Python."""
  name = '\x1f'.join(map(str, ('document order', seed, task, split))).encode()
  keys = hashlib.blake2b(name, digest_size=48).digest()
  first, second = (int.from_bytes(keys[i : i + 8], 'little') for i in (0, 8))

  def key(text):
    found = hashlib.blake2b(text.encode(), digest_size=16).digest()
    a, b = (int.from_bytes(found[i : i + 8], 'little') for i in (0, 8))
    return mix(mix(a, first) ^ b, second), found

  return sorted(texts, key=key)


def test_a_store_is_what_its_format_says(tmp_path):
  """An oracle that shares no code: Python's sort and SentencePiece's own encoder."""
  import fixture_tasks  # TensorFlow

  model = sentencepiece.SentencePieceProcessor(model_file=fixture_tasks.VOCABULARY_PATH)
  texts = [*fixture_tasks.documents('train'), 'Zeile\r\nzwei\x00 3\u20ac', ' ']
  texts.append('longer than what a unit writes ' * 200)
  expected, offsets, found = [], [0], []
  for text in order_of(texts, 3, 'toy', 'train'):
    expected += [*model.encode(text), model.eos_id()]
    offsets.append(len(expected))
    found.append(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
  manifest = build(tmp_path / 's', texts, vocabulary=fixture_tasks.vocabulary(), seed=3)
  store = token_store.TokenStore(str(tmp_path / 's'))
  assert store.read(0, store.num_tokens).tolist() == expected
  assert store.offsets().tolist() == offsets
  assert [row.tobytes().hex() for row in store.hashes()] == found
  assert manifest.num_bytes == sum(len(text.encode()) for text in texts)
  store.verify()


def test_examples_with_inputs_over_many_files(tmp_path):
  examples = [
    {'inputs': [5] * (i % 4), 'targets': [6 + i, 7, 1][: 2 + i % 2], 'bytes': i}
    for i in range(50)
  ]
  documents = [Part(f'p{i}', lambda i=i: iter(examples[i::3]), 9) for i in range(3)]
  manifest = build(tmp_path / 's', documents)
  assert manifest.has_inputs and manifest.num_bytes == sum(range(50))

  def hash_of(example):
    ids = [*example['inputs'], *example['targets']]
    data = len(example['inputs']).to_bytes(8, 'little')
    data += b''.join(i.to_bytes(4, 'little') for i in ids)
    return hashlib.blake2b(data, digest_size=16).hexdigest()

  expected = {
    hash_of(e): ([*e['inputs'], *[t for t in e['targets'] if t != 1], 1], i % 4)
    for i, e in enumerate(examples)
  }
  store = token_store.TokenStore(str(tmp_path / 's'))
  stream, offsets = store.read(0, store.num_tokens).tolist(), store.offsets()
  found = zip(
    store.hashes(), itertools.pairwise(offsets), store.inputs_lengths(), strict=True
  )
  for row, (start, stop), inputs in found:
    assert expected.pop(row.tobytes().hex()) == (stream[start:stop], inputs)
  assert not expected
  store.verify()


def test_equal_keys_go_by_the_hash(tmp_path, monkeypatch):
  def few_keys(hashes, *args):
    return hashes[:, 0].astype(np.uint64) % 2 << np.uint64(63)

  monkeypatch.setattr(token_store, 'document_keys', few_keys)
  build(tmp_path / 's')
  rows = token_store.TokenStore(str(tmp_path / 's')).hashes()
  rows = [(row[0] % 2, row.tobytes()) for row in rows]
  assert rows == sorted(rows)


def test_the_manifest_counts(whole):
  manifest = token_store.read_manifest(str(whole[0]))
  assert manifest.num_documents == len(TEXTS) + 1 and manifest.num_empty == 6
  data = [text.encode() for text in [*TEXTS, TEXTS[7]]]
  assert manifest.num_bytes == sum(map(len, data))
  assert manifest.num_tokens == manifest.num_bytes + len(data)


def test_checksums_are_those_of_the_files_contents(whole):
  store = token_store.TokenStore(str(whole[0]))
  stream = store.read(0, store.num_tokens).astype('<u4').tobytes()
  digests = [
    hashlib.blake2b(stream[i : i + 1024], digest_size=16).digest()
    for i in range(0, len(stream), 1024)
  ]
  expected = hashlib.blake2b(b''.join(digests), digest_size=16).hexdigest()
  assert store.manifest.checksums['tokens'] == expected
  fields = json.loads(whole[1]['manifest.json'])
  found = fields.pop('checksum')
  text = json.dumps(fields, sort_keys=True).encode()
  assert found == hashlib.blake2b(text, digest_size=16).hexdigest()


# --- The same bytes.


@pytest.mark.parametrize(
  'ranges',
  [
    [range(len(TEXTS))],
    [range(40, 60), range(40)],
    [[i] for i in reversed(range(len(TEXTS)))],
  ],
)
def test_how_documents_are_cut_into_parts_does_not_matter(tmp_path, whole, ranges):
  limits = dataclasses.replace(LIMITS, run_bytes=10**6, unit_files=100)
  build(tmp_path / 's', parts(*ranges), limits=limits)
  assert files(tmp_path / 's') == whole[1]
  assert not os.path.exists(store_builder.work_folder(tmp_path / 's'))


def test_an_iterable_gives_the_same_store(tmp_path, whole):
  build(tmp_path / 's', lambda: (d for part in THREE for d in part.read()))
  assert files(tmp_path / 's') == whole[1]


def test_worker_processes_give_the_same_store(tmp_path, whole):
  with jobs.Pool(2) as pool:
    build(tmp_path / 'a', workers=pool)
    build(tmp_path / 'b', parts(range(60)), workers=pool)
  assert files(tmp_path / 'a') == whole[1]
  assert files(tmp_path / 'b') == whole[1]


@pytest.mark.slow
def test_seven_workers_give_the_same_store(tmp_path, whole):
  build(tmp_path / 's', parts(*([i] for i in range(len(TEXTS)))), workers=7)
  assert files(tmp_path / 's') == whole[1]


@pytest.mark.parametrize('ids_of_shards', [*itertools.permutations(range(3))])
def test_shards_give_the_same_store_in_any_order(tmp_path, whole, ids_of_shards):
  path = tmp_path / 's'
  for i, shard in enumerate(ids_of_shards):
    before = sorted(set(range(3)) - set(ids_of_shards[:i]))
    assert store_builder.outstanding(path, 3) == before
    manifest = build(path, shard_id=shard, num_shards=3)
    assert (manifest is None) == (i < 2)
  assert files(path) == whole[1]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['s', 's.lock']


def test_shards_side_by_side(tmp_path, whole):
  context = multiprocessing.get_context('spawn')
  children = [
    context.Process(target=build_shard, args=(str(tmp_path / 's'), i, 2))
    for i in range(2)
  ]
  for child in children:
    child.start()
  for child in children:
    child.join(60)
    assert child.exitcode == 0
  assert files(tmp_path / 's') == whole[1]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['s', 's.lock']


def test_a_bucket_gives_the_same_store(tmp_path, whole):
  """By URL, which is what a bucket has: no locks, no folders, only keys."""
  url = f'file://{tmp_path}/bucket/s'
  assert storage.is_remote(url)
  assert build(url, shard_id=1, num_shards=2) is None
  assert build(url, shard_id=0, num_shards=2)
  assert files(tmp_path / 'bucket' / 's') == whole[1]
  assert storage.list_folders(f'file://{tmp_path}/bucket') == ['s']
  assert not storage.exists(store_builder.work_folder(url))
  token_store.TokenStore(url).verify()


# --- Kills, damage and a full disk.


class Killed(BaseException):
  """Stands for SIGKILL: nothing but the test catches it."""


@pytest.fixture
def dying(monkeypatch):
  """dying.after = n: the process is as good as dead after writing n more files."""

  class Dying:
    after = 0

    def wrap(self, function):
      def call(*args):
        self.after -= 1
        if self.after < 0:
          raise Killed
        return function(*args)

      return call

  dying = Dying()
  monkeypatch.setattr(storage, 'write_bytes', dying.wrap(storage.write_bytes))
  monkeypatch.setattr(store_builder, '_write', dying.wrap(store_builder._write))
  return dying


def test_killed_again_and_again_it_goes_on_from_there(
  tmp_path, whole, dying, monkeypatch
):
  path, kills, done, perform = tmp_path / 's', 0, [], jobs.Job.perform

  def record(self, stage, unit):
    facts = perform(self, stage, unit)
    done.append((stage, unit.name))
    return facts

  monkeypatch.setattr(jobs.Job, 'perform', record)
  while True:
    dying.after = kills % 40  # sometimes less than a unit writes, sometimes more
    try:
      build(path)
      break
    except Killed:
      kills += 1
      assert token_store.read_manifest(str(path)) is None or files(path) == whole[1]
      assert kills < 1000
  assert kills > 10
  assert len(done) == len(set(done)) > 10, 'no finished unit is done again'
  assert files(path) == whole[1]


@pytest.mark.slow
def test_killed_at_every_write(tmp_path, whole, dying):
  for n in itertools.count():
    path = tmp_path / str(n)
    dying.after = n
    try:
      build(path)
      break
    except Killed:
      dying.after = 10**9
      build(path)
      assert files(path) == whole[1]
  assert n > 50


def test_killed_while_it_clears_up(tmp_path, whole, monkeypatch):
  path = tmp_path / 's'
  with monkeypatch.context() as patch:
    patch.setattr(jobs.Job, 'delete', lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
      build(path)
  work = pathlib.Path(store_builder.work_folder(path))
  assert (work / 'settings.json').exists()
  assert build(path, lambda: 1 / 0) == token_store.read_manifest(str(path))
  assert not work.exists() and files(path) == whole[1]


def test_what_is_left_of_a_deleted_work_folder_does_not_count(tmp_path, whole):
  path, folder = tmp_path / 's', pathlib.Path(store_builder.work_folder(tmp_path / 's'))
  build(path, shard_id=0, num_shards=2)
  (folder / 'settings.json').unlink()
  for file in (folder / 'runs').iterdir():
    file.unlink()
  build(path)
  assert files(path) == whole[1]


def test_begun_for_other_documents(tmp_path, whole):
  build(tmp_path / 's', parts(range(30), range(30, 60)), shard_id=0, num_shards=2)
  with pytest.raises(errors.UserError, match='begun with other settings: documents'):
    build(tmp_path / 's', shard_id=1, num_shards=2)
  build(tmp_path / 's')
  assert files(tmp_path / 's') == whole[1]


def test_full_disk_leaves_nothing_that_passes_for_a_store(tmp_path, whole, monkeypatch):
  def full(build, *args):
    with storage.writing(build.path):
      raise ValueError('RESOURCE_EXHAUSTED: No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(store_builder, '_write', full)
    with pytest.raises(errors.Failure, match='disk is full'):
      build(tmp_path / 's')
  assert token_store.read_manifest(str(tmp_path / 's')) is None
  build(tmp_path / 's')
  assert files(tmp_path / 's') == whole[1]


def test_files_deleted_before_the_end_are_missed(tmp_path, monkeypatch):
  path = tmp_path / 's'
  finish = store_builder._finish

  def without_one(build):
    (path / 'tokens' / 'c' / '1').unlink()
    return finish(build)

  monkeypatch.setattr(store_builder, '_finish', without_one)
  with pytest.raises(errors.Failure, match=r'tokens has \d+ files.*\.building and run'):
    build(path)


def test_mixed_kinds(tmp_path):
  mixed = ['text', {'targets': [4], 'bytes': 1}]
  kinds = r'different kinds .*\(targets, text\)'
  with pytest.raises(errors.UserError, match=kinds):
    build(tmp_path / 's', mixed)
  parts = [Part(f'p{i}', lambda i=i: iter([mixed[i]]), 9) for i in range(2)]
  with pytest.raises(errors.UserError, match=kinds):
    build(tmp_path / 's', parts)


def test_no_text_in_any_part(tmp_path):
  empty = [Part(f'p{i}', lambda: iter(['']), 9) for i in range(2)]
  with pytest.raises(errors.UserError, match="'toy' has no text in its split 'train'"):
    build(tmp_path / 's', empty)


def test_a_mistake_in_one_part_costs_the_others_nothing(tmp_path, whole, monkeypatch):
  def mistake():
    raise errors.UserError('line 3 of x.jsonl is no document')

  path, work = tmp_path / 's', tmp_path / 's.building'
  bad = [*THREE[:2], Part(THREE[2].name, mistake, THREE[2].num_bytes)]
  with pytest.raises(errors.UserError, match=r'^line 3 of x\.jsonl'):
    build(path, bad)
  with pytest.raises(errors.UserError, match='--shard_id=5 with --num_shards=2'):
    build(path, shard_id=5, num_shards=2)
  assert len(list(work.glob('tokenise/*.json'))) == 2
  build(path, [Part(p.name, mistake, p.num_bytes) for p in THREE[:2]] + THREE[2:])
  assert files(path) == whole[1]


# --- Slow: real kills, memory, Beam.

KILLED = """
import sys
sys.path.insert(0, TESTS)
import toy_stores as t
t.build(sys.argv[1], t.parts(*([i] for i in range(60))), workers=int(sys.argv[2]))
""".replace('TESTS', repr(os.path.dirname(__file__)))


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_killed_five_times(tmp_path, whole, workers):
  rng, path = random.Random(workers), tmp_path / 's'
  args = [sys.executable, '-c', KILLED, str(path), str(workers)]
  slow = {**os.environ, 'TOY_SECONDS': '0.1'}  # for each part: six in all
  for _ in range(5):
    process = subprocess.Popen(args, env=slow)
    while process.poll() is None and not path.with_name('s.building').exists():
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    assert process.poll() is None, 'it was built before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()
  done = len(list(path.with_name('s.building').glob('tokenise/*.json')))
  assert done > 5, 'a build goes on where the one before was killed'
  subprocess.run(args, check=True)
  assert files(path) == whole[1]


MEMORY = """
import functools, sys
sys.path.insert(0, TESTS)
from palm_t5x.corpus import store_builder, token_store
from palm_t5x.corpus.documents import Part
import toy_stores

def read(part, count):
  for i in range(count):
    yield f'{part} {i} ' + 'abcdefgh' * 120

if __name__ == '__main__':
  count = int(sys.argv[2])
  parts = [Part(f'p{i}', functools.partial(read, i, count), 1) for i in range(2)]
  store_builder.build(
    sys.argv[1], parts, toy_stores.Bytes(), task='t', split='s',
    limits=store_builder.Limits(run_bytes=8 << 20, unit_files=1),
  )
  print(PEAK)
""".replace('TESTS', repr(os.path.dirname(__file__))).replace('PEAK', runs.PEAK)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_the_corpus(tmp_path):
  """614 MB of ids in runs of 8 MB: less memory than the ids alone would need."""
  script = tmp_path / 'memory.py'
  script.write_text(MEMORY)
  args = [sys.executable, str(script), str(tmp_path / 's'), '80000']
  done = subprocess.run(args, capture_output=True, text=True, check=True)
  manifest = token_store.read_manifest(str(tmp_path / 's'))
  assert manifest.num_tokens * 4 > 600e6
  assert int(done.stdout) < 400, 'MB'


@pytest.mark.slow
def test_beam_gives_the_same_store(tmp_path, whole):
  build(tmp_path / 's', runner=beam_runner.Beam('DirectRunner'))
  assert files(tmp_path / 's') == whole[1]
  assert not os.path.exists(store_builder.work_folder(tmp_path / 's'))


@pytest.mark.slow
def test_beam_says_what_a_unit_said_and_goes_on(tmp_path, whole):
  bad = [*THREE[:2], Part(THREE[2].name, toy_stores.failing, THREE[2].num_bytes)]
  runner = beam_runner.Beam('DirectRunner')
  with pytest.raises(errors.Failure, match=r'^line 3 of x\.jsonl is no document$'):
    build(tmp_path / 's', bad, runner=runner)
  build(tmp_path / 's', runner=runner)
  assert files(tmp_path / 's') == whole[1]


def test_tokens_by_language_are_counted(tmp_path):
  texts = [
    ('en', 'one two'),
    ('de', 'eins'),
    (None, 'x'),
    ('en', 'three'),
    ('und', '?'),
  ]

  def read():
    for i, (language, text) in enumerate(texts):
      meta = {} if language is None else {'language': language}
      yield Document(str(i), text, meta=meta)

  manifest = toy_stores.build(str(tmp_path / 'store'), [Part('a', read, 10)])
  expected = {}
  for language, text in texts:
    if language:
      expected[language] = expected.get(language, 0) + len(toy_stores.ids(text))
  assert manifest.languages == expected
  assert token_store.read_manifest(str(tmp_path / 'store')).languages == expected

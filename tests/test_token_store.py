"""The token store: what is written is what is read, and damage is never read."""

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from toy_stores import TEXTS, Bytes, files, ids

from palm_t5x import errors
from palm_t5x.corpus import reader, store_builder, token_store


def build(path, texts=TEXTS, **kwargs):
  kwargs = {'task': 'toy', 'split': 'train', **kwargs}
  return store_builder.build(str(path), texts, Bytes(), **kwargs)


@pytest.fixture
def store(tmp_path):
  build(tmp_path / 'store')
  return token_store.TokenStore(str(tmp_path / 'store'))


def test_holds_every_document_once_each_ended(store):
  stream, offsets = store.read(0, store.num_tokens), store.offsets()
  found = [stream[a:b].tolist() for a, b in itertools.pairwise(offsets)]
  assert sorted(found) == sorted(ids(text) for text in TEXTS)
  assert found != [ids(text) for text in TEXTS], 'the order is seeded, not the source'
  assert store.num_bytes == sum(len(text.encode()) for text in TEXTS)
  assert store.num_documents == len(TEXTS) == len(store.hashes())
  assert store.manifest.eos_id == 1 and not store.manifest.has_inputs


def test_rows_are_slices_that_share_one_token(store):
  stream, T = store.read(0, store.num_tokens), 16
  rows = store.rows(T, [3, 0, store.num_rows(T) - 1])
  for row, r in zip(rows, [3, 0, store.num_rows(T) - 1], strict=True):
    np.testing.assert_array_equal(row, stream[r * T : r * T + T + 1])
  with pytest.raises(IndexError):
    store.rows(T, [store.num_rows(T)])


def test_same_bytes_every_time(tmp_path):
  build(tmp_path / 'a')
  build(tmp_path / 'b')
  assert files(tmp_path / 'a') == files(tmp_path / 'b')
  build(tmp_path / 'c', seed=1)
  assert files(tmp_path / 'c') != files(tmp_path / 'a')


def test_many_shards(tmp_path, store):
  small = token_store.Layout(tokens=256, chunk=32, offsets=16, hashes=8)
  build(tmp_path / 'many', layout=small)
  many = token_store.TokenStore(str(tmp_path / 'many'))
  assert len(files(tmp_path / 'many' / 'tokens')) > 5
  many.verify(workers=2)
  np.testing.assert_array_equal(
    many.read(0, many.num_tokens), store.read(0, store.num_tokens)
  )
  np.testing.assert_array_equal(many.offsets(), store.offsets())
  np.testing.assert_array_equal(many.hashes(), store.hashes())


def test_a_whole_store_is_kept(tmp_path):
  first = build(tmp_path / 's')
  assert build(tmp_path / 's', texts=lambda: 1 / 0) == first


def test_progress_reaches_the_end(tmp_path):
  calls = []
  build(tmp_path / 's', progress=lambda *call: calls.append(call))
  assert {label for label, _, _ in calls} == {'tokenising toy/train'}
  assert max(done for _, done, _ in calls) == sum(len(t.encode()) for t in TEXTS)


def test_half_surrogates_become_replacement_characters(tmp_path):
  build(tmp_path / 's', texts=['a\ud800b'])
  store = token_store.TokenStore(str(tmp_path / 's'))
  assert store.read(0, store.num_tokens).tolist() == ids('a\ufffdb')


@pytest.mark.parametrize('texts', [[], ['', '']])
def test_no_documents(tmp_path, texts):
  with pytest.raises(errors.UserError, match="'toy' has no text in its split 'train'"):
    build(tmp_path / 's', texts=texts)
  assert token_store.read_manifest(str(tmp_path / 's')) is None


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 0x40
  path.write_bytes(data)


@pytest.mark.parametrize('damage', [flip, os.remove, lambda p: p.write_bytes(b'')])
def test_damage_is_one_clear_failure(store, damage):
  path = pathlib.Path(store.path)
  shard = next(f for f in sorted((path / 'tokens').rglob('*')) if f.name == '0')
  damage(shard)
  fresh = token_store.TokenStore(store.path)
  for read in (lambda: fresh.rows(8, [0, 1]), fresh.verify):
    with pytest.raises(errors.Failure) as e:
      read()
    assert store.path in str(e.value) and 'Delete that folder' in str(e.value)
    assert '\n' not in str(e.value)


def test_a_wrong_but_well_formed_array_fails_verification(store, tmp_path):
  other = [text.replace('words', 'WORDS') for text in TEXTS]
  build(tmp_path / 'other', texts=other)
  shard = next(f for f in (tmp_path / 'other' / 'tokens').rglob('*') if f.name == '0')
  target = pathlib.Path(store.path) / shard.relative_to(tmp_path / 'other')
  target.write_bytes(shard.read_bytes())
  with pytest.raises(errors.Failure, match=r"checksum of 'tokens'"):
    token_store.TokenStore(store.path).verify()


def test_damaged_or_missing_manifest(store):
  manifest = pathlib.Path(store.path) / 'manifest.json'
  text = manifest.read_text()
  for edit in ({'num_tokens': 5}, {'vocabulary_hash': 'x'}, {'checksum': '0'}):
    manifest.write_text(json.dumps({**json.loads(text), **edit}))
    with pytest.raises(errors.Failure, match='was edited, its checksum does not match'):
      token_store.TokenStore(store.path)
  manifest.write_text('{"task":')
  with pytest.raises(errors.Failure, match='cannot be understood'):
    token_store.TokenStore(store.path)
  manifest.write_text(text.replace('"format": 2', '"format": 1'))
  with pytest.raises(errors.Failure, match='has format 1, this version reads format 2'):
    token_store.TokenStore(store.path)
  manifest.unlink()
  with pytest.raises(errors.Failure, match='no whole token store'):
    token_store.TokenStore(store.path)


def test_a_manifest_of_another_length(store):
  other = dataclasses.replace(store.manifest, num_tokens=5)
  (pathlib.Path(store.path) / 'manifest.json').write_bytes(other.to_json())
  with pytest.raises(errors.Failure, match='manifest says 5'):
    token_store.TokenStore(store.path)


def _build_in_child(path):
  build(path)


def test_two_builders_take_turns(tmp_path):
  context = multiprocessing.get_context('spawn')
  children = [
    context.Process(target=_build_in_child, args=(str(tmp_path / 's'),))
    for _ in range(2)
  ]
  for child in children:
    child.start()
  for child in children:
    child.join(60)
    assert child.exitcode == 0
  token_store.TokenStore(str(tmp_path / 's')).verify()


def test_unwritable_folder(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.Failure, match='Cannot write'):
    build(tmp_path / 'file' / 'store')


def test_examples_keep_inputs_and_end_targets(tmp_path):
  examples = [
    {'inputs': [5, 6], 'targets': [7, 8], 'bytes': 2},
    {'inputs': [], 'targets': [9, 1], 'bytes': 1},
  ]
  manifest = build(tmp_path / 's', texts=examples)
  store = token_store.TokenStore(str(tmp_path / 's'))
  offsets, stream = store.offsets(), store.read(0, store.num_tokens)
  found = {
    tuple(stream[a:b].tolist()): int(n)
    for (a, b), n in zip(
      itertools.pairwise(offsets), store.inputs_lengths(), strict=True
    )
  }
  assert found == {(5, 6, 7, 8, 1): 2, (9, 1): 0}
  assert manifest.has_inputs and manifest.num_bytes == 3
  store.verify()


def test_spans_of_any_length(store):
  stream = store.read(0, store.num_tokens)
  spans = store.spans([5, 0], [3, 7])
  np.testing.assert_array_equal(spans, [*stream[5:8], *stream[:7]])


def test_reader_does_not_import_tensorflow():
  script = (
    'import sys; from palm_t5x.corpus import reader, store_builder, token_store; '
    'print([m for m in ("tensorflow", "seqio", "jax") if m in sys.modules])'
  )
  out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
  assert out.stdout.strip() == '[]', out
  assert reader.__name__ == 'palm_t5x.corpus.reader'


@pytest.mark.parametrize('shared', [False, True])
def test_waiting_for_another_builder_is_said(tmp_path, caplog, shared):
  caplog.set_level(logging.INFO, 'palm_t5x')
  path, order = str(tmp_path / 'store'), []

  def wait():
    with token_store.only_builder(path, shared):
      order.append('second')

  second = threading.Thread(target=wait)
  with token_store.only_builder(path):
    assert not caplog.messages
    second.start()
    deadline = time.monotonic() + 20
    while not caplog.messages:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    order.append('first')
  second.join(20)
  assert order == ['first', 'second']
  assert caplog.messages == [f'waiting for another process that works on {path}']

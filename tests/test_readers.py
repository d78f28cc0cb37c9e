"""Readers: every format gives back what was written; damage is told, never fatal."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import pickle
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_t5x import errors
from palm_t5x.corpus import (
  documents,
  dump_formats,
  readers,
  records,
  streams,
  tfds_reader,
)
from palm_t5x.corpus.records import Broken, Ignored

PACKERS = {
  '': lambda data: data,
  '.gz': gzip.compress,
  '.bz2': bz2.compress,
  '.xz': lzma.compress,
  '.zst': lambda data: zstandard.ZstdCompressor().compress(data),
}
TEXTS = ['Grüße\nund mehr', 'two\ttabs', 'naïve 字 🎉', '']


def everything(reader, folder):
  """All that the parts of a folder yield, after a pickle as for another process."""
  parts = pickle.loads(pickle.dumps(reader.parts(str(folder))))
  assert len({part.name for part in parts}) == len(parts)
  assert all(re.fullmatch('[A-Za-z0-9._-]+', part.name) for part in parts)
  return [item for part in parts for item in part.read()]


def good(items):
  return [item for item in items if isinstance(item, documents.Document)]


def reasons(items):
  return [item.reason for item in items if isinstance(item, Broken)]


def write_lines(path, texts, pack=PACKERS['']):
  lines = [json.dumps({'text': text, 'id': i}) + '\n' for i, text in enumerate(texts)]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pack(''.join(lines).encode()))


@pytest.mark.parametrize('suffix', PACKERS)
def test_text_and_lines_in_every_compression(tmp_path, suffix):
  write_lines(tmp_path / 'a' / f'x.jsonl{suffix}', TEXTS, PACKERS[suffix])
  (tmp_path / f'b.txt{suffix}').write_bytes(PACKERS[suffix]('één\r\n'.encode()))
  items = everything(readers.Files(), tmp_path)
  assert [d.text for d in items] == [*TEXTS, 'één\r\n']
  assert [d.id for d in items] == [
    *(f'a/x.jsonl{suffix}#{i}' for i in range(4)),
    f'b.txt{suffix}',
  ]


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=8))
def test_round_trip_of_arbitrary_texts(tmp_path_factory, texts):
  """Whatever JSON or parquet can hold comes back; half surrogates become U+FFFD."""
  folder = tmp_path_factory.mktemp('any')
  for suffix, pack in PACKERS.items():
    write_lines(folder / f'x.jsonl{suffix}', texts, pack)
  clean = [documents.clean(text) for text in texts]
  table = pa.table({'text': clean, 'id': [str(i) for i in range(len(texts))]})
  pq.write_table(table, folder / 'x.parquet', row_group_size=3)
  items = everything(readers.Files(), folder)
  assert [d.text for d in items] == clean * (len(PACKERS) + 1)
  assert len({d.id for d in items}) == len(items)


@pytest.mark.parametrize('suffix', ['.jsonl', '.txt'])
@pytest.mark.parametrize('part_bytes', [7, 64, 1000])
def test_ranges_of_a_file_cover_each_line_once(tmp_path, suffix, part_bytes):
  texts = [f'{i} ' + 'x' * (i * 37 % 90) for i in range(60)]
  path = tmp_path / f'x{suffix}'
  if suffix == '.txt':
    path.write_text('\n'.join(texts))  # the last line has no end
  else:
    write_lines(path, texts)
  reader = readers.Files(lines_are_documents=True, part_bytes=part_bytes)
  assert len(reader.parts(str(tmp_path))) == path.stat().st_size // part_bytes + 1
  items = everything(reader, tmp_path)
  assert [d.text for d in items] == texts
  assert len({d.id for d in items}) == len(texts)


def test_a_parquet_file_is_cut_at_row_groups(tmp_path):
  table = pa.table({'body': [f'row {i}' for i in range(1000)], 'n': range(1000)})
  pq.write_table(table, tmp_path / 'x.parquet', row_group_size=10)
  reader = readers.Files(text_key='body', part_bytes=2000, meta_keys=('n',))
  assert len(reader.parts(str(tmp_path))) > 3
  items = everything(reader, tmp_path)
  assert [d.text for d in items] == table['body'].to_pylist()
  assert [d.meta['n'] for d in items] == list(range(1000))
  assert len({d.id for d in items}) == 1000


def test_broken_records_are_told_with_their_place(tmp_path):
  lines = [
    b'{"text": "fine"}',
    b'{"text": "\xff"}',
    b'{"text": ',
    b'{"txt": "no"}',
    b'{"text": 3}',
    b'["text"]',
    b'',
    b'[' * 200_000,
    b'{"text": "' + b'y' * 500_000 + b'"}',
    b'{"text": "fine too", "n": ' + b'1' * 5000 + b'}',
    b'{"text": "half a pair \\ud800"}',
  ]
  (tmp_path / 'x.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(lines))
  items = everything(readers.Files(max_document_bytes=300_000), tmp_path)
  assert [d.text for d in good(items)] == ['fine', 'half a pair \ufffd']
  assert [(b.place, b.reason) for b in items if isinstance(b, Broken)] == [
    ('x.jsonl:2', 'invalid UTF-8'),
    ('x.jsonl:3', 'invalid JSON'),
    ('x.jsonl:4', 'no text'),
    ('x.jsonl:5', 'text is no string'),
    ('x.jsonl:6', 'not a JSON object'),
    ('x.jsonl:8', 'invalid JSON'),
    ('x.jsonl:9', 'longer than max_document_bytes'),
    ('x.jsonl:10', 'invalid JSON'),  # Python refuses to parse such a number
  ]


@pytest.mark.parametrize('suffix', ['.gz', '.zst', '.bz2', '.xz'])
def test_a_cut_off_file_gives_what_comes_before(tmp_path, suffix):
  # bzip2's blocks are 900 kB of text: what is lost is less than one.
  number = 7_000 if suffix == '.bz2' else 3_000
  texts = [os.urandom(150).hex() for _ in range(number)]
  write_lines(tmp_path / f'x.jsonl{suffix}', texts, PACKERS[suffix])
  path = tmp_path / f'x.jsonl{suffix}'
  size = path.stat().st_size
  for left in (size - 1, size // 2, 3):
    os.truncate(path, left)
    items = everything(readers.Files(), tmp_path)
    found = good(items)
    assert [d.text for d in found] == texts[: len(found)]
    assert left == 3 or len(found) * size >= 0.3 * left * len(texts)
    (broken,) = items[len(found) :]
    assert broken.place == f'x.jsonl{suffix}, after line {len(found)}'
    assert 'cut-off' in broken.reason
  path.write_bytes(b'no such format at all')
  assert reasons(everything(readers.Files(), tmp_path)) == [f'damaged {suffix} file']


def test_several_members_and_frames_are_one_file(tmp_path):
  for suffix in ('.gz', '.zst', '.bz2', '.xz'):
    pack = PACKERS[suffix]
    path = tmp_path / f'x.txt{suffix}'
    path.write_bytes(pack(b'one ') + pack(b'two ' * 9) + pack(b'') + pack(b'three'))
    assert b''.join(streams.blocks(str(path))) == b'one ' + b'two ' * 9 + b'three'


def test_a_damaged_parquet_file(tmp_path):
  table = pa.table({'text': [os.urandom(50).hex() for _ in range(300)]})
  pq.write_table(table, tmp_path / 'x.parquet', row_group_size=100)
  data = bytearray((tmp_path / 'x.parquet').read_bytes())
  data[len(data) // 2 - 200 : len(data) // 2 + 200] = os.urandom(400)
  data[len(data) // 2 - 3000] ^= 255
  (tmp_path / 'cut.parquet').write_bytes(data[:-30])
  other = pa.table({'other': ['a']})
  pq.write_table(other, tmp_path / 'other.parquet')
  column = pa.array([b'ok', b'\xff'], pa.binary()).view(pa.string())
  pq.write_table(pa.table({'text': column}), tmp_path / 'utf.parquet')
  items = everything(readers.Files(), tmp_path)
  assert len(good(items)) == 301
  assert reasons(items) == ['damaged .parquet file', 'no column text', 'invalid UTF-8']


@pytest.mark.parametrize('name', ['x.jsonl', 'x.parquet', 'wiki_00', 't.jsonl'])
@pytest.mark.parametrize('suffix', PACKERS)
def test_no_damage_is_fatal(tmp_path, name, suffix):
  """Bytes changed, left out or put in at random: documents and broken records."""
  if name == 'x.parquet':
    table = pa.table({'text': [os.urandom(30).hex() for _ in range(100)]})
    codec = {'': 'none', '.gz': 'gzip', '.zst': 'zstd'}.get(suffix, 'snappy')
    path = tmp_path / name
    pq.write_table(table, path, 30, compression=codec, write_page_checksum=True)
    data = path.read_bytes()
  else:
    line = {
      'x.jsonl': '{{"text": "{0} {1}", "id": {0}}}\n',
      't.jsonl': '{{"id": {0}, "thread": 7, "parent": 3, "text": "{1}"}}\n',
      'wiki_00': '<doc id="{0}" url="u" title="{0}">\n{0}\n\n{1}\n</doc>\n',
    }[name]
    text = ''.join(line.format(i, os.urandom(30).hex()) for i in range(100))
    data = PACKERS[suffix](text.encode())
    path = tmp_path / f'{name}{suffix}'
  reader = {'w': dump_formats.WikiExtractor, 't': dump_formats.Threads}.get(
    name[0], readers.Files
  )()
  rng = random.Random(name + suffix)
  path.write_bytes(data)
  whole = len(everything(reader, tmp_path))
  assert whole in (1, 100)
  for _ in range(25):
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 5))):
      at = rng.randrange(len(data))
      kind = rng.randrange(4)
      if kind < 2:
        damaged[at : at + 1] = [bytes([rng.randrange(256)]), b''][kind]
      elif kind == 2:
        damaged[at:at] = rng.randbytes(20)
      else:
        del damaged[at:]
    path.write_bytes(damaged)
    items = everything(reader, tmp_path)
    assert items and all(isinstance(i, documents.Document | Broken) for i in items)
    if suffix == '' and name == 'x.parquet':  # its pages have checksums
      assert {d.text for d in good(items)} <= set(table['text'].to_pylist())


def test_workers_need_neither_tensorflow_nor_jax():
  modules = (
    'readers dump_formats tfds_reader language web conversations prose quality '
    'quality_report'
  )
  code = f"""
import importlib, sys
for name in {modules!r}.split():
  importlib.import_module('palm_t5x.corpus.' + name)
print({{'tensorflow', 'jax', 'seqio', 'sklearn', 'py3langid'}} & set(sys.modules))
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
  assert done.stdout.decode().strip() == 'set()'


def test_text_files_that_are_no_text(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'caf\xe9')
  (tmp_path / 'b.txt').write_bytes(b'')
  (tmp_path / 'c.txt').write_bytes(b'x' * 101)
  (tmp_path / 'd.jsonl').write_bytes(b'')
  (tmp_path / 'e.txt').symlink_to(tmp_path / 'nowhere')
  (tmp_path / 'f.txt').write_text('good')
  reader = readers.Files(max_document_bytes=100)
  items = everything(reader, tmp_path)
  assert [d.text for d in good(items)] == ['good']
  assert reasons(items) == [
    'invalid UTF-8',
    'empty file',
    'longer than max_document_bytes',
    'empty file',
  ]
  reader = readers.Files(invalid_utf8='replace', pattern='a.*')
  assert [d.text for d in everything(reader, tmp_path)] == ['caf\ufffd']
  with pytest.raises(errors.UserError, match='invalid_utf8'):
    readers.Files(invalid_utf8='ignore')


def test_fields_by_any_name(tmp_path):
  record = {'title': 'T', 'body': 'B', 'key': 'k7', 'link': 'http://x', 'year': 1999}
  (tmp_path / 'x.jsonl').write_text(json.dumps(record))
  reader = readers.Files(
    text_key=('title', 'subtitle', 'body'),
    id_key='key',
    source_key='link',
    meta_keys=('year', 'month'),
  )
  assert everything(reader, tmp_path) == [
    documents.Document('x.jsonl#k7', 'T\nB', 'http://x', {'year': 1999})
  ]


def test_all_readers_can_be_named_in_one_place():
  names = {'Files', 'SourceTree', 'Tfds', 'Threads', 'WikiExtractor'}
  assert {n for n in names if dataclasses.is_dataclass(getattr(readers, n))} == names


def test_nothing_to_read_says_where_and_what(tmp_path, caplog):
  for folder in (tmp_path / 'missing', tmp_path):
    for reader in (readers.Files(), readers.SourceTree()):
      with pytest.raises(errors.UserError, match=re.escape(str(folder))):
        reader.parts(str(folder))
  (tmp_path / 'x.docx').write_text('x')
  (tmp_path / '.hidden.txt').write_text('x')
  with pytest.raises(errors.UserError, match=r'none of the 1 files .*\.jsonl'):
    readers.Files().parts(str(tmp_path))
  with pytest.raises(errors.UserError, match=r'files like \*\.txt'):
    readers.Files(pattern='*.txt').parts(str(tmp_path))
  with pytest.raises(errors.UserError, match='mount'):
    readers.Files().parts('gs://bucket/raw')
  (tmp_path / 'x.txt').write_text('x')
  readers.Files().parts(str(tmp_path))
  assert '.docx (1)' in caplog.text


def test_parts_do_not_depend_on_the_place(tmp_path):
  found = []
  for name in ('here', 'elsewhere/deeper'):
    write_lines(tmp_path / name / 'a' / 'x.jsonl', TEXTS)
    write_lines(tmp_path / name / 'b.jsonl.gz', TEXTS, gzip.compress)
    reader = readers.Files(part_bytes=50)
    parts = reader.parts(str(tmp_path / name))
    items = everything(reader, tmp_path / name)
    found.append(([(p.name, p.num_bytes) for p in parts], items))
  assert found[0] == found[1]


def test_links_in_circles_end(tmp_path):
  (tmp_path / 'data' / 'a').mkdir(parents=True)
  (tmp_path / 'data' / 'a' / 'x.txt').write_text('x')
  (tmp_path / 'data' / 'a' / 'round').symlink_to(tmp_path / 'data')
  (tmp_path / 'outside').mkdir()
  (tmp_path / 'outside' / 'y.txt').write_text('y')
  (tmp_path / 'data' / 'more').symlink_to(tmp_path / 'outside')
  assert [d.id for d in everything(readers.Files(), tmp_path / 'data')] == [
    'a/x.txt',
    'more/y.txt',
  ]


def test_a_tree_of_source_files(tmp_path):
  files = {
    'me/one/setup.py': b'import os\n',
    'me/one/src/Main.JAVA': b'class Main {}\n',
    'me/one/logo.png': b'\x89PNG\0\0',
    'me/one/__init__.py': b'',
    'me/one/old.py': b'# caf\xe9\n',
    'me/one/.git/config': b'[core]\n',
    'me/one/big.py': b'x' * 300,
    'you/two/Makefile': b'all:\n',
  }
  for name, data in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  (tmp_path / 'you/two/again.py').symlink_to(tmp_path / 'me/one/setup.py')
  reader = readers.SourceTree(repository_levels=2, max_document_bytes=200)
  items = everything(reader, tmp_path)
  assert [(d.id, d.meta) for d in good(items)] == [
    ('me/one/setup.py', {'repository': 'me/one', 'extension': 'py'}),
    ('me/one/src/Main.JAVA', {'repository': 'me/one', 'extension': 'java'}),
    ('you/two/Makefile', {'repository': 'you/two', 'extension': ''}),
  ]
  assert good(items)[0].text == 'import os\n'
  ignored = {item.place: item.reason for item in items if isinstance(item, Ignored)}
  assert ignored == {
    'me/one/__init__.py': 'empty file',
    'me/one/big.py': 'longer than max_document_bytes',
    'me/one/logo.png': 'binary file',
    'me/one/old.py': 'invalid UTF-8',
  }
  reader = readers.SourceTree(extensions=('.java',), part_bytes=1)
  assert [d.id for d in everything(reader, tmp_path)] == ['me/one/src/Main.JAVA']
  # A repository stays with one worker, whatever a part's size.
  parts = readers.SourceTree(part_bytes=320).parts(str(tmp_path))
  assert [{item.id.split('/')[0] for item in good(p.read())} for p in parts] == [
    {'me'},
    {'you'},
  ]


def test_broken_records_are_counted_and_bounded(caplog):
  items = [documents.Document(str(i), 'é') for i in range(50)]
  items[10:10] = [Broken(f'x:{i}', 'invalid JSON') for i in range(7)]
  items[5:5] = [Ignored('y', 'binary file')] * 30
  counts = records.Counts()
  kept = list(records.tolerant(items, counts, max_broken=7))
  assert [d.id for d in kept] == [str(i) for i in range(50)]
  assert counts.facts() == {
    'documents': 50,
    'text_bytes': 100,
    'broken': {'invalid JSON': 7},
    'ignored': {'binary file': 30},
    'places': [f'x:{i}: invalid JSON' for i in range(5)],
  }
  assert 'x:4' in caplog.text and 'x:6' not in caplog.text and '7 broken' in caplog.text
  both = records.Counts(**counts.facts())
  both.merge(counts)
  assert (both.documents, both.broken) == (100, {'invalid JSON': 14})
  assert counts.broken == {'invalid JSON': 7}
  with pytest.raises(
    errors.Failure, match=r'7 of the first 47 .* x:6 .*MAX_BROKEN = 6'
  ):
    list(records.tolerant(items, max_broken=6))
  assert list(records.tolerant(items, max_broken=0, max_broken_share=0.2))


LONG_LINE = """
from palm_t5x.corpus import readers
items = []
for part in readers.Files(max_document_bytes={limit}).parts({folder!r}):
  items += part.read()
print([getattr(item, 'text', getattr(item, 'reason', '')) for item in items])
print(PEAK)
""".replace('PEAK', runs.PEAK)


@pytest.mark.parametrize(
  ('size', 'suffix'),
  [
    (120 << 20, ''),
    (120 << 20, '.zst'),
    pytest.param(1 << 30, '', marks=pytest.mark.slow),
    pytest.param(1 << 30, '.gz', marks=pytest.mark.slow),
    pytest.param(1 << 30, '.zst', marks=pytest.mark.slow),
  ],
)
def test_a_huge_line_is_never_in_memory(tmp_path, size, suffix):
  """Sparse, so the file itself takes no room; an import alone peaks at some 100 MB."""
  path = tmp_path / 'x.jsonl'
  with open(path, 'wb') as f:
    f.write(b'{"text": "before"}\n')
    f.seek(size)
    f.write(b'\n{"text": "after"}\n')
  if suffix:
    with open(path, 'rb') as f, open(f'{path}{suffix}', 'wb') as packed:
      if suffix == '.gz':
        with gzip.open(packed, 'wb', compresslevel=1) as out:
          while block := f.read(1 << 22):
            out.write(block)
      else:
        zstandard.ZstdCompressor(1).copy_stream(f, packed)
    path.unlink()
  code = LONG_LINE.format(limit=1 << 20, folder=str(tmp_path))
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
  texts, megabytes = done.stdout.decode().splitlines()
  assert texts == "['before', 'longer than max_document_bytes', 'after']"
  code = LONG_LINE.format(limit=1 << 20, folder=str(tmp_path)).split('items =')[0]
  code += LONG_LINE.rstrip().splitlines()[-1]
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
  # Blocks of a mebibyte, and at most 64 that zstd makes of 2 KiB.
  assert int(megabytes) < int(done.stdout) + 128


def test_a_dataset_of_tfds(tmp_path):
  import tensorflow_datasets as tfds

  builder = tfds.dataset_builders.AdhocBuilder(
    name='toy',
    version='1.0.0',
    features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    split_datasets={'train': [(i, {'text': t}) for i, t in enumerate(TEXTS)]},
    data_dir=tmp_path,
  )
  builder.download_and_prepare()
  reader = tfds_reader.Tfds('tfds:toy:1.0.0')
  assert sorted(d.text for d in everything(reader, tmp_path)) == sorted(TEXTS)
  with pytest.raises(errors.UserError, match="no split 'test', only train"):
    tfds_reader.Tfds('toy', split='test').parts(str(tmp_path))
  with pytest.raises(errors.UserError, match="no feature 'body', only text"):
    tfds_reader.Tfds('toy', text_key='body').parts(str(tmp_path))
  with pytest.raises(errors.UserError, match='is not prepared: there is no'):
    tfds_reader.Tfds('tiny_shakespeare:1.0.0').parts(str(tmp_path))


def test_a_builder_tfds_does_not_know(tmp_path):
  with pytest.raises(errors.UserError, match="TFDS cannot build 'no_such_set'"):
    tfds_reader.Tfds('no_such_set').parts(str(tmp_path))

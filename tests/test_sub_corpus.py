"""A sub-corpus from raw files, against what a few lines of Python say it must be."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from palm_t5x import errors, places
from palm_t5x.commands import corpus as corpus_command
from palm_t5x.corpus import (
  beam_runner,
  documents,
  jobs,
  near_duplicates,
  processed,
  sub_corpus,
)
from palm_t5x.corpus.documents import Document, Dropped
from palm_t5x.corpus.records import Broken


@dataclasses.dataclass(frozen=True)
class Lines:
  """One document per line, a JSON string, of each .txt file; '!' is a broken record."""

  def parts(self, data_dir):
    files = sorted(pathlib.Path(data_dir).glob('*.txt'))
    if not files:
      raise errors.UserError(f'no text in {data_dir}')
    return [
      documents.Part(f.stem, functools.partial(_lines, str(f)), f.stat().st_size)
      for f in files
    ]


def _lines(path):
  for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
    name, text = f'{pathlib.Path(path).name}:{number}', json.loads(line)
    yield Broken(name, 'a mark') if text == '!' else Document(name, text, name)


@dataclasses.dataclass(frozen=True)
class Cut:
  """A step of all three kinds: drops short texts, cuts texts at '|', passes others."""

  least: int = 3

  def __call__(self, document):
    if len(document.text) < self.least:
      return Dropped('too short')
    if document.text == 'all gone':
      return []
    if '|' in document.text:
      pieces = enumerate(document.text.split('|'))
      return [
        Document(f'{document.id}#{i}', text, document.source) for i, text in pieces
      ]
    return document


@dataclasses.dataclass(frozen=True)
class Shout:
  """A second step, so that what the first makes goes on."""

  def __call__(self, document):
    if 'quiet' in document.text:
      return Dropped('quiet')
    document.text = document.text.upper()
    return document


RAW = {
  'a': [
    'one document',
    'no',
    'second|third one',
    '!',
    'quiet please',
    'one document',
    'all gone',
  ],
  'b': ['THIRD ONE', 'another', 'lone \udcff half', 'x', 'loud|quiet one'],
  'c': [f'document number {i} of many' for i in range(300)],
}
KEPT = ['ONE DOCUMENT', 'SECOND', 'THIRD ONE', 'ANOTHER', 'LONE \ufffd HALF', 'LOUD']
KEPT += [f'DOCUMENT NUMBER {i} OF MANY' for i in range(300)]


@pytest.fixture
def raw(tmp_path):
  """The raw files; CORPUS_DIR and DATA_DIR name folders of the test."""
  folder = tmp_path / 'raw'
  folder.mkdir()
  for name, lines in RAW.items():
    (folder / f'{name}.txt').write_text('\n'.join(map(json.dumps, lines)))
  places.use(str(folder), str(tmp_path / 'corpora'))
  yield folder
  places.use()


def definition(**changes):
  stream = sub_corpus.Stream(Lines(), (Cut(), Shout()))
  settings = {'validation_share': 0.2, **changes}
  return sub_corpus.SubCorpus('toy', (stream,), **settings)


def tree(folder):
  """Every file of a folder and its contents."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path.suffix != '.lock'
  }


def texts(split):
  return list(processed.texts('toy', split))


def make(**kwargs):
  corpus_command.corpus(definition=definition(), **{'workers': 1, **kwargs})


def test_what_is_kept_dropped_and_why(raw, tmp_path, capsys):
  make()
  assert sorted(texts('train') + texts('validation')) == sorted(KEPT)
  manifest = processed.read_manifest(processed.folder('toy'))
  counts = {key: manifest.counts[key] for key in ('read', 'broken', 'kept')}
  assert counts == {'read': 311, 'broken': 1, 'kept': 308}
  assert manifest.counts['duplicates'] == 2  # one document, THIRD ONE
  assert manifest.broken_places == ['a.txt:4: a mark']
  dropped = {reason: entry['documents'] for reason, entry in manifest.dropped.items()}
  assert dropped == {'too short': 2, 'quiet': 2, 'nothing left': 1}
  assert manifest.dropped['too short']['examples'] == [
    {'id': 'a.txt:2', 'text': 'no'},
    {'id': 'b.txt:4', 'text': 'x'},
  ]
  share = manifest.splits['validation']['documents'] / len(KEPT)
  assert share == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / len(KEPT)) ** 0.5)
  printed = capsys.readouterr().out
  for line in (
    'records read',
    'dropped: too short',
    'exact duplicates',
    'kept for train',
  ):
    assert line in printed
  assert not (tmp_path / 'corpora/toy.work').exists()


def test_the_outcome_depends_on_the_files_alone(raw, tmp_path):
  """One worker, three, two machines one after the other: the same bytes."""
  make()
  expected = tree(tmp_path / 'corpora/toy')
  for name, runs in {
    'three': [{'workers': 3}],
    'shards': [{'shard_id': 1, 'num_shards': 2}, {'shard_id': 0, 'num_shards': 2}],
  }.items():
    places.use(str(raw), str(tmp_path / name))
    for kwargs in runs:
      make(**kwargs)
    assert tree(tmp_path / name / 'toy') == expected


@pytest.mark.slow
def test_beam_gives_the_same_bytes(raw, tmp_path):
  make()
  expected = tree(tmp_path / 'corpora/toy')
  places.use(str(raw), str(tmp_path / 'beam'))
  make(runner=beam_runner.Beam('DirectRunner'))
  assert tree(tmp_path / 'beam/toy') == expected


@pytest.mark.parametrize('kind', ['kept', 'hashes', 'places', 'toy/train', 'manifest'])
def test_an_interruption_costs_the_unit_under_way(raw, tmp_path, monkeypatch, kind):
  """A write that fails anywhere; the same command finishes with the same bytes."""
  make()
  expected = tree(tmp_path / 'corpora/toy')
  places.use(str(raw), str(tmp_path / 'again'))
  done, count = [], [0]
  perform, replace = jobs.Job.perform, sub_corpus.os.replace

  def counted(self, stage, unit):
    facts = perform(self, stage, unit)
    done.append((stage, unit.name))
    return facts

  def failing(source, target):
    count[0] += kind in str(target)
    if kind in str(target) and count[0] == 2:
      raise OSError(28, 'No space left on device', target)
    replace(source, target)

  monkeypatch.setattr(jobs.Job, 'perform', counted)
  if kind == 'manifest':
    monkeypatch.setattr(
      processed, 'write_manifest', lambda *a: (_ for _ in ()).throw(OSError)
    )
  monkeypatch.setattr(sub_corpus.os, 'replace', failing)
  if kind != 'places':  # there is one bucket
    with pytest.raises((OSError, errors.Failure)):
      make()
    assert processed.read_manifest(processed.folder('toy')) is None
  monkeypatch.undo()
  monkeypatch.setattr(jobs.Job, 'perform', counted)
  make()
  assert tree(tmp_path / 'again/toy') == expected
  assert len(done) == len(set(done)), 'a finished unit is not done again'


def test_finished_is_finished_and_other_settings_are_refused(raw, capsys):
  make()
  before = tree(raw.parent / 'corpora')
  first = capsys.readouterr().out
  make()
  assert first.endswith(capsys.readouterr().out)
  with pytest.raises(errors.UserError, match='validation_share differ'):
    corpus_command.corpus(definition=definition(validation_share=0.3), workers=1)
  (raw / 'd.txt').write_text('"more"')
  with pytest.raises(errors.UserError, match='other files'):
    make()
  assert tree(raw.parent / 'corpora') == before


def test_too_many_broken_records_stop_the_job(raw):
  (raw / 'b.txt').write_text('"!"\n' * 30)
  with pytest.raises(errors.Failure, match=r'records are broken.*b\.txt'):
    corpus_command.corpus(
      definition=definition(max_broken=10, max_broken_share=0.1), workers=1
    )
  assert processed.read_manifest(processed.folder('toy')) is None


def test_near_duplicates_of_what_is_unique(raw, tmp_path):
  """A text twice and nearly so a third time leaves exactly one of them."""
  for name in 'abc':
    (raw / f'{name}.txt').unlink()
  words = ' '.join(f'word{i}' for i in range(200))
  near = words.replace('word7 ', 'other ')
  lines = [words, near, 'something else altogether ' * 9, words]
  (raw / 'a.txt').write_text('\n'.join(map(json.dumps, lines)))
  made = definition(near_duplicates=near_duplicates.Options(), validation_share=0.0)
  corpus_command.corpus(definition=made, workers=1)
  kept = texts('train')
  assert len(kept) == 2 and sum('WORD1 ' in text for text in kept) == 1
  manifest = processed.read_manifest(processed.folder('toy'))
  assert manifest.counts['duplicates'] == manifest.counts['near_duplicates'] == 1


def test_streams_and_what_may_be_missing(raw, tmp_path):
  (raw / 'pages').mkdir()
  (raw / 'pages/p.txt').write_text('"a page"')
  streams = (
    sub_corpus.Stream(Lines(), (), 'pages'),
    sub_corpus.Stream(Lines(), (Shout(),), 'c4', optional=True),
  )
  made = sub_corpus.SubCorpus('toy', streams, validation_share=0.0)
  corpus_command.corpus(definition=made, workers=1)
  ((document,),) = [list(part.read()) for part in processed.parts('toy', 'train')]
  assert (document.id, document.text) == ('pages/p.txt:1', 'a page')
  places.use(str(tmp_path / 'empty'), str(tmp_path / 'other'))
  with pytest.raises(errors.UserError, match='no text in'):
    corpus_command.corpus(definition=made, workers=1)
  made = dataclasses.replace(made, streams=streams[1:])
  with pytest.raises(errors.UserError, match='none of the folders c4'):
    corpus_command.corpus(definition=made, workers=1)


def test_tasks_say_how_to_make_what_is_missing(raw):
  with pytest.raises(errors.UserError, match=r'gin_file=corpus/toy\.gin'):
    texts('train')
  assert processed.fingerprint('toy', 'train') is None
  with pytest.raises(errors.UserError, match='needs a sub-corpus to make'):
    corpus_command.corpus()


def test_damage_is_named(raw):
  make()
  folder = pathlib.Path(processed.folder('toy'))
  processed.verify(str(folder))
  file = next(folder.glob('train-*'))
  data = file.read_bytes()
  file.write_bytes(data[:-7])
  with pytest.raises(errors.Failure, match=rf'{file.name}.*ends too early'):
    texts('train')
  file.write_bytes(next(f for f in folder.glob('train-*') if f != file).read_bytes())
  with pytest.raises(errors.Failure, match='checksum differs'):
    processed.verify(str(folder))
  values = json.loads((folder / 'manifest.json').read_text())
  values['splits']['train']['documents'] += 1
  (folder / 'manifest.json').write_text(json.dumps(values))
  with pytest.raises(errors.Failure, match='was changed after it was written'):
    texts('train')


@pytest.mark.parametrize(('share', 'expected'), [(0.0, 0), (1e-9, 1)])
def test_something_is_held_out_unless_nothing_shall_be(raw, share, expected):
  corpus_command.corpus(definition=definition(validation_share=share), workers=1)
  assert len(texts('validation')) == expected
  assert len(texts('train')) == len(KEPT) - expected


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
  """The command, killed at moments all over its work, ends with the same bytes."""
  raw = tmp_path / 'raw'
  raw.mkdir()
  for number in range(40):
    begin = f'Document {number % 37} of the news, '
    lines = [f'{begin} line {i} of the day. ' * 9 for i in range(60)]
    records = [json.dumps({'id': i, 'text': line}) for i, line in enumerate(lines)]
    (raw / f'{number:02d}.jsonl').write_text('\n'.join(records))

  def command(folder):
    return [
      *(sys.executable, '-m', 'palm_t5x', 'corpus', '--gin_file=corpus/news.gin'),
      *(f'--data_dir={raw}', f'--gin.CORPUS_DIR={folder}', '--gin.WORKERS=2'),
      *('--gin.readers.Files.part_bytes=40000', '--gin.VALIDATION_SHARE=0.1'),
      '--gin.NEAR_DUPLICATES=@near_duplicates.Options()',
      '--gin_bindings=from palm_t5x.corpus import near_duplicates',
    ]

  began = time.monotonic()
  subprocess.run(command(tmp_path / 'straight'), check=True)
  took = time.monotonic() - began
  draw, kills = random.Random(0), 0
  while kills < 5:
    process = subprocess.Popen(command(tmp_path / 'killed'), start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(took * draw.uniform(0.3, 0.9))
    if process.poll() is not None:
      assert process.returncode == 0 and kills, 'too fast to be killed'
      break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kills += 1
  subprocess.run(command(tmp_path / 'killed'), check=True)
  assert tree(tmp_path / 'killed/news') == tree(tmp_path / 'straight/news')
  assert len(tree(tmp_path / 'straight/news')) > 80


def test_ids_need_not_be_unique(raw):
  """A text and its revision under one id, 40 times: one of each pair is kept."""
  for name in 'abc':
    (raw / f'{name}.txt').unlink()
  draw = random.Random(0)
  pairs = []
  for _ in range(40):
    words = [f'word{draw.randrange(10_000)}' for _ in range(200)]
    pairs += [' '.join(words), ' '.join(['new', *words[1:]])]
  (raw / 'a.txt').write_text('\n'.join(map(json.dumps, pairs)))
  stream = sub_corpus.Stream(Lines(), (SameId(),))
  made = sub_corpus.SubCorpus('toy', (stream,), near_duplicates.Options())
  corpus_command.corpus(definition=made, workers=1)
  kept = [*texts('train'), *texts('validation')]
  assert len(kept) == 40
  assert {text.split()[1] for text in kept} == {text.split()[1] for text in pairs}


@dataclasses.dataclass(frozen=True)
class SameId:
  """Gives two neighbouring lines one id."""

  def __call__(self, document):
    number = int(document.id.partition(':')[2]) - 1
    document.id = str(number // 2)
    return document


def test_what_is_made_of_one_record_stays_on_one_side(raw):
  for name in 'abc':
    (raw / f'{name}.txt').unlink()
  lines = [f'turn {i}|the answer to {i}|and thanks for {i}' for i in range(300)]
  (raw / 'a.txt').write_text('\n'.join(map(json.dumps, lines)))
  corpus_command.corpus(definition=definition(), workers=1)
  number = lambda text: text.split()[-1]
  train, held = ({*map(number, texts(split))} for split in ('train', 'validation'))
  assert not train & held and len(train | held) == 300 and len(held) > 30


@pytest.mark.parametrize('salt', 'abcd')
def test_something_is_held_out_of_what_near_duplicates_leave(raw, salt):
  for name in 'abc':
    (raw / f'{name}.txt').unlink()
  words = [[f'w{i}x{j}' for j in range(100)] for i in range(15)]
  lines = [' '.join([f'copy{k}', *w]) for w in words for k in range(3)]
  (raw / 'a.txt').write_text('\n'.join(map(json.dumps, lines)))
  made = definition(
    near_duplicates=near_duplicates.Options(), validation_share=1e-9, salt=salt
  )
  corpus_command.corpus(definition=made, workers=1)
  assert (len(texts('train')), len(texts('validation'))) == (14, 1)
  manifest = processed.read_manifest(processed.folder('toy'))
  assert manifest.splits['train']['documents'] == 14
  processed.verify(processed.folder('toy'))


def test_nothing_left_is_a_mistake_and_can_be_mended(raw):
  made = definition()
  nothing = dataclasses.replace(
    made, streams=(sub_corpus.Stream(Lines(), (Cut(1000),)),)
  )
  with pytest.raises(errors.UserError, match='Nothing is left of the 311 records'):
    corpus_command.corpus(definition=nothing, workers=1)
  corpus_command.corpus(definition=made, workers=1)
  assert texts('train')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'validation_share': 2}, 'VALIDATION_SHARE = 2'),
    ({'validation_share': -1}, 'VALIDATION_SHARE = -1'),
    ({'max_broken': -1}, 'MAX_BROKEN = -1'),
    ({'near_duplicates': True}, 'NEAR_DUPLICATES = True'),
  ],
)
def test_values_that_mean_nothing(changes, message):
  with pytest.raises(errors.UserError, match=message):
    definition(**changes)


def test_buckets_and_workers_that_cannot_be(raw):
  with pytest.raises(errors.UserError, match='WORKERS = 0'):
    corpus_command.corpus(definition=definition(), workers=0)
  places.use(str(raw), 'gs://bucket/corpora')
  with pytest.raises(errors.UserError, match=r'gs://bucket/corpora.*local or mounted'):
    make()


def test_a_flipped_bit_is_noticed(raw):
  make()
  folder = pathlib.Path(processed.folder('toy'))
  file, draw = next(folder.glob('train-00002*')), random.Random(0)
  data, clean = file.read_bytes(), texts('train')
  for _ in range(100):
    place = draw.randrange(len(data))
    damaged = bytearray(data)
    damaged[place] ^= 1 << draw.randrange(8)
    file.write_bytes(damaged)
    try:
      assert texts('train') == clean
    except errors.Failure:
      continue

"""`t5x vocab`, through the command."""

import json

import pytest
import sentencepiece
from runs import t5x

TEXT = [
  f'Sentence {i} of a text about boats, harbours and the sea.\n' * 3 for i in range(300)
]


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Two folders of text, in the current folder."""
  monkeypatch.chdir(tmp_path)
  for folder, texts in {'a': TEXT[:200], 'b': TEXT[200:]}.items():
    (tmp_path / folder).mkdir()
    lines = '\n'.join(json.dumps({'text': text}) for text in texts)
    (tmp_path / folder / 'x.jsonl').write_text(lines)
  return tmp_path


def vocab(*bindings, flags=()):
  return t5x(
    *('vocab', '--gin_file=corpus/palm_256k.gin', '--gin.CACHE_DIR=cache'),
    *('--gin.VOCABULARY_SIZE=400', '--gin.WORKERS=1', '--gin.SAMPLE_BYTES=20000'),
    *(f'--gin.{binding}' for binding in bindings),
    *flags,
  )


def test_from_files_once(files):
  done = vocab('SOURCES=a,b/x.jsonl')
  assert done.code == 0, done.err
  assert 'pieces       400' in done.out
  path = files / 'cache/vocabularies/palm_256k.model'
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  assert model.get_piece_size() == 400
  assert model.id_to_piece(model.encode('the harbours')[-1]) != '<unk>'
  manifest = json.loads((path.parent / 'palm_256k.model.json').read_text())
  assert (
    manifest['options']['byte_fallback'] and manifest['learned_from'] == 'a,b/x.jsonl'
  )
  assert 19_000 < manifest['characters'] <= 20_000
  before = path.read_bytes()
  again = vocab('SOURCES=a')
  assert again.code == 0 and 'is there already' in again.out
  assert path.read_bytes() == before
  assert sorted(f.suffix for f in path.parent.iterdir()) == ['.json', '.lock', '.model']


def test_from_a_mixture_by_its_weights(files):
  done = t5x(
    *('vocab', '--gin_file=palm_tiny.gin', '--gin.CACHE_DIR=cache'),
    *(
      '--gin_bindings=import fixture_tasks',
      '--gin.MIXTURE_OR_TASK_NAME=fixture_mixture',
    ),
    *('--gin.vocabulary.SentencePieceVocabulary.vocab_size=512', '--gin.MODEL_DIR=m'),
  )
  assert done.code == 0, done.err
  (model,) = (files / 'cache/vocabularies').glob('*.model')
  assert model.name == 'fixture_mixture-512.model'


def test_shards_draw_and_the_last_learns(files):
  bindings = ("SOURCES={'a': 2, 'b': 1}",)
  first = vocab(*bindings, flags=('--shard_id=1', '--num_shards=2'))
  assert first.code == 0 and 'Shard 1 of 2 has drawn its text' in first.out
  assert not (files / 'cache/vocabularies/palm_256k.model').exists()
  last = vocab(*bindings, flags=('--shard_id=0', '--num_shards=2'))
  assert last.code == 0 and 'pieces       400' in last.out
  sharded = (files / 'cache/vocabularies/palm_256k.model').read_bytes()
  alone = vocab(*bindings, 'VOCABULARY_PATH=alone.model')
  assert alone.code == 0, alone.err
  assert (files / 'cache/alone.model').read_bytes() == sharded


@pytest.mark.parametrize(
  ('bindings', 'message'),
  [
    (['SOURCES=nowhere'], "'nowhere', which is neither a file or folder"),
    (['SOURCES=()'], 'nothing to learn a vocabulary from'),
    (['SOURCES=a', 'VOCABULARY_SIZE=100'], 'vocab_size = 100 leaves no room'),
    ([], "no sub-corpus 'books'"),
    (["SOURCES={'a': 1.0, 'b': 0.0}"], "SOURCES gives 'b' the weight 0.0"),
    (["SOURCES={'a': 1.0, 'b': -2}"], "SOURCES gives 'b' the weight -2"),
    (["SOURCES={'a': 1.0, 'b': 'c'}"], "SOURCES gives 'b' the weight 'c'"),
    (['SOURCES=a', 'SAMPLE_BYTES=0'], 'SAMPLE_BYTES = 0'),
    (['SOURCES=a', 'WORKERS=0'], 'WORKERS = 0: it is a number of processes'),
  ],
)
def test_mistakes(files, bindings, message):
  done = vocab(*bindings)
  assert done.code == 2 and message in done.err
  assert len(done.err.splitlines()) == 1
  assert not (files / 'cache/vocabularies/palm_256k.model').exists()

"""From a task's name to token stores, whatever kind of SeqIO task it is."""

import itertools
import pathlib

import fixture_tasks
import numpy as np
import pytest
import seqio
import tensorflow as tf
from palm_t5x.tasks import text_files

from palm_t5x import errors
from palm_t5x.corpus import learning, prepare, sources, vocabulary


@pytest.fixture(scope='module')
def vocab():
  return fixture_tasks.vocabulary()


def texts_of(store, vocab):
  offsets, stream = store.offsets(), store.read(0, store.num_tokens)
  return [vocab.decode(stream[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


def test_text_task(tmp_path, vocab):
  ((name, store, weight),) = prepare.prepare('fixture_text', 'train', vocab, tmp_path)
  assert (name, weight) == ('fixture_text', 1.0)
  expected = list(fixture_tasks.documents('train'))
  assert sorted(texts_of(store, vocab)) == sorted(expected)
  assert store.num_bytes == sum(len(text.encode()) for text in expected)
  manifest = store.manifest
  assert (manifest.task, manifest.split) == ('fixture_text', 'train')
  assert manifest.vocabulary_hash == vocab.hash and manifest.vocab_size == 512
  assert pathlib.Path(store.path).parent == tmp_path / 'token_stores' / 'fixture_text'


def test_mixture(tmp_path, vocab):
  calls = []
  stores = prepare.prepare(
    'fixture_mixture', 'train', vocab, tmp_path, progress=lambda *c: calls.append(c)
  )
  assert [(n, w) for n, _, w in stores] == [
    ('fixture_code', 30.0),
    ('fixture_prose', 70.0),
  ]
  assert {label for label, _, _ in calls} == {
    'tokenising fixture_code/train',
    'tokenising fixture_prose/train',
  }
  calls.clear()
  prepare.prepare(
    'fixture_mixture', 'train', vocab, tmp_path, progress=lambda *c: calls.append(c)
  )
  assert not calls, 'a whole store is opened, not built'


def test_the_store_holds_what_seqio_gives(tmp_path, vocab):
  """The direct way and SeqIO's pipeline give the same ids."""
  task = seqio.get_mixture_or_task('fixture_text')
  with vocabulary.using(vocab):
    theirs = [
      example['targets'].tolist()
      for example in task.get_dataset(
        None, 'validation', shuffle=False
      ).as_numpy_iterator()
    ]
  ((_, store, _),) = prepare.prepare('fixture_text', 'validation', vocab, tmp_path)
  offsets, stream = store.offsets(), store.read(0, store.num_tokens)
  ours = [stream[a:b].tolist() for a, b in itertools.pairwise(offsets)]
  assert sorted(ours) == sorted(theirs)


def _add(name, features=None, preprocessors=None, texts=None):
  rows = {'train': texts or ['first text', 'second text', 'third, longer text']}
  features = features or {
    'targets': seqio.Feature(vocabulary.RunVocabulary(), add_eos=False)
  }
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
        {'targets': rows[split]}
      ),
      splits=['train'],
    ),
    preprocessors=[seqio.preprocessors.tokenize]
    if preprocessors is None
    else preprocessors,
    output_features=features,
  )


def test_a_users_own_task_runs_through_its_pipeline(tmp_path, vocab):
  @seqio.map_over_dataset
  def shout(example):
    return {'targets': tf.strings.upper(example['targets'])}

  _add('users_task', preprocessors=[shout, seqio.preprocessors.tokenize])
  ((_, store, _),) = prepare.prepare('users_task', 'train', vocab, tmp_path)
  assert sorted(texts_of(store, vocab)) == [
    'FIRST TEXT',
    'SECOND TEXT',
    'THIRD, LONGER TEXT',
  ]
  assert store.num_bytes == len('first textsecond textthird, longer text')
  stream = store.read(0, store.num_tokens)
  assert (stream == 1).sum() == 3, '[eod] is added where the task adds none'
  assert not store.manifest.has_inputs


def test_supervised_task_keeps_inputs(tmp_path, vocab):
  ((_, store, _),) = prepare.prepare('fixture_sums', 'train', vocab, tmp_path)
  examples = list(fixture_tasks.sums('train'))
  assert store.manifest.has_inputs and store.num_documents == len(examples)
  found = set()
  stream, offsets = store.read(0, store.num_tokens), store.offsets()
  for i, length in enumerate(store.inputs_lengths()):
    ids = stream[offsets[i] : offsets[i + 1]].tolist()
    found.add((vocab.decode(ids[:length]), vocab.decode(ids[length:])))
  assert found == {(e['inputs'], e['targets']) for e in examples}
  assert store.num_bytes == sum(len(e['targets']) for e in examples)


def test_another_vocabulary_is_refused(tmp_path, vocab):
  _add('byte_task', {'targets': seqio.Feature(seqio.ByteVocabulary())})
  with pytest.raises(errors.UserError, match='RunVocabulary'):
    prepare.prepare('byte_task', 'train', vocab, tmp_path)
  same = seqio.SentencePieceVocabulary(vocab.path)
  _add('same_task', {'targets': seqio.Feature(same)})
  prepare.prepare('same_task', 'train', vocab, tmp_path)


def test_seqios_own_vocabulary_serves_as_the_models(tmp_path):
  theirs = seqio.ByteVocabulary()
  ((_, store, _),) = prepare.prepare('fixture_code', 'validation', theirs, tmp_path)
  texts = [text for text in fixture_tasks.documents('validation')]
  assert set(texts_of(store, theirs)) <= set(texts)
  assert (store.read(0, store.num_tokens) == 1).sum() == store.num_documents


def test_untokenised_task_is_refused(tmp_path, vocab):
  feature = seqio.Feature(vocabulary.RunVocabulary(), dtype=tf.string, rank=0)
  _add('raw_task', {'targets': feature}, preprocessors=[])
  with pytest.raises(errors.UserError, match=r'seqio\.preprocessors\.tokenize'):
    prepare.prepare('raw_task', 'train', vocab, tmp_path)


def test_unknown_names(tmp_path, vocab):
  with pytest.raises(errors.UserError, match="Did you mean 'fixture_text'"):
    prepare.prepare('fixture_txt', 'train', vocab, tmp_path)
  with pytest.raises(errors.UserError, match="no split 'test': it has train"):
    prepare.prepare('fixture_text', 'test', vocab, tmp_path)


def test_rates_that_need_a_cache(tmp_path, vocab):
  if 'bad_rates' not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add(
      'bad_rates', ['fixture_text'], default_rate=seqio.mixing_rate_num_examples
    )
  with pytest.raises(errors.UserError, match="rates of mixture 'bad_rates'"):
    prepare.prepare('bad_rates', 'train', vocab, tmp_path)


def test_document_source_shards_and_shuffles():
  source = sources.DocumentSource(lambda split: [f'{split} {i}' for i in range(7)])
  get = lambda **kwargs: [
    example['text'].decode()
    for example in source.get_dataset('train', **kwargs).as_numpy_iterator()
  ]
  whole = [f'train {i}' for i in range(7)]
  assert get(shuffle=False) == whole
  assert sorted(get(shuffle=True, seed=1)) == whole == sorted(whole)
  assert get(shuffle=True, seed=1) == get(shuffle=True, seed=1) != whole
  shards = [get(shuffle=False, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
  assert sorted(itertools.chain(*shards)) == whole and len(shards[0]) == 3
  assert not get(shuffle=False, shard_info=seqio.ShardInfo(7, 8))


def test_vocabulary_is_learned_once(tmp_path):
  make = lambda: vocabulary.SentencePieceVocabulary(
    '{learn_from}.model', 400, learn_from='fixture_mixture', cache_dir=str(tmp_path)
  )
  calls = []
  learned = learning.learn_vocabulary(make(), progress=lambda *c: calls.append(c))
  assert calls and learned.codec.size == 400
  before = (tmp_path / 'fixture_mixture.model').stat().st_mtime_ns
  learning.learn_vocabulary(make())
  assert (tmp_path / 'fixture_mixture.model').stat().st_mtime_ns == before
  other = learning.learn_vocabulary(make(), cache_dir='/nowhere')
  assert other.hash == learned.hash


def test_vocabulary_is_learned_from_a_pipeline_too(tmp_path):
  _add('learned_from', texts=['the words of a text'] * 50)
  learned = vocabulary.SentencePieceVocabulary('v', 300, learn_from='learned_from')
  learning.learn_vocabulary(learned, str(tmp_path))
  assert min(learned.encode('the words of a text')) > vocabulary.NEWLINE_ID


def split_texts(split):
  return list(seqio.TaskRegistry.get('text_files').source.documents(split))


def test_text_files_are_split_by_name(tmp_path):
  for i in range(60):
    (tmp_path / f'{i}.txt').write_text(f'text {i}')
  (tmp_path / 'more.jsonl').write_text('{"text": "one"}\n\n{"text": "two"}\n')
  (tmp_path / 'ignored.bin').write_text('no')
  pattern = f'{tmp_path}/*.txt, {tmp_path}/*.jsonl'
  assert text_files.training_text(pattern, 'palm_tiny') == 'text_files'
  train, validation = split_texts('train'), split_texts('validation')
  everything = [f'text {i}' for i in range(60)] + ['one', 'two']
  assert sorted(train + validation) == sorted(everything)
  assert 1 <= len(validation) <= 12
  (tmp_path / 'another.txt').write_text('late')
  assert set(validation) <= set(split_texts('validation')), 'sides do not change'


@pytest.mark.parametrize('newline', ['\n', '\r\n'])
def test_one_text_file_is_split_by_blocks(tmp_path, newline):
  paragraphs = [f'Paragraph {i}. ' + 'words ' * 60 for i in range(300)]
  text = (newline * 2).join(paragraphs)
  (tmp_path / 'book.txt').write_bytes(text.encode())
  text_files.use_files(str(tmp_path / '*.txt'))
  train, validation = ''.join(split_texts('train')), ''.join(split_texts('validation'))
  held = [p for p in paragraphs if p in validation]
  assert 0.01 < len(held) / 300 < 0.15 or newline == '\r\n'
  assert not any(p in train for p in held) or newline == '\r\n'
  assert all(p in train or p in validation for p in paragraphs)


def test_text_files_that_are_not_there(tmp_path):
  with pytest.raises(errors.UserError, match=r"nothing/\*\.txt' matches no file"):
    text_files.training_text(f'{tmp_path}/nothing/*.txt')
  assert text_files.training_text(None, 'palm_tiny') == 'palm_tiny'
  assert text_files.training_text('', 'x') == 'x'
  text_files._patterns = ()
  with pytest.raises(errors.UserError, match='TEXT_FILES names, and it names none'):
    split_texts('train')


@pytest.mark.parametrize('line', ['not json', '{"body": "x"}', '[1]', '{"text": 3}'])
def test_bad_jsonl_names_the_line(tmp_path, line):
  (tmp_path / 'x.jsonl').write_text('{"text": "fine"}\n' + line)
  text_files.use_files(str(tmp_path / '*.jsonl'))
  with pytest.raises(errors.UserError, match=r'Line 2 of .*x\.jsonl'):
    split_texts('train')


def test_text_files_train_first_time(tmp_path, vocab):
  """Little text, a vocabulary of its own, stores that follow an edit."""
  (tmp_path / 'my.txt').write_text('Once upon a time there was a text.\n' * 40)
  name = text_files.training_text(str(tmp_path / '*.txt'))
  learned = vocabulary.SentencePieceVocabulary(
    '{learn_from}-{vocab_size}.model', 512, learn_from=name, cache_dir=str(tmp_path)
  )
  learning.learn_vocabulary(learned)
  assert learned.path != str(tmp_path / 'text_files-512.model')
  ((_, before, _),) = prepare.prepare(name, 'train', learned, tmp_path)
  ((_, held, _),) = prepare.prepare(name, 'validation', learned, tmp_path)
  assert before.num_tokens and held.num_tokens
  (tmp_path / 'my.txt').write_text('Another text altogether.\n' * 40)
  ((_, after, _),) = prepare.prepare(name, 'train', learned, tmp_path)
  assert 'Another' in texts_of(after, learned)[0]
  assert 'Once' in texts_of(before, learned)[0]
  assert np.any(after.hashes() != before.hashes())

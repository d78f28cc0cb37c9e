"""The vocabulary: lossless for every string, fixed ids, the same bytes every time."""

import copy
import pathlib
import pickle
import sysconfig

import fixture_tasks
import hypothesis
import numpy as np
import pytest
import sentencepiece
import seqio
import tensorflow as tf
from hypothesis import strategies as st

from palm_t5x import errors
from palm_t5x.corpus import codec, vocabulary


@pytest.fixture(scope='module')
def vocab():
  return fixture_tasks.vocabulary()


TRICKY = [
  '', ' ', '  two  spaces  ', '\t\ttabs', 'CR\r\nLF\n\n', '\0NUL\0', '\u2581', '\u3000',
  ' \u2581 \u2581\u2581x', 'e\u0301 \ufb01 \ufb00', '\U0001f469\u200d\U0001f467',
  '\uff11\uff12 \u0663\u0664', '[eod]', '<pad><unk></s>', '<0x41>', 'a\u2028b\u2029c',
  '\ufeffBOM', '\U0010ffff', '    indented\n        code',
]  # fmt: skip


@pytest.mark.parametrize('text', TRICKY)
def test_tricky_text_comes_back(vocab, text):
  ids = vocab.encode(text)
  assert vocab.decode(ids) == text
  assert not {0, 1, 2} & set(ids), 'text must never become a control id'


@hypothesis.given(st.text() | st.text(alphabet=' \u2581\n\r\t\0e\u0301<0x>ab1'))
@hypothesis.settings(max_examples=400, deadline=None)
def test_every_text_comes_back(text):
  vocab = _shared()
  ids = vocab.encode(text)
  assert vocab.decode(ids) == text
  assert vocab.encode_batch([text])[0].tolist() == list(ids)
  assert not {0, 1, 2} & set(ids)


def test_every_character_of_unicode_comes_back(vocab):
  points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
  texts = [''.join(points[i : i + 8192]) for i in range(0, len(points), 8192)]
  for text, ids in zip(texts, vocab.encode_batch(texts), strict=True):
    assert vocab.decode(ids) == text
    assert ids.min() > 2


def _plain(vocab):
  """SentencePiece's own processor of the same file, with none of our code."""
  return sentencepiece.SentencePieceProcessor(model_file=vocab.path)


@hypothesis.given(st.text() | st.text(alphabet='\u2581 ab1\n'))
@hypothesis.settings(max_examples=200, deadline=None)
def test_ids_are_those_of_sentencepiece_itself(text):
  vocab = _shared()
  mark = [3 + byte for byte in '\u2581'.encode()]
  expected = []
  for i, part in enumerate(text.split('\u2581')):
    expected += (mark if i else []) + _plain(vocab).encode(part)
  assert list(vocab.encode(text)) == expected


@pytest.mark.slow
def test_the_standard_library_comes_back(vocab):
  """Every file of Python's own library, read as the text that it is."""
  files = sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).rglob('*.py'))
  files = [f for f in files if 'site-packages' not in f.parts]
  texts = [f.read_bytes().decode('utf-8', 'replace') for f in files]
  assert len(texts) > 1000
  plain = _plain(vocab)
  for file, text, ids in zip(files, texts, vocab.encode_batch(texts), strict=True):
    assert vocab.decode(ids) == text, file
    if '\u2581' not in text:
      assert plain.encode(text) == ids.tolist(), file


_CACHE = []


def _shared():
  if not _CACHE:
    _CACHE.append(fixture_tasks.vocabulary())
  return _CACHE[0]


@pytest.mark.parametrize('model_type', ['unigram', 'bpe'])
def test_learned_from_almost_nothing_it_is_still_lossless(tmp_path, model_type):
  learned = vocabulary.train(['a'], str(tmp_path / 'v'), 4096, model_type=model_type)
  assert learned.vocab_size == 4096 == learned.codec.size
  for text in [*TRICKY, '<unused_3>']:
    assert learned.decode(learned.encode(text)) == text
    assert all(i < 270 for i in learned.encode(text))


def test_ids_are_the_settled_ones(vocab):
  assert (vocab.pad_id, vocab.eos_id, vocab.bos_id, vocab.unk_id) == (0, 1, 1, 2)
  assert [vocab.codec.piece(3 + b) for b in range(256)] == [
    f'<0x{b:02X}>' for b in range(256)
  ]
  assert vocab.codec.piece(259) == '\n' and vocab.encode('\n\n') == [259, 259]
  assert vocab.codec.piece(1) == '[eod]'
  assert vocab.vocab_size == 512


def test_numbers_are_split_into_digits(vocab):
  pieces = [vocab.codec.piece(i) for i in vocab.encode('123.5')]
  assert pieces == ['1', '2', '3', '.', '5']


def test_unlearned_characters_become_bytes(vocab):
  assert vocab.encode('電') == [3 + byte for byte in '電'.encode()]


def test_decode_stops_at_end_of_document(vocab):
  ids = [*vocab.encode('one'), 1, *vocab.encode('two')]
  assert vocab.decode(ids) == 'one'
  assert vocab.decode(np.array(ids)) == 'one'


def test_tensorflow_gives_the_same_ids(vocab):
  texts = [*TRICKY, *fixture_tasks.documents('validation')]
  dataset = tf.data.Dataset.from_tensor_slices(texts).map(
    vocab.encode_tf, num_parallel_calls=4
  )
  for text, ids in zip(texts, dataset.as_numpy_iterator(), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == vocab.encode(text)
  ragged = vocab.encode_tf(tf.constant([['a b', 'c'], ['\u2581', '']]))
  assert ragged.to_list() == [
    [vocab.encode('a b'), vocab.encode('c')],
    [vocab.encode('\u2581'), []],
  ]
  back = vocab.decode_tf(vocab.encode_tf(tf.constant(TRICKY)))
  assert [text.decode() for text in back.numpy()] == TRICKY


def test_learning_is_deterministic(tmp_path):
  texts = list(fixture_tasks.documents('train'))
  for name in ('one', 'two'):
    vocabulary.train(iter(texts), str(tmp_path / name), 400)
  assert (tmp_path / 'one').read_bytes() == (tmp_path / 'two').read_bytes()


def test_the_committed_vocabulary_is_learned_from_the_fixture_corpus(tmp_path, vocab):
  """Relations only: another SentencePiece may choose other pieces."""
  learned = vocabulary.train(
    fixture_tasks.documents('train'), str(tmp_path / 'v'), fixture_tasks.VOCAB_SIZE
  )
  texts = list(fixture_tasks.documents('validation'))
  ours, theirs = (sum(map(len, v.encode_batch(texts))) for v in (vocab, learned))
  assert abs(ours - theirs) < 0.02 * ours


def test_opens_no_file_before_it_is_used(tmp_path):
  missing = vocabulary.SentencePieceVocabulary(str(tmp_path / 'none'), 1000)
  assert missing.vocab_size == 1000 and missing.eos_id == 1
  assert not missing.exists()
  copy.deepcopy(missing)
  with pytest.raises(errors.UserError, match='There is no vocabulary file at'):
    missing.encode('x')


def test_wrong_size_is_refused(vocab):
  wrong = vocabulary.SentencePieceVocabulary(vocab.path, 600)
  with pytest.raises(errors.UserError, match=r'has 512 pieces, but vocab_size = 600'):
    wrong.encode('x')


def test_damaged_file_is_a_failure(tmp_path, vocab):
  (tmp_path / 'v').write_bytes(b'not a model')
  with pytest.raises(errors.Failure, match='damaged'):
    vocabulary.SentencePieceVocabulary(str(tmp_path / 'v')).encode('x')


@pytest.mark.parametrize(('texts', 'size'), [([], 512), (['a'], 260)])
def test_nothing_to_learn_from(tmp_path, texts, size):
  with pytest.raises(errors.UserError):
    vocabulary.train(texts, str(tmp_path / 'v'), size)
  assert not (tmp_path / 'v').exists()


def test_copies_and_equality(vocab, tmp_path):
  for other in (copy.deepcopy(vocab), pickle.loads(pickle.dumps(vocab))):
    assert other == vocab and other.encode('a b') == vocab.encode('a b')
  vocab.save_copy(str(tmp_path / 'copy'))
  assert vocabulary.SentencePieceVocabulary(str(tmp_path / 'copy')) == vocab
  (tmp_path / 'other').write_bytes(b'x')
  assert vocab != seqio.ByteVocabulary()


def test_path_in_cache_and_placeholders(tmp_path):
  made = vocabulary.SentencePieceVocabulary(
    'vocabularies/{learn_from}-{vocab_size}.model',
    512,
    learn_from='fixture_text',
    cache_dir=str(tmp_path),
  )
  assert made.path == str(tmp_path / 'vocabularies' / 'fixture_text-512.model')
  absolute = vocabulary.SentencePieceVocabulary('/x/y.model', cache_dir=str(tmp_path))
  assert absolute.path == '/x/y.model'


def test_run_vocabulary_stands_for_the_one_in_use(vocab):
  vocabulary.use(None)
  stand_in = vocabulary.RunVocabulary()
  with pytest.raises(errors.UserError, match='none is in use'):
    stand_in.encode('x')
  assert stand_in == vocabulary.RunVocabulary() and stand_in != vocab
  with vocabulary.using(vocab):
    assert stand_in.encode('a b') == vocab.encode('a b')
    assert stand_in.vocab_size == 512 and stand_in.eos_id == 1
    assert stand_in == vocab and vocab == stand_in
    assert stand_in.hash == codec.hash_of(stand_in) == vocab.hash
    seqio.Feature(vocabulary=stand_in)
  with vocabulary.using(seqio.ByteVocabulary()):
    assert stand_in.decode(stand_in.encode('é')) == 'é'
    assert stand_in.encode_batch(['a'])[0].tolist() == stand_in.encode('a')


def test_hashes_tell_vocabularies_apart(vocab):
  seqios = seqio.SentencePieceVocabulary(vocab.path)
  hashes = [
    codec.hash_of(v)
    for v in (
      vocab,
      seqio.ByteVocabulary(),
      seqio.ByteVocabulary(extra_ids=5),
      seqio.SentencePieceVocabulary(vocab.path, extra_ids=5),
    )
  ]
  assert len(set(hashes)) == 4
  assert codec.hash_of(seqios) == vocab.hash, 'the same model file, the same ids'

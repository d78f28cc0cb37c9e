"""The lossless SentencePiece vocabulary of the paper (section 2), as SeqIO wants it.

Ids: 0 pad, 1 [eod] (it is `eos_id`, and begins prompts too), 2 unk, 3..258 the bytes,
259 the newline, then the learned pieces. Every string comes back exactly: whitespace is
kept, numbers are split into digits, and what was not learned becomes UTF-8 bytes.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os

import numpy as np
import sentencepiece
import seqio
import tensorflow as tf

from palm_t5x import errors
from palm_t5x.corpus import codec as codec_lib
from palm_t5x.corpus import storage
from palm_t5x.corpus.codec import hash_of  # noqa: F401  (part of this module too)

PAD_ID = 0
EOD_ID = 1
UNK_ID = 2
FIRST_BYTE_ID = 3
NEWLINE_ID = FIRST_BYTE_ID + 256
NUM_RESERVED = NEWLINE_ID + 1


class SentencePieceVocabulary(seqio.Vocabulary):
  """A vocabulary in a SentencePiece file, opened at its first use.

  Args:
    path: the model file, local or gs://. A relative path lies in `cache_dir` where that
      is given. `{learn_from}`, `{vocab_size}` and `{model_type}` in it are replaced by
      those arguments (and, for a task that reads the user's own files, a hash of their
      names).
    vocab_size: how many ids there are; None reads it from the file. With it, the
      file is not needed to know the model's shape.
    learn_from: the mixture or task to learn the vocabulary from if there is no file
      yet: see `learning.learn_vocabulary`.
    model_type: how it is then learned: 'unigram' or 'bpe'.
    character_coverage: the share of characters that are then learned as pieces; the
      rest are bytes.
    cache_dir: the folder that a relative `path` is relative to; None: the working
      directory.
  """

  def __init__(
    self,
    path: str,
    vocab_size: int | None = None,
    learn_from: str | None = None,
    cache_dir: str | None = None,
    model_type: str = 'unigram',
    character_coverage: float = 0.9995,
  ):
    super().__init__(extra_ids=0)
    self._raw_path = os.fspath(path)
    self._size = None if vocab_size is None else int(vocab_size)
    self.learn_from = learn_from
    self.model_type = model_type
    self.character_coverage = character_coverage
    self.cache_dir = cache_dir
    self._codec = None
    self._hash = None

  def __getstate__(self):
    # Gin deep-copies what it binds; the loaded model neither copies nor pickles.
    return {**self.__dict__, '_codec': None}

  @property
  def path(self) -> str:
    """The absolute path (or URL) of the model file."""
    path = self._raw_path
    if '{' in path:
      path = path.format(
        learn_from=_learning_key(self.learn_from),
        vocab_size=self._size,
        model_type=self.model_type,
      )
    if self.cache_dir and not storage.is_remote(path):
      path = storage.join(storage.normalise(self.cache_dir), os.path.expanduser(path))
    return storage.normalise(path)

  def read_from(self, path: str) -> None:
    """Names another file, such as the copy in a run's own folder."""
    self._raw_path, self.cache_dir = os.fspath(path), None
    self._codec = self._hash = None

  @property
  def has_size(self) -> bool:
    """Whether the number of ids is known without the file."""
    return self._size is not None

  def exists(self) -> bool:
    """Whether the model file is there."""
    return storage.read_bytes(self.path) is not None

  @property
  def codec(self) -> codec_lib.Codec:
    """The loaded model.

    Raises:
      UserError: no such file, not a vocabulary, or another number of pieces.
    """
    if self._codec is None:
      model = storage.read_bytes(self.path)
      if model is None:
        raise errors.UserError(
          f'There is no vocabulary file at {self.path}: make it with t5x vocab (for '
          'the paper: --gin_file=corpus/palm_256k.gin), or name an existing '
          'SentencePiece model with --gin.VOCABULARY_PATH.'
        )
      try:
        codec = codec_lib.Codec(model)
      except (RuntimeError, OSError) as e:
        raise errors.Failure(
          f'{self.path} is not a SentencePiece model, or is damaged: delete it to have '
          'it learned again, or name another file.'
        ) from e
      if codec.eos_id != EOD_ID:
        raise errors.UserError(
          f'The vocabulary at {self.path} ends documents with id {codec.eos_id}, this '
          'class is for those with [eod] = 1: use seqio.SentencePieceVocabulary.'
        )
      if self._size is not None and codec.size != self._size:
        raise errors.UserError(
          f'The vocabulary at {self.path} has {codec.size} pieces, but vocab_size = '
          f'{self._size}: change one of them.'
        )
      self._hash = hashlib.blake2b(model, digest_size=16).hexdigest()
      self._codec = codec
    return self._codec

  @property
  def hash(self) -> str:
    """blake2b-128 of the model file, in hex: what token stores are keyed by."""
    return self._hash or (self.codec and self._hash)

  def save_copy(self, path: str) -> None:
    """Makes `path`, such as a file in a run's own folder, equal to the model file."""
    data = storage.read_bytes(self.path)
    if storage.read_bytes(path) != data:
      storage.write_bytes(path, data)

  @property
  def bos_id(self) -> int:
    """[eod]: documents and prompts begin where the one before ended."""
    return EOD_ID

  @property
  def eos_id(self) -> int:
    """[eod], which ends every document."""
    return EOD_ID

  @property
  def unk_id(self) -> int:
    """Never produced by encoding: unlearned characters become bytes."""
    return UNK_ID

  @property
  def _base_vocab_size(self) -> int:
    return self.codec.size if self._size is None else self._size

  def _encode(self, s: str) -> list[int]:
    return self.codec.encode(s)

  def encode_batch(self, texts, num_threads: int = 0) -> list[np.ndarray]:
    """One int32 array of ids per text, without [eod]; 0 threads: all cores."""
    return self.codec.encode_batch(texts, num_threads)

  def _decode(self, ids) -> str:
    return self.codec.decode(ids)

  def _encode_tf(self, s):
    # Through Python, not through tensorflow_text: its SentencePiece is an older one and
    # breaks ties between equally likely segmentations (runs of spaces) the other way,
    # and what a model is evaluated on must be tokenised as what it was trained on.
    if not isinstance(s, tf.RaggedTensor):
      rank = s.shape.rank
      if rank == 0:
        return self._encode_flat(s[tf.newaxis]).values
      if rank == 1:
        return self._encode_flat(s)
      s = tf.RaggedTensor.from_tensor(s, ragged_rank=rank - 1)
    return s.with_flat_values(self._encode_flat(s.flat_values))

  def _encode_flat(self, s):
    def encode(texts):
      rows = [self.codec.encode(text.decode(errors='replace')) for text in texts]
      lengths = np.array([len(row) for row in rows], np.int64)
      return np.array(list(itertools.chain(*rows)), np.int32), lengths

    # stateful=False lets tf.data save its iterators and run the calls side by side.
    ids, lengths = tf.numpy_function(encode, [s], (tf.int32, tf.int64), stateful=False)
    return tf.RaggedTensor.from_row_lengths(
      tf.ensure_shape(ids, [None]), tf.ensure_shape(lengths, [None]), validate=False
    )

  def _decode_tf(self, ids):
    if isinstance(ids, tf.RaggedTensor):
      ids = ids.to_tensor()

    def decode(ids):
      rows = ids.reshape(-1, ids.shape[-1])
      text = [self.codec.decode(row).encode() for row in rows]
      return np.array(text, object).reshape(ids.shape[:-1])

    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(text, ids.shape[:-1])

  def __eq__(self, other) -> bool:
    if isinstance(other, RunVocabulary):
      return other == self
    if not isinstance(other, SentencePieceVocabulary):
      return False
    return self.path == other.path or (
      self.exists() and other.exists() and self.hash == other.hash
    )

  def __hash__(self) -> int:
    return hash(type(self))

  def __str__(self) -> str:
    return f'SentencePieceVocabulary({self.path}, vocab_size={self._size})'

  __repr__ = __str__


def _learning_key(name: str | None) -> str:
  """What a learned vocabulary's file is named after: the text it was learned from."""
  if name is None:
    return 'vocabulary'
  keys = {
    getattr(task.source, 'identity', '')
    for task in seqio.get_subtasks(seqio.get_mixture_or_task(name))
  }
  return '-'.join([name, *sorted(keys - {''})])


_in_use: seqio.Vocabulary | None = None


def use(vocabulary: seqio.Vocabulary | None) -> None:
  """Makes `vocabulary` the one that every `RunVocabulary` stands for; None for none."""
  global _in_use
  if isinstance(vocabulary, RunVocabulary):
    raise ValueError('a RunVocabulary cannot stand for itself')
  _in_use = vocabulary


def current() -> seqio.Vocabulary:
  """The vocabulary of this run.

  Raises:
    UserError: none was set.
  """
  if _in_use is None:
    raise errors.UserError(
      'This task is tokenised with the vocabulary of the model, and none is in use: '
      'call palm_t5x.corpus.vocabulary.use(vocabulary) first.'
    )
  return _in_use


@contextlib.contextmanager
def using(vocabulary: seqio.Vocabulary):
  """`use(vocabulary)` for the length of a with block."""
  global _in_use
  before = _in_use
  use(vocabulary)
  try:
    yield vocabulary
  finally:
    _in_use = before


class RunVocabulary(seqio.Vocabulary):
  """Stands in a task's features for the vocabulary of the model being run.

  So that a task can be registered before a vocabulary is known, and serve any.
  """

  def __init__(self):
    super().__init__(extra_ids=0)

  bos_id = property(lambda self: current().bos_id)
  eos_id = property(lambda self: current().eos_id)
  unk_id = property(lambda self: current().unk_id)
  pad_id = property(lambda self: current().pad_id)
  extra_ids = property(lambda self: current().extra_ids)
  vocab_size = property(lambda self: current().vocab_size)
  _base_vocab_size = property(lambda self: current()._base_vocab_size)

  hash = property(lambda self: codec_lib.hash_of(current()))

  def encode_batch(self, texts) -> list[np.ndarray]:
    """One int32 array of ids per text, without [eod]."""
    return codec_lib.encode_batch(current(), texts)

  def _encode(self, s):
    return current()._encode(s)

  def _decode(self, ids):
    return current()._decode(ids)

  def _encode_tf(self, s):
    return current()._encode_tf(s)

  def _decode_tf(self, ids):
    return current()._decode_tf(ids)

  def __eq__(self, other) -> bool:
    if isinstance(other, RunVocabulary):
      return True
    return _in_use is not None and _in_use == other

  def __hash__(self) -> int:
    return hash(SentencePieceVocabulary)

  def __str__(self) -> str:
    return f'RunVocabulary({_in_use})'


def _trainer_options(vocab_size, model_type, character_coverage, num_threads) -> dict:
  """SentencePiece's options that make a vocabulary what the paper says it is."""
  return {
    'vocab_size': vocab_size,
    'model_type': model_type,
    'character_coverage': character_coverage,
    'byte_fallback': True,
    'split_digits': True,
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
    'add_dummy_prefix': False,
    'allow_whitespace_only_pieces': True,
    'pad_id': PAD_ID,
    'eos_id': EOD_ID,
    'unk_id': UNK_ID,
    'bos_id': -1,
    # A control piece: the text "[eod]" is ordinary text, never this id.
    'eos_piece': '[eod]',
    'user_defined_symbols': ['\n'],
    # However rare spaces are: as bytes they would come back as a literal U+2581.
    'required_chars': codec_lib.SPACE_MARK,
    'num_threads': num_threads,
    'max_sentence_length': 1 << 20,
    # Candidates to prune from. The default of a million doubles the time and, for small
    # vocabularies, changes nothing that can be measured.
    'seed_sentencepiece_size': max(100_000, 4 * vocab_size),
    'train_extremely_large_corpus': vocab_size > 100_000,
    'hard_vocab_limit': False,
  }


def train(
  texts,
  path: str,
  vocab_size: int,
  *,
  model_type: str = 'unigram',
  character_coverage: float = 0.9995,
  num_threads: int = 2,
  note: str = '',
) -> SentencePieceVocabulary:
  """Learns a vocabulary with the paper's properties and writes it atomically.

  Writes `path` and, before it, `path`.json: sizes, options, and the model's hash. The
  same texts and `num_threads` give the same bytes. Where the text is too short for so
  many pieces, the last ids are pieces that nothing is ever encoded to.

  Args:
    texts: an iterable of strings; only what it yields is read, so bound it first.
    path: where to write the model, local or gs://.
    vocab_size: pieces in all, with the 260 reserved ones.
    model_type: 'unigram' or 'bpe'; the paper does not say which it used.
    character_coverage: the share of characters learned as pieces; the rest are bytes.
    num_threads: fixed, since the sums' order (so the result) depends on it.
    note: where the texts are from, for the manifest.

  Raises:
    UserError: too little text for so many pieces.
  """
  options = _trainer_options(vocab_size, model_type, character_coverage, num_threads)
  if vocab_size <= NUM_RESERVED:
    raise errors.UserError(
      f'vocab_size = {vocab_size} leaves no room beside the {NUM_RESERVED} reserved '
      'pieces: choose 512 or more.'
    )
  model, seen = io.BytesIO(), {'characters': 0, 'spaces': False}

  def lines():
    # The newline has a piece of its own, so that no piece needs to span lines.
    for text in texts:
      seen['characters'] += len(text)
      for line in text.split('\n'):
        if line.strip() and codec_lib.SPACE_MARK not in line:
          seen['spaces'] |= ' ' in line
          yield line
    if not seen['spaces'] and seen['characters']:
      yield 'a a'  # required_chars must occur

  feed = lines()
  first = next(feed, None)
  if first is None:
    raise errors.UserError('There is no text to learn a vocabulary from.')
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=itertools.chain([first], feed),
      model_writer=model,
      minloglevel=2,
      **options,
    )
  except RuntimeError as e:
    raise errors.UserError(
      f'Cannot learn {vocab_size} pieces from {seen["characters"]:,} characters of '
      f'text: use a smaller vocab_size or more text. SentencePiece says: {e}'
    ) from e
  data = _with_fixed_ids(model.getvalue(), vocab_size)
  manifest = {
    'hash': hashlib.blake2b(data, digest_size=16).hexdigest(),
    'characters': seen['characters'],
    'learned_from': note,
    'sentencepiece': sentencepiece.__version__,
    'options': options,
  }
  # The manifest first: a model that is there is a whole one.
  storage.write_bytes(path + '.json', (json.dumps(manifest, indent=2) + '\n').encode())
  storage.write_bytes(path, data)
  return SentencePieceVocabulary(path, vocab_size)


def _with_fixed_ids(model: bytes, vocab_size: int) -> bytes:
  """Moves the newline's piece behind the 256 bytes; fills up with unused pieces."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  pieces = list(proto.pieces)
  assert pieces[FIRST_BYTE_ID].piece == '\n', pieces[FIRST_BYTE_ID].piece
  pieces.insert(NEWLINE_ID, pieces.pop(FIRST_BYTE_ID))
  del proto.pieces[:]
  proto.pieces.extend(pieces)
  for i in range(vocab_size - len(pieces)):
    proto.pieces.add(piece=f'<unused_{i}>', score=0.0, type=proto.SentencePiece.UNUSED)
  proto.trainer_spec.vocab_size = vocab_size
  return proto.SerializeToString(deterministic=True)

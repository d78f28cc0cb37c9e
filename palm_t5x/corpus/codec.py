"""Text to token ids and back, exactly, with SentencePiece and nothing else.

Kept apart from `vocabulary` so that a process that only tokenises does not load
TensorFlow (three seconds and 800 MB).
"""

import hashlib

import numpy as np
import sentencepiece

# SentencePiece writes a space as U+2581, so a literal U+2581 in the text would come
# back as a space. Its three UTF-8 bytes as byte pieces come back as themselves.
SPACE_MARK = '\u2581'


class Codec:
  """A SentencePiece model that gives back every string it is given.

  Args:
    model: the bytes of a model made by `vocabulary.train` (byte fallback, identity
      normalisation, no added prefix).
  """

  def __init__(self, model: bytes):
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.mark_ids = tuple(
      self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE_MARK.encode()
    )

  @property
  def size(self) -> int:
    """How many pieces there are."""
    return self._processor.get_piece_size()

  @property
  def eos_id(self) -> int:
    """The id of [eod]."""
    return self._processor.eos_id()

  @property
  def unk_id(self) -> int:
    """The id of the unknown piece, which no text is ever encoded to."""
    return self._processor.unk_id()

  def piece(self, index: int) -> str:
    """The piece with this id, as SentencePiece spells it."""
    return self._processor.id_to_piece(int(index))

  def encode(self, text: str) -> list[int]:
    """The ids of one text, without [eod]."""
    if SPACE_MARK not in text:
      return self._processor.encode(text)
    ids: list[int] = []
    for i, part in enumerate(text.split(SPACE_MARK)):
      ids.extend(self.mark_ids if i else ())
      ids.extend(self._processor.encode(part))
    return ids

  def encode_batch(self, texts, num_threads: int = 0) -> list[np.ndarray]:
    """Encodes many texts in one call, on `num_threads` threads (0: all cores).

    Returns:
      one int32 array per text, without [eod]; the same ids as `encode`.
    """
    texts = list(texts)
    plain = [text for text in texts if SPACE_MARK not in text]
    # As NumPy arrays: lists of Python's integers take as long to make as the encoding.
    encoded = iter(
      self._processor.encode(plain, num_threads=num_threads or -1, return_type='numpy')
      if plain
      else ()
    )
    return [
      np.array(self.encode(text) if SPACE_MARK in text else next(encoded), np.int32)
      for text in texts
    ]

  def decode(self, ids) -> str:
    """The text of the ids; control ids (pad, [eod]) stand for no text."""
    return self._processor.decode([int(i) for i in ids])


def hash_of(vocabulary) -> str:
  """A hex digest that two SeqIO vocabularies share only if they give the same ids."""
  if hasattr(vocabulary, 'hash'):
    return vocabulary.hash
  state = getattr(vocabulary, 'sp_model', None)
  if state is None:
    kept = sorted((k, repr(v)) for k, v in vars(vocabulary).items())
    state = repr((type(vocabulary).__qualname__, kept)).encode()
  if vocabulary.extra_ids:
    state += f'+{vocabulary.extra_ids}'.encode()
  return hashlib.blake2b(state, digest_size=16).hexdigest()


def encode_batch(vocabulary, texts) -> list[np.ndarray]:
  """One int32 array of ids per text, with any SeqIO vocabulary; no end of document."""
  if hasattr(vocabulary, 'encode_batch'):
    return vocabulary.encode_batch(texts)
  return [np.array(vocabulary.encode(text), np.int32) for text in texts]

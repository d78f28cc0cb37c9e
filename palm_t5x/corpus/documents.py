"""What the corpus stages pass on: documents, parts of a corpus, and files of documents.

A file of documents is zstd-compressed JSON lines, one object with id, text, source and
meta each. It appears whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from palm_t5x import errors
from palm_t5x.corpus import storage

_LEVEL = 3  # of zstd: the level at which it still outruns a tokeniser
_BUFFER = 1 << 20


@dataclasses.dataclass(slots=True)
class Document:
  """One document.

  Attributes:
    id: unique in its sub-corpus and independent of where the files lie.
    text: the text itself.
    source: where it is from, for reports: a relative path, a URL.
    meta: JSON-able facts that readers and steps add, such as 'language'.
  """

  id: str
  text: str
  source: str = ''
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)

  def hash(self) -> bytes:
    """blake2b-128 of the text: equal for exact duplicates."""
    return text_hash(self.text)


@dataclasses.dataclass(frozen=True)
class Dropped:
  """What a step returns for a document it does not keep.

  Attributes:
    reason: a short phrase, the same for all documents dropped for this reason.
  """

  reason: str


@dataclasses.dataclass(frozen=True)
class Part:
  """A share of a corpus that one worker reads from beginning to end.

  Attributes:
    name: unique in the corpus; letters, digits, '-', '_' and '.' only.
    read: returns an iterator over the documents, which may be `Document`s, texts, or
      dicts of one example; must pickle (a function of a module, or a partial of one)
      and must repeat itself.
    num_bytes: about how much there is to read, for progress and balance.
  """

  name: str
  read: Callable[[], Iterator[Any]]
  num_bytes: int = 0


def clean(text: str) -> str:
  """Half a surrogate pair, which JSON can hold, is not text: it becomes U+FFFD."""
  try:
    text.encode()
  except UnicodeEncodeError:
    text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return text


def text_hash(text: str) -> bytes:
  """blake2b-128 of a text's UTF-8 bytes; `text` must be `clean`."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def uniform(*names) -> float:
  """A number in [0, 1) that is a pure function of `names`, such as (salt, id).

  What samples and splits are drawn with: it depends on no order and no sharding.
  """
  text = '\x1f'.join(str(name) for name in names)
  digest = hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=8).digest()
  return (int.from_bytes(digest, 'little') >> 11) / (1 << 53)


class Writer:
  """Writes a file of documents: whole, fsynced and renamed on leaving the with block.

  Leaving it by an exception keeps what was there before. Documents may be added as
  `Document`s or as plain dicts. A full disk is a `Failure`.

  Attributes:
    num_documents: written so far.
    checksum: blake2b-128 of the uncompressed lines, in hex, once closed.
  """

  def __init__(self, path: str):
    self._path, self._temporary = path, storage.temporary(path)
    self._digest = hashlib.blake2b(digest_size=16)
    self.num_documents, self.checksum = 0, ''

  def __enter__(self) -> 'Writer':
    with storage.writing(self._path):
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      self._file = open(self._temporary, 'wb')
    compressor = zstandard.ZstdCompressor(_LEVEL, write_checksum=True)
    self._out = compressor.stream_writer(self._file, closefd=False)
    self._pending = io.BytesIO()
    return self

  def add(self, document: Document | dict[str, Any]) -> None:
    """Appends one document."""
    if isinstance(document, Document):
      document = {
        'id': document.id,
        'text': document.text,
        'source': document.source,
        'meta': document.meta,
      }
    line = json.dumps(document, ensure_ascii=False, separators=(',', ':')) + '\n'
    self._pending.write(line.encode('utf-8', 'replace'))
    self.num_documents += 1
    if self._pending.tell() >= _BUFFER:
      self._flush()

  def _flush(self):
    data = self._pending.getvalue()
    self._digest.update(data)
    with storage.writing(self._path):
      self._out.write(data)
    self._pending = io.BytesIO()

  def __exit__(self, kind, value, trace) -> None:
    try:
      if kind is None:
        self._flush()
        with storage.writing(self._path):
          self._out.close()
          self._file.flush()
          os.fsync(self._file.fileno())
          os.replace(self._temporary, self._path)
        self.checksum = self._digest.hexdigest()
    finally:
      self._file.close()
      with contextlib.suppress(FileNotFoundError):
        os.unlink(self._temporary)


def read(path: str) -> Iterator[Document]:
  """The documents of a file that `Writer` wrote, in its order.

  Raises:
    Failure: the file is missing or damaged.
  """
  try:
    for line in lines(path):
      yield Document(**json.loads(line))
  except (OSError, ValueError, TypeError, zstandard.ZstdError) as e:
    raise errors.Failure(
      f'The documents in {path} cannot be read ({_first_line(e)}): delete the '
      'folder it lies in and run the command that wrote it (`t5x corpus`) again.'
    ) from e


def lines(path: str) -> Iterator[bytes]:
  """The lines of a zstd file, without their ends.

  Raises:
    ValueError: the file ends too early.
  """
  frame, rest = zstandard.ZstdDecompressor().decompressobj(), b''
  with open(path, 'rb') as f:
    while data := f.read(_BUFFER):
      *lines, rest = (rest + frame.decompress(data)).split(b'\n')
      yield from lines
  if rest or not frame.eof:  # zstd itself is silent about a file that was cut off
    raise ValueError('it ends too early')


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

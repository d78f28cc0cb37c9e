"""Dumps with a form of their own: Wikipedia by WikiExtractor, threads of messages."""

import dataclasses
import datetime
import functools
import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import zstandard

from palm_t5x import errors
from palm_t5x.corpus import documents, records, streams
from palm_t5x.corpus.records import Broken

_WIKI_NAME = re.compile(r'(^|/)wiki_\d+(\.(json|jsonl|txt))?(\.(gz|zst|bz2|xz))?$')
_WIKI_FOLDER = re.compile(r'(^|/)[A-Z]{2}$')
_OPEN = re.compile(r'<doc\s.*?\bid="([^"]*)".*?\burl="([^"]*)".*?\btitle="(.*)"\s*>$')
_BUCKETS = 32
_PER_MESSAGE = 600  # bytes of Python objects around a message's text


@dataclasses.dataclass(frozen=True)
class WikiExtractor:
  """Articles as WikiExtractor writes them, as <doc> elements or with --json.

  Files are AA/wiki_00 and so on, compressed or not, in any folders (such as one per
  language). Ids are folder#article; meta has 'title', which the text does not repeat.

  Attributes:
    unescape: entities such as &lt; are decoded: WikiExtractor writes them by default.
    max_document_bytes: longer articles are broken.
    part_bytes: what one worker reads at a time.
  """

  unescape: bool = True
  max_document_bytes: int = 64 << 20
  part_bytes: int = records.PART_BYTES

  def parts(self, data_dir: str) -> list[documents.Part]:
    """See `records.Reader`."""
    wanted = "WikiExtractor's files, such as AA/wiki_00"
    found = records.files_below(data_dir, formats=wanted)
    files = [f for f in found if _WIKI_NAME.search(f[0])]
    if not files:
      raise records.nothing_to_read(data_dir, wanted, len(found))
    return _parts(self, data_dir, files, _read_wiki)


def _parts(reader, data_dir, files, read) -> list[documents.Part]:
  return [
    documents.Part(
      f'{i:05d}-{records.slug(share[0][0])}',
      functools.partial(read, reader, data_dir, tuple(path for path, _ in share)),
      sum(size for _, size in share),
    )
    for i, share in enumerate(records.shares(files, reader.part_bytes))
  ]


def _read_wiki(reader: WikiExtractor, data_dir: str, paths) -> Iterator[Any]:
  for path in paths:
    lines = streams.lines(
      streams.blocks(records.locate(data_dir, path)), reader.max_document_bytes
    )
    number = 0
    article = None
    try:
      for number, (_, line) in enumerate(lines, 1):
        place = f'{path}:{number}'
        if article is None and (line is None or line.startswith(b'{')):
          yield _wiki_json(reader, path, place, line)
        elif line is not None and line.startswith(b'<doc '):
          if article:
            yield Broken(article.place, 'no </doc>')
          article = _Article(place, line)
        elif line is not None and line.rstrip() == b'</doc>':
          if article:
            yield article.document(reader, path)
          else:
            yield Broken(place, '</doc> without <doc>')
          article = None
        elif article:
          article.add(line, reader.max_document_bytes)
        elif line.strip():
          yield Broken(place, 'text outside of <doc>')
      if article:
        yield Broken(article.place, 'no </doc>')
      if not number:
        yield Broken(path, 'empty file')
    except streams.Damaged as e:
      yield Broken(f'{path}, after line {number}', str(e))


class _Article:
  """The lines of a <doc> so far."""

  def __init__(self, place: str, head: bytes):
    self.place, self._head = place, head
    self._lines, self._size, self._broken = [], 0, ''

  def add(self, line: bytes | None, limit: int) -> None:
    self._size += limit + 1 if line is None else len(line) + 1
    if self._size > limit:
      self._broken = 'longer than max_document_bytes'
      self._lines.clear()
    else:
      self._lines.append(line)

  def document(self, reader: WikiExtractor, path: str) -> documents.Document | Broken:
    if self._broken:
      return Broken(self.place, self._broken)
    try:
      head = _OPEN.match(records.decode(self._head).rstrip())
      text = b'\n'.join(self._lines).decode()
    except UnicodeDecodeError:
      return Broken(self.place, 'invalid UTF-8')
    if not head:
      return Broken(self.place, '<doc> without id, url or title')
    name, url, title = head.groups()
    text = text.lstrip('\n')
    first, _, rest = text.partition('\n')
    if first.rstrip('\r') == title:
      text = rest
    return _article(reader, path, name, url, title, text)


def _wiki_json(reader, path: str, place: str, line) -> documents.Document | Broken:
  value, why = records.parse_object(line)
  if value is None:
    return Broken(place, why)
  fields = [value.get(key, '') for key in ('url', 'title', 'text')]
  if 'text' not in value or not all(isinstance(field, str) for field in fields):
    return Broken(place, 'no text')
  return _article(reader, path, value.get('id', place), *fields)


def _article(reader, path, name, url, title, text) -> documents.Document:
  if reader.unescape:
    title = html.unescape(title)
    text = html.unescape(text) if '&' in text else text
  # Articles are numbered within one wiki: its files share a folder of folders.
  name = f'{_WIKI_FOLDER.sub("", path.rpartition("/")[0])}#{name}'
  text, title = documents.clean(text.strip('\r\n')), documents.clean(title)
  return documents.Document(
    documents.clean(name), text, documents.clean(url) or path, {'title': title}
  )


@dataclasses.dataclass(frozen=True)
class Threads:
  """Threads of messages, from JSON lines: one thread a line, or one message a line.

  A line with 'messages', a list, is a thread. Others are messages, and those of a file
  that name one thread are brought together, as in Reddit's dumps; a message without a
  thread and without a parent begins one of its own name. Of the keys given, the first
  that a record has counts.

  The document's text is the messages', one after the other; meta['messages'] has them
  with their structure: id, parent, author, date (ISO 8601 or ''), text.
  `conversations.Conversation` makes conversations of them.

  Attributes:
    thread_key, id_key, parent_key, author_key, date_key, text_key: names of fields.
    title_key: that of a title, which goes in front of a message's text.
    unescape: entities such as &gt; are decoded: Reddit's dumps have them.
    max_document_bytes: longer threads and lines are broken.
    memory_bytes: what the messages of a file may take before they are sorted into files
      in the temporary folder (TMPDIR); at least eight times max_document_bytes.
    part_bytes: what one worker reads at a time; files are not cut.
  """

  thread_key: Sequence[str] = ('thread_id', 'link_id', 'thread', 'conversation_id')
  id_key: Sequence[str] = ('id', 'message_id')
  parent_key: Sequence[str] = ('parent', 'parent_id', 'reply_to')
  author_key: Sequence[str] = ('author', 'user', 'by')
  date_key: Sequence[str] = ('date', 'timestamp', 'created_utc', 'created_at', 'time')
  text_key: Sequence[str] = ('text', 'body', 'selftext')
  title_key: Sequence[str] = ('title',)
  unescape: bool = False
  max_document_bytes: int = 16 << 20
  memory_bytes: int = 256 << 20
  part_bytes: int = records.PART_BYTES

  def __post_init__(self):
    if self.memory_bytes < 8 * self.max_document_bytes:
      raise errors.UserError(
        f'Threads.memory_bytes = {self.memory_bytes} is less than eight times '
        f'max_document_bytes = {self.max_document_bytes}: raise it or lower that.'
      )

  def parts(self, data_dir: str) -> list[documents.Part]:
    """See `records.Reader`."""
    wanted = 'threads or messages as .jsonl, .json, .ndjson (also .gz, .zst, .bz2, .xz)'
    found = records.files_below(data_dir, formats=wanted)
    files = [f for f in found if _is_json_lines(f[0])]
    if not files:
      raise records.nothing_to_read(data_dir, wanted, len(found))
    return _parts(self, data_dir, files, _read_threads)


def _is_json_lines(path: str) -> bool:
  name = os.path.basename(path).lower()
  stem = name.removesuffix(streams.compression(name))
  # Reddit's monthly dumps, RC_2019-07.zst, have no other suffix.
  return stem.endswith(('.jsonl', '.json', '.ndjson')) or (
    stem != name and re.fullmatch(r'r[cs]_\d{4}-\d{2}', stem) is not None
  )


def _read_threads(reader: Threads, data_dir: str, paths) -> Iterator[Any]:
  for path in paths:
    aside = []  # what is no message of the flat form, on its way out

    def messages(path=path, aside=aside):
      lines = streams.lines(
        streams.blocks(records.locate(data_dir, path)), reader.max_document_bytes
      )
      number = 0
      try:
        for number, (_, line) in enumerate(lines, 1):
          if line is not None and not line.strip():
            continue
          found = _thread_line(reader, path, f'{path}:{number}', line)
          if isinstance(found, tuple):
            yield found
          else:
            aside.extend(found)
            yield None
        if not number:
          aside.append(Broken(path, 'empty file'))
      except streams.Damaged as e:
        aside.append(Broken(f'{path}, after line {number}', str(e)))
      yield None

    limits = reader.memory_bytes, reader.max_document_bytes
    for found in grouped(messages(), *limits):
      yield from aside
      aside.clear()
      if found is not None:
        thread, whole, members = found
        yield _thread(path, thread, whole, members)
    yield from aside


def _thread(path: str, name: str, whole: bool, messages: list[dict]):
  place = documents.clean(f'{path}#{name}')
  if not whole:
    return Broken(place, 'thread longer than max_document_bytes')
  text = '\n\n'.join(message['text'] for message in messages)
  return documents.Document(place, text, documents.clean(path), {'messages': messages})


def _thread_line(reader: Threads, path: str, place: str, line: bytes | None):
  """(thread, message) of the flat form, or a list of what to yield at once."""
  value, why = records.parse_object(line)
  if value is None:
    return [Broken(place, why)]
  if not isinstance(value.get('messages'), list):
    message = _message(reader, value)
    if isinstance(message, str):
      return [Broken(place, message)]
    thread = _name(_first(value, reader.thread_key))
    if not thread and message['parent']:
      return [Broken(place, f'no {" or ".join(reader.thread_key)}')]
    return thread or message['id'], message
  result, messages = [], []
  for i, item in enumerate(value['messages']):
    message = _message(reader, item) if isinstance(item, dict) else 'not a JSON object'
    if isinstance(message, str):
      result.append(Broken(f'{place}, message {i}', message))
    else:
      messages.append(message)
  name = _name(_first(value, (*reader.id_key, *reader.thread_key)))
  if messages:
    result.append(
      _thread(path, name or f'line {place.rpartition(":")[2]}', True, messages)
    )
  elif not result:
    result.append(Broken(place, 'no messages'))
  return result


def _message(reader: Threads, value: dict[str, Any]) -> dict[str, str] | str:
  """A message in the form that documents carry, or what is wrong with it."""
  name = _name(_first(value, reader.id_key))
  text, title = _first(value, reader.text_key), _first(value, reader.title_key)
  if not name:
    return f'no {" or ".join(reader.id_key)}'
  if not isinstance(text, str) and not isinstance(title, str):
    return f'no {" or ".join(reader.text_key)}'
  author = _first(value, reader.author_key)
  texts = [t for t in (title, text) if isinstance(t, str) and t]
  if reader.unescape:
    texts = [html.unescape(t) if '&' in t else t for t in texts]
  return {
    'id': name,
    'parent': _name(_first(value, reader.parent_key)),
    'author': documents.clean(author) if isinstance(author, str) else '',
    'date': iso_date(_first(value, reader.date_key)),
    'text': documents.clean('\n'.join(texts)),
  }


def _first(value: dict[str, Any], keys: Iterable[str]) -> Any:
  return next((value[key] for key in keys if value.get(key) is not None), None)


def _name(value: Any) -> str:
  """An id as text: Reddit's t1_abc and abc are one; '' if it is none."""
  if not isinstance(value, str | int) or isinstance(value, bool):
    return ''
  name = documents.clean(str(value))
  return re.sub(r'^t[1-6]_(?=[0-9a-z]+$)', '', name)


def iso_date(value: Any) -> str:
  """'2019-07-04T12:00:00Z' from seconds (or milliseconds) since 1970, or ISO text.

  '' for anything else.
  """
  if isinstance(value, str) and re.match(r'\d{4}-\d\d-\d\d', value):
    return documents.clean(value)
  try:
    seconds = float(value)
    seconds = seconds / 1000 if abs(seconds) > 1e11 else seconds
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  except (TypeError, ValueError, OverflowError, OSError):
    return ''
  return f'{moment:%Y-%m-%dT%H:%M:%SZ}'


def grouped(
  items: Iterable[tuple[str, dict] | None],
  memory_bytes: int,
  max_group_bytes: int,
  depth: int = 0,
) -> Iterator[tuple[str, bool, list[dict]] | None]:
  """Brings together the messages of one thread, wherever they are in a stream.

  What does not fit into memory is sorted into files by a hash of the thread, and each
  of them is grouped by itself.

  Args:
    items: (thread, message), or None, which is passed on at once.
    memory_bytes: about what messages may take.
    max_group_bytes: larger threads lose their messages, and are marked.
    depth: of files within files.

  Yields:
    (thread, whether it is whole, its messages in the order of the stream).

  Raises:
    Failure: the temporary folder is full.
  """
  items, groups, total = iter(items), {}, 0
  for item in items:
    if item is None:
      yield None
      continue
    total += _add(groups, *item, max_group_bytes)
    if total > memory_bytes:
      break
  else:
    for thread, (_, whole, messages) in groups.items():
      yield thread, whole, messages
    return
  with tempfile.TemporaryDirectory(prefix='palm_t5x_threads_') as folder:
    try:
      yield from _spill(folder, groups, items, depth)
    except OSError as e:
      raise errors.Failure(
        f'Cannot sort messages in {folder}: {e.strerror or e}. Set TMPDIR to a folder '
        'with as much room as the uncompressed file needs.'
      ) from e
    groups.clear()
    for i in range(_BUCKETS):
      path = os.path.join(folder, f'{i}.zst')
      yield from grouped(_spilled(path), memory_bytes, max_group_bytes, depth + 1)
      os.unlink(path)


def _add(groups, thread: str, message: dict | None, max_group_bytes: int) -> int:
  """Adds a message (None: the thread is not whole); returns by how much memory grew."""
  group = groups.setdefault(thread, [0, True, []])
  if not group[1]:
    return 0
  cost = 0 if message is None else _PER_MESSAGE + 2 * len(message['text'])
  if message is None or group[0] + cost > max_group_bytes:
    groups[thread] = [0, False, []]
    return -group[0]
  group[0] += cost
  group[2].append(message)
  return cost


def _spill(folder: str, groups, items, depth: int) -> Iterator[None]:
  outs = [
    zstandard.open(os.path.join(folder, f'{i}.zst'), 'wb', zstandard.ZstdCompressor(1))
    for i in range(_BUCKETS)
  ]

  def write(*entry):
    key = f'{depth}\x1f{entry[0]}'.encode()
    bucket = hashlib.blake2b(key, digest_size=2).digest()
    outs[int.from_bytes(bucket, 'little') % _BUCKETS].write(
      json.dumps(entry).encode() + b'\n'
    )

  try:
    for thread, (_, whole, messages) in groups.items():
      for message in messages:
        write(thread, message)
      if not whole:
        write(thread, None)
    groups.clear()
    for item in items:
      if item is None:
        yield None
      else:
        write(*item)
  finally:
    for out in outs:
      out.close()


def _spilled(path: str) -> Iterator[tuple[str, dict]]:
  with zstandard.open(path, 'rt', encoding='utf-8', newline='\n') as lines:
    for line in lines:
      yield tuple(json.loads(line))

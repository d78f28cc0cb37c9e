"""Raw text in any of the usual file formats, as one stream of documents.

A reader is a frozen dataclass whose fields Gin can bind; `parts(data_dir)` cuts what
lies there into shares that workers read side by side. What each yields, and how broken
records are passed over: `records.py`. All readers can be named here, for Gin; those of
dumps are in `dump_formats.py`, that of TensorFlow Datasets in `tfds_reader.py`.
"""

import collections
import dataclasses
import functools
import glob
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from palm_t5x import errors
from palm_t5x.corpus import documents, records, streams
from palm_t5x.corpus.dump_formats import Threads, WikiExtractor
from palm_t5x.corpus.records import Broken, Ignored
from palm_t5x.corpus.tfds_reader import Tfds

logger = logging.getLogger(__name__)

__all__ = ('Files', 'SourceTree', 'Tfds', 'Threads', 'WikiExtractor')

_LINES = ('.jsonl', '.json', '.ndjson')
_KNOWN = '.txt, .jsonl, .json, .ndjson (each also .gz, .zst, .bz2, .xz) and .parquet'
_BATCH_BYTES = 16 << 20  # of a parquet file's rows that are in memory at a time
_BINARY = 8192  # bytes; a NUL in the first so many makes a file binary, as for git


def _kind(path: str) -> str:
  """'.txt', '.jsonl' or '.parquet', by a file's name; '' for others."""
  name = path.lower()
  name = name.removesuffix(streams.compression(name))
  if name.endswith(_LINES):
    return '.jsonl'
  return next((k for k in ('.txt', '.parquet') if name.endswith(k)), '')


@dataclasses.dataclass(frozen=True)
class Files:
  """Text files, JSON lines and parquet files below a folder, in any mixture.

  The id of a document is its file's relative path, and, where files hold many, '#' and
  the record's own id, or ':' and its line or row, or '@' and its first byte.

  Attributes:
    pattern: a glob below the folder, such as 'en/**/*.jsonl.gz'; None: all files of the
      known formats.
    text_key: the field or column of the text, or several, whose texts are joined by a
      line break; at least one must be there.
    id_key: that of a record's id, if it has one; unique in its file.
    source_key: that of what reports say it is from.
    meta_keys: those that go into the documents' meta as they are.
    lines_are_documents: a .txt file is one document per line, not one in all.
    invalid_utf8: of .txt files: 'broken', or 'replace' by U+FFFD.
    max_document_bytes: longer records are broken, and never held in memory.
    part_bytes: uncompressed files are cut for several workers about there, and small
      files go together.
  """

  pattern: str | None = None
  text_key: str | Sequence[str] = 'text'
  id_key: str | None = 'id'
  source_key: str | None = 'url'
  meta_keys: Sequence[str] = ()
  lines_are_documents: bool = False
  invalid_utf8: str = 'broken'
  max_document_bytes: int = 64 << 20
  part_bytes: int = records.PART_BYTES

  def __post_init__(self):
    if self.part_bytes < 1 or self.max_document_bytes < 1:
      raise errors.UserError(
        f'part_bytes = {self.part_bytes}, max_document_bytes = '
        f'{self.max_document_bytes}: both are numbers of bytes, 1 or more.'
      )
    if self.invalid_utf8 not in ('broken', 'replace'):
      raise errors.UserError(
        f"invalid_utf8 = {self.invalid_utf8!r}: it is 'broken' or 'replace'."
      )

  def parts(self, data_dir: str) -> list[documents.Part]:
    """See `records.Reader`. Files of unknown formats are named in the log."""
    files = records.files_below(data_dir, formats=_KNOWN)
    if self.pattern is not None:
      root = os.path.abspath(os.path.expanduser(data_dir))
      wanted = glob.glob(self.pattern, root_dir=root, recursive=True)
      wanted = {path.replace(os.sep, '/') for path in wanted}
      chosen = [f for f in files if f[0] in wanted]
      if not chosen:
        raise records.nothing_to_read(
          data_dir, f'files like {self.pattern}', len(files)
        )
    else:
      chosen = files
    known = [f for f in chosen if _kind(f[0])]
    if not known:
      raise records.nothing_to_read(data_dir, _KNOWN, len(chosen))
    _say_ignored([path for path, _ in chosen if not _kind(path)])
    return self._cut(data_dir, known)

  def _cut(self, data_dir, files) -> list[documents.Part]:
    small, result = [], []

    def add(pieces, num_bytes):
      name = f'{len(result):05d}-{records.slug(pieces[0][0])}'
      read = functools.partial(_read_files, self, data_dir, tuple(pieces))
      result.append(documents.Part(name, read, num_bytes))

    def flush():
      for share in records.shares(small, self.part_bytes):
        add([(path, None, None) for path, _ in share], sum(s for _, s in share))
      small.clear()

    for path, size in files:
      cuts = size // self.part_bytes + 1
      if cuts == 1 or not self._can_be_cut(path):
        small.append((path, size))
        continue
      flush()
      if _kind(path) == '.parquet':
        stops = _row_groups(records.locate(data_dir, path))
        cuts = min(cuts, max(stops, 1))
      else:
        stops = size
      for i in range(cuts):
        add([(path, stops * i // cuts, stops * (i + 1) // cuts)], size // cuts)
    flush()
    return result

  def _can_be_cut(self, path: str) -> bool:
    kind = _kind(path)
    return not streams.compression(path) and (
      kind == '.parquet'
      or kind == '.jsonl'
      or (kind == '.txt' and self.lines_are_documents)
    )


def _say_ignored(paths: Sequence[str]) -> None:
  if paths:
    kinds = collections.Counter(os.path.splitext(p)[1] or 'no extension' for p in paths)
    named = ', '.join(f'{kind} ({n})' for kind, n in kinds.most_common(5))
    logger.warning('%d files of unknown formats are ignored: %s', len(paths), named)


def _row_groups(path: str) -> int:
  """The number of row groups of a parquet file; 0 if it is damaged."""
  try:
    with pq.ParquetFile(path) as file:
      return file.metadata.num_row_groups
  except (pa.ArrowException, OSError):
    return 0


def _read_files(reader: Files, data_dir: str, pieces) -> Iterator[Any]:
  for path, start, stop in pieces:
    full = records.locate(data_dir, path)
    kind = _kind(path)
    if kind == '.parquet':
      yield from _parquet(reader, full, path, start, stop)
    elif kind == '.txt' and not reader.lines_are_documents:
      yield _text_file(reader, full, path)
    else:
      yield from _line_file(reader, full, path, start, stop)


def _text_file(reader: Files, full: str, path: str) -> documents.Document | Broken:
  try:
    data = streams.whole(full, reader.max_document_bytes)
  except streams.Damaged as e:
    return Broken(path, str(e))
  if data is None:
    return Broken(path, 'longer than max_document_bytes')
  if not data:
    return Broken(path, 'empty file')
  try:
    text = records.decode(data)
  except UnicodeDecodeError:
    if reader.invalid_utf8 == 'broken':
      return Broken(path, 'invalid UTF-8')
    text = data.decode(errors='replace')
  return documents.Document(documents.clean(path), text, documents.clean(path))


def _line_file(reader: Files, full: str, path: str, start, stop) -> Iterator[Any]:
  plain = _kind(path) == '.txt'
  limit = reader.max_document_bytes
  if start is None:
    lines = streams.lines(streams.blocks(full), limit)
  else:
    lines = streams.range_lines(full, start, stop, limit)
  number, place = 0, f'{path}:1'
  try:
    for number, (offset, line) in enumerate(lines, 1):
      place = f'{path}:{number}' if start is None else f'{path}@{offset}'
      if line is not None and not line.strip():
        continue
      yield (
        _text_line(path, place, line)
        if plain
        else _record(reader, path, place, *records.parse_object(line))
      )
    if not number and start is None:
      yield Broken(path, 'empty file')
  except streams.Damaged as e:
    yield Broken(f'{path}, after line {number}', str(e))


def _text_line(path: str, place: str, line: bytes | None):
  if line is None:
    return Broken(place, 'longer than max_document_bytes')
  try:
    text = records.decode(line).removesuffix('\r')
  except UnicodeDecodeError:
    return Broken(place, 'invalid UTF-8')
  return documents.Document(documents.clean(place), text, documents.clean(path))


def _record(
  reader: Files, path: str, place: str, value: dict[str, Any] | None, why: str
) -> documents.Document | Broken:
  """A document from a record's fields."""
  if value is None:
    return Broken(place, why)
  keys = (reader.text_key,) if isinstance(reader.text_key, str) else reader.text_key
  found = [value[key] for key in keys if value.get(key) is not None]
  if not found:
    return Broken(place, f'no {" or ".join(keys)}')
  if not all(isinstance(text, str) for text in found):
    return Broken(place, f'{" or ".join(keys)} is no string')
  text = documents.clean(
    '\n'.join(t for t in found if t) if len(keys) > 1 else found[0]
  )
  if len(text) > reader.max_document_bytes:
    return Broken(place, 'longer than max_document_bytes')
  own = value.get(reader.id_key) if reader.id_key else None
  if not isinstance(own, str | int) or isinstance(own, bool) or own == '':
    name = place
  else:
    name = f'{path}#{own}'
  source = value.get(reader.source_key) if reader.source_key else None
  source = source if isinstance(source, str) and source else path
  meta = {key: value[key] for key in reader.meta_keys if value.get(key) is not None}
  return documents.Document(documents.clean(name), text, documents.clean(source), meta)


def _parquet(reader: Files, full: str, path: str, start, stop) -> Iterator[Any]:
  """The rows of row groups start..stop-1, a few at a time."""
  try:
    # Buffered: else a whole column of a row group, often a gigabyte, is in memory.
    file = pq.ParquetFile(full, buffer_size=1 << 20, page_checksum_verification=True)
  except (pa.ArrowException, OSError):
    yield Broken(path, 'damaged .parquet file')
    return
  with file:
    names = set(file.schema_arrow.names)
    text = (reader.text_key,) if isinstance(reader.text_key, str) else reader.text_key
    if not names & set(text):
      yield Broken(path, f'no column {" or ".join(text)}')
      return
    others = [key for key in (reader.id_key, reader.source_key) if key]
    columns = [c for c in dict.fromkeys([*text, *others, *reader.meta_keys])]
    columns = [c for c in columns if c in names]
    groups = range(file.metadata.num_row_groups)[start:stop]
    row = sum(file.metadata.row_group(g).num_rows for g in range(groups.start))
    for group in groups:
      first = row
      try:
        size = _rows_at_a_time(file.metadata.row_group(group), columns)
        batches = file.iter_batches(size, row_groups=[group], columns=columns)
        for batch in batches:
          yield from _rows(reader, path, batch, row)
          row += batch.num_rows
      except (pa.ArrowException, OSError):
        yield Broken(f'{path}, after row {row}', 'damaged .parquet file')
      row = first + file.metadata.row_group(group).num_rows
    if not row:
      yield Broken(path, 'empty file')


def _rows_at_a_time(group, columns: Sequence[str]) -> int:
  """How many rows of a group are about `_BATCH_BYTES`."""
  chunks = [group.column(i) for i in range(group.num_columns)]
  size = sum(
    chunk.total_uncompressed_size
    for chunk in chunks
    if chunk.path_in_schema.split('.')[0] in columns
  )
  return max(1, min(1024, group.num_rows * _BATCH_BYTES // max(size, 1)))


def _rows(reader: Files, path: str, batch: pa.RecordBatch, row: int) -> Iterator[Any]:
  columns = {}
  for name, column in zip(batch.schema.names, batch.columns, strict=True):
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
      # Parquet's strings may not be UTF-8: one that is not must not end the file.
      binary = (
        pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
      )
      column = column.cast(binary)
    columns[name] = column
  for i in range(batch.num_rows):
    place = f'{path}:{row + i}'
    value, why = {}, ''
    for name, column in columns.items():
      try:
        field = column[i].as_py()
        value[name] = field.decode() if isinstance(field, bytes) else field
      except UnicodeDecodeError:
        value, why = None, 'invalid UTF-8'
        break
    yield _record(reader, path, place, value, why)


@dataclasses.dataclass(frozen=True)
class SourceTree:
  """Trees of source files: one document per file, whose id is its relative path.

  Meta: 'repository', the first folders of the path, and 'extension', in lower case
  without its dot. Binary, empty and undecodable files are ignored, not broken: any tree
  has some.

  Attributes:
    repository_levels: how many folders name a repository: 1, or 2 for owner/name.
    extensions: which files to read, such as ('py', 'c'); None: all.
    max_document_bytes: larger files are ignored.
    part_bytes: what one worker reads at a time; repositories are kept together.
  """

  repository_levels: int = 1
  extensions: Sequence[str] | None = None
  max_document_bytes: int = 1 << 20
  part_bytes: int = 64 << 20

  def parts(self, data_dir: str) -> list[documents.Part]:
    """See `records.Reader`. Links are not followed."""
    found = records.files_below(data_dir, follow_links=False, formats='source files')
    files = found
    if self.extensions is not None:
      wanted = {e.lower().lstrip('.') for e in self.extensions}
      files = [f for f in files if _extension(f[0]) in wanted]
    if not files:
      wanted = 'source files'
      if self.extensions is not None:
        wanted = f'files that end in {", ".join(self.extensions)}'
      raise records.nothing_to_read(data_dir, wanted, len(found))
    return [
      documents.Part(
        f'{i:05d}-{records.slug(share[0][0])}',
        functools.partial(_read_tree, self, data_dir, tuple(p for p, _ in share)),
        sum(size for _, size in share),
      )
      for i, share in enumerate(records.shares(files, self.part_bytes, self.repository))
    ]

  def repository(self, path: str) -> str:
    """The repository that a relative path belongs to."""
    return '/'.join(path.split('/')[:-1][: self.repository_levels])


def _extension(path: str) -> str:
  return os.path.splitext(path)[1].lower().removeprefix('.')


def _read_tree(reader: SourceTree, data_dir: str, paths) -> Iterator[Any]:
  for path in paths:
    full, limit = records.locate(data_dir, path), reader.max_document_bytes
    try:
      with open(full, 'rb') as f:
        data = f.read(limit + 1)
    except OSError as e:
      yield Broken(path, os.strerror(e.errno) if e.errno else 'unreadable')
      continue
    if not data:
      yield Ignored(path, 'empty file')
    elif len(data) > limit:
      yield Ignored(path, 'longer than max_document_bytes')
    elif b'\0' in data[:_BINARY]:
      yield Ignored(path, 'binary file')
    else:
      try:
        text = records.decode(data)
      except UnicodeDecodeError:
        yield Ignored(path, 'invalid UTF-8')
        continue
      name = documents.clean(path)
      meta = {'repository': reader.repository(name), 'extension': _extension(name)}
      yield documents.Document(name, text, name, meta)

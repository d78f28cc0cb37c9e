"""Bytes and lines of files of any compression, in memory that does not grow with them.

What was read before a file turns out to be damaged has been passed on by then.
"""

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator

import zstandard

COMPRESSIONS = ('.gz', '.zst', '.bz2', '.xz')

_BLOCK = 1 << 20  # bytes that are read, or decompressed, at a time
# zstd packs up to 128 KiB into 4 bytes, and its decompressor has no limit on output:
# this much input yields 32 MiB at the very most.
_ZSTD_BLOCK = 1 << 10
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` needs, as Reddit's dumps do


class Damaged(Exception):  # noqa: N818 (a finding about a file, which readers catch)
  """The file cannot be read from here on; the text is a short phrase."""


def compression(name: str) -> str:
  """The suffix of a compressed file's name; '' for others."""
  return next((c for c in COMPRESSIONS if name.lower().endswith(c)), '')


def blocks(path: str, start: int = 0) -> Iterator[bytes]:
  """The decompressed bytes of a file, about a mebibyte at a time.

  Args:
    path: compressed if `compression(path)` says so.
    start: where to begin, in a file that is not compressed.

  Raises:
    Damaged: the file is cut off, not of its format, or cannot be read.
  """
  kind = compression(path)
  try:
    if kind == '.gz':
      yield from _gzip(_raw(path))
    elif kind == '.zst':
      yield from _zstd(_raw(path))
    elif kind:
      factory = bz2.BZ2Decompressor if kind == '.bz2' else lzma.LZMADecompressor
      yield from _with_needs_input(_raw(path), factory)
    else:
      yield from _raw(path, start)
  except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as e:
    raise Damaged(f'damaged {kind} file') from e
  except OSError as e:
    # bz2 reports damage so, without an error number.
    phrase = os.strerror(e.errno) if e.errno else f'damaged {kind} file'
    raise Damaged(phrase) from e


def _raw(path: str, start: int = 0) -> Iterator[bytes]:
  with open(path, 'rb', buffering=0) as f:
    f.seek(start)
    while data := f.read(_BLOCK):
      yield data


def _gzip(data: Iterable[bytes]) -> Iterator[bytes]:
  stream, begun = zlib.decompressobj(31), False
  for block in data:
    while block:
      begun = True
      yield stream.decompress(block, _BLOCK)
      if stream.eof:  # of a member; another may follow, or padding
        block = stream.unused_data.lstrip(b'\0')
        stream, begun = zlib.decompressobj(31), False
      else:
        block = stream.unconsumed_tail
  yield stream.flush()
  if begun and not stream.eof:
    raise Damaged('cut-off .gz file')


def _zstd(data: Iterable[bytes]) -> Iterator[bytes]:
  decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
  frame, begun, out, size = decompressor.decompressobj(), False, [], 0
  for large in data:
    for i in range(0, len(large), _ZSTD_BLOCK):
      block = large[i : i + _ZSTD_BLOCK]
      while block:
        begun = True
        try:
          text = frame.decompress(block)
        except zstandard.ZstdError:
          yield b''.join(out)
          raise
        out.append(text)
        size += len(text)
        block = b''
        if frame.eof:
          block = frame.unused_data
          frame, begun = decompressor.decompressobj(), False
      if size >= _BLOCK:
        joined, out, size = b''.join(out), [], 0
        for start in range(0, len(joined), _BLOCK):
          yield joined[start : start + _BLOCK]
  yield b''.join(out)
  if begun:
    raise Damaged('cut-off .zst file')


def _with_needs_input(data: Iterable[bytes], factory: Callable) -> Iterator[bytes]:
  stream, begun = factory(), False
  for block in data:
    while block or not stream.needs_input:
      begun = True
      yield stream.decompress(block, _BLOCK)
      block = b''
      if stream.eof:
        block = stream.unused_data
        stream, begun = factory(), False
  if begun:
    raise Damaged('cut-off file')


def lines(data: Iterable[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
  """(offset, line without its end) of every line; None for one of over `limit` bytes.

  A line that is too long is never held in memory.
  """
  pieces, size, offset = [], 0, 0  # of the line that is not complete yet
  for block in data:
    first, newline, rest = block.partition(b'\n')
    size += len(first)
    if size <= limit:
      pieces.append(first)
    else:
      pieces.clear()
    if not newline:
      continue
    yield offset, b''.join(pieces) if size <= limit else None
    offset += size + 1
    *whole, last = rest.split(b'\n')
    for line in whole:
      yield offset, line if len(line) <= limit else None
      offset += len(line) + 1
    pieces, size = [last], len(last)
  if size:
    yield offset, b''.join(pieces) if size <= limit else None


def range_lines(
  path: str, start: int, stop: int, limit: int
) -> Iterator[tuple[int, bytes | None]]:
  """`lines` of the share of an uncompressed file that begins in bytes start..stop-1.

  A line belongs to the range that its first byte lies in: ranges that cover a file
  yield each of its lines once. Offsets are those in the file.
  """
  # One byte early: the first piece is what is left of a line that began before.
  base = max(start - 1, 0)
  for offset, line in lines(blocks(path, base), limit):
    if start and not offset:
      continue
    if base + offset >= stop:
      return
    yield base + offset, line


def whole(path: str, limit: int) -> bytes | None:
  """All bytes of a file, or None if there are more than `limit`."""
  pieces, size = [], 0
  for block in blocks(path):
    size += len(block)
    if size > limit:
      return None
    pieces.append(block)
  return b''.join(pieces)

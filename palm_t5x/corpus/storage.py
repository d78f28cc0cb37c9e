"""Small files on a local disk or in a bucket, through TensorStore's key-value stores.

A token store and a vocabulary may lie at a local path or at gs://bucket/path; both go
through the same calls. Every write is atomic: a reader sees the old bytes or the new.
"""

import contextlib
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence

import tensorstore as ts

from palm_t5x import errors

_IN_FLIGHT = 64  # reads under way at a time: a bucket answers each in tens of ms


def is_remote(path: str) -> bool:
  """Whether `path` names a bucket (gs://, s3://) rather than a local file."""
  return '://' in path


def normalise(path: str) -> str:
  """`path` with ~ and $VARIABLES expanded and made absolute; URLs are left alone."""
  path = os.fspath(path)
  if is_remote(path):
    return path.rstrip('/')
  return os.path.abspath(os.path.expanduser(os.path.expandvars(path)))


def join(folder: str, *names: str) -> str:
  """`os.path.join`, for URLs too."""
  return (posixpath if is_remote(folder) else os.path).join(folder, *names)


def kvstore_spec(folder: str):
  """TensorStore's description of the folder, as `ts.open` wants it."""
  folder = normalise(folder)
  if is_remote(folder):
    return folder + '/'
  return {'driver': 'file', 'path': folder + '/'}


def _open(path: str):
  folder, _, name = normalise(path).rpartition('/')
  return ts.KvStore.open(kvstore_spec(folder or '/')).result(), name


@contextlib.contextmanager
def writing(path: str):
  """Turns what TensorStore raises while writing `path` into one clear `Failure`."""
  try:
    yield
  except (ValueError, OSError) as e:
    text = str(e)
    if re.search(r'RESOURCE_EXHAUSTED|[Nn]o space left|quota|File too large', text):
      hint = 'the disk is full: free some space, or name another folder, and run again'
    elif re.search(r'PERMISSION_DENIED|[Pp]ermission|[Rr]ead-only|Not a dir', text):
      hint = 'it cannot be written to: name another folder'
    else:
      hint = text
    raise errors.Failure(f'Cannot write {path}: {hint}.') from e


def temporary(path: str) -> str:
  """A name beside `path` that no other process uses, on whichever machine."""
  return f'{path}.{uuid.uuid4().hex[:12]}.tmp'


@contextlib.contextmanager
def atomic(path: str):
  """A local binary file that appears whole, fsynced, or not at all.

  Raises:
    Failure: the disk is full or the folder cannot be written to.
  """
  unfinished = temporary(path)
  with writing(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
      with open(unfinished, 'wb') as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
      os.replace(unfinished, path)
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(unfinished)


def read_bytes(path: str) -> bytes | None:
  """The file's bytes, or None where there is no such file.

  Raises:
    Failure: it is there and cannot be read.
  """
  try:
    store, name = _open(path)
    result = store.read(name).result()
  except (ValueError, OSError) as e:
    raise errors.Failure(f'Cannot read {path}: {e}') from e
  return bytes(result.value) if result.state == 'value' else None


def read_range(path: str, start: int, stop: int) -> bytes:
  """Bytes start..stop-1 of a file.

  Raises:
    Failure: it is missing, too short, or cannot be read.
  """
  if start == stop:
    return b''
  try:
    store, name = _open(path)
    result = store.read(name, byte_range=slice(start, stop)).result()
  except (ValueError, OSError, TypeError) as e:
    raise errors.Failure(f'Cannot read {path}: {e}') from e
  if result.state != 'value':
    raise errors.Failure(f'Cannot read {path}: there is no such file.')
  return bytes(result.value)


def read_ranges(
  folder: str, ranges: Sequence[tuple[str, int, int | None]]
) -> Iterator[bytes]:
  """Bytes start..stop-1 of each (name, start, stop) in `folder`, many at a time.

  A stop of None reads to the end of the file. Yields in the order of `ranges`.

  Raises:
    Failure: a file is missing, too short, or cannot be read.
  """
  path, waiting = folder, []
  try:
    store = ts.KvStore.open(kvstore_spec(folder)).result()
    for i in range(len(ranges) + _IN_FLIGHT):
      if i >= _IN_FLIGHT and i - _IN_FLIGHT < len(ranges):
        path, future = waiting[i - _IN_FLIGHT]
        waiting[i - _IN_FLIGHT] = None
        result = future and future.result()
        if result is not None and result.state != 'value':
          raise errors.Failure(f'Cannot read {path}: there is no such file.')
        yield bytes(result.value) if result else b''
      if i < len(ranges):
        name, start, stop = ranges[i]
        empty = start == stop
        read = None if empty else store.read(name, byte_range=slice(start, stop))
        waiting.append((join(folder, name), read))
  except (ValueError, OSError, TypeError) as e:
    raise errors.Failure(f'Cannot read {path}: {_short(e)}') from e


def _short(error: BaseException) -> str:
  """TensorStore's message without the call sites that it appends."""
  return ' '.join(
    re.split(r' \[(?:source locations|tensorstore_spec)=', str(error))[0].split()
  )


def list_names(folder: str) -> list[str]:
  """The names of the files in `folder` and its folders, relative to it, sorted."""
  try:
    store = ts.KvStore.open(kvstore_spec(folder)).result()
    names = store.list().result()
  except (ValueError, OSError) as e:
    raise errors.Failure(f'Cannot list {folder}: {e}') from e
  return sorted(name.decode() for name in names)


def list_folders(folder: str) -> list[str]:
  """The names of the folders in `folder`, sorted; there may be none."""
  if not is_remote(folder):
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return []
  return sorted({name.split('/')[0] for name in list_names(folder) if '/' in name})


def exists(folder: str) -> bool:
  """Whether there is anything in `folder`."""
  if not is_remote(folder):
    return os.path.isdir(normalise(folder))
  return bool(list_names(folder))


def write_bytes(path: str, data: bytes) -> None:
  """Writes the file atomically, making its folders.

  Raises:
    Failure: the disk is full or the folder cannot be written to.
  """
  with writing(path):
    store, name = _open(path)
    store.write(name, data).result()


def delete_file(path: str) -> None:
  """Deletes a file; there may be none."""
  with writing(path):
    store, name = _open(path)
    store.write(name, None).result()


def delete_folder(folder: str) -> None:
  """Deletes `folder` with all that is in it; there may be none."""
  folder = normalise(folder)
  with writing(folder):
    if not is_remote(folder):
      with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        shutil.rmtree(folder)
      return
    store = ts.KvStore.open(kvstore_spec(folder)).result()
    store.delete_range(ts.KvStore.KeyRange()).result()

"""Whether a folder still holds, byte for byte, what was written into it.

`checksums.json` maps each file below the folder to a digest: blake2b over the digests
of its blocks, so that all of the machine's cores can share the work.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib

NAME = 'checksums.json'
BLOCK = 1 << 26  # bytes


def _digest(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=16).digest()


def _digest_block(path: pathlib.Path, offset: int) -> bytes:
  with path.open('rb') as f:
    f.seek(offset)
    return _digest(f.read(BLOCK))


def _sync(path: pathlib.Path):
  with path.open('rb') as f:
    os.fsync(f.fileno())


def digests(folder: pathlib.Path, sync: bool = False) -> dict[str, str]:
  """Digest of every file below `folder`, by relative path; `sync` fsyncs them too."""
  paths = sorted(p for p in folder.rglob('*') if p.is_file())
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    blocks = {
      path: [
        pool.submit(_digest_block, path, offset)
        for offset in range(0, max(1, path.stat().st_size), BLOCK)
      ]
      for path in paths
      if path.relative_to(folder).as_posix() != NAME
    }
    written = [pool.submit(_sync, path) for path in blocks if sync]
    found = {
      path.relative_to(folder).as_posix(): _digest(
        b''.join(block.result() for block in parts)
      ).hex()
      for path, parts in blocks.items()
    }
    for done in written:
      done.result()
  return found


def write(folder: pathlib.Path):
  """Seals a folder: fsyncs its files and writes their digests beside them.

  Raises:
    OSError: if a file cannot be read, or the digests not be written.
  """
  with (folder / NAME).open('w') as f:
    json.dump(digests(folder, sync=True), f, indent=0)
    f.flush()
    os.fsync(f.fileno())


def damage(folder: str | os.PathLike) -> str | None:
  """What is wrong with a sealed folder, in words; None if it is whole."""
  folder = pathlib.Path(folder)
  try:
    recorded = dict(json.loads((folder / NAME).read_text()).items())
  except FileNotFoundError:
    return f'{NAME} is missing'
  except (OSError, ValueError, AttributeError) as e:
    return f'{NAME} is unreadable ({e})'
  try:
    found = digests(folder)
  except OSError as e:
    return f'unreadable ({e})'
  for name, digest in recorded.items():
    if name not in found:
      return f'{name} is missing'
    if found[name] != digest:
      return f'{name} has changed since it was written'
  for name in found:
    if name not in recorded:
      return f'{name} is in no {NAME}'
  return None

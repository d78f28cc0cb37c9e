"""Which checkpoints belong to a run that went back, and which it left behind.

    MODEL_DIR/rewinds.json    every rewind of the run, oldest first

Each rewind names the step it went back to and the data that is passed over from there.
A checkpoint says how many rewinds came before it (`rewinds` in its metadata); one that
lies beyond the target of a later rewind was left behind and counts for nothing. The
file is replaced in one rename, and that rename is the rewind: a kill before it leaves
the old timeline whole, a kill after it leaves a run that resumes on the new one, and
all else (removing what was left behind, the line in events.jsonl) is done again by
whoever finds it undone. `MODEL_DIR/events.jsonl` is for people and never read back.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from palm_t5x.errors import Failure

REWINDS = 'rewinds.json'
EVENTS = 'events.jsonl'
Entry = Mapping[str, Any]


def read(directory: str | os.PathLike) -> list[Entry]:
  """The rewinds of a run, oldest first; [] for a run that never went back.

  Each has 'checkpoint' (the step gone back to), 'skips' (half-open ranges of example
  indices, all that the run passes over since) and 'event' (its line in events.jsonl).

  Raises:
    Failure: if the file is there and cannot be understood.
  """
  path = pathlib.Path(directory) / REWINDS
  try:
    entries = json.loads(path.read_text())
    for entry in entries:
      int(entry['checkpoint']), list(entry['skips']), dict(entry['event'])
  except (FileNotFoundError, NotADirectoryError):
    return []
  except (OSError, ValueError, TypeError, KeyError) as e:
    raise Failure(
      f'{path} is unreadable ({type(e).__name__}: {e}). It says which checkpoints a '
      'rewind left behind and which data it skips: put back a copy.'
    ) from e
  return entries


def append(directory: str | os.PathLike, entry: Entry) -> list[Entry]:
  """Adds a rewind, which thereby has happened; returns all. Only process 0 calls it."""
  entries = [*read(directory), entry]
  replace(pathlib.Path(directory) / REWINDS, json.dumps(entries, indent=1) + '\n')
  return entries


def left_behind(entries: Sequence[Entry], step: int, rewinds: int) -> bool:
  """Whether a checkpoint of `step`, written after `rewinds` rewinds, is of no use."""
  return any(step > entry['checkpoint'] for entry in entries[rewinds:])


def skips(entries: Sequence[Entry], rewinds: int) -> list[tuple[int, int]]:
  """What to pass over from a checkpoint on that was written after `rewinds` rewinds."""
  return [
    (start, stop) for entry in entries[rewinds:] for start, stop in entry['skips']
  ]


def record_event(directory: str | os.PathLike, event: Mapping[str, Any]) -> None:
  """Adds a line to events.jsonl unless it is there; removes a torn one."""
  path = pathlib.Path(directory) / EVENTS
  lines = path.read_text(errors='replace').splitlines() if path.exists() else []
  whole = [line for line in lines if _is_json(line)]
  line = json.dumps(event)
  if line not in whole:
    replace(path, ''.join(f'{text}\n' for text in [*whole, line]))


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file whole and durably, or leaves the old one.

  Raises:
    Failure: if it cannot be written.
  """
  temporary = path.with_name(path.name + '.tmp')
  try:
    with temporary.open('w') as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)
  except OSError as e:
    raise Failure(
      f'Cannot write {path}: {e.strerror or e}. Make room, then run the same command '
      'again.'
    ) from e


def _is_json(line: str) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except ValueError:
    return False

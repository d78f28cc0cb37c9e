"""What readers share: broken records and their bound, files, shares of work."""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from palm_t5x import errors
from palm_t5x.corpus import documents

logger = logging.getLogger(__name__)

PART_BYTES = 64 << 20  # what one worker reads at a time, roughly
_FILES_OF_A_PART = 20_000
_PLACES_SHOWN = 5
_BOM = b'\xef\xbb\xbf'


@dataclasses.dataclass(frozen=True, slots=True)
class Broken:
  """What a reader yields for a record that it cannot read.

  Attributes:
    place: where the record is: a file's relative path, and a line, row or byte.
    reason: a short phrase, one of few.
  """

  place: str
  reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ignored(Broken):
  """What is no document and no damage either, such as an image among source files."""


class Reader(Protocol):
  """A raw format, with its options: a frozen dataclass that pickles."""

  def parts(self, data_dir: str) -> list[documents.Part]:
    """The shares of the corpus below `data_dir`, in an order that does not change.

    Their iterators yield `Document`, `Broken` and `Ignored`; names and documents do
    not depend on where `data_dir` lies.

    Raises:
      UserError: there is nothing to read.
    """


@dataclasses.dataclass
class Counts:
  """What came out of a part, or of several.

  Attributes:
    documents: number of documents.
    text_bytes: their texts, in UTF-8.
    broken, ignored: reason -> number of records.
    places: of the first few broken ones, with their reasons.
  """

  documents: int = 0
  text_bytes: int = 0
  broken: dict[str, int] = dataclasses.field(default_factory=dict)
  ignored: dict[str, int] = dataclasses.field(default_factory=dict)
  places: list[str] = dataclasses.field(default_factory=list)

  def facts(self) -> dict[str, Any]:
    """As JSON; `Counts(**facts)` is its inverse."""
    return dataclasses.asdict(self)

  def merge(self, other: 'Counts') -> None:
    """Adds what `other` counted."""
    self.documents += other.documents
    self.text_bytes += other.text_bytes
    for mine, theirs in ((self.broken, other.broken), (self.ignored, other.ignored)):
      for reason, number in theirs.items():
        mine[reason] = mine.get(reason, 0) + number
    self.places = (self.places + other.places)[:_PLACES_SHOWN]


def tolerant(
  items: Iterable[documents.Document | Broken],
  counts: Counts | None = None,
  *,
  max_broken: int = 100,
  max_broken_share: float = 0.01,
) -> Iterator[documents.Document]:
  """The documents among what a part yields; broken records are counted and logged.

  Args:
    items: what `Part.read()` returns.
    counts: is added to.
    max_broken: so many broken records of a part are passed over in any case.
    max_broken_share: and so many of those read so far, as a share.

  Raises:
    Failure: there are more.
  """
  counts = Counts() if counts is None else counts
  broken = read = 0
  for item in items:
    read += 1
    if isinstance(item, documents.Document):
      counts.documents += 1
      # The bytes of ASCII text are its characters: no need to encode it.
      text = item.text
      size = len(text) if text.isascii() else len(text.encode(errors='replace'))
      counts.text_bytes += size
      yield item
      continue
    which = counts.ignored if isinstance(item, Ignored) else counts.broken
    which[item.reason] = which.get(item.reason, 0) + 1
    if isinstance(item, Ignored):
      continue
    broken += 1
    if len(counts.places) < _PLACES_SHOWN:
      place = documents.clean(item.place)
      counts.places.append(f'{place}: {item.reason}')
      logger.warning('skipped %s: %s', place, item.reason)
    if broken > max(max_broken, max_broken_share * read):
      place = documents.clean(item.place)
      raise errors.Failure(
        f'{broken} of the first {read} records are broken, the last one at {place} '
        f'({item.reason}); MAX_BROKEN = {max_broken} and MAX_BROKEN_SHARE = '
        f'{max_broken_share:g} allow no more. Repair the files, or raise one of them.'
      )
  if broken > _PLACES_SHOWN:
    logger.warning('skipped %d broken records of %d in all', broken, read)


def decode(line: bytes) -> str:
  """UTF-8, without a byte order mark.

  Raises:
    UnicodeDecodeError: it is not UTF-8.
  """
  return line.removeprefix(_BOM).decode()


def parse_object(line: bytes | None) -> tuple[dict[str, Any] | None, str]:
  """(object, '') from a line of JSON, or (None, why not)."""
  if line is None:
    return None, 'longer than max_document_bytes'
  try:
    value = json.loads(decode(line))
  except UnicodeDecodeError:
    return None, 'invalid UTF-8'
  except (ValueError, RecursionError):
    return None, 'invalid JSON'
  return (value, '') if isinstance(value, dict) else (None, 'not a JSON object')


def slug(path: str) -> str:
  """A name for a part, from the path of its first file."""
  return re.sub('[^A-Za-z0-9._-]+', '-', path)[-60:]


def files_below(
  data_dir: str, *, follow_links: bool = True, formats: str = ''
) -> list[tuple[str, int]]:
  """(relative path with '/', bytes) of every file below a folder, sorted.

  Names that begin with a dot are left out. A `data_dir` that is a file is that file.

  Raises:
    UserError: there is no such folder.
  """
  if '://' in data_dir:
    raise errors.UserError(
      f'Raw data is read from a local or mounted folder, not from {data_dir}: copy it '
      'or mount it, and give --data_dir that folder.'
    )
  root = os.path.abspath(os.path.expanduser(data_dir))
  if os.path.isfile(root):
    return [(os.path.basename(root), os.path.getsize(root))]
  if not os.path.isdir(root):
    raise errors.UserError(
      f'There is no folder {root} to read raw text from: set --data_dir'
      f'{f" to one with {formats}" if formats else ""}.'
    )
  found, seen = [], {os.path.realpath(root)}
  for folder, folders, names in os.walk(root, followlinks=follow_links):
    folders[:] = sorted(n for n in folders if not n.startswith('.'))
    if follow_links:
      # A link to a folder that was seen already may lead round in circles.
      folders[:] = [n for n in folders if _is_new(os.path.join(folder, n), seen)]
    for name in names:
      path = os.path.join(folder, name)
      if name.startswith('.') or (not follow_links and os.path.islink(path)):
        continue
      if os.path.isfile(path):
        relative = os.path.relpath(path, root).replace(os.sep, '/')
        found.append((relative, os.path.getsize(path)))
  return sorted(found)


def _is_new(folder: str, seen: set[str]) -> bool:
  if not os.path.islink(folder):
    return True
  real = os.path.realpath(folder)
  new = not any(real == s or s.startswith(real + os.sep) for s in seen)
  seen.add(real)
  return new


def locate(data_dir: str, relative: str) -> str:
  """The path of one of `files_below(data_dir)`."""
  root = os.path.abspath(os.path.expanduser(data_dir))
  return root if os.path.isfile(root) else os.path.join(root, *relative.split('/'))


def nothing_to_read(data_dir: str, wanted: str, found: int) -> errors.UserError:
  """The error for a folder with no file of a format."""
  root = os.path.abspath(os.path.expanduser(data_dir))
  what = f'none of the {found} files in it is one' if found else 'it is empty'
  return errors.UserError(
    f'There is nothing to read in {root}: {what}. Wanted: {wanted}. Set --data_dir to '
    'the folder that holds them.'
  )


def shares(
  files: Sequence[tuple[str, int]],
  part_bytes: int = PART_BYTES,
  group: Callable[[str], str] = lambda path: path,
) -> list[list[tuple[str, int]]]:
  """Cuts a sorted list of files into shares of about `part_bytes`.

  Args:
    files: (path, bytes).
    part_bytes: a share ends when it holds so many.
    group: path -> a name; files next to each other with one name stay together, up to
      four times `part_bytes`.
  """
  result, share, size, last = [], [], 0, None
  for path, num_bytes in files:
    full = size + num_bytes > part_bytes or len(share) >= _FILES_OF_A_PART
    far_too_full = size > 4 * part_bytes or len(share) >= 4 * _FILES_OF_A_PART
    if share and (far_too_full or (full and group(path) != last)):
      result.append(share)
      share, size = [], 0
    share.append((path, num_bytes))
    size, last = size + num_bytes, group(path)
  return [*result, share] if share else result

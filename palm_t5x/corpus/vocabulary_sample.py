"""The text that a vocabulary is learned from: a random sample in the mixture's weights.

Each document draws a number from its text's hash; of every source those with the
smallest numbers are taken, up to the source's share of the budget. So the sample is the
same whatever the order, the shares and the workers, and it can go on after a kill. No
process holds more than one source's budget of text.
"""

import dataclasses
import heapq
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from palm_t5x.corpus import documents, jobs

_LONGEST = 1 << 20  # characters of a document that count: none takes all of the sample
_SLACK = 64 << 20  # bytes beyond twice its share that are drawn of a large source


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents that a part of the sample is drawn from.

  Attributes:
    name: of the task.
    weight: its share of the sample, relative to the others'.
    parts: its documents.
  """

  name: str
  weight: float
  parts: Sequence[documents.Part]

  def limit(self, budget: int) -> float:
    """The number up to which documents are drawn at first.

    Most documents of a large source cannot be in the sample: they are passed over. It
    goes by the size of the files, which may hold less text than that.
    """
    size = sum(part.num_bytes for part in self.parts)
    known = all(part.num_bytes for part in self.parts)
    return min(1.0, (2 * budget + _SLACK) / size) if known and size else 1.0

  def units(self, span: tuple[float, float], budget: int, paths) -> list[jobs.Unit]:
    """Units that draw from one part each, documents with numbers in [low, high)."""
    return [
      jobs.Unit(
        os.path.basename(path).split('.')[0],
        _draw,
        (part, self.name, span, budget, path),
        max(part.num_bytes, 1),
      )
      for part, path in zip(self.parts, paths, strict=True)
    ]


class _Smallest:
  """The texts with the smallest numbers: as few as come to `budget` bytes, each once.

  Those of a whole are the same as those of its parts' smallest.
  """

  def __init__(self, budget: int):
    self.size = 0
    self._budget = budget
    self._heap: list[tuple[float, str]] = []  # the largest number first
    self._sizes: dict[tuple[float, str], int] = {}

  def __len__(self) -> int:
    return len(self._heap)

  def is_past(self, number: float) -> bool:
    """Whether no text with this number, or a larger one, can be among them."""
    return self.size >= self._budget and number > -self._heap[0][0]

  def add(self, number: float, text: str) -> None:
    """Takes the text in, if it is among the smallest, and others out."""
    entry = (-number, text)
    if self.is_past(number) or entry in self._sizes:
      return
    self._sizes[entry] = len(text.encode())
    self.size += self._sizes[entry]
    heapq.heappush(self._heap, entry)
    while self.size - self._sizes[self._heap[0]] >= self._budget:
      self.size -= self._sizes.pop(heapq.heappop(self._heap))

  def add_files(self, paths: Sequence[str]) -> None:
    """Takes in what `_draw` wrote; one file is open at a time, there are thousands."""
    for path in paths:
      for document in documents.read(path):
        number = float(document.id)
        if self.is_past(number):
          break  # as are all that follow
        self.add(number, document.text)

  def sorted(self) -> list[tuple[float, str]]:
    """(number, text), the smallest number first."""
    return [(-number, text) for number, text in sorted(self._heap, reverse=True)]


def budgets(sources: Sequence[Source], sample_bytes: int) -> list[int]:
  """How many bytes each source gives."""
  total = sum(source.weight for source in sources)
  return [max(1, int(sample_bytes * s.weight / total)) for s in sources]


class _Share:
  """A source's part in the sample, and where its drawn text lies."""

  def __init__(self, number: int, source: Source, budget: int, folder: str):
    self.source, self.budget, self.limit = source, budget, source.limit(budget)
    names = [f'{number}-{i:05d}.jsonl.zst' for i in range(len(source.parts))]
    self._drawn = [os.path.join(folder, 'drawn', name) for name in names]
    # Not the same files: what is missing must look the same after a kill.
    self._more = [os.path.join(folder, 'drawn_again', name) for name in names]

  def units(self) -> list[jobs.Unit]:
    """Of the stage 'sample'."""
    return self.source.units((0.0, self.limit), self.budget, self._drawn)

  def units_again(self) -> list[jobs.Unit]:
    """Of the stage 'again', for what the documents below the limit leave missing."""
    if self.limit >= 1:
      return []
    missing = self.budget - self._first().size
    if missing <= 0:
      return []
    return self.source.units((self.limit, 1.0), missing, self._more)

  def _first(self) -> _Smallest:
    chosen = _Smallest(self.budget)
    chosen.add_files(self._drawn)
    return chosen

  def texts(self) -> Iterator[str]:
    """Its part of the sample, when both stages are done."""
    chosen, left = self._first(), self.budget
    if chosen.size < self.budget and self.limit < 1:
      chosen.add_files(self._more)
    for _, text in chosen.sorted():
      text = text[: max(1, left)]  # a document longer than what is left is cut
      left -= len(text.encode())
      yield text


def _shares(sources: Sequence[Source], sample_bytes: int, folder: str) -> list[_Share]:
  each = zip(sources, budgets(sources, sample_bytes), strict=True)
  return [_Share(i, source, budget, folder) for i, (source, budget) in enumerate(each)]


def stages(
  sources: Sequence[Source], sample_bytes: int, folder: str, local: bool = False
) -> list[jobs.Stage]:
  """The stages that draw the sample; `local` if the parts do not pickle.

  The second is for sources that had less text below their limit than their share.
  """

  def units(job):
    del job
    shares = _shares(sources, sample_bytes, folder)
    return [unit for share in shares for unit in share.units()]

  def units_again(job):
    del job
    shares = _shares(sources, sample_bytes, folder)
    return [unit for share in shares for unit in share.units_again()]

  return [
    jobs.Stage('sample', units, 'drawing text', local),
    jobs.Stage('again', units_again, 'drawing more text', local),
  ]


def _draw(
  part, name: str, span: tuple[float, float], budget: int, path: str
) -> dict[str, int]:
  """A unit: the documents of a part with the smallest numbers in a span."""
  low, high = span
  chosen = _Smallest(budget)
  for text in _texts(part):
    number = documents.uniform(name, documents.text_hash(text).hex())
    if low <= number < high:
      chosen.add(number, text[:_LONGEST])
  with documents.Writer(path) as writer:
    for number, text in chosen.sorted():
      writer.add(documents.Document(f'{number:.17f}', text))
  return {'documents': len(chosen), 'bytes': chosen.size}


def _texts(part) -> Iterator[str]:
  for document in part.read():
    text: Any = getattr(document, 'text', document)
    if isinstance(text, str) and text:
      yield documents.clean(text)


def texts(sources: Sequence[Source], sample_bytes: int, folder: str) -> Iterator[str]:
  """The sample, source after source, once the stages are done.

  A source with less text than its share gives all it has.
  """
  for share in _shares(sources, sample_bytes, folder):
    yield from share.texts()


def first(texts_: Iterator[str]) -> Iterator[str] | None:
  """The same texts if there is any to learn from, else None."""
  skipped = []
  for text in texts_:
    skipped.append(text)
    if text.strip():
      return itertools.chain(skipped, texts_)
  return None

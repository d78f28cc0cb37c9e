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

  def units(self, number: int, budget: int, folder: str) -> list[jobs.Unit]:
    """The units of the stage 'sample'; every one draws from one part."""
    size = sum(part.num_bytes for part in self.parts)
    known = all(part.num_bytes for part in self.parts)
    # Of a large source most documents cannot be in the sample: they are passed over.
    limit = min(1.0, (2 * budget + _SLACK) / size) if known and size else 1.0
    return [
      jobs.Unit(
        f'{number}-{i:05d}',
        _draw,
        (part, self.name, limit, budget, _path(folder, number, i)),
        max(part.num_bytes, 1),
      )
      for i, part in enumerate(self.parts)
    ]


def _path(folder: str, source: int, part: int) -> str:
  return os.path.join(folder, 'drawn', f'{source}-{part:05d}.jsonl.zst')


def budgets(sources: Sequence[Source], sample_bytes: int) -> list[int]:
  """How many bytes each source gives."""
  total = sum(source.weight for source in sources)
  return [max(1, int(sample_bytes * s.weight / total)) for s in sources]


def stage(
  sources: Sequence[Source], sample_bytes: int, folder: str, local: bool = False
) -> jobs.Stage:
  """The stage that draws the sample; `local` if the parts do not pickle."""

  def units(job):
    del job
    shares = enumerate(zip(sources, budgets(sources, sample_bytes), strict=True))
    return [
      unit
      for number, (source, budget) in shares
      for unit in source.units(number, budget, folder)
    ]

  return jobs.Stage('sample', units, 'drawing text', local)


def _draw(part, name: str, limit: float, budget: int, path: str) -> dict[str, int]:
  """Unit of 'sample': the documents of a part with the smallest numbers."""
  chosen: list[tuple[float, str]] = []  # a heap with the largest number first
  size = 0
  for text in _texts(part):
    number = documents.uniform(name, documents.text_hash(text).hex())
    if number >= limit:
      continue
    text = text[:_LONGEST]
    heapq.heappush(chosen, (-number, text))
    size += len(text.encode())
    while size - len(chosen[0][1].encode()) >= budget:
      size -= len(heapq.heappop(chosen)[1].encode())
  with documents.Writer(path) as writer:
    for number, text in sorted(chosen, reverse=True):
      writer.add(documents.Document(f'{-number:.17f}', text))
  return {'documents': len(chosen), 'bytes': size}


def _texts(part) -> Iterator[str]:
  for document in part.read():
    text: Any = getattr(document, 'text', document)
    if isinstance(text, str) and text:
      yield documents.clean(text)


def texts(sources: Sequence[Source], sample_bytes: int, folder: str) -> Iterator[str]:
  """The sample, source after source, once the stage is done.

  A source with less text than its share gives all it has.
  """
  shares = budgets(sources, sample_bytes)
  for number, (source, left) in enumerate(zip(sources, shares, strict=True)):
    files = [documents.read(_path(folder, number, i)) for i in range(len(source.parts))]
    previous = None
    for document in heapq.merge(*files, key=lambda d: (d.id, d.text)):
      if document.text == previous:  # duplicates have one number
        continue
      previous = document.text
      # A document longer than what is left is cut.
      text = document.text[: max(1, left)]
      left -= len(text.encode())
      yield text
      if left <= 0:
        break


def first(texts_: Iterator[str]) -> Iterator[str] | None:
  """The same texts if there is any to learn from, else None."""
  skipped = []
  for text in texts_:
    skipped.append(text)
    if text.strip():
      return itertools.chain(skipped, texts_)
  return None

"""What quality sampling did: a histogram of scores, and examples of either side."""

import dataclasses
import math
from typing import Any

from palm_t5x.corpus import documents

_BINS, _BANDS, _EXAMPLES, _SHOWN = 20, 5, 3, 300


@dataclasses.dataclass
class Tally:
  """Scores of kept and dropped documents, and examples of both; merges in any order.

  Attributes:
    kept, dropped: numbers of documents by score, in 20 bins from 0 to 1.
    examples: 'kept' or 'dropped' -> five bands of scores -> up to three documents,
      drawn by their names: [draw, id, score, the text's beginning].
  """

  kept: list[int] = dataclasses.field(default_factory=lambda: [0] * _BINS)
  dropped: list[int] = dataclasses.field(default_factory=lambda: [0] * _BINS)
  examples: dict[str, list[list[list]]] = dataclasses.field(
    default_factory=lambda: {
      kind: [[] for _ in range(_BANDS)] for kind in ('kept', 'dropped')
    }
  )

  def add(self, document: documents.Document, kept: bool) -> None:
    """Counts a document that went through `QualityStep`; others pass uncounted."""
    score = document.meta.get('quality')
    if score is None:
      return
    counts = self.kept if kept else self.dropped
    counts[min(int(score * _BINS), _BINS - 1)] += 1
    band = self.examples['kept' if kept else 'dropped'][
      min(int(score * _BANDS), _BANDS - 1)
    ]
    draw = documents.uniform('example', document.id)
    if len(band) < _EXAMPLES or draw < band[-1][0]:
      band.append([draw, document.id, score, document.text[:_SHOWN]])
      band.sort()
      del band[_EXAMPLES:]

  def merge(self, other: 'Tally') -> None:
    """Adds what `other` counted."""
    self.kept = [a + b for a, b in zip(self.kept, other.kept, strict=True)]
    self.dropped = [a + b for a, b in zip(self.dropped, other.dropped, strict=True)]
    for kind, bands in other.examples.items():
      for mine, theirs in zip(self.examples[kind], bands, strict=True):
        mine[:] = sorted([*mine, *theirs])[:_EXAMPLES]

  def facts(self) -> dict[str, Any]:
    """As JSON; `Tally(**facts)` is its inverse."""
    return dataclasses.asdict(self)

  def rows(self) -> list[tuple[str, int, int, float]]:
    """(scores, kept, dropped, share kept; nan where there are none) by bin."""
    result = []
    for i, (kept, dropped) in enumerate(zip(self.kept, self.dropped, strict=True)):
      share = kept / (kept + dropped) if kept + dropped else math.nan
      result.append((f'{i / _BINS:.2f}-{(i + 1) / _BINS:.2f}', kept, dropped, share))
    return result

"""How similar two texts are by Levenshtein distance, at a bounded cost.

Similarity is 1 - distance / length of the longer text. Up to `exact_chars` it is exact.
Longer texts are aligned line by line first, and only what lies between equal lines is
compared by character: that spells out one way to edit one text into the other, so the
distance is never too small and no pair is called similar that is not; it may be too
large by a little. A stretch without any equal line that is longer than `exact_chars`
counts as rewritten.
"""

import re

from rapidfuzz.distance import Levenshtein

_LONG_LINE = 1000  # characters; a minified file is one line: its statements are lines
_PIECE = re.compile(rf'[^;,{{}}]{{0,{_LONG_LINE}}}(?:[;,{{}}]|(?<=.)|\Z)', re.DOTALL)


def similarity(a: str, b: str, *, threshold: float, exact_chars: int) -> float:
  """A similarity in [threshold, 1], or 0.0 where it is below the threshold."""
  longest = max(len(a), len(b))
  if min(len(a), len(b)) < threshold * longest:
    return 0.0
  if longest <= exact_chars:
    return Levenshtein.normalized_similarity(a, b, score_cutoff=threshold)
  allowed = int((1 - threshold) * longest + 1e-6)
  distance = _distance_by_pieces(a, b, allowed, exact_chars)
  return 0.0 if distance > allowed else 1 - distance / longest


def _distance_by_pieces(a: str, b: str, allowed: int, exact_chars: int) -> int:
  """An upper bound of the distance; some number above `allowed` if it exceeds that."""
  pieces_a, pieces_b = _pieces(a), _pieces(b)
  numbers: dict[str, int] = {}
  rows_a = [numbers.setdefault(piece, len(numbers)) for piece in pieces_a]
  rows_b = [numbers.setdefault(piece, len(numbers)) for piece in pieces_b]
  distance, begin_a, begin_b = 0, 0, 0
  for block in Levenshtein.opcodes(rows_a, rows_b).as_matching_blocks():
    distance += _stretch(
      ''.join(pieces_a[begin_a : block.a]),
      ''.join(pieces_b[begin_b : block.b]),
      allowed - distance,
      exact_chars,
    )
    if distance > allowed:
      break
    begin_a, begin_b = block.a + block.size, block.b + block.size
  return distance


def _stretch(a: str, b: str, allowed: int, exact_chars: int) -> int:
  if not a or not b or max(len(a), len(b)) > exact_chars:
    return max(len(a), len(b))
  return Levenshtein.distance(a, b, score_cutoff=max(allowed, 0))


def _pieces(text: str) -> list[str]:
  pieces = []
  for line in text.split('\n'):
    if len(line) <= _LONG_LINE:
      pieces.append(line + '\n')
    else:
      pieces += [piece for piece in _PIECE.findall(line + '\n') if piece]
  pieces[-1] = pieces[-1][:-1]  # the last line has no end
  return pieces

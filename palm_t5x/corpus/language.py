"""Which language a document is in, and the paper's table of languages.

py3langid tells some 140 languages apart. The paper's identifier knew others, and
languages in Latin letters besides; those are 'not distinguishable', never 0.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from palm_t5x.corpus import documents

UNDETERMINED = 'und'

# Table 29 of the paper: billions of tokens. As extracted, 122 of its "124 languages".
_TABLE_29 = """
  en 578.064, de 25.954, fr 24.094, es 15.654, und 12.064, pl 10.764, it 9.699,
  nl 7.690, sv 5.218, tr 4.855, pt 4.701, ru 3.932, fi 3.101, cs 2.991, zh 2.977,
  ja 2.832, no 2.695, ko 1.444, da 1.387, id 1.175, ar 1.091, ceb 1.012, uk 0.890,
  vi 0.726, ps 0.638, ca 0.636, hu 0.555, ro 0.510, la 0.482, cy 0.481, iw 0.477,
  fa 0.437, bs 0.427, co 0.392, ht 0.376, sr 0.373, el 0.366, eo 0.348, be 0.329,
  ar-Latn 0.325, hy 0.324, sk 0.310, th 0.282, lb 0.268, bg 0.266, hi-Latn 0.257,
  hi 0.232, ms 0.212, hr 0.198, bn 0.194, jv 0.192, et 0.179, fil 0.175, gl 0.175,
  sl 0.174, az 0.170, lt 0.163, gd 0.160, te 0.155, ka 0.155, eu 0.153, sd 0.149,
  haw 0.140, pa 0.138, tg 0.138, tt 0.137, mk 0.135, kk 0.134, ru-Latn 0.134,
  hmn 0.132, te-Latn 0.123, lv 0.119, fy 0.111, is 0.110, sq 0.108, af 0.108,
  ml 0.108, ja-Latn 0.107, kn 0.106, bg-Latn 0.089, mt 0.086, mg 0.081, uz 0.080,
  ig 0.079, so 0.076, am 0.076, ga 0.076, ne 0.075, mr 0.075, my 0.069, si 0.069,
  ku 0.069, mr-Latn 0.067, ml-Latn 0.066, gu-Latn 0.064, ky 0.064, el-Latn 0.063,
  mn 0.061, km 0.060, ckb 0.055, ha 0.046, lo 0.046, yi 0.044, gu 0.043,
  bn-Latn 0.042, sw 0.040, yo 0.040, zh-Latn 0.038, ny 0.036, sm 0.035, su 0.035,
  or 0.032, ta-Latn 0.031, mi 0.030, ug 0.025, rw 0.022, zu 0.020, st 0.015,
  sn 0.014, kn-Latn 0.014, tk 0.010, xh 0.008
"""
PAPER_TABLE_29: dict[str, float] = {
  code: float(billions)
  for code, billions in (entry.split() for entry in _TABLE_29.split(','))
}
# Billions that the table's percentages are shares of: all tokens but code's (English is
# 77.984 %). The table as extracted sums to 740.96.
PAPER_TOTAL = 741.26

# py3langid's names -> the paper's: other names of a language, and languages that the
# paper's table does not tell from a larger one.
_PAPER_NAMES = {
  'he': 'iw',
  'hbo': 'iw',
  'nn': 'no',
  'tl': 'fil',
  'ary': 'ar',
  'arz': 'ar',
  'wuu': 'zh',
  'yue': 'zh',
  'grc': 'el',
  'uzs': 'uz',
  'zxx': UNDETERMINED,  # no language: numbers, lists of names
}


@functools.cache
def _model():
  """py3langid's identifier, with probabilities that sum to one; 0.5 s to load."""
  from py3langid import langid

  return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@functools.cache
def distinguishable() -> frozenset[str]:
  """The codes that `identify` can return."""
  names = {_PAPER_NAMES.get(name, name) for name in _model().labels}
  return frozenset(names | {UNDETERMINED})


def identify(
  text: str,
  min_confidence: float = 0.3,
  max_bytes: int = 384,
  retry_bytes: int = 2048,
) -> tuple[str, float]:
  """The language that a text begins in.

  Args:
    text: any.
    min_confidence: below it, the language is 'und'.
    max_bytes: so many of the text's bytes are looked at; its cost grows with them.
    retry_bytes: so many where that leaves the language open: pages that begin with
      names and numbers, a few of a hundred.

  Returns:
    (the paper's code or else ISO 639's, probability).
  """
  text = text.lstrip()
  code, confidence = _begins_in(text, min_confidence, max_bytes)
  if code == UNDETERMINED and retry_bytes > max_bytes and len(text) > max_bytes // 4:
    code, confidence = _begins_in(text, min_confidence, retry_bytes)
  return code, confidence


def _begins_in(text: str, min_confidence: float, max_bytes: int) -> tuple[str, float]:
  start = text[:max_bytes].encode('utf-8', 'replace')[:max_bytes]
  code, confidence = _model().classify(start)
  confidence = min(float(confidence), 1.0)
  if confidence < min_confidence:
    return UNDETERMINED, confidence
  return _PAPER_NAMES.get(code, code), confidence


@dataclasses.dataclass(frozen=True)
class LanguageStep:
  """Adds meta['language'] and meta['language_confidence'].

  Attributes:
    keep: documents in other languages are dropped; None: all are kept.
    min_confidence, max_bytes, retry_bytes: see `identify`.
  """

  keep: Sequence[str] | None = None
  min_confidence: float = 0.3
  max_bytes: int = 384
  retry_bytes: int = 2048

  def __call__(
    self, document: documents.Document
  ) -> documents.Document | documents.Dropped:
    code, confidence = identify(
      document.text, self.min_confidence, self.max_bytes, self.retry_bytes
    )
    if self.keep is not None and code not in self.keep:
      return documents.Dropped('another language')
    document.meta['language'] = code
    document.meta['language_confidence'] = round(confidence, 3)
    return document


@dataclasses.dataclass(frozen=True)
class LanguageRow:
  """A line of the table of languages.

  Attributes:
    code: the paper's, or ours where it has none.
    tokens: ours; None: our identifier cannot tell this language.
    share: of our tokens, in percent; None likewise.
    paper_billions: of tokens in Table 29; None: the table does not have the language.
    paper_share: of the paper's tokens that are not code, in percent; None likewise.
  """

  code: str
  tokens: float | None
  share: float | None
  paper_billions: float | None
  paper_share: float | None

  def cells(self) -> tuple[str, str, str, str, str]:
    """As text, in the order of the attributes."""
    if self.tokens is None:
      ours = ('not distinguishable', '')
    else:
      ours = (f'{self.tokens:,.0f}', f'{self.share:.3f} %')
    if self.paper_billions is None:
      return (self.code, *ours, '', '')
    paper = (f'{self.paper_billions:.3f}', f'{self.paper_share:.3f} %')
    return (self.code, *ours, *paper)


def language_table(tokens: Mapping[str, float]) -> list[LanguageRow]:
  """Our tokens by language beside the paper's Table 29.

  Args:
    tokens: code -> tokens (or bytes, or documents: shares are what compares). Code is
      left out, as it is in the paper's percentages.

  Returns:
    rows in the paper's order, then the languages that it does not list, most first.
  """
  total = sum(tokens.values())
  known = distinguishable()

  def row(code: str) -> LanguageRow:
    number = tokens.get(code, 0 if code in known else None)
    share = None if number is None else 100 * number / total if total else 0.0
    billions = PAPER_TABLE_29.get(code)
    paper_share = None if billions is None else 100 * billions / PAPER_TOTAL
    return LanguageRow(code, number, share, billions, paper_share)

  others = sorted(set(tokens) - set(PAPER_TABLE_29), key=lambda c: (-tokens[c], c))
  return [row(code) for code in (*PAPER_TABLE_29, *others)]

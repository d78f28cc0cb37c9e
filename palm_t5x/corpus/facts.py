"""Facts about a corpus, counted document by document: what a datasheet needs.

Counts add up, so every unit of work keeps a `Tally` and the report merges them. Words
are counted as ASCII words in lower case; e-mail addresses, phone numbers and street
addresses are recognised by their form, which is approximate (the paper's Appendix C
used a classifier): US phone numbers and international ones that begin with '+', and
US-style street addresses.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from palm_t5x.corpus import identity_terms
from palm_t5x.corpus.documents import Document

QUALITY_BINS = 20  # of [0, 1]
_TOLL_FREE = {b'800', b'833', b'844', b'855', b'866', b'877', b'888'}
_EMAIL = re.compile(
  r'@(?<=[A-Za-z0-9_%+-]@)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,5}'
  r'[A-Za-z]{2,24}(?![\w@])'
)
_PHONE_LIKE = re.compile(rb'000-0000|\+0')  # with digits as 0; space and dot as -
_PHONE = re.compile(
  rb'(?<![\w.+-])(?:\+?1[-. ]?)?(?:\(([2-9]\d\d)\) ?|([2-9]\d\d)[-. ])[2-9]\d\d[-. ]'
  rb'\d{4}(?![\w-])'
  rb'|(?<![\w.])\+(?!1\b)[1-9]\d{0,2}(?:[-. ]\(?\d{2,5}\)?){2,5}(?!\d)'
)
_STREETS = [
  'street', 'st', 'avenue', 'ave', 'road', 'rd', 'boulevard', 'blvd', 'lane', 'ln',
  'drive', 'dr', 'court', 'ct', 'way', 'place', 'pl', 'highway', 'hwy', 'parkway',
  'pkwy', 'square', 'sq', 'terrace',
]  # fmt: skip
_ADDRESS = re.compile(
  r'\b\d{1,5} (?:[NSEW]\.? |North |South |East |West )?(?:[A-Z][a-z]+ '
  r'|\d{1,3}(?:st|nd|rd|th) ){1,3}'
  rf'(?:{"|".join(name.capitalize() for name in _STREETS)})\b'
)
_WORDS = bytes(c if c >= 128 or chr(c).isalpha() else 32 for c in range(256))
_DIGITS = bytes(48 if 48 <= c <= 57 else 45 if c in b'. ' else c for c in range(256))


@functools.cache
def _vocabulary() -> tuple[dict[bytes, tuple[str, str]], dict[bytes, tuple]]:
  """word -> (group, name); and first word -> terms of two words with their group."""
  singles, doubles = {}, {}
  for name, words in identity_terms.PRONOUNS.items():
    for word in words.split():
      singles[word.encode()] = ('pronouns', name)
  for category, (_, words) in identity_terms.TERMS.items():
    for word in words.split():
      if '_' in word:
        first, second = word.encode().split(b'_')
        term = (
          b' ' + first + b' ' + second + b' ',
          f'{category}: {first.decode()} {second.decode()}',
        )
        doubles[first] = (*doubles.get(first, ()), term)
      else:
        singles[word.encode()] = ('terms', f'{category}: {word}')
  return singles, doubles


@dataclasses.dataclass
class Tally:
  """Counts of a set of documents.

  Attributes:
    counts: group -> name -> number. Groups: 'total' (documents, bytes, characters,
      tokens), 'language' and 'code_language' with '.documents', '.bytes' and '.tokens',
      'quality' (bin of `QUALITY_BINS`), 'length' (floor(log2(bytes))), 'pronouns' and
      'terms' with '.documents' for the documents that have one, 'found' (documents with
      an 'email', 'phone', 'toll_free', 'address', or a pronoun).
  """

  counts: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)

  def group(self, name: str) -> collections.Counter:
    """The counts of a group; empty if there are none."""
    return self.counts.setdefault(name, collections.Counter())

  def add(self, document: Document) -> None:
    """Counts a document.

    Its meta may have 'language', 'extension' or 'repository' (then the language is one
    of code), 'quality' in [0, 1] and 'tokens'.
    """
    data = document.text.encode('utf-8', 'replace')
    meta, size = document.meta, len(data)
    tokens = meta.get('tokens') or 0
    total = self.group('total')
    total['documents'] += 1
    total['bytes'] += size
    total['characters'] += len(document.text)
    total['tokens'] += tokens
    kind = 'code_language' if 'repository' in meta else 'language'
    name = str(meta.get('language') or ('Other' if kind == 'code_language' else 'und'))
    self.group(f'{kind}.documents')[name] += 1
    self.group(f'{kind}.bytes')[name] += size
    if tokens:
      self.group(f'{kind}.tokens')[name] += tokens
    if isinstance(quality := meta.get('quality'), int | float):
      place = min(int(max(quality, 0) * QUALITY_BINS), QUALITY_BINS - 1)
      self.group('quality')[str(place)] += 1
    self.group('length')[str(max(size, 1).bit_length() - 1)] += 1
    self._words(document.text, data)

  def _words(self, text, data):
    words = data.translate(_WORDS).lower().split()
    counts = collections.Counter(words)
    singles, doubles = _vocabulary()
    seen = set()
    for word in singles.keys() & counts.keys():
      group, name = singles[word]
      self.group(group)[name] += counts[word]
      seen.add((group, name))
    for word in doubles.keys() & counts.keys():
      line = b' ' + b' '.join(words) + b' '
      for term, name in doubles[word]:
        if number := line.count(term):
          self.group('terms')[name] += number
          seen.add(('terms', name))
    for group, name in seen:
      self.group(f'{group}.documents')[name] += 1
    found = self.group('found')
    if b'@' in data and _EMAIL.search(text):
      found['email'] += 1
    phones = list(_phones(data))
    found['phone'] += bool(phones)
    found['toll_free'] += any(area in _TOLL_FREE for area in phones)
    if not counts.keys().isdisjoint(_STREET_WORDS) and _ADDRESS.search(text):
      found['address'] += 1

  def merge(self, other: 'Tally') -> 'Tally':
    """Adds another tally's counts to this one; returns this one."""
    for name, counts in other.counts.items():
      self.group(name).update(counts)
    return self

  def to_json(self) -> dict[str, dict[str, int]]:
    """A JSON-able form, sorted; `from_json` reads it."""
    return {
      name: {key: n for key, n in sorted(counts.items()) if n}
      for name, counts in sorted(self.counts.items())
    }

  @classmethod
  def from_json(cls, counts: Mapping[str, Any]) -> 'Tally':
    """What `to_json` returned."""
    return cls({name: collections.Counter(group) for name, group in counts.items()})


def _phones(data: bytes) -> Iterator[bytes | None]:
  """The area code of each phone number; None for those of other countries."""
  for place in _PHONE_LIKE.finditer(data.translate(_DIGITS)):
    # A look around what looks like one is much faster than a search of the text.
    for match in _PHONE.finditer(data[max(place.start() - 16, 0) : place.end() + 24]):
      yield match[1] or match[2]


_STREET_WORDS = frozenset(word.encode() for word in _STREETS)


def tally(document: Document) -> Tally:
  """The counts of one document."""
  out = Tally()
  out.add(document)
  return out

"""The licence of a repository, a folder of it, or a file.

PaLM's code comes from files whose repository has no copyleft licence (section 3). What
counts here, in this order: copyleft in any licence file, package metadata or SPDX line
of the folder, or granted by its README, makes it copyleft, unless the repository offers
a choice ('MIT OR GPL-3.0') that names a permissive licence; then a permissive licence
makes it permissive; everything else is unknown. A false alarm costs a repository, a
miss would let copyleft code pass: where a text is ambiguous it is taken as copyleft.
"""

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping

from palm_t5x.corpus import licence_texts as texts_lib
from palm_t5x.corpus.licence_texts import COPYLEFT, PERMISSIVE

_HEADER = 8000  # characters of a file in which its notice is looked for
_STRANGE = 60  # words from which a licence file that is not recognised counts
_LONGEST = 200_000  # characters of a licence file that are read
_LONGEST_FIELD = 4000  # characters of an SPDX expression; a longer one is read as words


@dataclasses.dataclass(frozen=True)
class Licence:
  """What was found.

  Attributes:
    spdx_id: an SPDX id, an expression, or 'unknown'.
    kind: 'permissive', 'copyleft' (which includes what forbids a use), or 'unknown'.
    where: the file that decided.
  """

  spdx_id: str = 'unknown'
  kind: str = 'unknown'
  where: str = ''


UNKNOWN = Licence()


@dataclasses.dataclass(frozen=True)
class Rules:
  """Which licences are which.

  Attributes:
    copyleft: beginnings of SPDX ids; they win over `permissive`.
    permissive: beginnings of SPDX ids; all others are unknown.
  """

  copyleft: tuple[str, ...] = COPYLEFT
  permissive: tuple[str, ...] = PERMISSIVE

  def kind(self, spdx_id: str) -> str:
    """Of one SPDX id."""
    return texts_lib.kind_of(spdx_id, self.copyleft, self.permissive)


DEFAULT = Rules()


@dataclasses.dataclass
class _Found:
  """What the evidence says so far: ids by kind, and what a choice covers."""

  copyleft: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  permissive: dict[str, str] = dataclasses.field(default_factory=dict)
  covered: set[str] = dataclasses.field(default_factory=set)
  choice: str = ''
  strange: str = ''  # a licence file that nothing is known of

  def add(self, other: '_Found', where: str = '') -> None:
    for name, (family, before) in other.copyleft.items():
      self.copyleft.setdefault(name, (family, where or before))
    for name, before in other.permissive.items():
      self.permissive.setdefault(name, where or before)
    self.covered |= other.covered
    self.choice = self.choice or other.choice

  def against(self) -> '_Found':
    """The copyleft in it to which it offers no alternative, and nothing else."""
    left = {k: v for k, v in self.copyleft.items() if v[0] not in self.covered}
    return _Found(copyleft=left)

  def licence(self) -> Licence:
    for name, (family, where) in self.copyleft.items():
      if family not in self.covered:
        return Licence(name, 'copyleft', where)
    if self.strange or not self.permissive:
      return Licence(where=self.strange)
    names = sorted(self.permissive)
    return Licence(
      self.choice or ' AND '.join(names), 'permissive', self.permissive[names[0]]
    )


# Names of licence files; a file of source code is none.
_LICENCE_FILE = re.compile(
  r'(?:.*[-_. ])?(?:un)?licen[sc]es?(?:[-_. ].*)?|copying.*|copyright(?:[-_. ].*)?'
  r'|(?:.*[-_. ])?(?:[al]?gpl|gfdl|mpl|epl|eupl|cddl)[-_.v\d]*(?:\.\w+)?'
  r'|legal(?:\.\w+)?',
  re.IGNORECASE,
)
_SOURCE = re.compile(
  r'\.(?:py|js|jsx|ts|tsx|java|kt|go|rs|rb|php|c|cc|cpp|cxx|h|hpp|cs|swift|scala|m|lua'
  r'|dart|pl|sql|sh|css|scss|png|svg|json|ya?ml|xml|gradle|vue|ejs|tmpl|key|lic|el|clj)$',
  re.IGNORECASE,
)
_README = re.compile(r'readme[.\w-]*', re.IGNORECASE)
# What may make a folder copyleft, and never permissive: notices about the parts of a
# program, and licence files in folders of documents.
_NOTICE_FILE = re.compile(r'(?:notices?|eula)(?:[-_. ].*)?', re.IGNORECASE)
_LICENCE_FOLDER = re.compile(r'licen[sc]es?', re.IGNORECASE)
_DOCUMENTS_FOLDER = re.compile(r'docs?|documentation|legal', re.IGNORECASE)
_METADATA = re.compile(
  r'package\.json|composer\.json|bower\.json|setup\.(?:cfg|py)|pyproject\.toml'
  r'|cargo\.toml|pom\.xml|pubspec\.ya?ml|description|.*\.(?:gemspec|nuspec|cabal|rockspec)'
  r'|dub\.json|info\.json|meta\.(?:json|ya?ml)|makefile\.pl|build\.(?:gradle|sbt)'
  r'|[^/]*\.csproj|project\.clj|haxelib\.json|metadata\.json|cff|citation\.cff',
  re.IGNORECASE,
)


def is_evidence(path: str) -> bool:
  """Whether a file, by its path relative to the folder in question, is looked at.

  Files of the folder itself count, all below its LICENSES/ folder, and licence files
  in its docs/ or legal/ folder.
  """
  folder, _, rest = path.partition('/')
  if not rest:
    return _is_licence_file(path) or _is_readme(path) or _is_metadata(path)
  if _DOCUMENTS_FOLDER.fullmatch(folder):
    return '/' not in rest and _is_licence_file(rest)
  return bool(_LICENCE_FOLDER.fullmatch(folder))


def evidence_depth(folder: str) -> int:
  """How many levels of a folder of this name, below the one in question, count."""
  if _DOCUMENTS_FOLDER.fullmatch(folder):
    return 1
  return 3 if _LICENCE_FOLDER.fullmatch(folder) else 0


def _is_licence_file(name: str) -> bool:
  matches = _LICENCE_FILE.fullmatch(name) or _NOTICE_FILE.fullmatch(name)
  return bool(matches) and not _SOURCE.search(name)


def _is_readme(name: str) -> bool:
  return bool(_README.fullmatch(name)) and not _SOURCE.search(name)


def _only_drops(path: str) -> bool:
  folder, _, name = path.rpartition('/')
  if folder:
    return bool(_DOCUMENTS_FOLDER.fullmatch(folder))
  return bool(_NOTICE_FILE.fullmatch(name)) and not _LICENCE_FILE.fullmatch(name)


def _is_metadata(name: str) -> bool:
  return bool(_METADATA.fullmatch(name))


def detect(texts: Mapping[str, str | None], rules: Rules = DEFAULT) -> Licence:
  """The licence of a folder.

  Args:
    texts: path relative to the folder -> text, or None where it cannot be read, which
      is as a licence that is not recognised; files that are no evidence
      (`is_evidence`) are passed over.
    rules: which licences are copyleft and which permissive.

  Returns:
    the licence; an unknown one has a `where` if a licence file is not recognised, even
    beside another that is, and none if there is nothing to go by.
  """
  found, weak = _Found(), _Found()
  for path in sorted(filter(is_evidence, texts)):
    text, name = texts[path], os.path.basename(path)
    if text is None:
      found.strange = path
      continue
    text = text[:_LONGEST]
    spdx = _spdx_lines(text, rules)
    if _only_drops(path):
      for mine in (spdx, _prose(texts_lib.normalised(text), rules)):
        found.add(mine.against(), path)
      continue
    found.add(spdx, path)
    if _is_metadata(name):
      for field in _fields(name.lower(), text):
        slash_is_or = name.lower() == 'cargo.toml'
        found.add(_field(field, rules, slash_is_or), path)
    elif _is_readme(name):
      for phrase in _grants(text):
        weak.add(_prose(phrase, rules, names=True), path)
    else:
      words = texts_lib.normalised(text)
      mine = _prose(words, rules, names=len(text) < 200)
      found.add(mine, path)
      if not mine.copyleft and not mine.permissive and words.count(' ') > _STRANGE:
        found.strange = path
      if len(name.split('.')) + len(re.split('[-_]', name)) > 2 or '/' in path:
        # LICENSE.GPL, LICENSES/MPL-2.0.txt, license/gpl/COPYING: the name says it too.
        found.add(_prose(texts_lib.normalised(path), rules, names=True), path)
  # A README's word makes a folder copyleft, and permissive where all else is silent.
  found.add(dataclasses.replace(weak, permissive={}))
  found.permissive = found.permissive or weak.permissive
  return found.licence()


def of_file(text: str, rules: Rules = DEFAULT) -> Licence:
  """What a source file says of itself: an SPDX line, or a notice in its beginning."""
  found = _spdx_lines(text, rules) if _SPDX_MARK in text else _Found()
  head = text[:_HEADER].lower()
  if any(word in head for word in _NOTICE):
    found.add(_prose(texts_lib.normalised(head), rules), '')
  return found.licence()


# A notice has one of these; looking for them is what most files cost.
_NOTICE = (
  'licens', 'licenc', 'gpl', 'general', 'public domain', 'permission', 'copying',
  'cecill', 'copyleft', 'confidential', 'commercial', 'redistribut', 'creative',
  'eupl', 'mpl', 'epl', 'cddl', 'osl', 'unauthorized',
)  # fmt: skip
_SPDX_MARK = 'SPDX-License-Identifier'
_SPDX_LINE = re.compile(
  _SPDX_MARK + r':?[ \t]*\(?([^\n*"\'<>#;/]+(?:/[^\n*"\'<>#;/ ]+)*)'
)


def _spdx_lines(text: str, rules: Rules) -> _Found:
  found = _Found()
  for match in _SPDX_LINE.finditer(text):
    whole = match[0].split(':', 1)[-1].strip().removesuffix('-->').strip(' \t\r%}|)-')
    opened = whole.count('(') - whole.count(')')
    found.add(_field(whole + ')' * max(opened, 0), rules, False), '')
  return found


# Expressions and names in fields.

_OPERAND = re.compile(r'[A-Za-z0-9][A-Za-z0-9.+:-]*')


def _field(value: str, rules: Rules, slash_is_or: bool) -> _Found:
  """What a metadata field says: an SPDX expression, or a name in words."""
  if len(value) > _LONGEST_FIELD:
    return _prose(texts_lib.normalised(value), rules, names=True)
  tokens = re.findall(
    r'\(|\)|[^\s()]+', value.replace('/', ' OR ' if slash_is_or else ' / ')
  )
  try:
    found, rest = _either(tokens, rules)
    if not rest:
      return found
  except (ValueError, IndexError, RecursionError):
    pass
  return _prose(texts_lib.normalised(value), rules, names=True)


def _either(tokens, rules) -> tuple[_Found, list[str]]:
  """expression = term (OR term)*: permissive if any term is, and then covers all."""
  begin = tokens
  found, tokens = _both(tokens, rules)
  terms = [found]
  while tokens and tokens[0].upper() in ('OR', '|', '||'):
    found, tokens = _both(tokens[1:], rules)
    terms.append(found)
  if len(terms) == 1:
    return terms[0], tokens
  whole = _Found()
  for term in terms:
    whole.add(term, '')
  if any(term.licence().kind == 'permissive' for term in terms):
    whole.covered |= {family for family, _ in whole.copyleft.values()}
    whole.choice = ' '.join(begin[: len(begin) - len(tokens)])
  return whole, tokens


def _both(tokens, rules) -> tuple[_Found, list[str]]:
  """term = factor ((AND | WITH) factor)*: an exception changes nothing."""
  found, tokens = _factor(tokens, rules)
  while tokens and tokens[0].upper() in ('AND', 'WITH', '/', ',', '&'):
    operator = tokens[0].upper()
    other, tokens = _factor(tokens[1:], rules)
    if operator == 'WITH':
      continue
    if not other.copyleft and not other.permissive:
      other.copyleft = {'LicenseRef-Unknown': ('?', '')} if operator == 'AND' else {}
    found.add(other, '')
  return found, tokens


def _factor(tokens, rules) -> tuple[_Found, list[str]]:
  if tokens[0] == '(':
    found, rest = _either(tokens[1:], rules)
    if rest[0] != ')':
      raise ValueError(tokens)
    return found, rest[1:]
  if not _OPERAND.fullmatch(tokens[0]) or tokens[0].upper() in ('OR', 'AND', 'WITH'):
    raise ValueError(tokens)
  return _identified(tokens[0], rules), tokens[1:]


def _identified(name: str, rules: Rules) -> _Found:
  """One word of an expression, an SPDX id or like one."""
  kind = rules.kind(name)
  if kind == 'copyleft':
    found = texts_lib.copyleft_in(texts_lib.normalised(name))
    return _Found(copyleft={name: (found[0][1] if found else name, '')})
  if kind == 'permissive':
    return _Found(permissive={name: ''})
  return _prose(texts_lib.normalised(name), rules, names=True)


# Sentences.

# No word is in it in two ways, or a run of them would be tried in all combinations.
_GAP = (
  r'(?:(?:licenses?|licensed|version|v?\d+|style|clause|new|modified|revised'
  r'|either|the|terms|of|under|gnu|at|your|option|choice|with|orlater|a|an|any|both'
  r'|general|public|lesser) ){0,12}'
)
_P = (
  r'(?:mit|x11|expat|bsd\w*|apache\w*|isc|zlib|boost|unlicense|cc0|wtfpl|psf|ncsa'
  r'|public domain|ms pl|artistic license 2) '
)
_C = {
  'GNU': r'(?:gnu|[al]?gpl\w*|lesser general|affero|general public) ',
  'MPL': r'(?:mozilla|mpl\w*) ',
  'EPL': r'(?:eclipse|epl\w*) ',
  'CDDL': r'(?:common development|cddl) ',
  'CC': r'(?:cc by sa|creative commons) ',
}
_OR_LATER = re.compile(
  r'or (?:\w+ (?:at )?)?(?:at )?(?:your option )?(?:any )?'
  r'(?:later|newer|greater|above|higher)(?: versions?)?|and later'
)


def _prose(words: str, rules: Rules, names: bool = False) -> _Found:
  """What `normalised` words say; `names`: of a short phrase that names a licence."""
  found = _Found()
  for name, family in texts_lib.copyleft_in(words):
    if rules.kind(name) == 'copyleft' or name.startswith('LicenseRef'):
      found.copyleft[name] = (family, '')
  listed = texts_lib.named_in(words) if names else texts_lib.permissive_in(words)
  for name in listed:
    if name == 'LicenseRef-Proprietary' and not found.copyleft:
      found.copyleft[name] = ('other', '')
    if rules.kind(name) == 'permissive':
      found.permissive[name] = ''
  if found.copyleft:
    found.covered = _chosen(words, bool(found.permissive))
    if found.covered:
      found.permissive = found.permissive or {'choice': ''}
      found.choice = ' OR '.join([*found.permissive, *found.copyleft])
  return found


def _chosen(words: str, permissive: bool) -> set[str]:
  """The families to which a sentence offers a permissive alternative."""
  words = _OR_LATER.sub('orlater', words)
  chosen = set()
  for family, name in _C.items():
    if (
      re.search(rf' {_P}{_GAP}or {_GAP}{name}', words)
      or re.search(rf' {name}{_GAP}or {_GAP}{_P}', words)
      or (
        permissive
        and re.search(
          r' alternatively (?:this|the|you|it)(?: \w+){0,12} (?:may|can) (?:be )?'
          rf'(?:\w+ ){{0,8}}(?:terms of|under) (?:\w+ ){{0,6}}?{name}',
          words,
        )
      )
    ):
      chosen.add(family)
  return chosen


_HEADING = re.compile(
  r'^(?:#+[ \t]*|=+[ \t]*)?licen[sc](?:e|ing)[^\n]{0,40}\n+(?:[=~-]+\n+)?(.{1,400})',
  re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_GRANT = re.compile(
  r' (?:licensed|released|distributed|available|published|provided|covered'
  r'|redistributed|redistribute it|modify it) (?:\w+ ){0,6}?(?:under|by|with) '
  r'((?:\w+ ){1,16})'
)


def _grants(text: str) -> Iterator[str]:
  """The phrases of a README that grant a licence, as `normalised` words."""
  for match in _HEADING.finditer(text):
    yield texts_lib.normalised(re.split(r'\n#|\n\n\n', match[1])[0])
  words = texts_lib.normalised(text)
  for match in _GRANT.finditer(words):
    yield f' {match[1].strip()} '
  yield from re.findall(r' (?:[al]gpl|gpl)(?:v?\d)? licensed ', words)
  for badge in re.findall(
    r'badge/licen[sc]e-([\w.%+-]+?)-\w+\.?\w*', text, re.IGNORECASE
  ):
    yield texts_lib.normalised(badge)


# Package metadata.


def _fields(name: str, text: str) -> Iterator[str]:
  """The values of a package's licence fields; all of them hold."""
  if name.endswith('.json'):
    yield from _of_json(text)
  elif name.endswith('.toml'):
    yield from _of_toml(text)
  elif name.endswith(('.xml', '.nuspec', '.csproj')):
    for block in _elements(text):
      yield from re.findall(r'<name>([^<]+)</name>', block) or [
        re.sub('<[^<>]*>', ' ', block)
      ]
    yield from re.findall(
      r'<PackageLicen[sc]e(?:Expression|File)>([^<]+)<', text, re.IGNORECASE
    )
  else:
    yield from _of_lines(text)
  yield from re.findall(r'License :: (?:OSI Approved :: )?([^\'"\n,]+)', text)


_LICENCE_TAG = re.compile(r'<(/?)licenses?(?![\w-])(?=[^<>]{0,200}>)', re.IGNORECASE)


def _elements(text: str) -> Iterator[str]:
  """The text from each <licenses> to the next closing tag; none is read twice."""
  begin = None
  for tag in _LICENCE_TAG.finditer(text):
    if not tag[1]:
      begin = tag.end() if begin is None else begin
    elif begin is not None:
      yield text[begin : tag.start()].partition('>')[2]
      begin = None


def _of_json(text: str) -> Iterator[str]:
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError):
    yield from re.findall(r'"licen[sc]es?"\s*+:\s*+(?:\[\s*+)?"([^"]+)"', text)
    return
  if not isinstance(fields, dict):
    return
  for key, value in fields.items():
    if key.lower() in ('license', 'licence', 'licenses', 'licences'):
      for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict):
          one = one.get('type') or one.get('name') or one.get('url')
        if isinstance(one, str):
          yield one


def _of_toml(text: str) -> Iterator[str]:
  try:
    fields = tomllib.loads(text)
  except (ValueError, RecursionError):  # numbers of thousands of digits, deep lists
    yield from _of_lines(text)
    return
  for place in ('package', 'project', 'tool.poetry', 'workspace.package'):
    value = fields
    for key in (*place.split('.'), 'license'):
      value = value.get(key) if isinstance(value, dict) else None
    value = value.get('text') if isinstance(value, dict) else value
    if isinstance(value, str):
      yield value


def _of_lines(text: str) -> Iterator[str]:
  """license = 'MIT', licenses = ["MIT", "GPL-3.0"], License: MIT, and the like."""
  pattern = r'^[^\n#]{0,40}?\blicen[sc]es?["\']?\s*(?::=|=>|[:=(])\s*(.{1,200})$'
  for value in re.findall(pattern, text, re.IGNORECASE | re.MULTILINE):
    quoted = re.findall(r'["\']([^"\']+)["\']', value)
    yield from quoted or [value.split('#')[0].strip('[]%; ')]

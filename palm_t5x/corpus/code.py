"""Source code: files of repositories with their licences, and what is kept of them.

A reader, `Repositories`, decides the licence of a repository before it reads its files;
the steps drop what has the wrong licence or language or was not written by hand. The
paper names licence, language and near-duplicates (`near_duplicates`) only (section 3);
the rules against generated files are choices of this project.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator

from palm_t5x import errors
from palm_t5x.corpus import code_languages, licences
from palm_t5x.corpus.code_languages import LANGUAGES
from palm_t5x.corpus.documents import Document, Dropped, Part
from palm_t5x.corpus.records import Broken, Ignored

_CONTROL = {'.git', '.hg', '.svn', '.bzr', 'CVS'}
_EVIDENCE_BYTES = 200_000  # of a licence file that are read


@dataclasses.dataclass(frozen=True)
class Repositories:
  """Reads a folder of repositories: one document per file.

  A document's id is its path in the folder; its meta has 'repository', 'licence' (an
  SPDX id or expression, or 'unknown'), 'licence_kind', 'licence_where' (the file that
  decided), 'language' (of Table 28, or None) and 'extension'. The licence is that of
  the nearest folder above the file that has one; a copyleft licence holds for all that
  lies below it.

  Attributes:
    depth: levels of folders down to a repository: 1 for repo/, 2 for owner/repo/.
    part_bytes: of the repositories that a part holds, about.
    max_file_bytes: larger files are dropped.
    rules: which licences are copyleft and which permissive.
  """

  depth: int = 2
  part_bytes: int = 1 << 26
  max_file_bytes: int = 1 << 20
  rules: licences.Rules = licences.DEFAULT

  def parts(self, data_dir: str) -> list[Part]:
    """Groups of whole repositories, the same ones on every machine.

    Raises:
      UserError: there is no repository.
    """
    found = [
      (name, _size(os.path.join(data_dir, name))) for name in self._all(data_dir)
    ]
    if not found:
      levels = 'owner/repository/' if self.depth == 2 else 'folder'
      raise errors.UserError(
        f'{data_dir} has no repositories: code.Repositories.depth = {self.depth} '
        f'expects one {levels} for each; put them there, or '
        'set depth to 1 or 2 as they lie.'
      )
    groups, size = [[]], 0
    for name, num_bytes in found:
      if groups[-1] and size + num_bytes > self.part_bytes:
        groups.append([])
        size = 0
      groups[-1].append((name, num_bytes))
      size += num_bytes
    return [
      Part(
        f'repositories-{i:05d}',
        functools.partial(self.read, data_dir, tuple(name for name, _ in group)),
        sum(num_bytes for _, num_bytes in group),
      )
      for i, group in enumerate(groups)
    ]

  def _all(self, data_dir: str) -> list[str]:
    names = ['']
    for _ in range(self.depth):
      names = [
        os.path.join(name, entry.name)
        for name in names
        for entry in _entries(os.path.join(data_dir, name))
        if entry.is_dir(follow_symlinks=False) and entry.name not in _CONTROL
      ]
    return sorted(names)

  def read(
    self, data_dir: str, repositories: tuple[str, ...]
  ) -> Iterator[Document | Broken]:
    """The files of some repositories, in order of their paths."""
    for repository in repositories:
      yield from self._folder(data_dir, repository, repository, licences.UNKNOWN)

  def _folder(self, data_dir, repository, folder, above):
    entries = _entries(os.path.join(data_dir, folder))
    root = os.path.join(data_dir, repository)
    licence = self._licence(root, os.path.join(data_dir, folder), entries, above)
    for entry in entries:
      path = os.path.join(folder, entry.name)
      if entry.is_symlink() or entry.name in _CONTROL:
        continue
      if entry.is_dir():
        yield from self._folder(data_dir, repository, path, licence)
      elif entry.is_file():
        yield self._file(os.path.join(data_dir, path), path, repository, licence)

  def _licence(self, root, folder, entries, above) -> licences.Licence:
    if above.kind == 'copyleft':
      return above
    texts = {}
    for entry in entries:
      for name in _evidence(folder, entry.name, licences.evidence_depth(entry.name)):
        texts[name] = _start(root, os.path.join(folder, name))
    own = licences.detect(texts, self.rules) if texts else licences.UNKNOWN
    return above if own == licences.UNKNOWN else own

  def _file(self, place, path, repository, licence) -> Document | Broken:
    try:
      if os.path.getsize(place) > self.max_file_bytes:
        return Ignored(_name(path), 'larger than max_file_bytes')
      with open(place, 'rb') as f:
        data = f.read()
    except OSError as e:
      return Broken(_name(path), f'it cannot be read: {e.strerror}')
    if b'\0' in data:
      return Ignored(_name(path), 'binary')
    try:
      text = data.decode('utf-8-sig')
    except UnicodeDecodeError:
      return Broken(_name(path), 'invalid UTF-8')
    meta = {
      'repository': _name(repository),
      'licence': licence.spdx_id,
      'licence_kind': licence.kind,
      'licence_where': licence.where,
      'language': code_languages.language_of(path, text),
      'extension': code_languages.extension_of(path),
    }
    return Document(_name(path), text, _name(path), meta)


def _entries(folder: str) -> list[os.DirEntry]:
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except NotADirectoryError:
    return []
  except OSError as e:
    raise errors.Failure(f'{folder} cannot be read: {e.strerror}.') from e


def _name(path: str) -> str:
  """A path as a text; names that are not UTF-8 get U+FFFD."""
  return os.fsencode(path).decode('utf-8', 'replace').replace(os.sep, '/')


def _size(folder: str) -> int:
  total = 0
  for here, folders, files in os.walk(folder):
    folders[:] = [name for name in folders if name not in _CONTROL]
    for name in files:
      total += os.lstat(os.path.join(here, name)).st_size
  return total


def _evidence(folder: str, path: str, depth: int) -> Iterator[str]:
  """The evidence at a path relative to a folder, and in so many levels below it."""
  place = os.path.join(folder, path)
  if os.path.isdir(place):
    for entry in _entries(place) if depth else ():
      yield from _evidence(folder, f'{path}/{entry.name}', depth - 1)
  elif licences.is_evidence(path) and (os.path.isfile(place) or os.path.islink(place)):
    yield path


def _start(root: str, path: str) -> str | None:
  """The beginning of a file of a repository; None if it is none or cannot be read."""
  real, root = os.path.realpath(path), os.path.realpath(root)
  if os.path.commonpath([real, root]) != root or not os.path.isfile(real):
    return None
  try:
    with open(real, 'rb') as f:
      return f.read(_EVIDENCE_BYTES).decode('utf-8', 'replace')
  except OSError:
    return None


@dataclasses.dataclass(frozen=True)
class KeepLicences:
  """Keeps files whose repository, folder and own notice are all free of copyleft.

  Attributes:
    keep_unknown: also keep what no licence was found for.
    rules: which licences are copyleft and which permissive; as the reader's.
  """

  keep_unknown: bool = False
  rules: licences.Rules = licences.DEFAULT

  def __call__(self, document: Document) -> Document | Dropped:
    kind = document.meta.get('licence_kind', 'unknown')
    if kind == 'copyleft':
      return Dropped('copyleft licence')
    if kind == 'unknown' and not self.keep_unknown:
      return Dropped('unknown licence')
    if licences.of_file(document.text, self.rules).kind == 'copyleft':
      return Dropped('copyleft notice in the file')
    return document


@dataclasses.dataclass(frozen=True)
class KeepLanguages:
  """Keeps files in some languages, by meta['language'] or else the id's extension.

  Attributes:
    languages: names of Table 28.

  Raises:
    UserError: a name that is not in the table.
  """

  languages: tuple[str, ...] = LANGUAGES

  def __post_init__(self):
    unknown = sorted(set(self.languages) - set(LANGUAGES))
    if unknown:
      raise errors.UserError(
        f'code.KeepLanguages.languages has {unknown[0]!r}: the languages are '
        f'{", ".join(LANGUAGES)}.'
      )

  def __call__(self, document: Document) -> Document | Dropped:
    if 'language' not in document.meta:
      language = code_languages.language_of(document.id, document.text)
      document.meta['language'] = language
    if document.meta['language'] not in self.languages:
      return Dropped('another language')
    return document


@dataclasses.dataclass(frozen=True)
class RenderNotebooks:
  """Makes scripts of notebooks: code and prose, no outputs."""

  def __call__(self, document: Document) -> Document | Dropped:
    if document.meta.get('language') != 'Notebooks':
      return document
    text = code_languages.notebook_text(document.text)
    if text is None or not text.strip():
      return Dropped('broken or empty notebook')
    return dataclasses.replace(document, text=text)


_GENERATED_NAME = re.compile(
  r'(?:^|/)(?:package-lock\.json|npm-shrinkwrap\.json|composer\.lock|go\.sum'
  r'|[^/]*\.lock|[^/]*_pb2(?:_grpc)?\.pyi?|[^/]*\.pb(?:\.gw)?\.(?:go|cc|h|c)'
  r'|[^/]*\.(?:g|freezed|gr|mocks)\.dart|[^/]*\.(?:g|g\.i|designer|generated)\.cs'
  r'|[^/]*[-._](?:min|bundle|packed|compressed)\.(?:js|css|mjs)|[^/]*\.generated\.\w+'
  r'|[^/]*\.(?:map|snap)|moc_[^/]*\.cpp|ui_[^/]*\.(?:py|h)|R\.java|BuildConfig\.java'
  r'|[^/]*\.tab\.[ch]|lex\.yy\.c|zz_generated[^/]*\.go|[^/]*_string\.go|bindata\.go)$',
  re.IGNORECASE,
)
_GENERATED_TEXT = re.compile(
  r'\bdo\s+not\s+(?:hand[- ]?)?(?:edit|modify|change)\b|@generated\b|<auto-?generated'
  r'|\bauto-?(?:matically)?[- ]?generated\b|\b(?:file|code|source|class|module|page'
  r'|parser|document)\s+(?:is|was|has\s+been|were|are)?\s*(?:\w+\s+)?generated\s+'
  r'(?:by|from|with)\b|\bgenerated\s+by\s+(?:the\s+)?(?:protocol\s+buffer|swig|thrift|javadoc|doxygen'
  r'|django|sphinx|antlr|cython|autoconf|automake|qt|flex|bison|yacc|jflex|wsdl\w*|xsd|xjc|sqlc)\b',
  re.IGNORECASE,
)
_VENDORED = re.compile(
  r'(?:^|/)(?:node_modules|bower_components|vendor|vendors|third[-_]?party|external|extern'
  r'|dist|site-packages|Pods|Carthage|\.venv|virtualenv)/',
  re.IGNORECASE,
)
_BLOB_CHARS = 400
_BLOB = re.compile(
  rf'[A-Za-z0-9+/=_-]{{{_BLOB_CHARS}}}|(?:\\x[0-9a-fA-F]{{2}}){{{_BLOB_CHARS // 4}}}'
)
_SPACES = b' \t\r\n\f\v'
_NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalpha())


@dataclasses.dataclass(frozen=True)
class DropGenerated:
  """Drops files that nobody wrote: generated, minified, data, locks, vendored.

  Attributes:
    marker_chars: of a file's beginning in which 'DO NOT EDIT' and the like are sought.
    average_line: mean length of non-empty lines in characters above which a file is
      minified.
    longest_line: longest line, likewise.
    loose: languages whose lines may be `loose_factor` times as long.
    min_letters: smallest share of letters (ASCII, and bytes above 127) among bytes that
      are not white space.
    max_blobs: largest share of characters in runs that encode data (base64, escapes).
    drop_vendored: also drop copies of other projects: node_modules, vendor, ...
    min_chars: smaller files are dropped.
  """

  marker_chars: int = 2000
  average_line: float = 100.0
  longest_line: int = 1000
  loose: tuple[str, ...] = ('HTML', 'XML', 'SQL', 'Notebooks', 'PHP')
  loose_factor: float = 4.0
  min_letters: float = 0.25
  max_blobs: float = 0.3
  drop_vendored: bool = True
  min_chars: int = 20

  def __call__(self, document: Document) -> Document | Dropped:
    text, path = (
      document.text,
      document.id.removeprefix(document.meta.get('repository', '') + '/'),
    )
    if _GENERATED_NAME.search(path):
      return Dropped('generated, by its name')
    if self.drop_vendored and _VENDORED.search(path):
      return Dropped('vendored')
    if len(text.strip()) < self.min_chars:
      return Dropped('too short')
    if _GENERATED_TEXT.search(text, 0, self.marker_chars):
      return Dropped('generated, by its own word')
    lengths = [len(line) for line in text.split('\n') if line]
    factor = self.loose_factor if document.meta.get('language') in self.loose else 1
    if sum(lengths) > factor * self.average_line * len(lengths):
      return Dropped('long lines on average')
    longest = max(lengths)
    if longest > factor * self.longest_line:
      return Dropped('a very long line')
    data = text.encode('utf-8', 'replace')
    letters = len(data.translate(None, _NO_LETTERS))
    if letters < self.min_letters * len(data.translate(None, _SPACES)):
      return Dropped('few letters')
    if longest >= _BLOB_CHARS and self.max_blobs * len(text) < sum(
      map(len, _BLOB.findall(text))
    ):
      return Dropped('mostly encoded data')
    return document

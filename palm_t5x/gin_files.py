"""Gin files as text: finding them, and reading every name in them without importing.

`scan` follows the includes of a configuration with gin's own parser, but looks nothing
up. What it finds is enough to answer, in a fraction of a second and before jax is
imported: is every file there and well formed, which macros and scopes does the
configuration know, and what is NPROC.
"""

import dataclasses
import difflib
import io
import os
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gin import config_parser

from palm_t5x.environment import package_gin_dir
from palm_t5x.errors import UserError

# What gin's parser raises for text that is not Gin.
SYNTAX_ERRORS = (SyntaxError, tokenize.TokenError, ValueError)


class Reference(NamedTuple):
  """`@scope/name` or `@scope/name()` in a Gin value."""

  scopes: tuple[str, ...]
  selector: str
  evaluate: bool


class Macro(NamedTuple):
  """`%NAME` in a Gin value."""

  name: str


class NamesOnly(config_parser.ParserDelegate):
  """Reads references and macros as names: nothing is imported or looked up."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    *scopes, selector = scoped_configurable_name.split('/')
    return Reference(tuple(scopes), selector, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
  """' Did you mean X?' for the nearest candidates, or '' if none is near."""
  by_lower = {c.lower(): c for c in candidates}
  near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
  if not near:
    return ''
  return f' Did you mean {" or ".join(by_lower[n] for n in near)}?'


@dataclasses.dataclass(frozen=True)
class SearchPath:
  """Where Gin files are looked for: the given folders, in order, then the package's.

  A file of the user's wins over one of ours with the same name, so that a user's own
  copy of `t5x/configs/runs/pretrain.gin` is what their include finds.
  """

  folders: tuple[str, ...] = ('.',)

  @property
  def all_folders(self) -> tuple[str, ...]:
    """Every folder, the package's last."""
    return (*self.folders, package_gin_dir())

  def find(self, name: str, beside: str | None = None) -> str:
    """The path of a Gin file.

    Args:
      name: as in `--gin_file` or `include`.
      beside: the including file; its folder is looked into last.

    Raises:
      UserError: if there is none, with the places searched and near names.
    """
    if '://' in name:
      return name
    folders = [*self.all_folders, *([os.path.dirname(beside)] if beside else [])]
    for folder in folders:
      path = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
      if os.path.isfile(path):
        return path
    if name.startswith('t5x/') and not name.startswith('t5x/configs/runs/'):
      hint = (
        " T5X's own model files are not part of this package; PaLM's are models/*.gin. "
        'Put your copy in the current folder or in one of --gin_search_paths.'
      )
    else:
      hint = did_you_mean(name, self._names())
    searched = ', '.join(os.path.normpath(f) for f in dict.fromkeys(folders))
    raise UserError(f'there is no Gin file {name!r}. Searched: {searched}.{hint}')

  def _names(self) -> Iterator[str]:
    """Names that `find` knows: the package's, and the user's at most a level down."""
    for folder in self.all_folders:
      ours = folder == self.all_folders[-1]
      for root, subfolders, names in os.walk(folder):
        depth = os.path.relpath(root, folder).count(os.sep)
        if not ours and depth >= 1:
          subfolders.clear()
        subfolders[:] = [s for s in subfolders if not s.startswith('.')]
        for name in names:
          if name.endswith('.gin'):
            yield os.path.normpath(os.path.relpath(os.path.join(root, name), folder))


def read(path: str) -> str:
  """The text of a Gin file, from a disk or a bucket."""
  try:
    if '://' in path:
      from etils import epath

      return epath.Path(path).read_text()
    with open(path, encoding='utf-8') as f:
      return f.read()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read the Gin file {path}: {error}') from error


def parse(text: str, path: str, delegate) -> Iterator[Any]:
  """gin's statements of a text.

  Raises:
    UserError: with file, line and text of what is not Gin.
  """
  source = io.StringIO(text)
  source.name = path
  try:
    yield from config_parser.ConfigParser(source, delegate)
  except UserError:
    raise
  except SYNTAX_ERRORS as error:
    raise UserError(_syntax_message(error, text, path)) from error


def _syntax_message(error: Exception, text: str, path: str) -> str:
  """One line for a syntax error: file:line: what, and the line itself."""
  args = error.args
  location = args[1] if len(args) > 1 else None
  if isinstance(location, config_parser.Location):
    line = location.line_num
  elif isinstance(location, tuple):  # Python's tokenizer: (line, column) or longer.
    line = location[0] if isinstance(location[0], int) else location[1]
  else:
    line = getattr(error, 'lineno', None) or 1
  lines = text.splitlines() or ['']
  shown = lines[min(int(line), len(lines)) - 1].strip()
  what = ' '.join(str(args[0] if args else error).split())
  if 'malformed node' in what or 'Failed to parse token' in what:
    what = 'a value must be a number, a list, @name, %MACRO or text in quotes'
  return f'{path}:{line}: {what.rstrip(".")}. In: {shown}'


def where(path: str, location: config_parser.Location) -> str:
  """`file:line`, the prefix of every message about a statement."""
  return f'{path}:{location.line_num}'


@dataclasses.dataclass
class Scan:
  """The names in a configuration.

  Attributes:
    texts: path to text of every file, in the order in which their reading began.
    macros: macro name to its last value (References and Macros as names).
    macro_uses: macros that some value refers to.
    scopes: names before a slash, in bindings and references.
  """

  texts: dict[str, str] = dataclasses.field(default_factory=dict)
  macros: dict[str, Any] = dataclasses.field(default_factory=dict)
  macro_uses: set[str] = dataclasses.field(default_factory=set)
  scopes: set[str] = dataclasses.field(default_factory=set)

  def value(self, name: str, default: Any = None) -> Any:
    """A macro's literal value, or `default` where it is unset or a reference."""
    value = self.macros.get(name, default)
    if isinstance(value, Macro) and value.name != name:
      value = self.value(value.name, default)
    return default if isinstance(value, Macro | Reference) else value

  def add(self, scope: str, selector: str, arg_name: str, value: Any) -> None:
    """Takes note of one binding."""
    if arg_name:
      self.scopes.update(s for s in scope.split('/') if s)
    else:
      self.macros[f'{scope}/{selector}' if scope else selector] = value
    for found in leaves(value):
      if isinstance(found, Macro):
        self.macro_uses.add(found.name)
      else:
        self.scopes.update(found.scopes)


def leaves(value: Any, kinds: tuple = (Macro, Reference)) -> Iterator[Any]:
  """Every object of the given kinds in a value, however deep."""
  if isinstance(value, kinds):
    yield value
  elif isinstance(value, dict):
    for key, item in value.items():
      yield from leaves(key, kinds)
      yield from leaves(item, kinds)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from leaves(item, kinds)


def scan(names: Sequence[str], search: SearchPath) -> Scan:
  """Reads Gin files and all they include, in gin's order, importing nothing.

  Raises:
    UserError: for a missing file, bad syntax, or a file that includes itself.
  """
  result = Scan()
  for name in names:
    _scan_file(search.find(name), search, result, ())
  return result


def _scan_file(path: str, search: SearchPath, result: Scan, open_files: tuple):
  if path in open_files:
    raise UserError(f'{path} includes itself, through {" -> ".join(open_files)}.')
  text = result.texts.setdefault(path, read(path))
  for statement in parse(text, path, NamesOnly()):
    if isinstance(statement, config_parser.IncludeStatement):
      try:
        included = search.find(statement.filename, beside=path)
      except UserError as error:
        raise UserError(f'{where(path, statement.location)}: {error}') from error
      _scan_file(included, search, result, (*open_files, path))
    elif isinstance(statement, config_parser.BindingStatement):
      result.add(
        statement.scope, statement.selector, statement.arg_name, statement.value
      )

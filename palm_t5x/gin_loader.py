"""Runs Gin files: gin's parser and registry under our own reading of statements.

gin's own loop stops at the first T5X parameter this package lacks and explains an
error in ten lines; this one drops the former, says the latter in one line with file and
line number, and remembers the aliases of every file, so that the command line can use
the names that the files use. Everything that touches gin's internals is here and in
`gin_check`; setup.cfg bounds gin-config accordingly.
"""

import contextlib
import importlib
import importlib.util  # gin.resource_reader uses it without importing it.
import inspect
import pkgutil
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from palm_t5x import gin_files, modes, t5x_alias, t5x_parameters
from palm_t5x.environment import cache_dir
from palm_t5x.errors import UserError
from palm_t5x.gin_command_line import Binding, parse_value
from palm_t5x.gin_files import did_you_mean, where


class LocatedError(UserError):
  """A UserError whose text already says where in the Gin files it is."""


class Unresolved:
  """Stands for a reference to nothing until it is known whether anyone needs it."""

  def __init__(self, name: str, reason: str):
    self.name, self.reason = name, reason


class _Context(gin_config.ParseContext):
  """gin's symbol table of one file, which also knows complete registry names.

  gin re-reads references when it registers a class anew, in whichever file it is at
  that moment; a complete name means the same in all of them, an alias does not.
  """

  @property
  def aliases(self) -> dict[str, types.ModuleType]:
    return self._symbol_table

  @property
  def dynamic(self) -> bool:
    return self._dynamic_registration

  def get_configurable(self, selector):
    if selector.partition('.')[0] in self._symbol_table:
      with contextlib.suppress(AttributeError):
        return super().get_configurable(selector)
    return gin_config._REGISTRY.get(selector)

  def objects(self, selector: str) -> Any:
    """What `selector` names by this file's imports.

    Raises:
      NameError: if its first part is no import of the file.
      AttributeError: if a module lacks the rest.
    """
    first, *rest = selector.split('.')
    if first not in self._symbol_table:
      raise NameError(first)
    value = self._symbol_table[first]
    for name in rest:
      try:
        value = getattr(value, name)
      except AttributeError:
        if not isinstance(value, types.ModuleType) or not hasattr(value, '__path__'):
          raise
        try:
          value = importlib.import_module(f'{value.__name__}.{name}')
        except ModuleNotFoundError as error:
          raise AttributeError(name) from error
    return value


class _Delegate(config_parser.ParserDelegate):
  """Makes gin's references, by complete name, out of the names in a file."""

  def __init__(self, loader: 'Loader', context: _Context | None):
    self._loader, self._context = loader, context

  def configurable_reference(self, scoped_configurable_name, evaluate):
    *scopes, selector = scoped_configurable_name.split('/')
    try:
      found = self._loader.resolve(selector, self._context)
    except UserError as error:
      return Unresolved(selector, str(error))
    name = '/'.join([*scopes, found.selector])
    return gin_config.ConfigurableReference(name, evaluate)

  def macro(self, macro_name):
    return gin_config.ParserDelegate().macro(macro_name)


class Loader:
  """Reads Gin files and command-line bindings into gin's configuration.

  Attributes:
    dropped: T5X parameters that were let go, in order, each once.
    notes: other things the user should hear once.
  """

  def __init__(self, search: gin_files.SearchPath, texts: dict[str, str] | None = None):
    self._search = search
    self._texts = dict(texts or {})
    self._contexts: list[_Context] = []
    self._mentioned: set[str] = set()
    self.dropped: list[str] = []
    self.notes: list[str] = []

  def load_file(self, name: str, beside: str | None = None) -> None:
    """Runs a Gin file and what it includes.

    Raises:
      UserError: at the first statement that means nothing here.
    """
    path = self._search.find(name, beside)
    self.load_text(self._texts.get(path) or gin_files.read(path), path)

  def load_text(self, text: str, path: str) -> None:
    """Runs Gin statements; `path` is what messages call them."""
    context = _Context()
    self._contexts.append(context)
    with self._pushed(context):
      for statement in gin_files.parse(text, path, _Delegate(self, context)):
        at = where(path, statement.location)
        try:
          self._run(statement, context, path)
        except LocatedError:
          raise
        except UserError as error:
          raise LocatedError(f'{at}: {error}') from error
    gin_config._IMPORTS.update(context.imports)

  def bind(self, binding: Binding) -> None:
    """Applies a binding of the command line.

    Raises:
      UserError: if its configurable or parameter does not exist or is ambiguous.
    """
    value = parse_value(binding.text, _Delegate(self, None))
    try:
      self._bind(None, binding.scope, binding.selector, binding.arg_name, value)
    except UserError as error:
      raise UserError(f'--gin.{binding.name}: {error}') from error
    self._note_shadowed(binding)

  def register(self, function: Any) -> Any:
    """The gin Configurable of a function, registered if no file has mentioned it."""
    module = sys.modules[function.__module__]
    return gin_config._inverse_lookup(function) or _register(
      module, [function.__name__]
    )

  def resolve(self, selector: str, context: _Context | None = None) -> Any:
    """The gin Configurable that a name in a file, or on the command line, means.

    Args:
      selector: by alias, by the end of a registered name, or by Python path.
      context: the file's; None, or a file without imports: by any file's aliases.

    Raises:
      UserError: for a name that means nothing or several things.
    """
    if selector.split('.')[-1] == 'EncoderDecoderModel':
      raise UserError(t5x_alias.ENCODER_DECODER)
    if context is not None and context.dynamic:
      found = self._by_alias(selector, context)
    else:
      found = self._by_any_name(selector)
    self._mentioned.add(found.selector)
    return found

  def _by_any_name(self, selector: str) -> Any:
    """`resolve` by the aliases of all files, else by the end of a registered name."""
    found = {}
    for candidate in self._contexts:
      with contextlib.suppress(NameError, AttributeError):
        value = candidate.objects(selector)
        if callable(value):
          found[id(value)] = candidate
    if len(found) == 1:
      return self._by_alias(selector, *found.values())
    matches = gin_config._REGISTRY.matching_selectors(selector)
    # What the files mention goes before what libraries have registered besides.
    matches = [m for m in matches if m in self._mentioned] or matches
    if len(matches) == 1 and not found:
      return gin_config._REGISTRY[matches[0]]
    if len(found) > 1 or len(matches) > 1:
      names = ', '.join(sorted(matches)) or 'different modules in different files'
      raise UserError(f'{selector} is ambiguous: {names}. Write more of the name.')
    raise UserError(f'no configurable is called {selector}.{self._near(selector)}')

  def _by_alias(self, selector: str, context: _Context) -> Any:
    """`resolve` within one file's imports."""
    first = selector.partition('.')[0]
    if first == 'gin':
      return context.get_configurable(selector)
    try:
      value = context.objects(selector)
    except NameError as error:
      known = gin_config._REGISTRY.get(selector)
      if known is not None:
        return known
      raise UserError(
        f'{selector}: this file imports nothing called {first!r}.'
        f'{did_you_mean(first, context.aliases)}'
      ) from error
    except AttributeError as error:
      parent, _, last = selector.rpartition('.')
      with contextlib.suppress(NameError, AttributeError):
        owner = context.objects(parent)
        hint = did_you_mean(last, _public(owner))
        raise UserError(f'{_name_of(owner)} has no {last}.{hint}') from error
      raise UserError(f'no configurable is called {selector}.') from error
    if not callable(value):
      raise UserError(f'{selector} is no class or function, so it takes no bindings.')
    found = gin_config._inverse_lookup(value)
    if found is None:
      _, *rest = selector.split('.')
      module = context.aliases[first]
      while isinstance(getattr(module, rest[0], None), types.ModuleType):
        module = getattr(module, rest.pop(0))
      if module is modes:  # The function's own module is what config.gin should name.
        module = sys.modules[value.__module__]
      found = _register(module, rest)
    return found

  def _near(self, selector: str) -> str:
    """A suggestion for an unknown name on the command line."""
    names = {'.'.join(n.split('.')[-2:]) for n, _ in gin_config._REGISTRY.items()}
    names.update(n.split('.')[-1] for n in tuple(names))
    for context in self._contexts:
      for alias, module in context.aliases.items():
        if isinstance(module, types.ModuleType) and alias != 'gin':
          names.update(f'{alias}.{n}' for n in _public(module))
    return did_you_mean(selector, names)

  @contextlib.contextmanager
  def _pushed(self, context: _Context) -> Iterator[None]:
    """Makes `context` the one that gin resolves names in."""
    gin_config._PARSE_CONTEXTS.append(context)
    try:
      yield
    finally:
      gin_config._PARSE_CONTEXTS.remove(context)

  def _run(self, statement: Any, context: _Context, path: str) -> None:
    """Executes one statement of a file."""
    if isinstance(statement, config_parser.IncludeStatement):
      self.load_file(statement.filename, beside=path)
    elif isinstance(statement, config_parser.ImportStatement):
      self._import(statement, context)
    elif isinstance(statement, config_parser.BlockDeclaration):
      if not t5x_parameters.is_dropped(statement.selector, ''):
        self.resolve(statement.selector, context)
    else:
      self._bind(
        context,
        statement.scope,
        statement.selector,
        statement.arg_name,
        statement.value,
      )

  def _import(self, statement: config_parser.ImportStatement, context: _Context):
    """Runs an import; T5X's modules and `__main__` become this package's."""
    module = statement.module
    if module == '__main__':
      alias = statement.alias or '__main__'
      statement = statement._replace(module='palm_t5x.modes', is_from=True, alias=alias)
    elif statement.is_from and module.startswith('t5x.') and module.count('.') == 1:
      own = 'palm_t5x' + module.removeprefix('t5x')
      if importlib.util.find_spec(own) is not None:
        statement = statement._replace(module=own)
    try:
      context.process_import(statement)
      if statement.module == 'palm_t5x.modes':
        context.imports.remove(
          statement
        )  # config.gin names the functions' own modules.
    except SyntaxError as error:
      if error.filename and error.filename.endswith('.py'):
        raise
      raise UserError(str(error.args[0])) from error
    except t5x_alias.T5XImportError as error:
      raise UserError(str(error)) from error
    except ModuleNotFoundError as error:
      missing = error.name or statement.module
      if not f'{statement.module}.'.startswith(f'{missing}.'):
        raise  # A module of the user's was found, and lacks one of its own imports.
      raise UserError(_import_message(statement.module, missing)) from error

  def _bind(
    self,
    context: _Context | None,
    scope: str,
    selector: str,
    arg_name: str,
    value: Any,
  ) -> None:
    """Binds a macro or a parameter, or drops what T5X has and we do not."""
    missing = next(gin_files.leaves(value, (Unresolved,)), None)
    if not arg_name:
      if missing:
        raise UserError(missing.reason)
      name = f'{scope}/{selector}' if scope else selector
      gin.bind_parameter((name, 'gin.macro', 'value'), value)
      return
    try:
      configurable = self.resolve(selector, context)
      if missing:
        raise UserError(missing.reason)
      self._bind_parameter(configurable, scope, selector, arg_name, value)
    except UserError:
      if not t5x_parameters.is_dropped(selector, arg_name):
        raise
      name = f'{".".join(selector.split(".")[-2:])}.{arg_name}'
      if name not in self.dropped:
        self.dropped.append(name)

  def _bind_parameter(self, configurable, scope, selector, arg_name, value):
    """gin's bind_parameter with our message for a parameter that does not exist."""
    context = _Context()
    try:
      with self._pushed(context):
        gin.bind_parameter((scope, configurable.selector, arg_name), value)
    except ValueError as error:
      names = parameters(configurable.wrapped)
      raise UserError(
        f'{selector} has no parameter {arg_name!r}.{did_you_mean(arg_name, names)}'
      ) from error

  def _note_shadowed(self, binding: Binding) -> None:
    """Says when a scoped binding of a file wins over one of the command line."""
    if not binding.arg_name or binding.scope:
      return
    with contextlib.suppress(UserError):
      selector = self.resolve(binding.selector).selector
      scopes = sorted(
        scope
        for (scope, other), bound in gin_config._CONFIG.items()
        if scope and other == selector and binding.arg_name in bound
      )
      if scopes:
        names = ', '.join(f'{s}/{binding.name}' for s in scopes)
        self.notes.append(
          f'--gin.{binding.name} does not reach where a file binds it in a scope: '
          f'{names}'
        )


def _register(module: types.ModuleType, path: list[str]) -> Any:
  """Registers `module.path` under the module's real name.

  gin registers what a file names under the file's alias, and then two files cannot use
  one alias for different modules.
  """
  context = _Context()
  location = config_parser.Location(None, 0, None, '')
  dotted = '.' in module.__name__
  for name, is_from in (
    ('__gin__.dynamic_registration', True),
    (module.__name__, dotted),
  ):
    context.process_import(config_parser.ImportStatement(name, is_from, None, location))
  return context.get_configurable('.'.join([module.__name__.rpartition('.')[2], *path]))


def _import_message(wanted: str, missing: str) -> str:
  """Why an import in a Gin file failed."""
  parent, _, last = missing.rpartition('.')
  owner = sys.modules.get(parent)
  if owner is not None and hasattr(owner, last):
    return (
      f'cannot import {wanted}: {last} is no module, and Gin imports modules: write '
      f'import {parent} and bind {parent}.{last}.'
    )
  near = sys.stdlib_module_names
  if owner is not None and hasattr(owner, '__path__'):
    near = [f'{parent}.{m.name}' for m in pkgutil.iter_modules(owner.__path__)]
  return (
    f'cannot import {wanted}: there is no module {missing!r} on the Python path or in '
    f'the current folder.{did_you_mean(missing, near)}'
  )


def parameters(function: Any) -> list[str]:
  """Names of a function's or class's parameters; [] if Python cannot tell."""
  try:
    return [
      p.name
      for p in inspect.signature(function).parameters.values()
      if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != 'self'
    ]
  except (TypeError, ValueError):
    return []


def _public(owner: Any) -> list[str]:
  """Names of a module's or class's public members."""
  return [n for n in dir(owner) if not n.startswith('_')]


def _name_of(owner: Any) -> str:
  """How to call a module or class in a message."""
  return getattr(owner, '__qualname__', None) or owner.__name__


def load(
  files: Sequence[str],
  statements: Sequence[str] = (),
  bindings: Sequence[Binding] = (),
  search: gin_files.SearchPath | None = None,
  texts: dict[str, str] | None = None,
) -> Loader:
  """Reads files, then `--gin_bindings` statements, then bindings; later ones win.

  The command's own macros (NPROC, CACHE_DIR, ...) have a value before any file.
  """
  loader = Loader(search or gin_files.SearchPath(), texts)
  own = {'NPROC': None, 'DATA_DIR': None, 'CORPUS_DIR': None, 'CACHE_DIR': cache_dir()}
  for name, value in own.items():
    gin.bind_parameter((name, 'gin.macro', 'value'), value)
  for name in files:
    loader.load_file(name)
  if statements:
    header = 'from __gin__ import dynamic_registration\n'
    loader.load_text(header + '\n'.join(statements) + '\n', '--gin_bindings')
  for binding in bindings:
    loader.bind(binding)
  return loader

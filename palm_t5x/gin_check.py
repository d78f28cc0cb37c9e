"""What a configuration lacks, before anything is built: all of it, in one message.

Starting at the function of the chosen mode, `Reached` follows the references through
gin's bindings the way a call would. Only what is reached must be complete, so one Gin
file can bind every mode and each asks for its own macros alone.
"""

import inspect
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import gin
from gin import config as gin_config

from palm_t5x.errors import UserError
from palm_t5x.gin_command_line import OWN_MACROS
from palm_t5x.gin_files import leaves

_Reference = gin_config.ConfigurableReference


class Use(NamedTuple):
  """A configurable in the scope it would be called in.

  Attributes:
    scope: names of the active scopes, outermost first.
    configurable: gin's record of it.
    called: whether the configuration itself calls it, `@f()`, rather than naming it.
    bindings: parameter to value, as a call in this scope would get them.
  """

  scope: tuple[str, ...]
  configurable: Any
  called: bool
  bindings: dict[str, Any]

  @property
  def name(self) -> str:
    """Scope and the last two parts of the selector."""
    short = '.'.join(self.configurable.selector.split('.')[-2:])
    return '/'.join([*self.scope, short])


class Reached:
  """All that a call of an entry function would read from gin.

  Attributes:
    uses: every configurable reached, in the order in which it was found.
    config: gin's configuration, restricted to what was reached.
    missing_macros: macros that are used and have no value, with one user of each.
  """

  def __init__(self, entry: Any):
    """Follows references from the gin Configurable of the mode's function."""
    self.uses: list[Use] = []
    self.config: dict[tuple[str, str], dict[str, Any]] = {}
    self.missing_macros: dict[str, str] = {}
    self._seen: set[tuple] = set()
    self._visit((), entry, called=True)
    for name in OWN_MACROS:
      self._visit((name,), gin_config._REGISTRY['gin.macro'], called=True)

  def _visit(self, scope: tuple[str, ...], configurable: Any, called: bool) -> None:
    key = (scope, configurable.selector, called)
    if key in self._seen:
      return
    self._seen.add(key)
    bindings: dict[str, Any] = {}
    for depth in range(len(scope) + 1):
      place = ('/'.join(scope[:depth]), configurable.selector)
      if place in gin_config._CONFIG:
        self.config[place] = gin_config._CONFIG[place]
        bindings.update(gin_config._CONFIG[place])
    use = Use(scope, configurable, called, bindings)
    if not _is_macro(configurable):
      self.uses.append(use)
    for parameter, value in bindings.items():
      for reference in leaves(value, (_Reference,)):
        self._follow(use, parameter, reference)
    self._visit_methods(scope, configurable)

  def _follow(self, use: Use, parameter: str, reference: Any) -> None:
    """Goes on into one reference."""
    scope = tuple(reference.scopes) or use.scope
    if _is_macro(reference.configurable):
      name = '/'.join(reference.scopes)
      value = gin_config._CONFIG.get((name, 'gin.macro'), {}).get('value', gin.REQUIRED)
      if _is_required(value):
        user = '%' + use.scope[-1] if _is_macro(use.configurable) else ''
        self.missing_macros.setdefault(name, user or f'{use.name}.{parameter}')
    if not _is_constant(reference.configurable):
      self._visit(scope, reference.configurable, reference.evaluate)

  def _visit_methods(self, scope: tuple[str, ...], configurable: Any) -> None:
    """Bindings of a class's methods count as reached with the class."""
    if inspect.isclass(configurable.wrapped):
      prefix = configurable.selector + '.'
      for selector, method in list(gin_config._REGISTRY.items()):
        if selector.startswith(prefix) and method.is_method:
          self._visit(scope, method, called=False)

  def missing_arguments(self) -> Iterator[str]:
    """`function.parameter` for each argument a call would lack."""
    for use in self.uses:
      for name, value in use.bindings.items():
        if _is_required(value):
          yield f'{use.name}.{name}'
      if use.called:
        for parameter in _signature(use.configurable.wrapped):
          required = parameter.default is parameter.empty or (
            parameter.default is gin.REQUIRED
          )
          if required and parameter.name not in use.bindings:
            yield f'{use.name}.{parameter.name}'

  def check(self, mode: str) -> None:
    """Raises for all that is missing, refused or of a wrong type.

    Args:
      mode: what to call the command in messages.

    Raises:
      UserError: one line naming everything.
    """
    for use in self.uses:
      refusal = getattr(use.configurable.wrapped, 'gin_refusal', None)
      if refusal:
        raise UserError(refusal)
    lacks = [f'{name} (for {user})' for name, user in self.missing_macros.items()]
    lacks += list(dict.fromkeys(self.missing_arguments()))
    if lacks:
      first = next(iter(self.missing_macros), None) or lacks[0]
      raise UserError(
        f'{mode} needs values for: {", ".join(lacks)}. '
        f'Bind each in a Gin file or as {_example(first)}.'
      )
    for use in self.uses:
      for name, value in use.bindings.items():
        _check_scalar(use, name, value)

  def text(self) -> str:
    """The reached configuration as a Gin file that says the same."""
    return gin_config._config_str(self.config)


def settings(entry: str = '') -> tuple[dict[str, str], dict[str, str]]:
  """What the configuration sets, as text: for comparing two of them.

  Args:
    entry: the function whose settings count, as 'palm_t5x.train.train'; all if it is
      '' or not configured.

  Returns:
    ({'scope/module.function.parameter': value}, macros followed, and for those whose
    value comes from a macro {the same key: the macro's name}).
  """
  config = gin_config._CONFIG
  for _, configurable in list(gin_config._REGISTRY.items()) if entry else ():
    wrapped = configurable.wrapped
    if f'{wrapped.__module__}.{getattr(wrapped, "__qualname__", "")}' == entry:
      config = Reached(configurable).config
  values, macros = {}, {}
  for (scope, selector), bindings in config.items():
    short = '.'.join(selector.split('.')[-2:])
    for parameter, value in bindings.items() if selector != 'gin.macro' else ():
      name = f'{scope}/{short}.{parameter}' if scope else f'{short}.{parameter}'
      value, macro = _literal(value)
      values[name] = repr(value)
      if macro:
        macros[name] = macro
  return values, macros


def _example(name: str) -> str:
  """A command-line flag that would mend a missing name."""
  if name == 'MODEL':
    return '--gin_file=models/palm_8b.gin'
  values = {'MODEL_DIR': 'runs/my_run', 'TASK_FEATURE_LENGTHS': '"{\'targets\': 256}"'}
  return f'--gin.{name}={values.get(name, "...")}'


def _is_macro(configurable: Any) -> bool:
  return configurable.wrapped is gin_config.macro


def _is_constant(configurable: Any) -> bool:
  return configurable.wrapped is gin_config._retrieve_constant


def _is_required(value: Any) -> bool:
  """Whether a value is REQUIRED, or `%gin.REQUIRED` in a file."""
  if isinstance(value, _Reference) and _is_constant(value.configurable):
    value = gin_config._CONSTANTS.get('/'.join(value.scopes))
  return value is gin.REQUIRED


def _signature(function: Any) -> list[inspect.Parameter]:
  """Parameters that a call must or may fill; [] if Python cannot tell."""
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return []
  kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  return [p for p in parameters if p.kind not in kinds]


def _literal(value: Any) -> tuple[Any, str]:
  """A value after following macros, and the last macro's name ('' without one)."""
  macro = ''
  for _ in range(20):
    if not (isinstance(value, _Reference) and _is_macro(value.configurable)):
      break
    macro = '/'.join(value.scopes)
    value = gin_config._CONFIG.get((macro, 'gin.macro'), {}).get('value')
  return value, macro


def _check_scalar(use: Use, name: str, value: Any) -> None:
  """Refuses text, or a fraction, where the signature wants a number or a truth value.

  Only plain annotations are judged (int, float, bool and each with None): a value that
  the command line took for text is the usual mistake.
  """
  annotation = next(
    (p.annotation for p in _signature(use.configurable.wrapped) if p.name == name), None
  )
  if isinstance(annotation, str):
    plain = {'int': int, 'float': float, 'bool': bool}
    parts = [part.strip() for part in annotation.split('|')]
    kinds = [plain.get(part, part) for part in parts]
  else:
    kinds = typing.get_args(annotation) or (annotation,)
  kinds = [kind for kind in kinds if kind not in (type(None), 'None')]
  value, macro = _literal(value)
  scalar = bool(kinds) and all(kind in (int, float, bool) for kind in kinds)
  wrong_text = isinstance(value, str) and scalar
  wrong_fraction = isinstance(value, float) and kinds == [int]
  if wrong_text or wrong_fraction:
    words = {int: 'a whole number', float: 'a number', bool: 'True or False'}
    wanted = words[float if float in kinds else kinds[0]]
    source = f'{macro}={value!r}' if macro else repr(value)
    raise UserError(f'{use.name}.{name} takes {wanted}, not {source}.')

"""`--gin.NAME=VALUE`: names as Gin files write them, values quoted where a shell ate
the quotes, and typos caught before anything slow is imported.
"""

import io
import re
import tokenize
from collections.abc import Sequence
from typing import Any, NamedTuple

from gin import config_parser

from palm_t5x import gin_files
from palm_t5x.errors import UserError

# Macros the command itself reads: legal on the command line whatever the files say.
OWN_MACROS = ('NPROC', 'CACHE_DIR', 'CORPUS_DIR', 'DATA_DIR', 'HEARTBEAT_TIMEOUT')

_NAME = re.compile(r'^(?:[A-Za-z_]\w*/)*[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*$')
_STATEMENT = re.compile(r'^\s*(import|from|include)\s')
_KEYWORDS = {'true': 'True', 'false': 'False', 'none': 'None', 'null': 'None'}


class Binding(NamedTuple):
  """One binding of the command line.

  Attributes:
    scope: what is before the last slash, or ''.
    selector: the configurable, by any name a Gin file may use; a macro's name.
    arg_name: the parameter; '' for a macro.
    text: the value as Gin text.
  """

  scope: str
  selector: str
  arg_name: str
  text: str

  @property
  def name(self) -> str:
    """As on the command line."""
    scoped = f'{self.scope}/{self.selector}' if self.scope else self.selector
    return f'{scoped}.{self.arg_name}' if self.arg_name else scoped


def parse_value(text: str, delegate: config_parser.ParserDelegate) -> Any:
  """A Gin value that is the whole of `text`.

  Raises:
    SyntaxError, tokenize.TokenError or ValueError: if it is not one.
  """
  parser = config_parser.ConfigParser(io.StringIO(text), delegate)
  value = parser.parse_value()
  if parser.current_token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
    raise SyntaxError(f'text after the value: {parser.current_token.string}')
  return value


def quote(text: str, name: str = 'NAME') -> str:
  """Gin text for a value from a shell: Gin values as they are, other text as a string.

  `runs/m`, `py_lm`, `gs://b/*.txt` and `train[:1%]` are strings; `5`, `(1, 2)`,
  `{'targets': 8}`, `@f()`, `%M`, `None` and `'text'` are what Gin makes of them.

  Raises:
    UserError: for text that starts or ends like a Gin value and is not one.
  """
  text = text.strip()
  if not text:
    raise UserError(
      f'--gin.{name}= has no value; an empty string is --gin.{name}="\'\'".'
    )
  try:
    parse_value(text, gin_files.NamesOnly())
    return text
  except gin_files.SYNTAX_ERRORS as error:
    if text[0] in '([{@%\'"' or text[-1] in '\'"':
      raise UserError(
        f'--gin.{name}={text}: this is no Gin value (unbalanced quotes or brackets, or '
        f'text without quotes inside brackets). Write for example --gin.{name}="'
        f'{_example(text)}".'
      ) from error
  if text.lower() in _KEYWORDS:
    right = _KEYWORDS[text.lower()]
    raise UserError(
      f'--gin.{name}={text}: write {right}, or "\'{text}\'" for the text.'
    )
  return repr(text)


def _example(text: str) -> str:
  """A well-formed value of the kind that `text` tried to be."""
  examples = {'(': "('a', 1)", '[': "['a', 'b']", '{': "{'targets': 256}"}
  examples |= {'@': '@adafactor.Adafactor()', '%': '%MODEL'}
  return examples.get(text[0]) or repr(text.strip('\'"'))


def parse_binding(text: str) -> Binding:
  """`NAME=VALUE` as a Binding.

  Raises:
    UserError: if there is no `=`, or the name cannot be one.
  """
  name, equals, value = text.partition('=')
  name = name.strip()
  if not equals:
    raise UserError(
      f"--gin.{name} has no value: Gin bindings are --gin.NAME=VALUE, with the '='."
    )
  if not _NAME.match(name):
    raise UserError(
      f'--gin.{name}: {name!r} is no name for a binding. Write --gin.MACRO=..., '
      '--gin.module.Class.parameter=... or --gin.scope/module.Class.parameter=...'
    )
  scope, selector, arg_name = config_parser.parse_binding_key(name)
  return Binding(scope, selector, arg_name, quote(value, name))


def parse_bindings(texts: Sequence[str]) -> tuple[list[str], list[Binding]]:
  """Splits `--gin_bindings` into Gin statements (imports, includes) and bindings."""
  statements = [t for t in texts if _STATEMENT.match(t)]
  return statements, [parse_binding(t) for t in texts if not _STATEMENT.match(t)]


def rewrite_gin_args(args: Sequence[str]) -> list[str]:
  """`--gin.NAME=VALUE` to `--gin_bindings=NAME = VALUE` (T5X's gin_utils)."""
  rewritten = []
  for arg in args:
    prefix = next((p for p in ('--gin.', '-gin.') if arg.startswith(p)), None)
    if prefix:
      binding = parse_binding(arg[len(prefix) :])
      arg = f'--gin_bindings={binding.name} = {binding.text}'
    rewritten.append(arg)
  return rewritten


def check_names(bindings: Sequence[Binding], scan: gin_files.Scan) -> None:
  """Refuses macros and scopes of the command line that no Gin file knows.

  A name counts as known if any file defines or refers to it, or another binding of the
  command line refers to it. (Parameters are checked where they are bound.)

  Raises:
    UserError: naming the near ones.
  """
  uses = gin_files.Scan()
  for binding in bindings:
    value = parse_value(binding.text, gin_files.NamesOnly())
    uses.add('', '', 'value', value)
  macros = {*scan.macros, *scan.macro_uses, *uses.macro_uses, *OWN_MACROS}
  scopes = {*scan.scopes, *uses.scopes, *macros}
  for binding in bindings:
    if not binding.arg_name:
      if binding.name not in macros:
        raise UserError(
          f'--gin.{binding.name}: no Gin file of this run defines or uses '
          f'{binding.name}.{gin_files.did_you_mean(binding.name, macros)}'
        )
      continue
    for scope in binding.scope.split('/') if binding.scope else ():
      if scope not in scopes:
        raise UserError(
          f'--gin.{binding.name}: no Gin file of this run has a scope {scope!r}.'
          f'{gin_files.did_you_mean(scope, scan.scopes)}'
        )

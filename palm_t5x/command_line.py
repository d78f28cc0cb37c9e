"""The command line of `t5x`: flags as a table, parsing, and help.

T5X's flags are here with T5X's names, so that its launch scripts work; everything else
is Gin. Nothing heavy is imported: help answers at once.
"""

import argparse
import os
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from palm_t5x import environment
from palm_t5x.errors import UserError
from palm_t5x.modes import MODES


class Flag(NamedTuple):
  """One flag.

  Attributes:
    name: without dashes.
    kind: str, int, bool (a switch), list (comma separated) or 'many' (repeatable).
    help: one line; '' for flags that are accepted and do nothing here.
    modes: modes that take it; () is all.
    binds: parameter of the mode's function that it sets, if any.
  """

  name: str
  kind: Any
  help: str
  modes: tuple[str, ...] = ()
  binds: str | None = None


# Modes whose work several machines can share.
SHARDED = ('infer', 'cache', 'corpus', 'vocab')

FLAGS = (
  Flag('gin_file', 'many', 'Gin file; repeat it, later ones win'),
  Flag('gin_bindings', 'many', "a line of Gin, as --gin_bindings='NAME = VALUE'"),
  Flag('gin_search_paths', list, "folders to find Gin files in (default '.')"),
  Flag('dry_run', bool, 'print the configuration this mode would use; build nothing'),
  Flag('run_mode', str, '--run_mode=MODE is another way to write MODE'),
  Flag('data_dir', str, 'folder of datasets in their original formats (DATA_DIR)'),
  Flag('tfds_data_dir', str, 'folder of TensorFlow Datasets, for tasks that use them'),
  Flag('seqio_additional_cache_dirs', list, "folders of SeqIO's own task caches"),
  Flag(
    'skip_batches',
    'many',
    'a:b: batches never to train on, as numbers of the unskipped run; repeat it',
    ('train',),
    'skip_batches',
  ),
  Flag('shard_id', int, 'which shard to do, from 0', SHARDED, 'shard_id'),
  Flag('num_shards', int, 'into how many shards it is split', SHARDED, 'num_shards'),
  Flag('verify', bool, 'check what was built instead', ('cache',), 'verify'),
  Flag('report', bool, 'the facts about finished sub-corpora', ('corpus',), 'report'),
  Flag('show', str, 'the task or mixture to show in full', ('tasks',), 'names'),
  Flag('search', bool, 'try ways to compile, rank them', ('precompile',), 'search'),
  Flag('coordinator_address', str, 'host:port of process 0, for several processes'),
  Flag('process_count', int, 'how many processes there are'),
  Flag('process_index', int, 'which of them this one is, from 0'),
  Flag('initialization_timeout', int, 'seconds to wait for the other processes'),
  Flag('multiprocess_gpu', bool, 'join the other processes (implied by the above)'),
  Flag('verbosity', int, 'log level of libraries: 0 is info, 1 debug; also -v'),
  Flag('logtostderr', bool, ''),
  Flag('alsologtostderr', bool, ''),
  Flag('showprefixforinfo', bool, ''),
  Flag('stderrthreshold', str, ''),
  Flag('log_dir', str, ''),
)

_SWITCHES = {flag.name for flag in FLAGS if flag.kind is bool}


class Options(NamedTuple):
  """A parsed command line.

  Attributes:
    mode: a name in MODES, or '' if none was given.
    help: whether help was asked for.
    values: flag name to value; flags not given are absent.
    gin: `NAME=VALUE` texts of `--gin.NAME=VALUE` and `--gin_bindings`, in order.
    jax: jax's own flags, name to text.
    words: other words after the mode.
  """

  mode: str
  help: bool
  values: dict[str, Any]
  gin: list[str]
  jax: dict[str, str]
  words: list[str]


class _Parser(argparse.ArgumentParser):
  """argparse that raises our error instead of leaving."""

  def error(self, message):
    raise UserError(f'{message}. See t5x --help.')


def _parser() -> _Parser:
  """Every flag of the table, for argparse."""
  parser = _Parser(prog='t5x', add_help=False, allow_abbrev=False)
  parser.add_argument('--help', '-h', action='store_true')
  for flag in FLAGS:
    names = [f'--{flag.name}']
    if flag.name == 'verbosity':
      names += ['-v', '--v']
    how: dict[str, Any] = {'default': argparse.SUPPRESS, 'dest': flag.name}
    if flag.kind is bool:
      how |= {'nargs': '?', 'const': True, 'type': _truth}
    elif flag.kind is list:
      how['type'] = lambda text: [part for part in text.split(',') if part]
    elif flag.kind == 'many':
      how['action'] = 'append'
    else:
      how['type'] = flag.kind
    parser.add_argument(*names, **how)
  return parser


def _truth(text: str) -> bool:
  """A switch's value."""
  if text.lower() in ('true', 't', '1', 'yes', 'y'):
    return True
  if text.lower() in ('false', 'f', '0', 'no', 'n'):
    return False
  raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')


def parse(args: Sequence[str]) -> Options:
  """Parses the words after `t5x`.

  Raises:
    UserError: for unknown modes and flags, with the near ones, and for bad values.
  """
  args, after = list(args), []
  if '--' in args:
    cut = args.index('--')
    args, after = args[:cut], args[cut + 1 :]
  rest, gin, jax = _split(args)
  known, extra = _parser().parse_known_args(rest)
  values = vars(known)
  for text in extra:
    if text.startswith('-') and text != '-':
      raise UserError(_unknown_flag(text))
  words = extra + after
  gin += values.pop('gin_bindings', [])
  asked = values.pop('help')
  if not asked and words[:1] == ['help']:
    asked, words = True, words[1:]
  mode = values.pop('run_mode', None)
  if mode is None and words:
    mode, words = words[0], words[1:]
  if mode and mode not in MODES:
    raise UserError(_unknown_mode(mode))
  _check_mode(mode, values, words)
  return Options(mode or '', asked, values, gin, jax, words)


def _split(args: list[str]) -> tuple[list[str], list[str], dict[str, str]]:
  """Takes `--gin.X=Y` and `--jax_x=y` out; the rest gets two dashes, as absl allows."""
  rest: list[str] = []
  gin: list[str] = []
  jax: dict[str, str] = {}
  waiting = list(args)
  while waiting:
    arg = waiting.pop(0)
    if re.match(r'^-[A-Za-z]\w', arg):
      arg = '-' + arg
    if arg.startswith('--gin.'):
      gin.append(arg.removeprefix('--gin.'))
    elif arg == '--gin_bindings' and waiting:
      gin.append(waiting.pop(0))
    elif arg.startswith('--gin_bindings='):
      gin.append(arg.partition('=')[2])
    elif arg.startswith('--jax_') or arg.startswith('--nojax_'):
      name, equals, value = arg.lstrip('-').partition('=')
      if name.startswith('no'):
        name, value = name[2:], 'false'
      elif not equals:
        bare = waiting and not waiting[0].startswith('-') and waiting[0] not in MODES
        value = waiting.pop(0) if bare else 'true'
      jax[name] = value
    elif arg.startswith('--no') and arg[4:] in _SWITCHES:
      rest.append(f'--{arg[4:]}=false')
    elif arg.lstrip('-') in _SWITCHES and arg.startswith('--'):
      rest.append(arg + '=true')  # A switch never takes the next word.
    else:
      rest.append(arg)
  return rest, gin, jax


def _near(name: str, names: Sequence[str]) -> str:
  """' Did you mean ...?', imported late: it is slow to load and seldom needed."""
  from palm_t5x.gin_files import did_you_mean

  return did_you_mean(name, names)


def _unknown_flag(text: str) -> str:
  """The message for a flag that does not exist."""
  name = text.lstrip('-').partition('=')[0]
  if name.startswith('fdl_'):
    return f'--{name}: Fiddle configurations are not supported; use --gin_file.'
  hint = _near(f'--{name}', [f'--{flag.name}' for flag in FLAGS])
  if '_' in name or not hint:
    # The name of a macro, in small letters, may look like a flag too.
    hint += (
      f' Settings are bound through Gin, as --gin.{name.upper()}=...; see t5x --help.'
    )
  return f'unknown flag --{name}.{hint}'


def _unknown_mode(mode: str) -> str:
  """The message for a mode that does not exist."""
  if mode.endswith('.gin'):
    return f'{mode!r} is no mode: did you mean --gin_file={mode}? Write t5x MODE first.'
  return f'unknown mode {mode!r}.{_near(mode, list(MODES))} Modes: {", ".join(MODES)}.'


def _check_mode(mode: str | None, values: dict[str, Any], words: list[str]) -> None:
  """Refuses flags and words that the mode does not take."""
  for flag in FLAGS:
    if mode and flag.name in values and flag.modes and mode not in flag.modes:
      modes = ' and '.join(f't5x {m}' for m in flag.modes)
      raise UserError(f't5x {mode} has no --{flag.name}: it belongs to {modes}.')
  if mode and words and not MODES[mode].reads:
    word = words[0]
    hint = f' Did you mean --gin_file={word}?' if word.endswith('.gin') else ''
    raise UserError(f't5x {mode} takes no further words, but got {word!r}.{hint}')


def help_text(mode: str = '') -> str:
  """What `t5x --help` or `t5x MODE --help` prints."""
  return _mode_help(mode) if mode else _general_help()


def _general_help() -> str:
  width = max(len(name) for name in MODES)
  modes = '\n'.join(
    f'  {name:<{width}}  {mode.summary}' for name, mode in MODES.items()
  )
  examples = '\n'.join(
    f'  t5x {name} {MODES[name].example}'.rstrip() for name in MODES if name != 'infer'
  )
  return f"""Trains, evaluates and samples PaLM models, configured by Gin files.

usage: t5x MODE --gin_file=FILE.gin [--gin.NAME=VALUE ...] [flags]

Modes (t5x MODE --help says more):
{modes}

Examples:
{examples}

Anything a Gin file sets can be set on the command line, without quotes for text:
  --gin.TRAIN_STEPS=1000                       a macro
  --gin.train.eval_period=50                   a parameter
  --gin.train/utils.DatasetConfig.seed=7       a parameter in a scope

{_flags_help([flag for flag in FLAGS if flag.help])}
jax's own flags (--jax_...=...) are passed on.
"""


def _mode_help(name: str) -> str:
  mode = MODES[name]
  words = f' [{mode.reads.upper()}]' if mode.reads else ''
  flags = [f for f in FLAGS if f.help and (not f.modes or name in f.modes)]
  return f"""t5x {name}: {mode.summary}.

usage: t5x {name} --gin_file=FILE.gin [--gin.NAME=VALUE ...] [flags]{words}

Example:
  t5x {name} {mode.example}

{_macros_help(mode.gin)}{_flags_help(flags)}"""


def _flags_help(flags: Sequence[Flag]) -> str:
  """Flags as two columns."""
  rows = []
  for flag in flags:
    metavar = {int: '=N', str: '=TEXT', list: '=A,B', 'many': '=TEXT'}.get(
      flag.kind, ''
    )
    only = f' ({", ".join(flag.modes)} only)' if flag.modes else ''
    rows.append((f'--{flag.name}{metavar}', flag.help + only))
  return 'Flags:\n' + _columns(rows)


def _columns(rows: Sequence[tuple[str, str]]) -> str:
  """Two columns, the second wrapped at 88 characters in all."""
  width = min(34, max((len(left) for left, _ in rows), default=0))
  lines = []
  for left, right in rows:
    head = f'  {left:<{width}}  '
    start = '' if len(left) <= width else f'  {left}\n'
    head = head if not start else ' ' * (width + 4)
    lines.append(
      start
      + textwrap.fill(
        right,
        88,
        initial_indent=head,
        subsequent_indent=' ' * (width + 4),
        break_on_hyphens=False,
      )
    )
  return '\n'.join(line.rstrip() for line in lines) + '\n'


_MACRO = re.compile(r'^([A-Z][A-Z0-9_]*) = (.+?)(?:\s{2,}# (.*))?$')


def _macros_help(gin_file: str) -> str:
  """The macros a Gin file of ours sets, with its own comments as explanations."""
  path = os.path.join(environment.package_gin_dir(), gin_file)
  with open(path, encoding='utf-8') as f:
    found = [m.groups() for m in map(_MACRO.match, f.read().splitlines()) if m]
  rows = []
  for name, value, comment in found:
    value = 'required' if value == '%gin.REQUIRED' else value
    rows.append((f'{name} = {value}', comment or ''))
  return f'Macros (from {gin_file}):\n{_columns(rows)}\n' if rows else ''

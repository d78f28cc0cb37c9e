"""The `t5x` command: flags, environment, Gin, then one mode.

The order matters. A look at the Gin files as text comes first: it finds typos in a
fraction of a second, and the settings that jax reads only once, when it is imported.
Then the files are run, which imports what they name; then the whole configuration is
checked; only then is anything built.
"""

import atexit
import errno
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from palm_t5x import (
  command_line,
  environment,
  joining,
  peers,
  places,
  processes,
  quiet_imports,
)
from palm_t5x.errors import Failure, UserError
from palm_t5x.modes import MODES, load

# What the system says when it, and not the program, is at fault.
_WORLD = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
  *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
)

# Seconds that threads of libraries get to finish when the command is done.
_PATIENCE = 10.0


def run() -> None:
  """Entry point of the console script: runs the command and leaves the process."""
  try:
    code = main(sys.argv[1:])
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 1
  except BaseException:
    traceback.print_exc()
    code = 1
  _leave(code)


def main(args: Sequence[str]) -> int:
  """Runs `t5x ARGS` in this process.

  Returns:
    The exit code: 0 done, 1 failed, 2 a mistake in what was asked for, 130 interrupted.
  """
  try:
    options = command_line.parse(args)
    if options.help:
      print(command_line.help_text(options.mode))
    else:
      _run_mode(options)
    return 0
  except (UserError, Failure) as error:
    _say(f'error: {_one_line(error)}')
    return error.exit_code
  except BrokenPipeError:
    return 0
  except OSError as error:
    if error.errno not in _WORLD:
      raise
    place = f' ({error.filename})' if error.filename else ''
    _say(f'error: {error.strerror}{place}. Files written earlier are as they were.')
    return 1
  except KeyboardInterrupt:
    _say('interrupted.')
    return 130
  finally:
    _flush()


def _run_mode(options: command_line.Options) -> None:
  """Configures and runs one mode."""
  if not options.mode:
    raise UserError(
      f'name a mode: t5x MODE, one of {", ".join(MODES)}. See t5x --help.'
    )
  entry, reached = configure(options)
  if options.values.get('dry_run'):
    print(f'# What t5x {options.mode} would use. Nothing was built.\n{reached.text()}')
    return
  import gin

  joining.join(options.values, _heartbeat(), MODES[options.mode].computes)
  with processes.together():
    if processes.count() > 1:
      if processes.index():
        logging.getLogger('palm_t5x').setLevel(logging.WARNING)
      facts = peers.facts(reached.config, options.jax)
      processes.agree('configuration', facts, peers.REMEDY)
    gin.get_configurable(entry)()


def _heartbeat() -> int:
  """The macro HEARTBEAT_TIMEOUT, checked."""
  import gin

  try:
    value = gin.query_parameter('%HEARTBEAT_TIMEOUT')
  except ValueError:  # no file of this run sets it
    value = None
  return joining.heartbeat_timeout(value)


def configure(options: command_line.Options) -> tuple[Any, Any]:
  """Reads and checks the configuration of a mode; builds nothing.

  Returns:
    The mode's function, and what of the configuration a call of it reaches.

  Raises:
    UserError: for anything wrong with it, all that is missing at once.
  """
  from palm_t5x import gin_command_line, gin_files

  mode = MODES[options.mode]
  search = gin_files.SearchPath(tuple(options.values.get('gin_search_paths') or ('.',)))
  files = [*mode.files, *options.values.get('gin_file', ())]
  if not files:
    raise UserError(
      f't5x {options.mode} needs a configuration: --gin_file=FILE.gin. For example: '
      f't5x {options.mode} {mode.example}'
    )
  statements, bindings = gin_command_line.parse_bindings(options.gin)
  if 'data_dir' in options.values:
    text = repr(options.values['data_dir'])
    bindings.append(gin_command_line.Binding('', 'DATA_DIR', '', text))
  scan = gin_files.scan(files, search)
  _scan_statements(statements, scan, search)
  gin_command_line.check_names(bindings, scan)
  for binding in bindings:
    value = gin_command_line.parse_value(binding.text, gin_files.NamesOnly())
    scan.add(binding.scope, binding.selector, binding.arg_name, value)

  quiet_imports.install()
  environment.prepare(_nproc(scan), scan.value('CACHE_DIR'), options.jax)
  corpora = os.path.join(environment.cache_dir(scan.value('CACHE_DIR')), 'corpus')
  places.use(scan.value('DATA_DIR'), scan.value('CORPUS_DIR') or corpora)
  if mode.compiles_only:
    environment.compile_only(scan.value('TOPOLOGY'), scan.value('NUM_SLICES'))
  _configure_logging(options.values.get('verbosity'))
  return _load(options, files, statements, bindings, search, scan)


def _load(options, files, statements, bindings, search, scan) -> tuple[Any, Any]:
  """The slow half of `configure`: imports what the files name, and checks it all."""
  import gin

  from palm_t5x import gin_check, gin_loader, t5x_alias

  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # A user's own task modules lie there.
  t5x_alias.install()
  gin.clear_config()
  entry = load(options.mode)
  loader = gin_loader.load(files, statements, bindings, search, scan.texts)
  _apply_flags(options)
  configurable = loader.register(entry)
  _bind_flags(options, configurable)
  if loader.dropped:
    _say(f'note: T5X parameters with no meaning here: {", ".join(loader.dropped)}')
  for note in loader.notes:
    _say(f'note: {note}')
  reached = gin_check.Reached(configurable)
  reached.check(f't5x {options.mode}')
  return entry, reached


def _scan_statements(statements: list[str], scan: Any, search: Any) -> None:
  """Adds what `--gin_bindings='include ...'` brings in to the names known."""
  from gin import config_parser

  from palm_t5x import gin_files

  for statement in gin_files.parse(
    '\n'.join(statements) + '\n', '--gin_bindings', gin_files.NamesOnly()
  ):
    if isinstance(statement, config_parser.IncludeStatement):
      more = gin_files.scan([statement.filename], search)
      scan.texts.update(more.texts)
      scan.macros.update(more.macros)
      scan.macro_uses.update(more.macro_uses)
      scan.scopes.update(more.scopes)


def _nproc(scan: Any) -> int | None:
  """The macro NPROC, checked.

  Raises:
    UserError: if it is neither None nor a whole number above zero.
  """
  value = scan.value('NPROC')
  if value is not None and (type(value) is not int or value < 1):
    raise UserError(f'NPROC={value!r}: it is a number of threads, 1 or more, or None.')
  return value


def _configure_logging(verbosity: int | None) -> None:
  """Our own messages as single lines; libraries' only where they are errors.

  Args:
    verbosity: absl's level (flag -v); with it libraries say more too.
  """
  ours = logging.getLogger('palm_t5x')
  if not any(isinstance(handler, _LineHandler) for handler in ours.handlers):
    ours.addHandler(_LineHandler())
  ours.setLevel(logging.INFO)
  ours.propagate = False  # a library may have given the root logger a handler
  if verbosity is None:
    logging.getLogger('absl').setLevel(logging.ERROR)
    return
  from absl import logging as absl_logging

  absl_logging.set_verbosity(verbosity)
  absl_logging.use_absl_handler()


class _LineHandler(logging.Handler):
  """`t5x: warning: ...` for a warning, `t5x: ...` for information."""

  def emit(self, record: logging.LogRecord) -> None:
    level = record.levelname.lower()
    prefix = '' if record.levelno <= logging.INFO else f'{level}: '
    _say(prefix + _one_line(record.getMessage()))


def _apply_flags(options: command_line.Options) -> None:
  """Flags that belong to libraries."""
  if options.jax:
    unknown = environment.unknown_jax_flags(options.jax)
    if unknown:
      raise UserError(f'jax has no flag --{unknown[0]}. See jax.config in its manual.')
  if 'tfds_data_dir' in options.values:
    import seqio

    seqio.set_tfds_data_dir_override(options.values['tfds_data_dir'])
  if 'seqio_additional_cache_dirs' in options.values:
    import seqio

    seqio.add_global_cache_dirs(options.values['seqio_additional_cache_dirs'])


def _bind_flags(options: command_line.Options, configurable: Any) -> None:
  """Flags and words that set a parameter of the mode's function."""
  import gin

  given = {
    flag.binds: options.values[flag.name]
    for flag in command_line.FLAGS
    if flag.binds and flag.name in options.values
  }
  mode = MODES[options.mode]
  if mode.reads and options.words:
    given[mode.reads] = options.words if mode.reads_many else ' '.join(options.words)
  for name, value in given.items():
    gin.bind_parameter(f'{configurable.selector}.{name}', value)


def _one_line(error: BaseException) -> str:
  """The message without the call stack that gin appends to it."""
  text = str(error).partition('\n  In call to configurable')[0]
  return ' '.join(text.split())


def _flush() -> None:
  """Writes out stdout; a reader that has gone, such as `head`, is no failure."""
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
  """One line to the user, apart from what the mode prints."""
  print(f't5x: {text}', file=sys.stderr, flush=True)


def _leave(code: int) -> None:
  """Ends the process with `code`, whatever threads of libraries still do.

  Python's own way out destroys tf.data iterators while their Python generators wait for
  the interpreter, and then never ends. Everything worth keeping is on disk by now; the
  exit handlers still run, for a bounded time.
  """
  watchdog = threading.Timer(_PATIENCE, os._exit, [code])
  watchdog.daemon = True
  watchdog.start()
  if code:
    processes.close(code)
  try:
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
  except BaseException:
    traceback.print_exc()
  finally:
    processes.close(code)
    os._exit(code)

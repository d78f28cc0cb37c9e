"""Gin helpers under the names that T5X gives them in `t5x.gin_utils`.

`sum_fn`, `bool_fn` and `string_split_fn` are for use inside Gin files;
`summarize_gin_config` is what `train` and `evaluate` call to leave config.gin behind.
`did_you_mean` and `parse_gin_flags` serve code that reads names or files itself.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import gin

from palm_t5x import gin_command_line, gin_loader
from palm_t5x import gin_files as _files  # T5X has an argument called gin_files.
from palm_t5x.errors import Failure
from palm_t5x.gin_command_line import rewrite_gin_args
from palm_t5x.gin_files import did_you_mean

__all__ = [
  'bool_fn',
  'did_you_mean',
  'get_gin_config_str',
  'parse_gin_flags',
  'rewrite_gin_args',
  'string_split_fn',
  'sum_fn',
  'summarize_gin_config',
]


@gin.configurable
def get_gin_config_str() -> str:
  """The whole parsed configuration as Gin text (T5X's get_gin_config_str)."""
  return gin.config_str()


@gin.register
def summarize_gin_config(model_dir: str, summary_writer: Any, step: int) -> None:
  """Writes config.gin into a run's folder, and into TensorBoard (T5X's name).

  The file is replaced whole, so that a kill leaves the old one or the new one.

  Args:
    model_dir: the run's folder; made if missing.
    summary_writer: a clu metric writer, or None.
    step: the step to file the text under.

  Raises:
    Failure: if the folder cannot be written.
  """
  import jax

  if jax.process_index() != 0:
    return
  text = get_gin_config_str()
  path = os.path.join(model_dir, 'config.gin')
  try:
    if '://' in path:
      from etils import epath

      epath.Path(path).write_text(text)
    else:
      os.makedirs(model_dir, exist_ok=True)
      with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
      os.replace(path + '.tmp', path)
  except OSError as error:
    with contextlib.suppress(OSError):
      os.remove(path + '.tmp')
    raise Failure(
      f'Cannot write {path}: {error.strerror or error}. Make room or name another '
      'folder, then run the same command again.'
    ) from error
  if summary_writer is not None:
    summary_writer.write_texts(step, {'config': gin.markdown(text)})
    summary_writer.flush()


def parse_gin_flags(
  gin_search_paths: Sequence[str],
  gin_files: Sequence[str],
  gin_bindings: Sequence[str] = (),
) -> gin_loader.Loader:
  """Reads Gin files and bindings into gin, for notebooks and scripts (T5X's name).

  Args:
    gin_search_paths: folders to look in before the package's own.
    gin_files: files, later ones winning.
    gin_bindings: `NAME = VALUE` lines, as `--gin.NAME=VALUE` takes them.

  Returns:
    The loader, whose `dropped` lists the T5X parameters that were let go.

  Raises:
    UserError: as the command would.
  """
  search = _files.SearchPath(tuple(gin_search_paths) or ('.',))
  statements, bindings = gin_command_line.parse_bindings(gin_bindings)
  scan = _files.scan(gin_files, search)
  gin_command_line.check_names(bindings, scan)
  return gin_loader.load(gin_files, statements, bindings, search, scan.texts)


@gin.configurable
def sum_fn(var1=gin.REQUIRED, var2=gin.REQUIRED):
  """var1 + var2, for use inside Gin files."""
  return var1 + var2


@gin.configurable
def bool_fn(var1=gin.REQUIRED):
  """bool(var1), for use inside Gin files."""
  return bool(var1)


@gin.configurable
def string_split_fn(text=gin.REQUIRED, separator=gin.REQUIRED, maxsplit=-1, index=None):
  """text.split(separator, maxsplit), or one part of it, for use inside Gin files."""
  parts = text.split(separator, maxsplit)
  return parts if index is None else parts[index]

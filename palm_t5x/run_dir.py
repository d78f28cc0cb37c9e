"""MODEL_DIR: made, checked for writing, and described before any device work."""

import contextlib
import os
import pathlib
import tempfile
from typing import Any

import jax

from palm_t5x.checkpoints import param_count
from palm_t5x.errors import Failure, UserError


def prepare(path: str | os.PathLike, what: str = 'MODEL_DIR') -> str:
  """The absolute path of a run directory that exists and can be written.

  Raises:
    UserError: naming the path and what stops it.
  """
  text = os.fspath(path)
  if not text:
    raise UserError(f'{what} is empty: name a directory, such as runs/palm_tiny.')
  if '://' in text:
    raise UserError(
      f'{what}={text}: a run is written to a file system that every process sees, so '
      'far; mount the bucket and name its path. (Vocabularies and token stores may lie '
      'in a bucket.)'
    )
  folder = pathlib.Path(os.path.abspath(os.path.expanduser(text)))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    reason = 'it is a file' if folder.is_file() else e.strerror
    raise UserError(
      f'{what}={text} cannot be written ({reason}): name another with '
      f'--gin.{what}=PATH.'
    ) from None
  return str(folder)


def write_model_info(model_dir: str, params: Any, axes: Any, partitioner: Any):
  """Writes model-info.txt: every parameter with its shape, axes and mesh axes.

  Args:
    model_dir: the run directory.
    params: tree of arrays or ShapeDtypeStructs.
    axes: tree of logical-axis tuples of the same structure.
    partitioner: maps axes to the mesh.
  """
  if jax.process_index():
    return
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  names = jax.tree.structure(params).flatten_up_to(axes)
  lines = []
  for (path, leaf), logical in zip(leaves, names, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shape = ', '.join(f'{a}={n}' for a, n in zip(logical, leaf.shape, strict=True))
    size = param_count(leaf)
    lines.append(f'{name:48} {size:>16,}  ({shape})  {partitioner.spec(logical)}')
  lines.append(f'Total number of parameters: {param_count(params):,}')
  replace(pathlib.Path(model_dir) / 'model-info.txt', '\n'.join(lines) + '\n')


@contextlib.contextmanager
def writing(path: str | os.PathLike):
  """Turns an OSError inside the block into a Failure that names the file."""
  try:
    yield
  except OSError as e:
    raise Failure(
      f'Cannot write {os.fspath(path)}: {e.strerror or e}. Make room or name another '
      'folder, then run the same command again.'
    ) from e


def replace(path: str | os.PathLike, text: str):
  """Writes a small file whole, or leaves the old one."""
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  with writing(path):
    try:
      temporary.write_text(text)
      temporary.replace(path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise

"""What must be the same in every process of a run, as names and texts to compare."""

import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping
from typing import Any

REMEDY = (
  'Start all with the same Gin files, --gin bindings, code, versions and NPROC; only '
  'CACHE_DIR, CORPUS_DIR, DATA_DIR and VOCABULARY_PATH may differ.'
)
# Each host may have its own disks; what is read there is compared by its contents.
_PLACES = ('CACHE_DIR', 'CORPUS_DIR', 'DATA_DIR', 'VOCABULARY_PATH')


def facts(config: Mapping[tuple[str, str], Mapping[str, Any]], jax_flags) -> dict:
  """The configuration that a mode reads, code, versions, threads and jax's flags.

  Args:
    config: (scope, selector) -> parameter -> value: `gin_check.Reached.config`.
    jax_flags: `--jax_*` flags, name to text.
  """
  found = {}
  for (scope, selector), values in config.items():
    for parameter, value in values.items():
      if selector == 'gin.macro':
        name = scope
      else:
        short = '.'.join(selector.split('.')[-2:])
        name = f'{scope}/{short}.{parameter}' if scope else f'{short}.{parameter}'
      if name not in _PLACES:
        found[name] = repr(value)
  found |= {f'--{name}': text for name, text in jax_flags.items()}
  found['NPROC'] = os.environ.get('NPROC', 'None')
  found['the code of palm_t5x'] = _code()
  for package in ('jax', 'jaxlib'):
    found[f"{package}'s version"] = importlib.metadata.version(package)
  return found


def _code() -> str:
  """A hash of this package's source files."""
  root = pathlib.Path(__file__).parent
  digest = hashlib.blake2b(digest_size=6)
  for path in sorted(root.rglob('*.py')):
    digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
  return digest.hexdigest()

"""What made a checkpoint, and what differs when another setting goes on with it.

Bit-identical resumption needs the same mesh, thread count, library versions and machine
kind; a checkpoint therefore carries them, and a run that resumes under others is told.
"""

import importlib.metadata
import logging
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax

from palm_t5x import gin_utils
from palm_t5x.corpus.vocabulary import hash_of
from palm_t5x.errors import UserError
from palm_t5x.utils import describe_vocabulary

logger = logging.getLogger(__name__)

# Other values of these change results in the last bits, and nothing else.
_EXACTNESS = ('mesh', 'num_processes', 'nproc', 'platform', 'machine', 'versions')


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def describe(model: Any, partitioner: Any, seed: int) -> dict[str, Any]:
  """The part of a checkpoint's metadata that is the same for a whole run."""
  return {
    'format': 1,
    'vocabulary': hash_of(model.output_vocabulary),
    'seed': seed,
    'mesh': {name: int(size) for name, size in partitioner.mesh.shape.items()},
    'num_processes': jax.process_count(),
    'nproc': os.environ.get('NPROC', ''),
    'platform': jax.default_backend(),
    'machine': platform.machine(),
    'versions': {
      p: _version(p) for p in ('palm_t5x', 'jax', 'jaxlib', 'flax', 'optax')
    },
    'config': gin_utils.get_gin_config_str(),
  }


def check_vocabulary(stored: Mapping[str, Any], vocabulary: Any, where: Any):
  """Refuses a checkpoint that was trained with another vocabulary.

  Raises:
    UserError: naming both.
  """
  here = hash_of(vocabulary)
  if stored.get('vocabulary') not in (None, here):
    raise UserError(
      f'checkpoint {where} was trained with another vocabulary '
      f'({stored["vocabulary"]}, here {here}: {describe_vocabulary(vocabulary)}). '
      'Bind VOCABULARY_PATH to the one it was trained with (config.gin beside it).'
    )


def warn_differences(stored: Mapping[str, Any], current: Mapping[str, Any]):
  """Says once what will make the continuation differ from an uninterrupted run."""
  if stored.get('seed') != current['seed']:
    logger.warning(
      'RANDOM_SEED was %s and is now %s: the data order changes from here on.',
      stored.get('seed'),
      current['seed'],
    )
  changed = [
    f'{name} {stored[name]} -> {current[name]}'
    for name in _EXACTNESS
    if name in stored and stored[name] != current[name]
  ]
  if changed:
    logger.warning(
      'resuming under other conditions (%s): equal to rounding, not bit for bit.',
      '; '.join(changed),
    )

"""What made a checkpoint, and what differs when another setting goes on with it.

Bit-identical resumption needs the same mesh, thread count, library versions and machine
kind; a checkpoint therefore carries them, with the version of this code and every Gin
setting that trained it, and a run that resumes under others is told which.
"""

import importlib.metadata
import logging
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from palm_t5x import gin_check, gin_utils
from palm_t5x.corpus.vocabulary import hash_of
from palm_t5x.errors import UserError
from palm_t5x.utils import describe_vocabulary

logger = logging.getLogger(__name__)

# Other values of these change results in the last bits, and nothing else.
_EXACTNESS = ('mesh', 'num_processes', 'nproc', 'platform', 'machine', 'versions')

# Settings that change nothing of what is trained: how long, where to, what is shown.
_APART = re.compile(
  r'^(train_eval|infer_eval|sample)/|CheckpointConfig\.|SamplingConfig\.|Evaluator\.'
  r'|(^|\.)(model_dir|cache_dir|total_steps|relative_steps|stats_period|eval_\w+'
  r'|final_eval_steps|sample_prompts|sampling|skip_batches|run_eval_before_training'
  r'|summarize_config_fn|train_eval_dataset_cfg|infer_eval_dataset_cfg'
  r'|inference_evaluator_cls|actions|checkpoint_cfg)$'
)
_SHOWN = 5  # settings named in one message


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def _commit() -> str | None:
  """The git commit of this code, '-dirty' if files were changed; None if installed."""
  root = pathlib.Path(__file__).resolve().parent.parent
  if not (root / '.git').exists():
    return None
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  try:
    done = subprocess.run(
      command, cwd=root, capture_output=True, text=True, timeout=10, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip() or None


def code() -> dict[str, str | None]:
  """Version and, in a checkout, commit of the code that runs."""
  return {'version': _version('palm_t5x'), 'commit': _commit()}


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
    'code': code(),
    'config': gin_utils.get_gin_config_str(),
    'settings': gin_check.settings('palm_t5x.train.train')[0],
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
  """Says what will make the continuation differ from an uninterrupted run."""
  settings, macros = gin_check.settings('palm_t5x.train.train')
  warn_settings(stored, settings, macros)
  if stored.get('code', current['code']) != current['code']:
    logger.info(
      'the checkpoint was made by palm_t5x %s, this is %s.',
      _code_in_words(stored['code']),
      _code_in_words(current['code']),
    )
  if stored.get('seed') != current['seed']:
    logger.warning(
      'RANDOM_SEED was %s and is now %s: the data order changes from here on.',
      stored.get('seed'),
      current['seed'],
    )
  changed = [
    f'{name} {_where_unlike(stored[name], current[name])}'
    for name in _EXACTNESS
    if name in stored and stored[name] != current[name]
  ]
  if changed:
    logger.warning(
      'resuming under other conditions (%s): equal to rounding, not bit for bit.',
      '; '.join(changed),
    )


def warn_settings(
  stored: Mapping[str, Any],
  settings: Mapping[str, str],
  macros: Mapping[str, str],
  only: str = '',
):
  """Names the Gin settings that a checkpoint was made with otherwise.

  Args:
    stored: the checkpoint's metadata.
    settings: of now, binding to value.
    macros: binding to the macro that it takes its value from.
    only: a prefix of the bindings to compare, for a start that is no resumption.
  """
  before = stored.get('settings')
  if before is None:
    return  # written before checkpoints had them
  changed = {}
  for name in sorted(before.keys() | settings.keys()):
    old, new = before.get(name, 'unset'), settings.get(name, 'unset')
    if old != new and name.startswith(only) and not _APART.search(name):
      changed[macros.get(name, name)] = f'{_cut(old)} -> {_cut(new)}'
  if not changed:
    return
  shown = [f'{name} {change}' for name, change in list(changed.items())[:_SHOWN]]
  if len(changed) > _SHOWN:
    shown.append(f'and {len(changed) - _SHOWN} more')
  logger.log(
    logging.INFO if only else logging.WARNING,
    'the checkpoint of step %s was made with other settings: %s.',
    stored.get('step'),
    '; '.join(shown),
  )


def _cut(text: str, most: int = 60) -> str:
  return text if len(text) <= most else f'{text[: most - 3]}...'


def _where_unlike(old: Any, new: Any) -> str:
  """'old -> new', of two dictionaries only the entries that differ."""
  if not isinstance(old, Mapping) or not isinstance(new, Mapping):
    return f'{old} -> {new}'
  names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
  return ', '.join(f'{name} {old.get(name)} -> {new.get(name)}' for name in names)


def _code_in_words(code: Mapping[str, Any]) -> str:
  commit = f' (commit {code["commit"]})' if code.get('commit') else ''
  return f'{code.get("version")}{commit}'

"""A trained model's parameters on this mesh: the start of eval, infer and complete."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from palm_t5x import checkpoints, gin_check, provenance, utils
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.errors import UserError

VOCABULARY_COPY = 'vocabulary.model'  # in MODEL_DIR, so that a run needs no cache

logger = logging.getLogger(__name__)


def prefer_copy(vocabulary: Any, run: Any):
  """Reads a vocabulary whose file is gone from the run that was trained with it."""
  copy = pathlib.Path(run) / VOCABULARY_COPY
  if not hasattr(vocabulary, 'read_from') or vocabulary.exists():
    return
  if copy.exists() and checkpoints.steps_in(run):
    vocabulary.read_from(copy)


@dataclasses.dataclass
class Restored:
  """Parameters and where they came from.

  Attributes:
    params: sharded parameter tree.
    shardings: tree of its shardings.
    step: updates they have seen.
    path: the checkpoint folder.
  """

  params: Any
  shardings: Any
  step: int
  path: str


def restore_params(
  model: Any, partitioner: Any, cfg: utils.RestoreCheckpointConfig, folder: Any = None
) -> Restored:
  """Restores the parameters alone; no optimizer state is read.

  Args:
    model: whose parameters they are; its vocabulary is put in use.
    partitioner: where they go.
    cfg: names the checkpoint or run directory.
    folder: a checkpoint folder already found, instead of cfg.path.

  Raises:
    UserError: if nothing is there, or it is of another model or vocabulary.
  """
  path = cfg.single_path
  if folder is None and not path:
    raise UserError('CHECKPOINT_PATH is empty: name a checkpoint or a run directory.')
  folder = folder or checkpoints.find(path)
  vocabulary = model.output_vocabulary
  vocabulary_lib.use(vocabulary)
  prefer_copy(vocabulary, pathlib.Path(folder).parent)
  utils.verify_vocabulary_size(model)
  metadata = checkpoints.read_metadata(folder)
  provenance.check_vocabulary(metadata, vocabulary, folder)
  provenance.warn_settings(metadata, *gin_check.settings(), only='network.')

  def init(rng):
    shapes = {'decoder_input_tokens': (1, 1)}
    return model.get_initial_variables(rng, shapes)['params']

  with partitioner.context():
    shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = partitioner.shardings(model.param_logical_axes(), shapes)
  abstract = jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
    shapes,
    shardings,
  )
  params = checkpoints.load(folder, {'target': abstract}, dtype=cfg.dtype)['target']
  logger.info('restored %s (step %d).', folder, metadata['step'])
  return Restored(params, shardings, int(metadata['step']), str(folder))

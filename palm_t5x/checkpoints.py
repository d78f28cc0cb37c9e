"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong run.

    MODEL_DIR/checkpoint_<step>/state/...        the arrays (Orbax, OCDBT), T5X's tree
    MODEL_DIR/checkpoint_<step>/metadata/...     what made it: step, data, config, ...
    MODEL_DIR/checkpoint_<step>/checksums.json   blake2b of every file above

Orbax writes into `checkpoint_<step>.orbax-checkpoint-tmp` in the background; the
checksums are written and everything is fsynced there, and only then is the folder
renamed. So a folder with the final name is whole, or it was damaged later, which the
checksums tell. It is deleted by a rename first, for the same reason. Restoring reshards
onto any mesh, and stacks or unstacks layers where the model does otherwise.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity

from palm_t5x import layer_layout, processes, timeline
from palm_t5x.errors import Failure, UserError, disk_problem
from palm_t5x.train_state import TrainState

logger = logging.getLogger(__name__)

CHECKSUMS = 'checksums.json'
_TEMPORARY = '.orbax-checkpoint-tmp'
_NAME = re.compile(r'^checkpoint_(\d+)$')


def _digests(folder: pathlib.Path, sync: bool = False) -> dict[str, str]:
  """blake2b-128 of every file below `folder`, by relative path."""
  digests = {}
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if name == CHECKSUMS:
      continue
    with path.open('rb') as f:
      digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16))
      if sync:
        os.fsync(f.fileno())
    digests[name] = digest.hexdigest()
  return digests


def _write_checksums(folder: pathlib.Path):
  with (folder / CHECKSUMS).open('w') as f:
    json.dump(_digests(folder, sync=True), f, indent=0)
    f.flush()
    os.fsync(f.fileno())


class _SealedFolder(atomicity.AtomicRenameTemporaryPath):
  """Orbax's temporary folder, sealed with checksums between its last word and its name.

  Orbax finishes two files of its own just before it renames; so it is let rename to one
  more temporary name, and the checksums cover those files too.
  """

  async def finalize(self):
    final = self._final_path
    self._final_path = self._tmp_path.with_name(self._tmp_path.name + '-unsealed')
    try:
      await super().finalize()
      unsealed = pathlib.Path(self._final_path)
      _write_checksums(unsealed)
      os.rename(unsealed, final)
      _sync_folder(unsealed.parent)
    finally:
      self._final_path = final


def _sync_folder(folder: pathlib.Path):
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def damage(folder: str | os.PathLike) -> str | None:
  """What is wrong with a checkpoint folder, in words; None if it is whole."""
  folder = pathlib.Path(folder)
  try:
    recorded = json.loads((folder / CHECKSUMS).read_text())
  except FileNotFoundError:
    return f'{CHECKSUMS} is missing'
    recorded = dict(recorded.items())
  except (OSError, ValueError, AttributeError) as e:
    return f'{CHECKSUMS} is unreadable ({e})'
  try:
    found = _digests(folder)
  except OSError as e:
    return f'unreadable ({e})'
  # Older checkpoints left these two out, which Orbax writes last.
  unrecorded = ('_CHECKPOINT_METADATA', 'commit_success.txt')
  for name, digest in recorded.items():
    if name not in found:
      return f'{name} is missing'
    if found[name] != digest:
      return f'{name} has changed since it was written'
  for name in found:
    if name not in recorded and name not in unrecorded:
      return f'{name} is in no {CHECKSUMS}'
  return None


def _all_steps(directory: str | os.PathLike) -> list[int]:
  folder = pathlib.Path(directory)
  if not folder.is_dir():
    return []
  matches = (_NAME.match(p.name) for p in folder.iterdir() if p.is_dir())
  return sorted(int(m.group(1)) for m in matches if m)


def steps_in(directory: str | os.PathLike) -> list[int]:
  """Steps of the committed checkpoints in a run directory, oldest first.

  Those that a rewind left behind are not among them, even where a kill has kept the
  rewind from removing them.
  """
  steps, gone = _all_steps(directory), _left_behind(directory)
  return [step for step in steps if step not in gone]


def _left_behind(directory: str | os.PathLike) -> set[int]:
  """Steps of the checkpoints that belong to an abandoned timeline."""
  entries = timeline.read(directory)
  gone = set()
  for step in _all_steps(directory) if entries else ():
    if not timeline.left_behind(entries, step, 0):
      continue  # older than every target: no need to look inside
    try:
      rewinds = read_metadata(pathlib.Path(directory) / f'checkpoint_{step}')['rewinds']
    except KeyError:
      rewinds = 0
    except (OSError, ValueError, TypeError):
      continue  # damaged: whoever restores says so
    if timeline.left_behind(entries, step, rewinds):
      gone.add(step)
  return gone


def _remove(folder: pathlib.Path):
  """Deletes a checkpoint; a kill leaves all of it, or what `clean` takes for litter."""
  if not folder.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
  litter = folder.with_name(f'{folder.name}{_TEMPORARY}-deleted')
  shutil.rmtree(litter, ignore_errors=True)
  os.rename(folder, litter)
  shutil.rmtree(litter, ignore_errors=True)


def find(path: str | os.PathLike) -> pathlib.Path:
  """The checkpoint folder that `path` means: itself, or a run's newest whole one.

  Process 0 looks, for all of them.

  Raises:
    UserError: if there is none, naming what is there instead.
  """
  return pathlib.Path(processes.decide(lambda: str(_find(path))))


def _find(path: str | os.PathLike) -> pathlib.Path:
  folder = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
  if (folder / 'state').is_dir():
    return folder
  if folder.name == 'state' and folder.is_dir():
    return folder.parent
  steps = steps_in(folder)
  for step in reversed(steps):
    candidate = folder / f'checkpoint_{step}'
    problem = damage(candidate)
    if problem is None:
      return candidate
    logger.warning('checkpoint %s is damaged: %s.', candidate, problem)
  if steps:
    raise Failure(
      f'all {len(steps)} checkpoints in {folder} are damaged. Name another one, or put '
      'back a copy of one of them.'
    )
  near = steps_in(folder.parent)
  hint = f' {folder.parent} has checkpoints of steps {near}.' if near else ''
  raise UserError(
    f'no checkpoint at {folder}.{hint} Name a checkpoint or a run folder.'
  )


def read_metadata(folder: str | os.PathLike) -> dict[str, Any]:
  """What made a checkpoint: step, data position, vocabulary hash, configuration, ..."""
  return json.loads((pathlib.Path(folder) / 'metadata' / 'metadata').read_text())


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
    for path, leaf in leaves
  }


def _check_shapes(
  folder: pathlib.Path,
  stored: dict[str, tuple[int, ...]],
  wanted: dict[str, tuple[int, ...]],
):
  """Refuses a checkpoint of another model before anything is read.

  Raises:
    UserError: naming the parameters that differ.
  """
  roots = {name.split('/')[0] for name in wanted}
  stored = {n: s for n, s in stored.items() if n.split('/')[0] in roots}
  differences = [
    f'{name} is {stored.get(name, "absent")} there, {wanted.get(name, "absent")} here'
    for name in sorted(stored.keys() | wanted.keys(), reverse=True)  # target/ first
    if stored.get(name) != wanted.get(name)
  ]
  if differences:
    more = f' (and {len(differences) - 3} more)' if len(differences) > 3 else ''
    raise UserError(
      f'checkpoint {folder} is of another model: {"; ".join(differences[:3])}{more}. '
      'Use the Gin files that made it (config.gin beside it), or another MODEL_DIR.'
    )


def load(
  folder: str | os.PathLike,
  abstract: Any,
  dtype: str | None = None,
  verify: bool = True,
) -> Any:
  """Restores (part of) a checkpoint's tree onto the shardings of `abstract`.

  Args:
    folder: a checkpoint folder.
    abstract: tree of ShapeDtypeStruct with shardings; {'target': ...} for the
      parameters alone, or TrainState.to_tree() for all.
    dtype: if given, floating point leaves are restored in it.
    verify: check the checksums first.

  Raises:
    Failure: if the checkpoint is damaged.
    UserError: if it is of another model.
  """
  folder = pathlib.Path(folder)
  problem = processes.decide(lambda: damage(folder)) if verify else None
  if problem:
    raise Failure(
      f'checkpoint {folder} is damaged: {problem}. Use an older one, or remove it.'
    )
  stored = ocp.PyTreeCheckpointHandler().metadata(folder / 'state').tree
  layout = layer_layout.between(stored, abstract)
  if layout is not None:
    abstract, wanted = layout.stored(abstract), abstract
  _check_shapes(folder, _flat_shapes(stored), _flat_shapes(abstract))

  def restore_args(leaf):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return ocp.ArrayRestoreArgs(
      sharding=leaf.sharding,
      global_shape=leaf.shape,
      dtype=jnp.dtype(dtype) if dtype and floating else leaf.dtype,
    )

  tree = ocp.PyTreeCheckpointHandler().restore(
    folder / 'state',
    args=ocp.args.PyTreeRestore(
      item=abstract,
      restore_args=jax.tree.map(restore_args, abstract),
      partial_restore=True,
    ),
  )
  return tree if layout is None else layout.convert(tree, wanted)


@dataclasses.dataclass
class Checkpointer:
  """Saves and restores the checkpoints of one run (T5X's Checkpointer).

  Attributes:
    directory: the run's MODEL_DIR.
    keep: how many newest checkpoints to keep; None keeps all.
    dtype: floating point parameters are written in it ('float32' or 'bfloat16').
    keep_period: those of steps that it divides are kept for good; None for none.
    reach: the newest checkpoint at least so many steps old, and what is newer, is kept
      for a rewind.
  """

  directory: str
  keep: int | None = None
  dtype: str = 'float32'
  keep_period: int | None = None
  reach: int | None = None

  def __post_init__(self):
    self._folder = pathlib.Path(self.directory)
    self._tmp: pathlib.Path | None = None
    _quiet_failed_saves()
    self._async = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(), temporary_path_class=_SealedFolder
    )

  def clean(self):
    """Removes what an interrupted save or rewind left behind."""
    if jax.process_index() == 0 and self._folder.is_dir():
      for step in _left_behind(self._folder):
        _remove(self._folder / f'checkpoint_{step}')
      for leftover in self._folder.glob(f'checkpoint_*{_TEMPORARY}*'):
        shutil.rmtree(leftover, ignore_errors=True)

  def save(self, state: TrainState, metadata: dict[str, Any]):
    """Starts a save; returns as soon as the arrays have left the devices.

    Raises:
      Failure: if this save, or the one before it, could not be written.
    """
    self.wait()
    step = int(state.step)
    folder = self._folder / f'checkpoint_{step}'
    try:
      if jax.process_index() == 0 and folder.exists():
        _remove(folder)
    except OSError as e:
      raise self._failure(e) from e
    self._tmp = folder.with_name(folder.name + _TEMPORARY)
    tree = state.to_tree()
    if jnp.dtype(self.dtype) != jnp.float32:
      tree['target'] = jax.tree.map(
        lambda x: x.astype(self.dtype) if x.dtype == jnp.float32 else x, tree['target']
      )
    if jax.default_backend() == 'cpu':
      # There Orbax would hold views of buffers that the next step donates.
      tree = jax.tree.map(jnp.copy, tree)
    try:
      self._async.save(
        folder,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree), metadata=ocp.args.JsonSave(metadata)
        ),
        force=True,  # the first process removes what is there, above; all wait for it
      )
    except Exception as e:
      raise self._failure(e) from e

  def wait(self):
    """Waits for the save in flight, then deletes checkpoints beyond `keep`.

    Raises:
      Failure: if it could not be written; earlier checkpoints are as they were.
    """
    try:
      self._async.wait_until_finished()
    except Exception as e:
      raise self._failure(e) from e
    if self.keep and jax.process_index() == 0:
      for step in self._superfluous(steps_in(self._folder)):
        with contextlib.suppress(OSError):
          _remove(self._folder / f'checkpoint_{step}')

  def _superfluous(self, steps: list[int]) -> list[int]:
    """Of the steps that there are, oldest first, those that nothing keeps."""
    kept = set(steps[-self.keep :])
    if self.keep_period:
      kept.update(step for step in steps if step % self.keep_period == 0)
    if self.reach is not None and steps:
      old_enough = [step for step in steps if step <= steps[-1] - self.reach]
      kept.update(step for step in steps if step >= max(old_enough, default=0))
    return [step for step in steps if step not in kept]

  def _failure(self, error: Exception) -> Failure:
    if self._tmp is not None and jax.process_index() == 0:
      for half in self._folder.glob(f'{self._tmp.name}*'):  # on a full disk
        shutil.rmtree(half, ignore_errors=True)
    kept = steps_in(self._folder)
    return Failure(
      f'the checkpoint could not be written under {self._folder}: '
      f'{_first_line(error)}. Checkpoints of steps {kept} are intact; free space or '
      'name another MODEL_DIR, then run the same command again.'
    )

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *exc_info):
    self.close()

  def close(self):
    """Waits for the save in flight and ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._async.close()

  def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
    """Restores the newest whole checkpoint; reports and passes over damaged ones.

    Returns:
      (state, metadata), or None if the run has no checkpoint.

    Raises:
      Failure: if there are checkpoints and all are damaged.
    """
    step = processes.decide(self._newest_whole)
    if step is None:
      return None
    folder = self._folder / f'checkpoint_{step}'
    tree = load(folder, abstract.to_tree(), verify=False)
    return TrainState.from_tree(tree), read_metadata(folder)

  def _newest_whole(self) -> int | None:
    """The step to go on from; process 0 alone reads all of it for that."""
    steps = steps_in(self._folder)
    for step in reversed(steps):
      folder = self._folder / f'checkpoint_{step}'
      problem = damage(folder)
      if problem is None:
        return step
      logger.warning(
        'checkpoint %s is damaged: %s; trying the one before it.', folder, problem
      )
    if steps:
      raise Failure(
        f'all {len(steps)} checkpoints in {self._folder} are damaged. Move them away '
        'to start over.'
      )
    return None


def _first_line(error: BaseException) -> str:
  """The innermost cause in one line: 'No space left on device', not a trace."""
  problem = disk_problem(error)
  if problem:
    return problem
  while error.__cause__ or error.__context__:
    error = error.__cause__ or error.__context__
  text = str(error) or type(error).__name__
  return text.strip().splitlines()[0][:300]


def _quiet_failed_saves():
  """Keeps two libraries from printing traces over the one line that says what is wrong.

  Orbax logs the error that `save` and `wait` are about to raise, once per thread. And
  as it ends its event loop at the first write that fails, TensorStore finds the loop
  closed for each of the other writes, and prints a trace for each of hundreds.
  """
  hook = sys.unraisablehook
  if getattr(hook, 'quiets_failed_saves', False):
    return

  def without_late_answers(unraisable):
    if 'Event loop is closed' not in str(unraisable.exc_value):
      hook(unraisable)

  without_late_answers.quiets_failed_saves = True
  sys.unraisablehook = without_late_answers
  logging.getLogger('absl').addFilter(lambda record: not _caught_by_orbax(record))


def _caught_by_orbax(record: logging.LogRecord) -> bool:
  trace = record.exc_info and record.exc_info[2]
  return bool(trace) and 'orbax' in trace.tb_frame.f_code.co_filename


def param_count(params: Any) -> int:
  """Number of parameters in a tree."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))

"""Where numbers go: MODEL_DIR/metrics.jsonl, and TensorBoard through clu.

metrics.jsonl holds one JSON object per line, `{"step": 100, "split": "train", "loss":
3.2, ...}`, in the order of writing; NaN and infinity are null. A row is one write to a
file opened for appending, so killing the process tears at most the last line, which the
next run removes together with the rows that it is about to write again.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from palm_t5x.errors import Failure
from palm_t5x.metrics import Ratio

logger = logging.getLogger(__name__)

FILE_NAME = 'metrics.jsonl'
_REMOTE_SECONDS = 60.0


def read_metrics(model_dir: str, split: str | None = None) -> list[dict[str, Any]]:
  """The rows of MODEL_DIR/metrics.jsonl (of one split), torn lines left out."""
  path = epath.Path(model_dir) / FILE_NAME
  lines = path.read_text().splitlines() if path.exists() else []
  rows = [row for row in map(_parse, lines) if row is not None]
  return [row for row in rows if split is None or row['split'] == split]


def _parse(line: str) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and {'step', 'split'} <= row.keys() else None


def _number(value: Any) -> float:
  return float(value.value() if isinstance(value, Ratio) else value)


class MetricsWriter:
  """Writes one split's metrics: 'train', 'eval', 'training_eval/<task>', ...

  Args:
    model_dir: where metrics.jsonl is; all splits share it. Local or gs://.
    subdir: the split, and the folder of its TensorBoard events, as in T5X.
    first_step: the first step that this run will write. Rows of this split at that
      step or later are left over from a run that went further: they are removed.
      None keeps them all.
    tensorboard: False writes metrics.jsonl only, and never imports TensorFlow.

  It has the methods of clu's MetricWriter that a T5X user calls (`write_scalars`,
  `write_texts`, `write_hparams`, `flush`, `close`), so it can be handed to
  `gin_utils.summarize_gin_config`. In all processes but the first it does nothing.
  Raises Failure where the file cannot be written.
  """

  def __init__(
    self,
    model_dir: str,
    subdir: str = 'train',
    *,
    first_step: int | None = None,
    tensorboard: bool = True,
  ):
    self._split = subdir
    self._events_dir = os.path.join(model_dir, subdir)
    self._tensorboard = tensorboard
    self._events = None
    self._enabled = jax.process_index() == 0
    if self._enabled:
      self._rows = _open_rows(os.path.join(model_dir, FILE_NAME))
      self.drop_from(first_step)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Appends one row: numbers, 0-d arrays or Ratios by name."""
    if not self._enabled:
      return
    values = {name: _number(value) for name, value in scalars.items()}
    finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
    row = {'step': int(step), 'split': self._split, **finite}
    self._rows.append(json.dumps(row, allow_nan=False) + '\n')
    self._to_events('write_scalars', int(step), values)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Markdown by name, for TensorBoard's text page only."""
    if self._enabled:
      self._to_events('write_texts', int(step), texts)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Hyperparameters, for TensorBoard only."""
    if self._enabled:
      self._to_events('write_hparams', hparams)

  def drop_from(self, step: int | None) -> None:
    """Removes this split's rows of `step` and later, and any torn line.

    For a run that goes back: on resume, and after a rewind past a loss spike.
    """
    if not self._enabled:
      return

    def keep(line: str) -> bool:
      row = _parse(line)
      if row is None:
        return False
      return step is None or row['split'] != self._split or row['step'] < step

    self._rows.filter(keep)

  def flush(self) -> None:
    """Everything written so far is on disk (or in the bucket) afterwards."""
    if self._enabled:
      self._rows.flush()
      if self._events is not None:
        self._events.flush()

  def close(self) -> None:
    """Flushes and closes the event file."""
    self.flush()
    if self._events is not None:
      self._events.close()
      self._events = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self.close()

  def _to_events(self, method: str, *args: Any) -> None:
    if not self._tensorboard:
      return
    try:
      if self._events is None:
        self._events = _summary_writer(self._events_dir)
      getattr(self._events, method)(*args)
      self._events.flush()
    except Exception as error:
      # The numbers are in metrics.jsonl; a run of days must not die for a picture.
      logger.warning('TensorBoard is off from here: %s: %s', self._events_dir, error)
      self._tensorboard = False


def _summary_writer(logdir: str) -> Any:
  # clu imports TensorFlow: seconds, so only when the first number is there. On this
  # thread: an import racing with one elsewhere (seqio's) can see half a module.
  if 'tensorflow' not in sys.modules:
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  from clu import metric_writers

  return metric_writers.SummaryWriter(logdir)


# -- the two kinds of file --


def _open_rows(path: str) -> '_LocalRows | _RemoteRows':
  return _RemoteRows(path) if '://' in path else _LocalRows(path)


class _LocalRows:
  """Lines appended to a local file, which is opened for each: several may share it."""

  def __init__(self, path: str):
    self._path = path
    with _naming(path):
      os.makedirs(os.path.dirname(path) or '.', exist_ok=True)

  def append(self, line: str) -> None:
    with _naming(self._path), open(self._path, 'ab') as f:
      f.write(line.encode())

  def filter(self, keep: Callable[[str], bool]) -> None:
    if not os.path.exists(self._path):
      return
    with _naming(self._path):
      with open(self._path, encoding='utf-8', errors='replace') as f:
        lines = f.readlines()
      kept = [line for line in lines if line.endswith('\n') and keep(line)]
      if kept == lines:
        return
      # A new file in the old one's place: a kill here leaves one of the two, whole.
      temporary = f'{self._path}.tmp'
      with open(temporary, 'w', encoding='utf-8') as f:
        f.writelines(kept)
        f.flush()
        os.fsync(f.fileno())
      os.replace(temporary, self._path)

  def flush(self) -> None:
    pass


class _RemoteRows:
  """Lines of an object in a bucket: objects cannot grow, so it is written anew."""

  # One list per object, for every writer of it in this process.
  _lines_of: dict[str, list[str]] = {}

  def __init__(self, path: str):
    self._path = epath.Path(path)
    self._written = time.monotonic()
    if path not in self._lines_of:
      text = self._path.read_text() if self._path.exists() else ''
      self._lines_of[path] = text.splitlines(keepends=True)
    self._lines = self._lines_of[path]

  def append(self, line: str) -> None:
    self._lines.append(line)
    if time.monotonic() - self._written > _REMOTE_SECONDS:
      self.flush()

  def filter(self, keep: Callable[[str], bool]) -> None:
    self._lines[:] = [line for line in self._lines if keep(line)]

  def flush(self) -> None:
    self._written = time.monotonic()
    with _naming(str(self._path)):
      self._path.write_text(''.join(self._lines))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Turns an OSError inside the block into a Failure that names the file."""
  try:
    yield
  except OSError as error:
    raise Failure(
      f'Cannot write {path}: {error.strerror or error}. Make room or allow writing '
      'there, then run the same command: it goes on from the last checkpoint.'
    ) from error

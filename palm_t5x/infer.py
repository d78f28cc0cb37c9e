"""`t5x infer`: predictions or scores of a whole dataset, as JSONL.

    INFER_OUTPUT_DIR/<task>-<mode>.jsonl-00000-of-00004            one file per shard
    INFER_OUTPUT_DIR/<task>-<mode>.jsonl-00000-of-00004.COMPLETED  what it was made with
    INFER_OUTPUT_DIR/tmp-<task>-<mode>-00000-of-00004/             chunks while it runs

A chunk is written aside and renamed, so what is there is whole, and a run that was
killed goes on with the first chunk that is missing, if it is under the same settings.
The shards are merged from the chunks the same way. T5X's names for files, modes and
parameters.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from palm_t5x import generation, gin_utils, processes, run_dir, utils
from palm_t5x.errors import Failure, UserError
from palm_t5x.evaluation import numeric, pad_rows
from palm_t5x.restored import restore_params

MODES = ('predict', 'score', 'predict_with_aux')


def infer(
  *,
  mode: str,
  model: Any,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: Any,
  output_dir: str,
  checkpoint_period: int,
  shard_id: int = 0,
  num_shards: int = 1,
  merge_chunked_results: bool = True,
  summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
  stop: Sequence[str] = (),
) -> list[str]:
  """Writes a prediction or a score per example (T5X's infer).

  Args:
    mode: 'predict', 'predict_with_aux' (with scores) or 'score' (log-likelihood of the
      targets).
    model: a models.BaseModel; its decode_fn says how predictions are drawn.
    dataset_cfg: task or mixture. A task without inputs is a list of prompts: its
      targets are continued.
    restore_checkpoint_cfg: the checkpoint, or a run directory (its newest).
    partitioner: the mesh and its rules.
    output_dir: where the shards go.
    checkpoint_period: batches per chunk: what a kill can cost.
    shard_id: which shard of the examples this command does, from 0.
    num_shards: how many there are.
    merge_chunked_results: join the chunks into one file at the end.
    summarize_config_fn: writes config.gin.
    stop: strings that end a prediction.

  Returns:
    The files written.

  Raises:
    UserError: for an unknown mode, task, split or checkpoint.
  """
  if mode not in MODES:
    raise UserError(f'infer.mode={mode!r}: it can be one of {", ".join(MODES)}.')
  if not 0 <= shard_id < num_shards:
    raise UserError(f'shard_id={shard_id} must be in 0..{num_shards - 1} (num_shards).')
  if checkpoint_period < 1:
    raise UserError(f'infer.checkpoint_period={checkpoint_period}: 1 batch or more.')
  size = dataset_cfg.eval_batch_size
  partitioner.check_batch(size, name='INFER_BATCH_SIZE')
  tasks = utils.check_split(dataset_cfg)
  lengths = {task.name: _lengths(task, dataset_cfg, mode) for task in tasks}
  output_dir = run_dir.prepare(output_dir, 'INFER_OUTPUT_DIR')
  restored = restore_params(model, partitioner, restore_checkpoint_cfg)
  utils.verify_matching_vocabs(dataset_cfg, model)
  settings = {
    'checkpoint': restored.path,
    'split': dataset_cfg.split,
    'lengths': dict(dataset_cfg.task_feature_lengths or {}),
    'batch_size': size,
    'checkpoint_period': checkpoint_period,
    'stop': list(stop),
    'decoding': _decoding_settings(),
  }
  writers = {
    task.name: _ChunkWriter(
      pathlib.Path(output_dir), f'{task.name}-{mode}', shard_id, num_shards, settings
    )
    for task in tasks
  }
  done = processes.decide(lambda: [n for n, writer in writers.items() if writer.done()])
  say = print if processes.index() == 0 else lambda *args, **kwargs: None
  summarize_config_fn(output_dir, None, restored.step)
  step_fn = _step_fn(mode, model, partitioner, restored)
  written = []
  for task in tasks:
    writer = writers[task.name]
    if task.name in done:
      say(f'{writer.final} is complete: nothing to do.')
      written.append(str(writer.final))
      continue
    examples = _examples(
      task, dataset_cfg, lengths[task.name], model, mode, shard_id, num_shards
    )
    chunks = _grouped(examples, size * checkpoint_period)
    for number, chunk in enumerate(chunks):
      if processes.decide(lambda writer=writer, n=number: writer.has(n)):
        continue
      lines = []
      for rows in _grouped(iter(chunk), size):
        lines += _infer_batch(step_fn, rows, size, partitioner, model, mode, stop)
      writer.write(number, lines)
      done_now = number * size * checkpoint_period + len(lines)
      say(f'{task.name}: {done_now} examples', flush=True)
    if merge_chunked_results and jax.process_index() == 0:
      written.append(str(writer.merge()))
      print(f'written to {writer.final}')
  return written


def _step_fn(mode: str, model: Any, partitioner: Any, restored: Any) -> Callable:
  """Batch and key -> predictions, (predictions, scores) or scores, replicated."""

  def step(params, batch, rng):
    if mode == 'score':
      return model.score_batch(params, batch)
    if mode == 'predict':
      return model.predict_batch(params, batch, rng)
    return model.predict_batch_with_aux(params, batch, rng)

  compiled = partitioner.partition(
    step,
    in_shardings=(restored.shardings, partitioner.data_sharding, None),
    out_shardings=partitioner.sharding(()),
  )
  return lambda batch, rng: compiled(restored.params, batch, rng)


def _decoding_settings() -> list[str]:
  """What Gin binds of the decode functions: predictions depend on it."""
  lines = gin_utils.get_gin_config_str().splitlines()
  return sorted(line for line in lines if re.match(r'(\w+/)*(\w+\.)*decoding\.', line))


def _is_prompts(task: Any, mode: str) -> bool:
  """Whether a task without inputs serves as a list of prompts."""
  return 'inputs' not in task.output_features and mode != 'score'


def _lengths(task: Any, cfg: utils.DatasetConfig, mode: str) -> dict[str, int]:
  """Tokens of each feature.

  Raises:
    UserError: if prompts have no longest length.
  """
  lengths = dict(cfg.task_feature_lengths or {})
  if _is_prompts(task, mode) and not {'inputs', 'targets'} <= lengths.keys():
    raise UserError(
      f'{task.name} has no inputs, so its targets are the prompts: bind '
      "TASK_FEATURE_LENGTHS={'inputs': longest prompt, 'targets': tokens to generate}."
    )
  return lengths


def _examples(
  task: Any,
  cfg: utils.DatasetConfig,
  lengths: dict[str, int],
  model: Any,
  mode: str,
  shard_id: int,
  num_shards: int,
) -> Iterator[tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]]:
  """(index, what to report, model features) of this shard's examples, in order."""
  prompts = _is_prompts(task, mode)
  dataset = task.get_dataset(
    None if prompts else (lengths or None),
    cfg.split,
    shuffle=False,
    use_cached=utils.uses_cache(cfg),
    seed=cfg.seed or 0,
  ).shard(num_shards, shard_id)
  eos = model.output_vocabulary.eos_id
  if prompts:
    features = dataset.map(lambda e: _as_prompt(e['targets'], eos, lengths['inputs']))
  else:
    names = [n for n in ('inputs', 'targets') if n in task.output_features]
    features = dataset.map(lambda e: {n: e[n] for n in names})
    for name in names:
      lengths[name] = lengths.get(name) or _longest(features, name)
  converter = model.FEATURE_CONVERTER_CLS(
    pack=False, apply_length_check=False, bos_id=eos
  )
  converted = converter(features, lengths).as_numpy_iterator()
  pairs = zip(dataset.as_numpy_iterator(), converted, strict=True)
  for n, (example, batch) in enumerate(pairs):
    yield n * num_shards + shard_id, example, batch


def _as_prompt(targets: Any, eos: int, longest: int) -> dict[str, Any]:
  """A document as the inputs of an example whose targets are empty (tf tensors)."""
  prompt = targets[targets != eos][-longest:]
  return {'inputs': prompt, 'targets': prompt[:0]}


def _longest(dataset: Any, name: str) -> int:
  return max((len(e[name]) for e in dataset.as_numpy_iterator()), default=1)


def _infer_batch(
  step_fn, rows, size, partitioner, model, mode, stop
) -> list[dict[str, Any]]:
  """Runs one batch and renders its lines."""
  batch = numeric({k: np.stack([r[2][k] for r in rows]) for k in rows[0][2]})
  padded = pad_rows(batch, size)
  placed = partitioner.shard_batch(size, lambda i: {k: v[i] for k, v in padded.items()})
  # The key belongs to the batch's first example, so resuming draws the same samples.
  rng = jax.random.fold_in(jax.random.key(0), rows[0][0])
  out = jax.device_get(step_fn(placed, rng))
  lines = []
  for n, (index, example, _) in enumerate(rows):
    line = {'index': index, 'inputs': _readable(example, model)}
    if mode == 'score':
      line['score'] = float(out[n])
    else:
      ids, aux = out if mode == 'predict_with_aux' else (out, None)
      text = generation.decode_until_eos(model.output_vocabulary, ids[n])
      line['prediction'] = generation.truncate_at_stop(text, stop)[0]
      if aux is not None:
        line['aux'] = {k: np.asarray(v[n]).tolist() for k, v in aux.items()}
    lines.append(line)
  return lines


def _readable(example: dict[str, np.ndarray], model: Any) -> dict[str, Any]:
  """An example's features as text where there is text."""
  readable = {}
  for name, value in example.items():
    if name.endswith('_pretokenized') or not hasattr(value, 'dtype'):
      readable[name] = _text(value)
    elif f'{name}_pretokenized' not in example and name in ('inputs', 'targets'):
      readable[f'{name}_pretokenized'] = generation.decode_until_eos(
        model.output_vocabulary, value
      )
  return readable


def _text(value: Any) -> str:
  value = value.tolist() if hasattr(value, 'tolist') else value
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


def _grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
  while group := list(itertools.islice(items, size)):
    yield group


class _ChunkWriter:
  """Writes numbered chunks atomically and joins them into the final shard."""

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    shard_id: int,
    num_shards: int,
    settings: dict[str, Any],
  ):
    shard = f'{shard_id:05d}-of-{num_shards:05d}'
    self.final = folder / f'{name}.jsonl-{shard}'
    self._marker = folder / f'{self.final.name}.COMPLETED'  # T5X's name
    self._chunks = folder / f'tmp-{name}-{shard}'
    self._settings = settings
    self._count = 0

  def done(self) -> bool:
    """Whether the final file is there.

    Raises:
      UserError: if it, or the chunks there are, were made with other settings.
    """
    if self.final.exists():
      self._check_same(self._marker, self.final)
      shutil.rmtree(self._chunks, ignore_errors=True)
      return True
    self._check_same(self._chunks / 'settings.json', self._chunks)
    return False

  def _check_same(self, record: pathlib.Path, what: pathlib.Path):
    """Refuses to mix the results of two checkpoints, or to pass off old ones."""
    try:
      stored = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
      return
    changed = [
      f'{name} {stored.get(name)} there, {value} here'
      for name, value in self._settings.items()
      if stored.get(name) != value
    ]
    if changed:
      raise UserError(
        f'{what} was made with other settings ({"; ".join(changed)}): remove it, or '
        'name another INFER_OUTPUT_DIR.'
      )

  def _path(self, number: int) -> pathlib.Path:
    return self._chunks / f'chunk-{number:06d}.jsonl'

  def has(self, number: int) -> bool:
    """Whether a chunk is there already, from a run before."""
    self._count = max(self._count, number + 1)
    return self._path(number).exists()

  def write(self, number: int, lines: list[dict[str, Any]]):
    """Writes one chunk; a reader sees all of it or nothing."""
    if jax.process_index():
      return
    record = self._chunks / 'settings.json'
    if not record.exists():
      self._chunks.mkdir(exist_ok=True)
      _write_atomically(record, [json.dumps(self._settings, indent=1) + '\n'])
    text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
    _write_atomically(self._path(number), [text])

  def merge(self) -> pathlib.Path:
    """Joins the chunks in order and removes them."""
    _write_atomically(self._marker, [json.dumps(self._settings, indent=1) + '\n'])
    parts = (self._path(n).read_text() for n in range(self._count))
    _write_atomically(self.final, parts)
    shutil.rmtree(self._chunks, ignore_errors=True)
    return self.final


def _write_atomically(path: pathlib.Path, parts: Any):
  temporary = path.with_name(path.name + '.tmp')
  try:
    with temporary.open('w') as f:
      f.writelines(parts)
      f.flush()
      os.fsync(f.fileno())
    temporary.replace(path)
  except OSError as e:
    temporary.unlink(missing_ok=True)
    raise Failure(
      f'{path} could not be written ({e.strerror}). What is finished stays; run the '
      'same command again to go on.'
    ) from e

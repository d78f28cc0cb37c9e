"""`t5x describe`: what a configuration is, from shapes and manifests alone.

Parameters, memory, FLOPs and tokens by the paper's formulas (App. B), and what a run
will read of each sub-corpus. Opens no data, network or device beyond the machine's own
CPU: of token stores that are there, the manifests only.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from palm_t5x import data_plan, utils
from palm_t5x.checkpoints import param_count
from palm_t5x.corpus.sampling import BatchSchedule
from palm_t5x.metrics import carbon_tco2e

_SECONDS_PER_DAY = 86_400


def describe(
  *,
  model: Any,
  train_dataset_cfg: utils.DatasetConfig | None = None,
  partitioner: Any = None,
  total_steps: int | None = None,
  cache_dir: str | None = None,
  random_seed: int = 0,
  chip_hours: float | None = None,
  watts: float = 378.5,
  pue: float = 1.08,
  tco2e_per_mwh: float = 0.079,
) -> dict[str, Any]:
  """Prints and returns the facts of a configuration.

  Args:
    model: a models.BaseModel.
    train_dataset_cfg: gives sequence length and batch schedule.
    partitioner: gives the mesh that is asked for; no device is needed.
    total_steps: gives the training tokens.
    cache_dir: where token stores lie; with it, tokens, epochs and languages of the
      sub-corpora.
    random_seed: the run's, of which the order in the stores derives.
    chip_hours: with it, the carbon estimate of the paper's App. B.
    watts, pue, tco2e_per_mwh: see metrics.carbon_tco2e; the paper's by default.
  """
  facts: dict[str, Any] = {}
  shapes = jax.eval_shape(
    lambda rng: model.get_initial_variables(rng, {'decoder_input_tokens': (1, 1)}),
    jax.random.key(0),
  )['params']
  facts |= _model_facts(model, shapes)
  if train_dataset_cfg is not None:
    facts |= _data_facts(model, train_dataset_cfg, total_steps)
  if partitioner is not None:
    facts['mesh'] = _mesh_text(partitioner)
  if chip_hours:
    facts['chip hours'] = float(chip_hours)
    carbon = carbon_tco2e(chip_hours, watts, pue, tco2e_per_mwh)
    facts['carbon estimate (tCO2e)'] = f'{carbon:.2f}'
  for name, value in facts.items():
    print(f'{name:42} {_text(value)}')
  if cache_dir and train_dataset_cfg is not None and total_steps:
    mixture = data_plan.of_run(
      train_dataset_cfg, model.output_vocabulary, cache_dir, random_seed, total_steps
    )
    print('\n'.join(['', *data_plan.table(mixture)]))
    if languages := data_plan.language_table(mixture):
      print('\n'.join(['', *languages]))
    facts['mixture'] = {share.name: dataclasses.asdict(share) for share in mixture}
  return facts


def _model_facts(model: Any, shapes: Any) -> dict[str, Any]:
  stored = param_count(shapes)
  optimizer = jax.eval_shape(model.optimizer_def.init, shapes)
  state_bytes = sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((shapes, optimizer))
  )
  return {
    'parameters (as the paper counts)': model.num_params(),
    'parameters (stored)': stored,
    'parameters and optimizer state (bytes)': state_bytes,
  }


def _data_facts(
  model: Any, cfg: utils.DatasetConfig, total_steps: int | None
) -> dict[str, Any]:
  facts: dict[str, Any] = {
    'data': f'{cfg.name} ({cfg.split})',
    'sequence length (tokens)': cfg.length,
    'batch size (sequences)': _schedule_text(cfg.batch_size),
  }
  flops = model.flops_per_token(cfg.length)
  facts['training FLOPs per token'] = flops
  facts['hardware FLOPs per token'] = model.hardware_flops_per_token(cfg.length)
  if total_steps:
    tokens = BatchSchedule(cfg.batch_size).offset(total_steps) * cfg.length
    facts['steps'] = total_steps
    facts['training tokens'] = tokens
    facts['training FLOPs'] = flops * tokens
    facts['PFLOP/s-days'] = flops * tokens / 1e15 / _SECONDS_PER_DAY
  return facts


def _schedule_text(batch_size: utils.BatchSize) -> str:
  if isinstance(batch_size, int):
    return str(batch_size)
  return ', '.join(f'{size} from step {first}' for first, size in batch_size)


def _mesh_text(partitioner: Any) -> str:
  ici: Sequence[int] | None = getattr(partitioner, 'ici_mesh_shape', None)
  if ici is None:
    return f'all devices, {getattr(partitioner, "num_partitions", None) or 1}-way model'
  dcn = partitioner.dcn_mesh_shape or (1,) * len(ici)
  names = partitioner.mesh_axis_names[-len(ici) :]
  sizes = [i * d for i, d in zip(ici, dcn, strict=True)]
  axes = ' x '.join(f'{name} {size}' for name, size in zip(names, sizes, strict=True))
  return f'{axes} = {math.prod(sizes)} devices'


def _text(value: Any) -> str:
  if isinstance(value, int):
    return f'{value:,}' + (f'  ({value / 1e9:.2f} B)' if value >= 1e7 else '')
  if isinstance(value, float):
    return f'{value:.4g}'
  return str(value)

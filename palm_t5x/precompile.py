"""`t5x precompile`: the train step, compiled for chips that are not here.

The real compiler, for the real topology, on any machine: whether the program fits, what
it sends over which network, how much it computes, and how fast it can be at most.
Opens no vocabulary, data or network, and runs nothing.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from palm_t5x import (
  chips,
  metrics,
  precompile_report,
  precompile_search,
  run_dir,
  step_compiler,
  topology,
  utils,
)
from palm_t5x.compiled_program import DCN, ICI
from palm_t5x.errors import UserError
from palm_t5x.step_compiler import GIB, Compiler, DoesNotFitError, Step

RESULT = 'precompile.json'


def precompile(
  *,
  model: Any,
  train_dataset_cfg: utils.DatasetConfig,
  partitioner: Any,
  model_dir: str | None = None,
  random_seed: int | None = None,
  trainer_cls: Callable[..., Any] | None = None,
  topology_name: str | None = None,
  num_slices: int = 1,
  batch_size: int | str | None = None,
  compiler_options: Mapping[str, Any] | None = None,
  chip: chips.Chip | None = None,
  cache_dir: str | None = None,
  search: bool = False,
  search_tries: int = 12,
) -> dict[str, Any]:
  """Compiles the train step of a configuration; prints and returns its account.

  Args:
    model: a models.BaseModel.
    train_dataset_cfg: gives sequence length and batch sizes; its data is not opened.
    partitioner: the mesh and its rules.
    model_dir: gets precompile.json; None writes nothing.
    random_seed: accepted for T5X; nothing is initialised.
    trainer_cls: makes the Trainer; None: ours, with T5X's default schedule.
    topology_name: 'v4:12x16x16', 'cpu:8'; None: the devices of this machine.
    num_slices: how many such slices, joined by the data-centre network.
    batch_size: which of the ramp's: a number, 'all', or None for the last.
    compiler_options: name to value, handed to the compiler.
    chip: figures that replace the published ones of the topology's chip.
    cache_dir: libtpu's logs go below it.
    search: try rematerialisation policies, microbatches and options, and rank them.
    search_tries: programs that a search compiles at most.

  Returns:
    What precompile.json holds.

  Raises:
    UserError: for a configuration that cannot be compiled or does not fit: by how much,
      and what would.
    Failure: if libtpu is missing or the compiler gives up.
  """
  del random_seed
  sizes = _batch_sizes(train_dataset_cfg, batch_size)
  where = topology.find(
    topology_name, num_slices, cache_dir, getattr(partitioner, 'backend', None)
  )
  compiler = Compiler(model, train_dataset_cfg, partitioner, where, trainer_cls)
  for size in sizes:
    compiler.partitioner.check_batch(size)
  folder = run_dir.prepare(model_dir) if model_dir else None
  figures = _figures(chip, where)
  result = _describe(compiler, figures)
  print(precompile_report.heading(result), flush=True)
  if search:
    variant = compiler.first(sizes[-1], compiler_options)
    tried = precompile_search.search(
      compiler, variant, search_tries, lambda step: account(compiler, step, figures)
    )
    result['search'] = tried
    print(precompile_report.ranking(tried))
  else:
    result['programs'] = []
    for size in sizes:
      variant = compiler.first(size, compiler_options)
      facts = account(compiler, _compile(compiler, variant), figures)
      result['programs'].append(facts)
      print(precompile_report.program(facts), flush=True)
  if folder:
    path = os.path.join(folder, RESULT)
    run_dir.replace(path, json.dumps(result, indent=2) + '\n')
    print(f'Written to {path}.')
  return result


def _batch_sizes(cfg: utils.DatasetConfig, asked: int | str | None) -> list[int]:
  """Those to compile for, each once, in the ramp's order."""
  sizes = list(dict.fromkeys(cfg.batch_sizes))
  if asked is None:
    return sizes[-1:]
  if asked == 'all':
    return sizes
  if type(asked) is int and asked > 0:
    return [asked]
  raise UserError(
    f"PRECOMPILE_BATCH_SIZE={asked!r}: it is a number of sequences, 'all' for every "
    f'size of the ramp ({", ".join(map(str, sizes))}), or None for the last.'
  )


def _compile(compiler: Compiler, variant: step_compiler.Variant) -> Step:
  """Compiles, or says by how much it does not fit and what does."""
  try:
    return compiler.compile(variant)
  except DoesNotFitError as error:
    print('It does not fit. Looking for what does ...', flush=True)
    remedy = precompile_search.remedy(compiler, variant)
    raise UserError(
      f'the train step ({variant.text()}, batch {variant.batch_size}) needs '
      f'{error.used / GIB:.2f} GiB of a chip, which has {error.limit / GIB:.2f} GiB: '
      f'{(error.used - error.limit) / GIB:.2f} GiB too much. {remedy}'
    ) from error


def _figures(given: chips.Chip | None, where: topology.Topology) -> chips.Chip | None:
  """The chip's figures, or None where nothing is published or given."""
  given = given or chips.Chip()
  published = chips.PUBLISHED.get(where.kind)
  if published is None:
    whole = None not in dataclasses.astuple(given)
    return given if whole else None
  return given.over(published)


def _describe(compiler: Compiler, figures: chips.Chip | None) -> dict[str, Any]:
  """The machine, and what is compiled for it."""
  where, mesh = compiler.topology, compiler.mesh
  config = getattr(compiler.model, 'config', None)
  versions = {'jax': jax.__version__}
  if where.platform == 'tpu':
    versions['libtpu'] = importlib.metadata.version('libtpu')
  with step_compiler.target.compiling_for(where.platform):
    return {
      'parameters': compiler.model.num_params(),
      'topology': where.name,
      'num_slices': where.num_slices,
      'chips': len(where.devices),
      'device_kind': where.devices[0].device_kind,
      'mesh': {name: int(n) for name, n in mesh.shape.items()},
      'length': compiler.cfg.length,
      'dtype': config.mode if config else None,
      'attention_kernel': config.kernel if config else None,
      'chip': dataclasses.asdict(figures) if figures else None,
      'versions': versions,
    }


def account(compiler: Compiler, step: Step, figures: chips.Chip | None) -> dict:
  """Everything that is known of one compiled step, as plain values."""
  program, variant = step.program, step.variant
  tokens = variant.batch_size * compiler.cfg.length
  devices = len(compiler.topology.devices)
  flops = program.flops + program.kernel_flops
  facts = {
    'batch_size': variant.batch_size,
    'microbatches': variant.microbatches,
    'remat_policy': variant.remat_policy,
    'compiler_options': dict(variant.options),
    'seconds': {'trace': step.lower_seconds, 'compile': step.compile_seconds},
    'host_bytes': step.host_bytes,
    'memory': _memory(step, figures),
    'collectives': [
      dataclasses.asdict(c) | {'axis': c.axis} for c in program.collectives
    ],
    'flops': {
      'model_per_token': compiler.model.flops_per_token(compiler.cfg.length),
      'all_recomputed_per_token': _with_recomputation(compiler),
      'hardware_per_token': flops * devices / tokens,
      'hardware_per_chip': flops,
      'of_xla_per_chip': program.flops,
      'kernels_per_chip': [k._asdict() for k in program.kernels],
    },
    'bounds': None,
    'paper': precompile_report.PAPER.get(round(compiler.model.num_params() / 1e9)),
  }
  if figures:
    facts['bounds'] = _bounds(compiler, step, figures, tokens, facts['flops'])
  return facts


def _memory(step: Step, figures: chips.Chip | None) -> dict[str, float | None]:
  """Bytes of a chip by kind. What no other line names is temporary."""
  program = step.program
  parts = {
    'parameters': program.argument_bytes('state.params'),
    'optimizer': program.argument_bytes('state.opt_state'),
    'activations': program.saved_bytes,
  }
  rest = max(0, step.total_bytes - sum(parts.values()))
  limit = figures.hbm_bytes if figures else None
  return parts | {'temporaries': rest, 'total': step.total_bytes, 'limit': limit}


def _with_recomputation(compiler: Compiler) -> float | None:
  """App. B's FLOPs per token if the backward pass computes everything again."""
  config = getattr(compiler.model, 'config', None)
  if config is None:
    return None
  return metrics.hardware_flops_per_token(
    compiler.model.num_params(),
    *(config.num_layers, config.num_heads, config.head_dim, compiler.cfg.length),
    dense_recomputed=1.0,
    attention_recomputed=1.0,
  )


def _bounds(compiler, step: Step, figures: chips.Chip, tokens: int, flops: Mapping):
  """Least seconds by part, and the most that follows from them."""
  program = step.program
  axes = sorted({c.axis for c in program.collectives if c.network == ICI})
  state = program.argument_bytes('state.')
  seconds = chips.bounds(
    figures,
    flops['hardware_per_chip'],
    program.product_bytes + 2 * state,
    {axis: program.wire_bytes(ICI, axis) for axis in axes},
    compiler.topology.links(compiler.mesh),
    program.wire_bytes(DCN),
  )
  peak = figures.peak_flops * int(np.size(compiler.mesh.devices))

  def most(least_seconds: float) -> dict[str, float]:
    rate = tokens / least_seconds
    return {
      'seconds': least_seconds,
      'tokens_per_second': rate,
      'mfu': metrics.mfu(rate, flops['model_per_token'], peak),
      'hfu': metrics.mfu(rate, flops['hardware_per_token'], peak),
    }

  return {
    'seconds': seconds,
    'overlapped': most(max(seconds.values())),
    'summed': most(math.fsum(seconds.values())),
  }

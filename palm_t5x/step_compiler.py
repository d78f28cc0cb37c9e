"""Compiles the train step for devices that are not here, and says what it needs.

The step is the one that `train` runs: the same Trainer over the same abstract state,
with the same donation. No array is made.
"""

import contextlib
import copy
import dataclasses
import functools
import glob
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from palm_t5x import compiled_program, schedules, target, utils
from palm_t5x import trainer as trainer_lib
from palm_t5x.errors import Failure, UserError
from palm_t5x.hlo_loops import UnknownLoopError
from palm_t5x.topology import Topology
from palm_t5x.train_state import TrainStateInitializer

GIB = 2.0**30
_UNIT = {'': 1.0, 'K': 2.0**10, 'M': 2.0**20, 'G': GIB, 'T': 2.0**40}


class DoesNotFitError(Exception):
  """The compiler found no way to place the program in a chip's memory.

  Attributes:
    used: bytes that it needs, as far as the compiler got.
    limit: bytes that there are.
  """

  def __init__(self, used: float, limit: float):
    super().__init__(f'{used / GIB:.2f} GiB do not fit into {limit / GIB:.2f} GiB')
    self.used, self.limit = used, limit


@dataclasses.dataclass(frozen=True)
class Variant:
  """What of a configuration may be varied to make its step fit, or faster.

  Attributes:
    batch_size: sequences per update.
    microbatches: pieces of a batch.
    remat_policy: a key of network_config.REMAT_POLICIES; None for another's model.
    options: of the compiler.
  """

  batch_size: int
  microbatches: int
  remat_policy: str | None = None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def text(self) -> str:
    """One line."""
    parts = [f'MICROBATCHES={self.microbatches}']
    if self.remat_policy is not None:
      parts.insert(0, f'remat_policy={self.remat_policy}')
    return ', '.join(parts + [f'{k}={v}' for k, v in self.options.items()])


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled train step.

  Attributes:
    variant: what was compiled.
    program: what it does, per chip.
    total_bytes: of a chip's memory that it takes: the compiler's own total.
    lower_seconds: tracing.
    compile_seconds: the compiler's.
    host_bytes: most memory that this process has taken so far.
  """

  variant: Variant
  program: compiled_program.Program
  total_bytes: int
  lower_seconds: float
  compile_seconds: float
  host_bytes: int


class Compiler:
  """Compiles variants of one configuration for one topology."""

  def __init__(
    self,
    model: Any,
    cfg: utils.DatasetConfig,
    partitioner: Any,
    topology: Topology,
    trainer_cls: Callable[..., Any] | None = None,
  ):
    self.model, self.cfg, self.topology = model, cfg, topology
    # A copy, so that the devices are the topology's here and nowhere else.
    self.partitioner = copy.copy(partitioner)
    self.partitioner.__dict__.pop('mesh', None)
    self.partitioner.devices = list(topology.devices)
    self._trainer_cls = trainer_cls or functools.partial(
      trainer_lib.Trainer,
      learning_rate_fn=schedules.create_learning_rate_scheduler(),
    )

  @property
  def mesh(self) -> Any:
    """The jax Mesh."""
    return self.partitioner.mesh

  def first(self, batch_size: int, options: Mapping[str, Any] | None) -> Variant:
    """The configuration as it is."""
    trainer = self._trainer(self.model, None)
    config = getattr(self.model, 'config', None)
    policy = getattr(config, 'remat_policy', None)
    return Variant(batch_size, trainer.num_microbatches, policy, options or {})

  def compile(self, variant: Variant) -> Step:
    """Compiles one variant.

    Raises:
      DoesNotFitError: if it needs more memory than a chip has.
      UserError: if the mesh does not divide the model or the batch, or the compiler
        does not know an option.
      Failure: if the compiler gives up otherwise, or its program has a loop of unknown
        length.
    """
    self.partitioner.check_batch(variant.batch_size, variant.microbatches)
    start = time.perf_counter()
    with target.compiling_for(self.topology.platform):
      trainer = self._trainer(self._model(variant), variant.microbatches)
      lowered = trainer.lower(self._batch(variant.batch_size))
    lowered_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _no_cache():
      options = dict(variant.options)
      if self.topology.platform == 'tpu':
        options['xla_dump_to'] = folder
      try:
        compiled = lowered.compile(compiler_options=options)
      except jax.errors.JaxRuntimeError as error:
        raise _explained(error, variant) from error
      seconds = time.perf_counter() - lowered_at
      total = _total_bytes(folder, compiled)
    try:
      program = compiled_program.analyze(
        compiled.as_text(), self.topology.mesh(self.mesh)
      )
    except UnknownLoopError as error:
      raise Failure(f'{error}: no total would be right ({variant.text()}).') from error
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Step(variant, program, total, lowered_at - start, seconds, host)

  def _model(self, variant: Variant) -> Any:
    config = getattr(self.model, 'config', None)
    if variant.remat_policy in (None, getattr(config, 'remat_policy', None)):
      return self.model
    model = copy.copy(self.model)
    config = dataclasses.replace(config, remat_policy=variant.remat_policy)
    model.module = self.model.module.clone(config=config)
    return model

  def _trainer(self, model: Any, microbatches: int | None) -> Any:
    initializer = TrainStateInitializer(model, self.partitioner, self.cfg.input_shapes)
    more = {} if microbatches is None else {'num_microbatches': microbatches}
    return self._trainer_cls(
      model=model,
      train_state=initializer.abstract(),
      partitioner=self.partitioner,
      train_state_axes=initializer.axes,
      rng=jax.eval_shape(lambda: jax.random.key(0)),
      **more,
    )

  def _batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    names = {
      'decoder_input_tokens': jnp.int32,
      'decoder_target_tokens': jnp.int32,
      'decoder_loss_weights': jnp.float32,
    }
    if 'inputs' in (self.cfg.task_feature_lengths or {}):
      names |= {
        'decoder_causal_attention': jnp.int32,
        'decoder_segment_ids': jnp.int32,
        'decoder_positions': jnp.int32,
      }
    shape = (batch_size, self.cfg.length)
    sharding = self.partitioner.data_sharding
    return {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
      for name, dtype in names.items()
    }


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
  """Without jax's cache of compiled programs: what is compiled here runs nowhere."""
  old = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # jax looks at the option once
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', old)
    compilation_cache.reset_cache()


def _total_bytes(folder: str, compiled: Any) -> int:
  """The compiler's own total of main memory; on CPU, which reports none, the parts."""
  for path in glob.glob(os.path.join(folder, '*memory-usage-report.txt')):
    with open(path) as f:
      found = re.search(r'color=0\)\s*Total bytes: (\d+)', f.read())
    if found:
      return int(found[1])
  stats = compiled.memory_analysis()
  sizes = stats.argument_size_in_bytes + stats.output_size_in_bytes
  return sizes + stats.temp_size_in_bytes - stats.alias_size_in_bytes


def _explained(error: Exception, variant: Variant) -> Exception:
  """The compiler's refusal as one of our errors."""
  text = str(error)
  if 'RESOURCE_EXHAUSTED' in text:
    size = r'([\d.]+)([KMGT]?)B?'
    for pattern in (rf'Used {size} of {size} hbm', rf'\({size}\)[^(]*\({size}\)'):
      found = re.search(pattern, text)
      if found:
        used, unit, limit, limit_unit = found.groups()
        return DoesNotFitError(
          float(used) * _UNIT[unit], float(limit) * _UNIT[limit_unit]
        )
  said = ' '.join(text.splitlines()[0].split()) if text else type(error).__name__
  if variant.options and re.search(r'[Nn]o such compile option|option', said):
    return UserError(f'COMPILER_OPTIONS={dict(variant.options)}: {said}')
  return Failure(f'the compiler refused the train step ({variant.text()}): {said}')

"""The stages of a job as an Apache Beam pipeline, on any Beam runner.

A unit is an element. Its work goes through the job's shared folder as it does locally,
so that a pipeline which was stopped goes on from what is done, by Beam or without it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import jobs, storage

_FAILED = 'failed'  # folder of what units say when they fail


@dataclasses.dataclass(frozen=True)
class Beam:
  """Does a job's stages by Beam, in the place of `jobs.run`.

  Attributes:
    runner: a Beam runner, such as 'DirectRunner', 'DataflowRunner', 'FlinkRunner'.
    options: more of Beam's options, such as ('--project=p', '--region=r').
  """

  runner: str
  options: Sequence[str] = ()

  def __call__(self, job: jobs.Job, stages: Sequence[jobs.Stage]) -> bool:
    """Runs the pipeline to its end; True."""
    return run(job, stages, [f'--runner={self.runner}', *self.options])


def make(runner: str | None = None, options: Sequence[str] | str = ()) -> Beam | None:
  """What Gin binds: `Beam(runner, options)`, or None for a runner of None.

  Raises:
    UserError: Beam is not installed.
  """
  if runner is None:
    return None
  _import()
  return Beam(runner, tuple(options.split() if isinstance(options, str) else options))


def _import():
  try:
    import apache_beam
  except ImportError as e:
    raise errors.UserError(
      f'BEAM_RUNNER needs Apache Beam, which is not installed ({e}): pip install '
      "'palm_t5x[beam]', or leave BEAM_RUNNER at None."
    ) from e
  return apache_beam


def run(
  job: jobs.Job, stages: Sequence[jobs.Stage], options: Sequence[str] = ()
) -> bool:
  """Does what is left of a job; a stage begins when the one before is done.

  Args:
    job: in a folder that all of Beam's workers reach under the same name.
    stages: in their order; those that are `local` are done here first.
    options: Beam's.

  Returns:
    True.

  Raises:
    UserError, Failure: Beam is missing, or what a unit raised.
  """
  beam = _import()
  from apache_beam.options.pipeline_options import PipelineOptions

  local = [stage for stage in stages if stage.local]
  jobs.run(job, local)
  storage.delete_folder(job.path(_FAILED))
  try:
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
  except ValueError as e:
    raise errors.UserError(f'Beam refuses BEAM_RUNNER or BEAM_OPTIONS: {e}') from e
  before = pipeline | 'begin' >> beam.Create([0])
  for stage in stages[len(local) :]:
    # A side input is whole before any element meets it: that is the barrier.
    before = (
      pipeline
      | f'{stage.name}: begin' >> beam.Create([0])
      | f'{stage.name}: units'
      >> beam.FlatMap(_units, job, stage, beam.pvalue.AsSingleton(before))
      | f'{stage.name}: spread' >> beam.Reshuffle()
      | f'{stage.name}: do' >> beam.Map(_perform, job, stage.name)
      | f'{stage.name}: count' >> beam.combiners.Count.Globally()
    )
  try:
    pipeline.run().wait_until_finish()
  except Exception:
    _raise_what_a_unit_said(job)
    raise
  return True


def _units(begin: int, job: jobs.Job, stage: jobs.Stage, before: int):
  """The units of a stage that are not done."""
  del begin, before
  done = job.done(stage.name)
  return [unit for unit in stage.units(job) if unit.name not in done]


def _perform(unit: jobs.Unit, job: jobs.Job, stage: str) -> int:
  """Does a unit; what is wrong is left in the folder, for Beam wraps what is raised."""
  try:
    job.perform(stage, unit)
  except (errors.UserError, errors.Failure) as e:
    said = {'kind': type(e).__name__, 'text': str(e)}
    path = job.path(_FAILED, f'{stage}-{unit.name}.json')
    storage.write_bytes(path, json.dumps(said).encode())
    raise
  return 1


def _raise_what_a_unit_said(job: jobs.Job) -> None:
  for name in storage.list_names(job.path(_FAILED)):
    said: dict[str, Any] = json.loads(storage.read_bytes(job.path(_FAILED, name)))
    kind = errors.UserError if said['kind'] == 'UserError' else errors.Failure
    raise kind(said['text'])

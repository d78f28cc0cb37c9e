"""Units of work for tests of jobs; imports quickly, as worker processes import it."""

import os
import pathlib
import time

from palm_t5x import errors
from palm_t5x.corpus import jobs


def note(folder, name, seconds=0.0):
  """Leaves a line that says the unit was done; a second time, a second line."""
  time.sleep(seconds)
  with open(pathlib.Path(folder, name), 'a') as f:
    f.write('done\n')
  return {'name': name, 'worker': os.getpid()}


def gather(folder, stage, count):
  """Needs the whole stage before: its facts."""
  facts = jobs.Job(folder).facts(stage)
  assert len(facts) == count, f'{len(facts)} of {count} units are done'
  return sorted(fact['name'] for fact in facts.values())


def fail(kind):
  """Raises."""
  if kind == 'die':
    os._exit(9)
  raise {'failure': errors.Failure, 'bug': ZeroDivisionError}[kind]('as it was told')


def stages(folder, out, count=6, seconds=0.0):
  """'work': `count` notes; then 'sum' and 'more': units that need all of 'work'."""

  def work(job):
    return [jobs.Unit(f'u{i}', note, (out, f'u{i}', seconds), 2) for i in range(count)]

  def total(job):
    return [jobs.Unit(f's{i}', gather, (folder, 'work', count)) for i in range(3)]

  return [jobs.Stage('work', work, 'working'), jobs.Stage('sum', total)]


def run(folder, out, seconds=0.0, **kwargs):
  """Runs `stages`; whether the job is done."""
  return jobs.run(jobs.Job(folder), stages(folder, out, seconds=seconds), **kwargs)

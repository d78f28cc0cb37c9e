"""PROFILE_STEPS: which steps are traced, and a file that profilers open."""

import jax
import jax.numpy as jnp
import pytest

from palm_t5x import profiling
from palm_t5x.errors import UserError


def _traced(folder):
  """How often `one_step` ran in the trace under `folder`."""
  (path,) = (folder / 'plugins' / 'profile').rglob('*.xplane.pb')
  data = jax.profiler.ProfileData.from_file(str(path))
  names = [e.name for p in data.planes for line in p.lines for e in line.events]
  return len({n for n in names if n.startswith('one_step')})


def _run(hook, steps):
  work = jax.jit(lambda x: x @ x)
  x = jnp.ones((8, 8))
  for step in steps:
    with jax.profiler.TraceAnnotation(f'one_step_{step}'):
      x = work(x)
    hook(step, {'x': x})
  hook.close()


@pytest.mark.parametrize(
  'steps,start,count',
  [((3, 5), 0, 3), ((1, 2), 0, 2), ((4, 4), 0, 1), (2, 0, 2), ((8, 99), 0, 13)],
)
def test_traces_the_steps_that_are_named(tmp_path, steps, start, count):
  _run(profiling.ProfileHook(steps, start, str(tmp_path)), range(start + 1, 21))
  assert _traced(tmp_path) == count


def test_traces_nothing_unless_asked(tmp_path):
  _run(profiling.ProfileHook(None, 0, str(tmp_path)), range(1, 4))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('steps', [(5, 3), (0, 2), (1, 2, 3), 'many', -1])
def test_refuses_what_means_nothing(tmp_path, steps):
  with pytest.raises(UserError, match='PROFILE_STEPS'):
    profiling.ProfileHook(steps, 0, str(tmp_path))

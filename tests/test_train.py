"""`t5x train` through its real door: pulse, exact resumption, goldens, signals.

The kill tests run the command in a process of its own and end it with SIGKILL at
moments drawn from a fixed seed; what the survivor ends with must be what an
uninterrupted run ends with, to the last bit. test_kills.py does it a hundred times.
"""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import HERE, STEPS, arrays, command, losses, run

from palm_t5x import checkpoints
from palm_t5x.metric_writers import read_metrics


def test_a_run_leaves_what_its_user_needs(straight):
  model_dir, process = straight
  assert checkpoints.steps_in(model_dir) == [6, 9, 12]
  for name in ('config.gin', 'metrics.jsonl', 'model-info.txt'):
    assert (model_dir / name).stat().st_size > 0
  assert 'Total number of parameters' in (model_dir / 'model-info.txt').read_text()
  assert list((model_dir / 'train').glob('events.out.tfevents.*'))
  assert sorted(losses(model_dir)) == list(range(1, STEPS + 1))
  assert f'step {STEPS}/{STEPS}' in process.stdout and 'Next:' in process.stdout
  assert 'bits_per_byte' in process.stdout
  assert 'Traceback' not in process.stderr


def test_golden_losses(straight):
  """First ten losses and closing bits per byte on the fixture corpus (rtol 1e-3).

  PALM_T5X_UPDATE_GOLDEN=1 rewrites them, for a change that is meant to change them.
  """
  model_dir, _ = straight
  path = HERE / 'golden' / 'fixture_train.json'
  closing = read_metrics(str(model_dir), 'training_eval/fixture_text')[-1]
  found = {
    'losses': [losses(model_dir)[step] for step in range(1, 11)],
    'bits_per_byte': closing['bits_per_byte'],
  }
  if os.environ.get('PALM_T5X_UPDATE_GOLDEN'):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + '\n')
  golden = json.loads(path.read_text())
  np.testing.assert_allclose(found['losses'], golden['losses'], rtol=1e-3)
  assert found['bits_per_byte'] == pytest.approx(golden['bits_per_byte'], rel=1e-3)


def kill_at_random_moments(workspace, model_dir, rng, kills, seconds, *bindings):
  """Starts the run and kills it `kills` times; the last start ends by itself."""
  killed = 0
  for attempt in range(kills * 3):
    process = subprocess.Popen(
      **command(workspace, model_dir, *bindings),
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    if killed == kills:
      output, _ = process.communicate(timeout=300)
      assert process.returncode == 0, output[-3000:]
      return attempt
    for line in process.stdout:
      if line.startswith('step '):
        break
    time.sleep(rng.uniform(*seconds))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      killed += 1
    process.stdout.close()
    process.wait()
  raise AssertionError(f'only {killed} of {kills} kills hit a running process')


def assert_same_end(one, other, steps=STEPS):
  expected = arrays(one / f'checkpoint_{steps}')
  found = arrays(other / f'checkpoint_{steps}')
  assert expected.keys() == found.keys() and len(expected) > 5
  for name, value in expected.items():
    np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_killed_runs_end_bit_identical(workspace, straight):
  model_dir = workspace / 'killed'
  kill_at_random_moments(
    workspace, model_dir, random.Random(0), kills=2, seconds=(0.0, 0.25)
  )
  assert_same_end(straight[0], model_dir)
  assert losses(model_dir) == losses(straight[0])


@pytest.mark.parametrize('devices', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_resumes_on_another_mesh_to_rounding(workspace, straight, devices):
  model_dir = workspace / f'devices{devices}'
  assert run(workspace, model_dir, 'TRAIN_STEPS=6').returncode == 0
  resumed = run(workspace, model_dir, devices=devices)
  assert resumed.returncode == 0, resumed.stderr[-3000:]
  assert 'equal to rounding' in resumed.stderr
  expected, found = losses(straight[0]), losses(model_dir)
  assert expected.keys() == found.keys()
  np.testing.assert_allclose(
    [found[s] for s in sorted(found)],
    [expected[s] for s in sorted(expected)],
    rtol=2e-5,
  )


def test_a_signal_saves_and_leaves(workspace, straight):
  model_dir = workspace / 'signalled'
  process = subprocess.Popen(
    **command(workspace, model_dir, 'TRAIN_STEPS=5000', 'CHECKPOINT_PERIOD=5000'),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  for line in process.stdout:
    if line.startswith('step '):
      break
  process.send_signal(signal.SIGTERM)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM
  (step,) = checkpoints.steps_in(model_dir)
  assert checkpoints.damage(model_dir / f'checkpoint_{step}') is None
  assert f'checkpoint_{step} is saved' in output
  assert 'SIGTERM: saving' in errors and 'Traceback' not in errors
  assert losses(model_dir)[1] == losses(straight[0])[1]

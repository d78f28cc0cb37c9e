"""A hundred kills, in training and in the writing of checkpoints: nothing is lost."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from runs import HERE, arrays, command, losses, run

from palm_t5x import checkpoints

STEPS = 300
SETTINGS = (f'TRAIN_STEPS={STEPS}', 'CHECKPOINT_PERIOD=2', 'EVAL_STEPS=1')
SETTINGS += ('FINAL_EVAL_STEPS=1', 'CHECKPOINT_KEEP=2')


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_kills_end_bit_identical(workspace):
  straight = workspace / 'never_killed'
  assert run(workspace, straight, *SETTINGS).returncode == 0
  folder = workspace / 'kills'
  folder.mkdir()
  options = command(workspace, folder, *SETTINGS)
  after_mode = options['args'][4:]
  arguments = [a for a in after_mode if not a.startswith('--gin.MODEL_DIR')]
  driver = [sys.executable, str(HERE / 'kill_driver.py'), '100', '25', '0', str(folder)]
  done = subprocess.run(
    [*driver, '--', *arguments],
    env=options['env'],
    cwd=workspace,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['kills'] >= 100 and result['in_writes'] >= 20, result
  expected = arrays(straight / f'checkpoint_{STEPS}')
  for killed in map(pathlib.Path, result['runs']):
    found = arrays(killed / f'checkpoint_{STEPS}')
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name], value, err_msg=f'{killed} {name}')
    assert losses(killed) == losses(straight)
    for step in checkpoints.steps_in(killed):
      assert checkpoints.damage(killed / f'checkpoint_{step}') is None
  print(result)

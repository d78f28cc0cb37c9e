"""The devices and threads that every test runs with, set before jax is imported.

Eight simulated devices let meshes be tested; NPROC pins the CPU's reduction order, so
that numbers agree between machines. Compiled programs are kept between runs.
"""

import os
import pathlib
import tempfile

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['NPROC'] = '2'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
# Eight simulated devices wait for each other on two cores: on a busy machine for longer
# than the 40 seconds after which XLA would end the process.
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'terminate_timeout' not in _FLAGS:
  _FLAGS += ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
if 'xla_force_host_platform_device_count' not in _FLAGS:
  _FLAGS += ' --xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = _FLAGS.strip()
_CACHE = pathlib.Path(tempfile.gettempdir(), f'palm_t5x_tests_{os.getuid()}', 'xla')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


# `runs` imports TensorFlow, which tests that need no run shall not wait for.


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
  """A folder with the tests' Gin file, and a cache that all runs share."""
  import runs

  folder = tmp_path_factory.mktemp('runs')
  runs.write_config(folder)
  return folder


@pytest.fixture(scope='session')
def straight(workspace):
  """An uninterrupted run of the tiny model: (MODEL_DIR, its process). Read only."""
  import runs

  model_dir = workspace / 'straight'
  process = runs.run(workspace, model_dir)
  assert process.returncode == 0, process.stderr[-3000:]
  return model_dir, process

"""Seconds from a command's start to help, to the first step, to the first step again.

    python benchmarks/startup.py [--repeats 3]

Whole processes are timed: `t5x --help`; palm_tiny's first step with an empty
compilation cache; the same with a warm one; and the first step after a resumption. Data
and vocabulary are prepared beforehand. Ratios are over importing jax and seqio alone,
which no command that trains can do without.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def seconds_until(arguments: list[str], begins: str | None, environment) -> float:
  """From start to the first line that begins so, or to the end; then kills it."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=environment,
    text=True,
  )
  for line in process.stdout:
    if begins and line.startswith(begins):
      break
  took = time.perf_counter() - start
  process.kill()
  process.wait()
  return took


def main():
  """Prints one row per case: the fastest of the repeats."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=3)
  repeats = parser.parse_args().repeats
  environment = dict(os.environ, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL='3')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    fresh, trained = folder / 'fresh', folder / 'trained'

    def train(model_dir, steps):
      return [
        '-m',
        'palm_t5x',
        'train',
        '--gin_file=palm_tiny.gin',
        f'--gin.MODEL_DIR={model_dir}',
        f'--gin.CACHE_DIR={folder / "cache"}',
        f'--gin.TRAIN_STEPS={steps}',
        '--gin.STATS_PERIOD=1',
        '--gin.EVAL_PERIOD=None',
        '--gin.FINAL_EVAL_STEPS=1',
        '--gin.SAMPLE_PROMPTS=()',
      ]

    seconds_until(train(trained, 2), None, environment)

    def case(name, arguments, begins=None, before=lambda: None):
      times = []
      for _ in range(repeats):
        before()
        times.append(seconds_until(arguments, begins, environment))
      return name, min(times)

    def empty_cache():
      shutil.rmtree(folder / 'cache' / 'xla', ignore_errors=True)
      shutil.rmtree(fresh, ignore_errors=True)

    rows = [
      case('import jax, seqio', ['-c', 'import jax, seqio']),
      case('t5x --help', ['-m', 'palm_t5x', '--help']),
      case('first step, cold cache', train(fresh, 50), 'step ', empty_cache),
      case(
        'first step, warm cache',
        train(fresh, 50),
        'step ',
        lambda: shutil.rmtree(fresh, ignore_errors=True),
      ),
      case('first step on resume', train(trained, 50), 'step '),
    ]
  base = rows[0][1]
  for name, took in rows:
    print(f'{name:24} {took:6.2f} s   {took / base:5.2f} x importing jax and seqio')


if __name__ == '__main__':
  main()

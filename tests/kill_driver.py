"""Kills a training run a hundred times; a program, started by test_kills.py.

    python kill_driver.py KILLS IN_WRITES SEED FOLDER -- TRAIN ARGUMENTS

Everything is imported once; each attempt is a fork from before any JAX backend exists,
so that it costs a start of training and no start of Python. An attempt is killed with
SIGKILL at a drawn moment: during start-up, during training, or, for at least IN_WRITES
of them, while a checkpoint is being written, which is proved by the temporary folder
that the dead process has left behind. A run that ends before all kills are done is kept
and the next one begins. The last run may end. Prints one line of JSON:
{"kills", "in_writes", "before_training", "runs": [folder, ...]}.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

import fixture_tasks  # noqa: F401 (imports seqio and TensorFlow once)
import orbax.checkpoint  # noqa: F401
from clu import metric_writers  # noqa: F401

from palm_t5x import (  # noqa: F401
  adafactor,
  decoding,
  eval,
  infer,
  main,
  modes,
  train,
)

PATIENCE = 120.0  # seconds in which an attempt must show some life


def start(model_dir: pathlib.Path, arguments: list[str]) -> int:
  """Forks a child that trains; returns its process id."""
  pid = os.fork()
  if pid:
    return pid
  log = os.open(model_dir.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)
  code = 70
  try:
    code = main.main(['train', *arguments, f'--gin.MODEL_DIR={model_dir}'])
  finally:
    os._exit(code)


def ended(pid: int) -> int | None:
  """The exit code of a child that has ended; None while it runs."""
  done, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if done else None


def wait_until(pid: int, happens, seconds: float = PATIENCE) -> int | None:
  """Polls until `happens()`, or the child ends (its exit code), or time is up."""
  limit = time.monotonic() + seconds
  while time.monotonic() < limit:
    if happens():
      return None
    code = ended(pid)
    if code is not None:
      return code
    time.sleep(0.0005)
  return None


def writing(model_dir: pathlib.Path) -> bool:
  """Whether a checkpoint is under way (or was, when its writer died)."""
  try:
    return any('.orbax-checkpoint-tmp' in name for name in os.listdir(model_dir))
  except FileNotFoundError:
    return False


def size_of(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0


def attempt(model_dir, arguments, rng, kind) -> tuple[int | None, bool]:
  """Starts the run and kills it; (exit code if it ended first, killed in a write)."""
  # What an earlier kill left is cleaned up by the child; only then is a write its own.
  left = writing(model_dir)
  pid = start(model_dir, arguments)
  code = None
  if kind == 'start':
    code = wait_until(pid, lambda: False, rng.uniform(0.0, 1.5))
  else:
    if left:
      code = wait_until(pid, lambda: not writing(model_dir))
    rows = size_of(model_dir / 'metrics.jsonl')
    if code is None and kind == 'write':
      code = wait_until(pid, lambda: writing(model_dir))
      code = (
        wait_until(pid, lambda: False, rng.uniform(0, 0.03)) if code is None else code
      )
    elif code is None:
      code = wait_until(pid, lambda: size_of(model_dir / 'metrics.jsonl') != rows)
      code = (
        wait_until(pid, lambda: False, rng.uniform(0, 0.4)) if code is None else code
      )
  if code is not None:
    return code, False
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  return None, kind == 'write' and writing(model_dir)


def drive(kills, in_writes, seed, folder, arguments) -> dict:
  """Runs and kills until enough is done, then lets the last run end."""
  rng = random.Random(seed)
  runs, done, proved, early = [folder / 'run_0'], 0, 0, 0
  while done < kills or proved < in_writes:
    kind = rng.choice(('write', 'write', 'training', 'training', 'start'))
    code, in_write = attempt(runs[-1], arguments, rng, kind)
    if code is None:
      done, proved, early = done + 1, proved + in_write, early + (kind == 'start')
    elif code == 0:
      runs.append(folder / f'run_{len(runs)}')
    else:
      raise SystemExit(f'{runs[-1]} ended with {code} after {done} kills')
  pid = start(runs[-1], arguments)
  code = wait_until(pid, lambda: False, 600)
  if code != 0:
    raise SystemExit(f'{runs[-1]} ended with {code} at last')
  return {
    'kills': done,
    'in_writes': proved,
    'before_training': early,
    'runs': [str(run) for run in runs],
  }


if __name__ == '__main__':
  cut = sys.argv.index('--')
  kills_, in_writes_, seed_ = map(int, sys.argv[1:4])
  result = drive(
    kills_, in_writes_, seed_, pathlib.Path(sys.argv[4]), sys.argv[cut + 1 :]
  )
  print(json.dumps(result))

"""Saving and restoring a checkpoint, against copying the same bytes as plain files.

    python benchmarks/checkpoint.py [--size 100m] [--repeats 3]

A save counts from the call until the folder has its final name (fsynced, checksummed);
a copy reads the checkpoint's files, writes them and fsyncs each. A restore counts from
the call until the arrays are on the device, checksums compared; its copy only reads.
What a save steals from training is the time of steps that run while one is written,
against the same steps without one: on accelerators only the call itself blocks, on a
CPU the writer also takes processor time from the steps.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time

import jax
from train_step import make_trainer

from palm_t5x import checkpoints
from palm_t5x.train_state import TrainStateInitializer


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Every file below a folder."""
  return sorted(path for path in folder.rglob('*') if path.is_file())


def copy_files(source: pathlib.Path, target: pathlib.Path) -> float:
  """Seconds to copy a folder's files, each fsynced."""
  start = time.perf_counter()
  shutil.copytree(source, target)
  for path in files_in(target):
    with path.open('rb') as f:
      os.fsync(f.fileno())
  return time.perf_counter() - start


def read_files(folder: pathlib.Path) -> float:
  """Seconds to read a folder's files, from the page cache as a restore does here."""
  start = time.perf_counter()
  for path in files_in(folder):
    path.read_bytes()
  return time.perf_counter() - start


def steps_per_second(one, batch, seconds: float) -> float:
  """Rate of train steps over at least so long."""
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    jax.block_until_ready(one.train(batch))
    count += 1
  return count / (time.perf_counter() - start)


def main():
  """Prints GB/s, ratios, and the share of training that a save takes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', default='100m')
  parser.add_argument('--repeats', type=int, default=3)
  options = parser.parse_args()
  one, batch, _ = make_trainer(options.size, 'float32')
  initializer = TrainStateInitializer(one.model, one.partitioner, {})
  jax.block_until_ready(one.train(batch))
  size = sum(x.nbytes for x in jax.tree.leaves(one.train_state.to_tree()))
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    rows = {name: [] for name in ('call', 'save', 'copy', 'restore', 'read')}
    with checkpoints.Checkpointer(str(folder / 'run'), keep=1) as checkpointer:
      for repeat in range(options.repeats):
        start = time.perf_counter()
        checkpointer.save(one.train_state, {})
        rows['call'].append(time.perf_counter() - start)
        checkpointer.wait()
        rows['save'].append(time.perf_counter() - start)
        (step,) = checkpoints.steps_in(folder / 'run')
        made = folder / 'run' / f'checkpoint_{step}'
        rows['copy'].append(copy_files(made, folder / f'copy{repeat}'))
        shutil.rmtree(folder / f'copy{repeat}')
        start = time.perf_counter()
        state, _ = checkpointer.restore_newest(initializer.abstract())
        jax.block_until_ready(state.to_tree())
        rows['restore'].append(time.perf_counter() - start)
        rows['read'].append(read_files(made))
        del state
        jax.block_until_ready(one.train(batch))
      best = {name: min(times) for name, times in rows.items()}
      for name, took in best.items():
        print(f'{name:8} {took:7.3f} s   {size / took / 1e9:6.2f} GB/s')
      print(f'save / copy      {best["copy"] / best["save"]:.2f} of its speed')
      print(f'restore / copy   {best["copy"] / best["restore"]:.2f} of its speed')
      print(f'restore / read   {best["read"] / best["restore"]:.2f} of its speed')

      seconds = 6 * best['save']
      alone = steps_per_second(one, batch, seconds)
      start = time.perf_counter()
      checkpointer.save(one.train_state, {})
      blocked = time.perf_counter() - start
      beside = steps_per_second(one, batch, seconds)
      checkpointer.wait()
    lost = blocked + seconds * (1 - beside / alone)
    step_seconds = 1 / alone
    print(
      f'a save blocks training for {blocked:.3f} s ({blocked / step_seconds:.2f} steps)'
    )
    print(f'and in all costs it {lost:.2f} s; every 1,000 steps that is', end=' ')
    print(f'{100 * lost / (1000 * step_seconds):.2f} % of the time')


if __name__ == '__main__':
  main()

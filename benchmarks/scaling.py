"""Bounds of PaLM's train step over 64 to 6,144 TPU v4 chips, at a fixed load per chip.

    python benchmarks/scaling.py                     # weak scaling; half an hour
    python benchmarks/scaling.py --own               # the three runs as they are
    python benchmarks/scaling.py --sizes 540b --chips 3072,6144 --plot scaling.png

Each row is `t5x precompile` of palm_{8b,62b,540b}.gin for one topology: the real
compiler's memory, and upper bounds from the chip's stated rates, beside what the paper
reached. They are bounds: no chip is asked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

GIB = 2.0**30
PAPER_TOKENS = {('540b', 6144): 238.3e3, ('540b', 3072): 238.3e3 / 1.95}  # section 4.1
PAPER_MFU = {('540b', 6144): 0.462}
ROWS_PER_CHIP = {'8b': 2, '62b': 1, '540b': 1 / 3}  # the last batch of each own run
MODEL_AXIS = {'8b': 4, '62b': 8, '540b': 12}
# Chips to (shape of a slice, slices). 12-way model parallelism needs a side of 12.
POWERS_OF_TWO = {
  64: ('4x4x4', 1),
  256: ('4x8x8', 1),
  1024: ('8x8x16', 1),
  2048: ('8x16x16', 1),
  6144: ('8x16x16', 3),
}
MACHINES = {
  '8b': POWERS_OF_TWO,
  '62b': POWERS_OF_TWO,
  '540b': {
    384: ('4x8x12', 1),
    768: ('8x8x12', 1),
    1536: ('8x12x16', 1),
    3072: ('12x16x16', 1),
    6144: ('12x16x16', 2),
  },
}


def bindings(size: str, chips: int) -> list[str]:
  """Gin bindings of a size on so many chips."""
  shape, slices = MACHINES[size][chips]
  model = MODEL_AXIS[size]
  mesh = 'partitioning.PjitPartitioner'
  return [
    f'TOPOLOGY=v4:{shape}',
    f'NUM_SLICES={slices}',
    f'{mesh}.num_partitions=None',
    f'{mesh}.ici_mesh_shape=(1, {chips // slices // model}, {model})',
    f'{mesh}.dcn_mesh_shape=({slices}, 1, 1)',
    f'PRECOMPILE_BATCH_SIZE={int(chips * ROWS_PER_CHIP[size])}',
  ]


def compiled(size: str, more: list[str]) -> dict[str, Any] | str:
  """The result of `t5x precompile` in a process of its own, or its error."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'palm_t5x', 'precompile']
    command += [f'--gin_file=palm_{size}.gin', f'--gin.MODEL_DIR={folder}']
    command += [f'--gin.{binding}' for binding in more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      return done.stderr.strip().splitlines()[-1].removeprefix('t5x: error: ')
    with open(os.path.join(folder, 'precompile.json')) as f:
      return json.load(f)


def heading() -> str:
  """The table's first lines."""
  names = (
    *('size', 'chips', 'mesh', 'batch', 'GiB of 30.75', 'compute s', 'HBM s', 'ICI s'),
    *('DCN s', 'overlapped: MFU', 'summed: MFU', 'tokens/s at most', 'paper'),
  )
  return f'|{"|".join(names)}|\n|{"|".join("-" * len(names))}|'


def row(size: str, result: dict[str, Any]) -> str:
  """One row of the table."""
  program, chips = result['programs'][-1], result['chips']
  bounds = program['bounds']
  seconds = bounds['seconds']
  ici = sum(v for k, v in seconds.items() if k.startswith('ici'))
  measured = PAPER_TOKENS.get((size, chips))
  paper = f'{measured / 1e3:.1f}K tokens/s' if measured else ''
  if (size, chips) in PAPER_MFU:
    paper += f', {100 * PAPER_MFU[size, chips]:.1f} % MFU'
  return '|' + '|'.join(
    (
      size.upper(),
      f'{chips:,}',
      'x'.join(str(n) for n in result['mesh'].values()),
      f'{program["batch_size"]:,}',
      f'{program["memory"]["total"] / GIB:.2f}',
      *(f'{v:.2f}' for v in (seconds['compute'], seconds['hbm'], ici, seconds['dcn'])),
      f'{100 * bounds["overlapped"]["mfu"]:.1f} %',
      f'{100 * bounds["summed"]["mfu"]:.1f} %',
      f'{bounds["overlapped"]["tokens_per_second"] / 1e3:,.1f}K',
      f'{paper}|',
    )
  )


def ratios(size: str, results: dict[int, dict[str, Any]]) -> list[str]:
  """How the summed bound scales, beside the paper's 1.95 from one pod to two."""
  rates = {
    chips: result['programs'][-1]['bounds']['summed']['tokens_per_second']
    for chips, result in results.items()
  }
  lines = []
  for few, many in zip(sorted(rates), sorted(rates)[1:], strict=False):
    gain = rates[many] / rates[few]
    line = (
      f'{size.upper()}, {few:,} to {many:,} chips: {gain:.2f} times the tokens '
      f'({100 * gain * few / many:.0f} % of proportional)'
    )
    if (size, few, many) == ('540b', 3072, 6144):
      line += '; the paper reached 1.95 times'
    lines.append(line)
  return lines


def plot(path: str, found: dict[str, dict[int, dict[str, Any]]]) -> None:
  """MFU bounds over chips, a line for each size."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(6, 4), dpi=110)
  for size, results in found.items():
    chips = sorted(results)
    each = [results[n]['programs'][-1]['bounds'] for n in chips]
    (line,) = axes.plot(
      chips, [100 * b['overlapped']['mfu'] for b in each], 'o-', label=size.upper()
    )
    axes.plot(
      chips, [100 * b['summed']['mfu'] for b in each], 'o--', color=line.get_color()
    )
  axes.plot([6144], [46.2], 'k*', label='PaLM 540B, measured (paper)')
  axes.set(
    xscale='log',
    xlabel='TPU v4 chips',
    ylabel='MFU at most, %',
    ylim=(0, 105),
    title='solid: all overlaps; dashed: nothing does',
  )
  axes.legend()
  figure.tight_layout()
  figure.savefig(path)


def main() -> None:
  """Compiles what the command line names, row by row."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', default='8b,62b,540b')
  parser.add_argument('--chips', help='only these, as 256,1024')
  parser.add_argument('--own', action='store_true', help='the runs as their files are')
  parser.add_argument('--plot', help='write a picture here')
  options = parser.parse_args()
  wanted = {int(n) for n in (options.chips or '').split(',') if n}
  found: dict[str, dict[int, dict[str, Any]]] = {}
  print(heading(), flush=True)
  for size in options.sizes.split(','):
    machines = [n for n in MACHINES[size] if not wanted or n in wanted]
    for more in [[]] if options.own else [bindings(size, n) for n in machines]:
      start = time.perf_counter()
      result = compiled(size, more)
      if isinstance(result, str):
        print(f'|{size.upper()}|{" ".join(more[:2])}: {result}|', flush=True)
        continue
      found.setdefault(size, {})[result['chips']] = result
      print(row(size, result), flush=True)
      print(f'{time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
  print()
  for size, results in found.items():
    print('\n'.join(ratios(size, results)))
  if options.plot:
    plot(options.plot, found)


if __name__ == '__main__':
  main()

"""Draws a run: bits per byte against training tokens, training and held-out text.

    python docs/assets/plot_run.py MODEL_DIR OUT.svg

Reads MODEL_DIR/metrics.jsonl and nothing else. The picture in README.md is the output
for the run of `make train`; the same file gives the same bytes.
"""

import argparse
import itertools
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from palm_t5x import metric_writers

TRAINING, OVERALL, PART = '#9bb4cc', '#1f4e79', '#c8732d'
STYLE = {
  'font.family': 'sans-serif',
  'font.size': 10,
  'svg.fonttype': 'none',  # text stays text
  'svg.hashsalt': 'palm_t5x',  # element names that do not change from run to run
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#999999',
  'axes.grid': True,
  'grid.color': '#eeeeee',
}


def training_curve(model_dir: str) -> tuple[list[float], list[float]]:
  """(millions of tokens read, bits per byte) of each progress line."""
  rows = metric_writers.read_metrics(model_dir, 'train')
  if not rows:
    raise SystemExit(f'{model_dir} holds no metrics.jsonl with training rows.')
  tokens = itertools.accumulate(row['tokens'] / 1e6 for row in rows)
  return list(tokens), [row['bits_per_byte'] for row in rows]


def held_out_curves(model_dir: str) -> dict[str, dict[int, float]]:
  """Task -> {step: bits per byte}; a mixture, which sums its tasks up, comes last.

  Evaluations during training read a part of each task, the last one all of it. So that
  its curve is one, the mixture's is the tasks' mean with the bytes of the last one.
  """
  curves: dict[str, dict[int, float]] = {}
  num_bytes: dict[str, float] = {}
  for row in metric_writers.read_metrics(model_dir):
    kind, _, task = row['split'].partition('/')
    if kind == 'training_eval' and row.get('bits_per_byte') is not None:
      curves.setdefault(task, {})[row['step']] = row['bits_per_byte']
      num_bytes[task] = row['bytes']
  if len(curves) > 1:
    *tasks, mixture = curves
    total = sum(num_bytes[task] for task in tasks)
    curves[mixture] = {
      step: sum(curves[task][step] * num_bytes[task] / total for task in tasks)
      for step in curves[mixture]
    }
  return curves


def spread(values: list[float], gap: float) -> list[float]:
  """The values moved apart, up and down alike, so that labels there do not overlap."""
  order = sorted(range(len(values)), key=values.__getitem__)
  placed = list(values)
  for _ in range(200):
    for low, high in itertools.pairwise(order):
      lack = gap - (placed[high] - placed[low])
      if lack > 0:
        placed[low] -= lack / 2
        placed[high] += lack / 2
  return placed


def draw(model_dir: str, path: str) -> None:
  """Writes the picture."""
  tokens, training = training_curve(model_dir)
  steps = [row['step'] for row in metric_writers.read_metrics(model_dir, 'train')]
  tokens_at = dict(zip(steps, tokens, strict=True))
  curves = held_out_curves(model_dir)
  overall = next(reversed(curves), None)
  with plt.rc_context(STYLE):
    figure, axes = plt.subplots(figsize=(7.6, 3.9))
    axes.plot(tokens, training, color=TRAINING, linewidth=1.8)
    labels = [('training', training[-1], TRAINING)]
    for task, curve in curves.items():
      x = [tokens_at[step] for step in curve if step in tokens_at]
      y = [value for step, value in curve.items() if step in tokens_at]
      colour = OVERALL if task == overall else PART
      width = 2.2 if task == overall else 1.0
      axes.plot(x, y, color=colour, linewidth=width, marker='o', markersize=2 * width)
      name = f'{task}, held out' if task == overall else task
      labels.append((name, y[-1], colour))
    bottom, top = 0.8 * min(value for _, value, _ in labels), 1.03 * max(training)
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, tokens[-1])
    places = spread([value for _, value, _ in labels], 0.06 * (top - bottom))
    for (name, value, colour), place in zip(labels, places, strict=True):
      axes.annotate(
        f'{name}  {value:.2f}',
        (tokens[-1], place),
        xytext=(8, 0),
        textcoords='offset points',
        color=colour,
        va='center',
        annotation_clip=False,
      )
    axes.set_xlabel('training tokens (millions)')
    axes.set_ylabel('bits per byte')
    figure.savefig(path, bbox_inches='tight', metadata={'Date': None, 'Creator': None})
    plt.close(figure)


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('model_dir', help='a run, such as runs/palm_tiny')
  parser.add_argument('out', help='the picture to write; .svg or .png')
  arguments = parser.parse_args()
  draw(arguments.model_dir, arguments.out)
  print(f'written to {arguments.out}')


if __name__ == '__main__':
  main()

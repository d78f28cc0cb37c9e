"""The mesh and the rules in force, as code inside a model sees them.

Most of the model leaves sharding to XLA's partitioner. What does better by hand (the
embedding lookup, the loss, a kernel, the exchange between pods) asks here how a tensor
is cut, and writes its part of the work under `jax.shard_map`.
"""

import contextlib
import math
from collections.abc import Iterable

import flax.linen as nn
import jax

POD = 'pod'  # the mesh axis of the slow network


def sizes() -> dict[str, int]:
  """Mesh axis -> devices along it; empty without a mesh."""
  return dict(jax.sharding.get_abstract_mesh().shape)


def size(axes: Iterable[str]) -> int:
  """Into how many parts these mesh axes together cut a dimension."""
  present = sizes()
  return math.prod(present.get(axis, 1) for axis in axes)


def axes_of(*names: str) -> list[tuple[str, ...]]:
  """For each logical axis of one tensor, the mesh axes that cut it, () for none."""
  rules = nn.get_logical_axis_rules()
  spec = tuple(nn.logical_to_mesh_axes(names) or ()) if rules else ()
  one = lambda axes: (axes,) if isinstance(axes, str) else tuple(axes or ())
  cut = [tuple(a for a in one(axes) if size((a,)) > 1) for axes in spec]
  return cut + [()] * (len(names) - len(cut))


def batch_axes(rows: int) -> tuple[str, ...]:
  """The mesh axes that cut `rows` rows of a batch; () if they do not divide them."""
  (axes,) = axes_of('batch')
  return axes if rows % size(axes) == 0 else ()


def num_pods() -> int:
  """Size of the `pod` axis of the mesh in force; 1 where there is none."""
  return size((POD,))


@contextlib.contextmanager
def inside_pod():
  """The rules in force without the `pod` axis, for code that runs once in each pod."""
  keep = lambda axes: tuple(a for a in axes if a != POD)
  rules = [
    (name, keep(axes) if isinstance(axes, tuple) else axes)
    for name, axes in nn.get_logical_axis_rules()
    if axes != POD
  ]
  with nn.logical_axis_rules(rules):
    yield

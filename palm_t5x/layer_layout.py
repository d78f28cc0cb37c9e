"""Stacked and separate layers: the same parameters in two layouts on disk.

A model with `scan_layers` keeps `layers/<name>` with one axis more, the first, of the
layers; without, each layer is a subtree, `layers_0/<name>`, `layers_1/<name>`, ... What
mirrors parameters, such as an optimizer's moments, follows them. `between` tells
whether a checkpoint lies in the other layout than the model wants it in.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

STACKED = 'layers'
_SEPARATE = re.compile(r'^layers_(\d+)$')


@dataclasses.dataclass(frozen=True)
class Layout:
  """The other layout, and the way from it.

  Attributes:
    stacked: whether the checkpoint is stacked (and the model is not).
    num_layers: how many layers the checkpoint has.
  """

  stacked: bool
  num_layers: int

  def stored(self, tree: Any) -> Any:
    """Shapes and shardings in the model's layout -> in the checkpoint's."""
    return self._map(tree, not self.stacked, _split_shape, _join_shapes)

  def convert(self, tree: Any, wanted: Any) -> Any:
    """Arrays in the checkpoint's layout -> in the model's, sharded as `wanted`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    move = jax.jit(
      lambda t: self._map(t, self.stacked, _split, lambda parts: jnp.stack(parts)),
      out_shardings=shardings,
    )
    return move(tree)

  def _map(self, node: Any, split: bool, take, join) -> Any:
    """Rewrites every level that holds layers; `split` says in which direction."""
    if not isinstance(node, dict):
      if isinstance(node, (tuple, list)):
        parts = [self._map(child, split, take, join) for child in node]
        return type(node)(*parts) if hasattr(node, '_fields') else type(node)(parts)
      return node
    numbered = sorted((int(m[1]), k) for k in node if (m := _SEPARATE.match(str(k))))
    taken = {STACKED} if split else {key for _, key in numbered}
    others = {
      key: self._map(child, split, take, join)
      for key, child in node.items()
      if key not in taken
    }
    if split and STACKED in node:
      for i in range(self.num_layers):
        others[f'{STACKED}_{i}'] = jax.tree.map(
          lambda leaf, i=i: take(leaf, i), node[STACKED]
        )
    elif not split and numbered:
      layers = [node[key] for _, key in numbered]
      others[STACKED] = jax.tree.map(lambda *parts: join(parts), *layers)
    return others


def between(stored: Any, wanted: Any) -> Layout | None:
  """How to get from a checkpoint's tree to the model's; None if they agree."""
  have, want = _layers(stored), _layers(wanted)
  if have is None or want is None or (have > 0) == (want > 0):
    return None
  if have:
    return Layout(stacked=False, num_layers=have)
  first = jax.tree.leaves(stored['target'][STACKED])[0]
  return Layout(stacked=True, num_layers=int(first.shape[0]))


def _layers(tree: Any) -> int | None:
  """How many separate layers a tree has; 0 if it is stacked; None for neither."""
  params = tree.get('target') if isinstance(tree, dict) else None
  if not isinstance(params, dict):
    return None
  separate = sum(bool(_SEPARATE.match(str(key))) for key in params)
  return separate or (0 if STACKED in params else None)


def _split(leaf: jax.Array, i: int) -> jax.Array:
  return leaf[i]


def _split_shape(leaf: jax.ShapeDtypeStruct, i: int) -> jax.ShapeDtypeStruct:
  del i
  spec = tuple(leaf.sharding.spec)[1:]
  return _shaped(leaf, leaf.shape[1:], spec)


def _join_shapes(parts: Any) -> jax.ShapeDtypeStruct:
  spec = (None, *tuple(parts[0].sharding.spec))
  return _shaped(parts[0], (len(parts), *parts[0].shape), spec)


def _shaped(
  leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...], spec: tuple[Any, ...]
) -> jax.ShapeDtypeStruct:
  sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

"""Looking tokens up in an embedding whose rows and columns lie on many devices.

XLA's partitioner gathers a table that is sharded over its rows badly: it moves whole
tables between pods. So where a mesh cuts the table, the lookup is written out: each
device answers for the rows it holds, and the answers are added up.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from palm_t5x import meshes


def lookup(table_VD, tokens_BT, dtype):
  """Rows of `table_VD` for `tokens_BT`: [B, T, D] in `dtype`, sharded as activations.

  The gradient is added up in the table's dtype on each device, and crosses between
  devices in `dtype`.
  """
  rows, columns = meshes.axes_of('vocab', 'embed')
  if not rows:
    return jnp.take(table_VD.astype(dtype), tokens_BT, axis=0)
  _, _, embed = meshes.axes_of('batch', 'length', 'embed')
  batch = meshes.batch_axes(tokens_BT.shape[0])  # () for a few, such as a prompt
  spec = PartitionSpec
  inside = functools.partial(_lookup_own_rows, rows, columns, embed, dtype)
  return jax.shard_map(
    inside,
    in_specs=(spec(rows, columns or None), spec(batch or None)),
    out_specs=spec(batch or None, None, embed or None),
    axis_names={*rows, *columns, *batch, *embed},
    check_vma=False,
  )(table_VD, tokens_BT)


def _lookup_own_rows(rows, columns, embed, dtype, table_VD, tokens_BT):
  """One device's share: its rows of the table, whole across columns."""
  wide, table_VD = table_VD.dtype, table_VD.astype(dtype)
  if columns:
    table_VD = lax.all_gather(table_VD, columns, axis=1, tiled=True)
  table_VD = table_VD.astype(wide)  # so that the gradient's additions are exact
  own_BT = tokens_BT - lax.axis_index(rows) * table_VD.shape[0]
  here_BT = (own_BT >= 0) & (own_BT < table_VD.shape[0])
  x_BTD = jnp.take(table_VD, jnp.where(here_BT, own_BT, 0), axis=0)
  x_BTD = jnp.where(here_BT[..., None], x_BTD, 0).astype(dtype)
  if embed == rows:
    return lax.psum_scatter(x_BTD, rows, scatter_dimension=2, tiled=True)
  x_BTD = lax.psum(x_BTD, rows)
  if embed:
    width = x_BTD.shape[2] // lax.psum(1, embed)
    x_BTD = lax.dynamic_slice_in_dim(x_BTD, lax.axis_index(embed) * width, width, 2)
  return x_BTD

"""Which device holds what: the mesh, one table of rules, and the partitioner.

A tensor's axes carry logical names ('batch', 'embed', 'heads', ...). A rule table maps
each name to an axis of the device mesh, and that table is all the sharding there is:
XLA's SPMD partitioner derives every collective from it. The mesh has the axes

  pod    pure data parallelism between pods, over the slow data-centre network
  data   data parallelism inside a pod; parameters may be sharded over it too (FSDP)
  model  tensor parallelism inside a layer

(PaLM paper §4: 2 pods, 256-way fully sharded data parallel, 12-way model parallel.)
T5X names: PjitPartitioner, standard_logical_axis_rules.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from palm_t5x.errors import UserError

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
MeshShape = tuple[int, ...]


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: Rules | None = None,
) -> list[tuple[str, str | tuple[str, ...] | None]]:
  """The default table (T5X's function of the same name).

  Rules are tried in order, and a mesh axis is given to a tensor once: with
  `('embed', 'model')` before `('embed', 'data')` the embed axis of a kernel whose heads
  already took `model` goes to `data`. PaLM's layout is 2 and 2.

  Args:
    activation_partitioning_dims: 2 shards the embed axis of activations over `model`.
    parameter_partitioning_dims: 2 shards the embed axis of parameters over `data`.
    additional_rules: appended to the table.

  Raises:
    UserError: if a number of dims is neither 1 nor 2.
  """
  for name, dims in (
    ('activation_partitioning_dims', activation_partitioning_dims),
    ('parameter_partitioning_dims', parameter_partitioning_dims),
  ):
    if dims not in (1, 2):
      raise UserError(f'{name} is {dims!r}: it can be 1 or 2.')
  embed = []
  if activation_partitioning_dims == 2:
    embed.append(('embed', 'model'))
  if parameter_partitioning_dims == 2:
    embed.append(('embed', 'data'))
  return [
    ('batch', ('pod', 'data')),
    ('vocab', 'model'),
    ('mlp', 'model'),
    ('heads', 'model'),
    ('kv', None),
    ('joined_kv', 'model'),
    *(embed or [('embed', None)]),
    # The only large kernel without heads: over all devices of a pod, as the others are.
    ('kv_embed', tuple(axis for _, axis in embed) or None),
    ('kv_heads', None),
    ('fused', None),
    ('relpos_buckets', None),
    ('abspos_buckets', None),
    ('length', None),
    ('layers', None),
    ('stack', None),
    ('mlp_activations', None),
    *(additional_rules or ()),
  ]


def is_logical_axes(x: Any) -> bool:
  """Whether x is a leaf of an axes tree: ('vocab', 'embed'), (None,) or ()."""
  plain = isinstance(x, tuple) and not hasattr(x, '_fields')
  return plain and all(e is None or isinstance(e, str) for e in x)


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def mesh_shape(
  num_devices: int,
  num_axes: int,
  num_partitions: int | None,
  ici_mesh_shape: MeshShape | None,
  dcn_mesh_shape: MeshShape | None,
) -> tuple[MeshShape, MeshShape]:
  """Resolves T5X's three ways to name a mesh into (ici shape, dcn shape).

  A 2-tuple means (data, model); otherwise the tuple has one entry per mesh axis.

  Raises:
    UserError: if the shape does not multiply to the number of devices.
  """
  if ici_mesh_shape is None:
    model = num_partitions or 1
    if num_devices % model:
      raise UserError(
        f'num_partitions={model} does not divide the {num_devices} devices; it can be '
        f'one of {_divisors(num_devices)}.'
      )
    ici: MeshShape = (num_devices // model, model)
  else:
    ici = tuple(ici_mesh_shape)
  dcn = tuple(dcn_mesh_shape) if dcn_mesh_shape else (1,) * num_axes

  def widen(shape: MeshShape, name: str) -> MeshShape:
    if len(shape) == num_axes:
      return shape
    if len(shape) == 2 and num_axes > 2:
      return (1,) * (num_axes - 2) + shape
    raise UserError(
      f'{name}={shape} has {len(shape)} entries: the mesh has {num_axes} axes (a pair '
      'means data and model).'
    )

  ici, dcn = widen(ici, 'ici_mesh_shape'), widen(dcn, 'dcn_mesh_shape')
  total = math.prod(ici) * math.prod(dcn)
  if total != num_devices:
    raise UserError(
      f'ici_mesh_shape={ici} times dcn_mesh_shape={dcn} needs {total} devices, but '
      f'there are {num_devices}. Bind a shape that multiplies to {num_devices}, or '
      'leave both unset and bind num_partitions.'
    )
  return ici, dcn


def _on_torus(create: Callable, devices: Sequence[Any], shape: MeshShape) -> np.ndarray:
  """Whole axes of the torus for each mesh axis, or parts of them if need be."""
  try:
    return create(devices=devices)
  except NotImplementedError:
    pass
  try:
    return create(devices=devices, allow_split_physical_axes=True)
  except NotImplementedError as error:
    raise UserError(
      f'ici_mesh_shape={shape} cannot be laid on the chips, which form a torus of '
      f'{tuple(np.ptp([d.coords for d in devices], axis=0) + 1)}: make each size a '
      'product of its sides or of their divisors.'
    ) from error


def create_mesh(
  devices: Sequence[Any],
  ici: MeshShape,
  dcn: MeshShape,
  axis_names: Sequence[str],
) -> Mesh:
  """Lays devices out so that each mesh axis gets neighbouring chips."""
  shape = tuple(i * d for i, d in zip(ici, dcn, strict=True))
  if devices[0].platform == 'cpu':
    array = np.asarray(devices).reshape(shape)
  elif math.prod(dcn) > 1 and getattr(devices[0], 'slice_index', None) is not None:
    create = functools.partial(mesh_utils.create_hybrid_device_mesh, ici, dcn)
    array = _on_torus(create, devices, ici)
  else:
    array = _on_torus(
      functools.partial(mesh_utils.create_device_mesh, shape), devices, shape
    )
  return Mesh(array, tuple(axis_names))


@dataclasses.dataclass
class PjitPartitioner:
  """Places arrays and compiles functions on a device mesh (T5X's PjitPartitioner).

  Attributes:
    num_partitions: size of the `model` axis when no mesh shape is given.
    model_parallel_submesh: T5X's other name for it: the product of its entries.
    ici_mesh_shape: shape of the mesh inside a pod (fast network).
    dcn_mesh_shape: how many pods, per mesh axis (slow network).
    logical_axis_rules: the table; `standard_logical_axis_rules()` by default.
    mesh_axis_names: names of the mesh axes, outermost first.
    params_on_devices: accepted for T5X; parameters are always on the devices.
    backend: JAX platform to take the devices from; None for the default one.
    devices: the devices themselves, such as those of a machine that is elsewhere.
  """

  num_partitions: int | None = None
  model_parallel_submesh: MeshShape | None = None
  params_on_devices: bool = True
  backend: str | None = None
  ici_mesh_shape: MeshShape | None = None
  dcn_mesh_shape: MeshShape | None = None
  logical_axis_rules: Rules | None = None
  mesh_axis_names: Sequence[str] = ('pod', 'data', 'model')
  devices: Sequence[Any] | None = None

  def __post_init__(self):
    rules = self.logical_axis_rules
    if rules is None:
      rules = standard_logical_axis_rules()
    if 'kv_embed' not in dict(rules):  # a table written for T5X does not know it
      rules = [*rules, *(('kv_embed', axes) for name, axes in rules if name == 'embed')]
    self.rules = [(name, self._known_axes(axes)) for name, axes in rules]

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The device mesh; made when first asked for, so describing one needs no devices.

    Raises:
      UserError: if the devices there are do not make up the mesh that is asked for.
    """
    names = tuple(self.mesh_axis_names)
    devices = self.devices or jax.devices(self.backend)
    partitions = self.num_partitions
    if self.model_parallel_submesh:
      partitions = math.prod(self.model_parallel_submesh)
    ici, dcn = mesh_shape(
      len(devices), len(names), partitions, self.ici_mesh_shape, self.dcn_mesh_shape
    )
    return create_mesh(devices, ici, dcn, names)

  def _known_axes(self, axes):
    """Drops mesh axes that this mesh does not have, such as `pod` on a plain mesh."""
    if isinstance(axes, str):
      return axes if axes in self.mesh_axis_names else None
    if axes is None:
      return None
    return tuple(a for a in axes if a in self.mesh_axis_names) or None

  @contextlib.contextmanager
  def context(self):
    """Mesh and rules in force: trace and compile inside it."""
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
      yield

  def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes for a tensor with these logical axes."""
    return nn.logical_to_mesh_axes(tuple(logical_axes), self.rules) or PartitionSpec()

  def sharding(self, logical_axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of a tensor with these logical axes; () is replicated."""
    return NamedSharding(self.mesh, self.spec(logical_axes))

  def shardings(self, axes_tree: Any, shapes: Any = None) -> Any:
    """Shardings for a tree of logical-axis tuples, checked against `shapes` if given.

    Raises:
      UserError: if an axis of a tensor does not divide by its mesh axis.
    """
    tree = jax.tree.map(self.sharding, axes_tree, is_leaf=is_logical_axes)
    if shapes is None:
      return tree
    return jax.tree_util.tree_map_with_path(self._fitted, tree, shapes)

  def _fitted(self, path, sharding: NamedSharding, shape: Any) -> NamedSharding:
    """The sharding, over fewer mesh axes where a dimension does not divide by several.

    Raises:
      UserError: if it does not divide by one.
    """
    spec = list(sharding.spec)
    for axis, (size, names) in enumerate(zip(shape.shape, spec, strict=False)):
      names = (names,) if isinstance(names, str) else (names or ())
      parts = lambda names: math.prod(self.mesh.shape[n] for n in names)
      while len(names) > 1 and size % parts(names):
        names = names[:-1]
      spec[axis] = names if len(names) > 1 else (names[0] if names else None)
      parts = parts(names)
      if size % parts:
        raise UserError(
          f'{jax.tree_util.keystr(path, simple=True, separator="/")} has shape '
          f'{tuple(shape.shape)}; its axis {axis} of size {size} does not divide by '
          f'the {parts} devices of mesh axis {"x".join(names)}. Sizes that do: '
          f'{[d for d in _divisors(size) if d <= len(self.mesh.devices.flat)]}.'
        )
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  @property
  def data_sharding(self) -> NamedSharding:
    """Rows of a batch over the data axes, everything else whole."""
    return self.sharding(('batch',))

  @property
  def num_data_shards(self) -> int:
    """Into how many parts the mesh cuts a batch."""
    names = self.data_sharding.spec[0] if self.data_sharding.spec else None
    names = (names,) if isinstance(names, str) else (names or ())
    return math.prod(self.mesh.shape[n] for n in names)

  def check_batch(
    self,
    batch_size: int,
    num_microbatches: int | None = None,
    name: str = 'BATCH_SIZE',
  ):
    """Refuses a batch that the mesh cannot cut into equal parts.

    Raises:
      UserError: naming the batch, the number it must divide by, and two that would do.
    """
    parts = self.num_data_shards * (num_microbatches or 1)
    if batch_size % parts or batch_size < 1:
      below = max(parts, batch_size // parts * parts)
      micro = f' times {num_microbatches} microbatches' if num_microbatches else ''
      raise UserError(
        f'{name}={batch_size} does not divide by {parts} (the mesh '
        f'{dict(self.mesh.shape)} cuts a batch into {self.num_data_shards} '
        f'parts{micro}). Use {below} or {below + parts}.'
      )

  def shard_batch(
    self, batch_size: int, read: Callable[[np.ndarray], Mapping[str, np.ndarray]]
  ) -> dict[str, jax.Array]:
    """Builds a global batch of which this process reads only its own rows.

    Args:
      batch_size: rows of the global batch.
      read: maps row numbers inside the batch to {feature: [rows, ...]}.
    """
    sharding = self.data_sharding
    index_map = sharding.addressable_devices_indices_map((batch_size,))
    spans = {d: range(*index[0].indices(batch_size)) for d, index in index_map.items()}
    wanted = sorted({row for span in spans.values() for row in span})
    local = read(np.asarray(wanted, np.int64))
    place = {row: i for i, row in enumerate(wanted)}

    def to_global(values: np.ndarray) -> jax.Array:
      shards = [
        jax.device_put(values[place[span[0]] : place[span[0]] + len(span)], device)
        for device, span in spans.items()
      ]
      return jax.make_array_from_single_device_arrays(
        (batch_size, *values.shape[1:]), sharding, shards
      )

    return {name: to_global(values) for name, values in local.items()}

  def partition(
    self, fn: Callable, in_shardings=None, out_shardings=None, **jit_kwargs
  ) -> Callable:
    """`jax.jit` under this mesh and these rules; `.lower` as of a jitted function."""
    kwargs = dict(jit_kwargs)
    if in_shardings is not None:
      kwargs['in_shardings'] = in_shardings
    if out_shardings is not None:
      kwargs['out_shardings'] = out_shardings
    jitted = jax.jit(fn, **kwargs)

    def call(*args, **call_kwargs):
      with self.context():
        return jitted(*args, **call_kwargs)

    def lower(*args, **call_kwargs):
      with self.context():
        return jitted.lower(*args, **call_kwargs)

    call.lower = lower
    return call

"""Devices of machines that are not here: TPU slices by name, and simulated CPUs.

`v4:12x16x16` is a slice of 12 x 16 x 16 chips of TPU v4, `cpu:64` are 64 simulated CPU
devices. libtpu, without a TPU, knows the former and compiles for them.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from palm_t5x import compiled_program, environment
from palm_t5x.errors import Failure, UserError
from palm_t5x.gin_files import did_you_mean

# By kind: axes of the torus, and options for libtpu. A chip of v4 or v5p has two cores
# that JAX uses as one device ('megacore').
_MEGACORE = {'chip_config_name': 'megacore'}
KINDS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
  'v4': (3, _MEGACORE),
  'v5p': (3, _MEGACORE),
  'v5e': (2, {}),
  'v6e': (2, {}),
}
EXAMPLES = (
  *('v4:2x2x1', 'v4:2x2x2', 'v4:4x4x4', 'v4:8x8x8', 'v4:8x8x16', 'v4:12x16x16'),
  *('v4:16x16x16', 'v5p:2x2x1', 'v5p:4x4x4', 'v5p:8x16x16', 'v5p:16x16x24'),
  *('v5e:4x4', 'v5e:8x8', 'v5e:16x16', 'v6e:4x4', 'v6e:8x8', 'v6e:16x16', 'cpu:8'),
)
# XLA's CPU client simulates no more in one process, except as one of several.
_MAX_SIMULATED = 2048


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for.

  Attributes:
    name: as it was asked for; 'here' for the devices of this machine.
    num_slices: slices, joined by the data-centre network.
    platform: 'tpu', 'cpu' or 'gpu'.
    kind: of chip, a key of KINDS, or None.
    devices: all of them.
  """

  name: str
  num_slices: int
  platform: str
  kind: str | None
  devices: Sequence[Any]

  @property
  def _knows_slices(self) -> bool:
    return self.platform == 'tpu' and self.num_slices > 1

  def mesh(self, mesh: Any) -> compiled_program.Mesh:
    """What device numbers in a program for this jax Mesh mean."""
    each = len(self.devices) // self.num_slices
    number = {
      device.id: device.slice_index if self._knows_slices else place // each
      for place, device in enumerate(self.devices)
    }
    slices = np.vectorize(lambda device: number[device.id])(mesh.devices)
    spans = {name: _distinct(slices, axis) for axis, name in enumerate(mesh.axis_names)}
    across = {name: n for name, n in spans.items() if n > 1}
    return compiled_program.Mesh(dict(mesh.shape), across)

  def links(self, mesh: Any) -> dict[str, int]:
    """Mesh axis, or several joined by '+', to the links of a chip that lie along it."""
    if self.platform != 'tpu':
      return {}
    coordinates = np.array([d.coords for d in mesh.devices.flat])
    coordinates = coordinates.reshape(*mesh.devices.shape, -1)
    found = {}
    names = mesh.axis_names
    for chosen in range(1, 2 ** len(names)):
      axes = [i for i in range(len(names)) if chosen >> i & 1]
      varies = sum(
        (coordinates != coordinates.take([0], axis=axis)).any(
          axis=tuple(range(len(names)))
        )
        for axis in axes
      )
      found['+'.join(names[i] for i in axes)] = 2 * int(np.count_nonzero(varies))
    return found


def _distinct(slices: np.ndarray, axis: int) -> int:
  """Slices that one line of devices along a mesh axis runs through."""
  line = np.moveaxis(slices, axis, 0).reshape(slices.shape[axis], -1)
  return len(np.unique(line[:, 0]))


def find(
  name: str | None, num_slices: int = 1, cache_dir: str | None = None, backend=None
) -> Topology:
  """The devices of a topology.

  Args:
    name: 'v4:2x2x2', 'cpu:8', or None for the devices of this machine.
    num_slices: how many such slices.
    cache_dir: where libtpu may write its logs.
    backend: platform of this machine's devices, where name is None.

  Raises:
    UserError: for a name that is not one, with those near to it.
    Failure: if libtpu is not installed, or this process has too few CPU devices.
  """
  if type(num_slices) is not int or num_slices < 1:
    raise UserError(f'NUM_SLICES={num_slices!r}: it is a number of slices, 1 or more.')
  if name is None:
    return _here(backend, num_slices)
  kind, shape = _parse(name)
  if kind == 'cpu':
    devices = _simulated(name, shape[0] * num_slices)
    return Topology(name, num_slices, 'cpu', None, devices)
  devices = _described(name, kind, shape, num_slices, cache_dir)
  return Topology(name, num_slices, 'tpu', kind, devices)


def _parse(name: Any) -> tuple[str, tuple[int, ...]]:
  found = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)', name) if _is_text(name) else None
  kind = found[1] if found else ''
  if kind in KINDS or kind == 'cpu':
    shape = tuple(int(n) for n in found[2].split('x'))
    axes = 1 if kind == 'cpu' else KINDS[kind][0]
    if len(shape) == axes and 0 not in shape:
      return kind, shape
  raise _unknown(name)


def _is_text(name: Any) -> bool:
  return isinstance(name, str)


def _unknown(name: Any, why: str = '') -> UserError:
  hint = did_you_mean(str(name), EXAMPLES)
  return UserError(
    f'TOPOLOGY={name!r} is unknown{why}: it is a kind of chip and the shape of a '
    f'slice, such as {", ".join(EXAMPLES)}.{hint}'
  )


def _here(backend: str | None, num_slices: int) -> Topology:
  try:
    with held_output():  # of backends that find nothing here
      devices = jax.devices(backend)
  except RuntimeError as error:
    raise UserError(
      f'TOPOLOGY is not bound, and this machine has no {backend}: name the machine to '
      "compile for, as --gin.TOPOLOGY='v4:2x2x2' (with T5X's own file "
      "--gin.precompile.topology_name='v4:2x2x2')."
    ) from error
  if num_slices > 1:
    raise UserError(
      f'NUM_SLICES={num_slices} needs TOPOLOGY, the shape of one slice, such as '
      "--gin.TOPOLOGY='v4:2x2x2'."
    )
  return Topology('here', 1, devices[0].platform, None, devices)


def _simulated(name: str, count: int) -> Sequence[Any]:
  """The first CPU devices of this process, which `environment` asked XLA for."""
  devices = _cpu_devices(count)
  if len(devices) < count:
    raise Failure(
      f'TOPOLOGY={name} asks for {count} devices in all, but XLA simulates '
      f'{len(devices)} in this process: set '
      f'XLA_FLAGS=--xla_force_host_platform_device_count={count}.'
    )
  return devices[:count]


def _cpu_devices(count: int) -> Sequence[Any]:
  if count <= _MAX_SIMULATED:
    return jax.devices('cpu')
  # One process refuses to compile for more, unless it believes to be one of several.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=1, process_id=0)
  return jax.devices('cpu')


def _described(name, kind: str, shape, num_slices: int, cache_dir) -> Sequence[Any]:
  """What libtpu says of a topology. Its own lines do not reach the user."""
  if importlib.util.find_spec('libtpu') is None:
    raise Failure(
      f'TOPOLOGY={name} needs libtpu, which is not installed: '
      "pip install 'palm_t5x[tpu]' (or bind a TOPOLOGY of simulated devices, such as "
      "'cpu:8')."
    )
  environment.quiet_libtpu(cache_dir)
  try:
    with held_output():
      described = topologies.get_topology_desc(
        platform='tpu',
        topology_name=name,
        wrap=(True,) * 3,
        num_slices=num_slices,
        chips_per_host_bounds=(min(2, shape[0]), min(2, shape[1]), 1),
        **KINDS[kind][1],
      )
    return described.devices
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    said = str(error).splitlines()[0].partition(': ')
    raise _unknown(name, f' to libtpu ({(said[2] or said[0]).rstrip(".")})') from error


@contextlib.contextmanager
def held_output() -> Iterator[None]:
  """Holds what is written to file descriptors 1 and 2: a compiler's own chatter."""
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    saved = [os.dup(1), os.dup(2)]
  except OSError:  # there is none
    yield
    return
  with tempfile.TemporaryFile() as held:
    for number in (1, 2):
      os.dup2(held.fileno(), number)
    try:
      yield
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      for number, old in zip((1, 2), saved, strict=True):
        os.dup2(old, number)
        os.close(old)

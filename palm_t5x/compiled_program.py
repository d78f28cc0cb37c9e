"""What a compiled program does in one run, counted from its text.

Matrix products in FLOPs, collectives in bytes by mesh axis, bytes that products move
through memory, and what lies in memory at the end: per chip, with every loop counted as
often as it turns. XLA's own `cost_analysis` counts a loop's body once.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from palm_t5x import hlo, hlo_flops, hlo_groups, hlo_traffic
from palm_t5x.hlo import Array, Instruction, Module
from palm_t5x.hlo_loops import Frame, Loops

KINDS = (
  *('all-gather', 'reduce-scatter', 'all-reduce', 'collective-permute'),
  *('all-to-all', 'ragged-all-to-all', 'collective-broadcast'),
)
DCN, ICI = 'dcn', 'ici'


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, or all of a kind put together.

  Attributes:
    kind: one of KINDS, or 'transfer' for a plain send between slices.
    axes: the mesh axes over which the members of a group differ.
    network: 'ici' inside a slice, 'dcn' between slices.
    dtype: of what is moved.
    size: members of a group.
    result_bytes: of one chip's results, all runs together.
    operand_bytes: of what one chip puts in, all runs together.
    wire_bytes: that each chip sends, all runs together (ring algorithms).
    count: runs in one run of the program.
  """

  kind: str
  axes: tuple[str, ...]
  network: str
  dtype: str
  size: int
  result_bytes: int
  operand_bytes: int
  wire_bytes: float
  count: int

  @property
  def axis(self) -> str:
    """The axes as one word, such as 'data' or 'data+model'."""
    return '+'.join(self.axes)


class Kernel(NamedTuple):
  """A hand-written kernel (Pallas): XLA's text has its shapes and not its products."""

  name: str
  flops: float | None
  count: int


@dataclasses.dataclass
class Program:
  """The account of one program; everything is for one chip and one run.

  Attributes:
    flops: of matrix products in XLA's own operations.
    kernels: hand-written kernels by name; their FLOPs follow a rule.
    collectives: every kind on every axis.
    product_bytes: that matrix products read and write in the chip's main memory.
    arguments: (name, bytes in memory) of each argument, such as 'state.params...'.
    saved_bytes: activations that forward loops hand to backward loops.
  """

  flops: float
  kernels: tuple[Kernel, ...]
  collectives: tuple[Collective, ...]
  product_bytes: float
  arguments: tuple[tuple[str, int], ...]
  saved_bytes: int

  @property
  def kernel_flops(self) -> float:
    """FLOPs of all kernels that a rule is known for."""
    return sum(kernel.flops or 0.0 for kernel in self.kernels)

  def argument_bytes(self, prefix: str) -> int:
    """Bytes of the arguments whose name begins so."""
    return sum(size for name, size in self.arguments if name.startswith(prefix))

  def wire_bytes(self, network: str, axis: str | None = None) -> float:
    """Bytes that a chip sends on a network, or on one mesh axis of it."""
    return sum(
      c.wire_bytes
      for c in self.collectives
      if c.network == network and axis in (None, c.axis)
    )


def wire_bytes(kind: str, size: int, result_bytes: int, operand_bytes: int) -> float:
  """Bytes that each of `size` chips sends, by the ring algorithm of the kind."""
  share = (size - 1) / size
  return {
    'all-gather': share * result_bytes,
    'reduce-scatter': share * operand_bytes,
    'all-reduce': 2 * share * operand_bytes,
    'all-to-all': share * operand_bytes,
    'ragged-all-to-all': share * operand_bytes,
  }.get(kind, float(operand_bytes))


class Mesh(NamedTuple):
  """How devices are numbered: mesh axes in order, and those that span slices.

  Attributes:
    axes: name to size, outermost first; a device's number counts along them.
    slices: name to the number of slices along the axis, where there are several.
  """

  axes: Mapping[str, int]
  slices: Mapping[str, int]

  @property
  def in_slice(self) -> dict[str, int]:
    """Name to size inside one slice."""
    return {name: n // self.slices.get(name, 1) for name, n in self.axes.items()}


def analyze(text: str, mesh: Mesh) -> Program:
  """Counts what the program in `text` does.

  Args:
    text: an optimized HLO module, as `compiled.as_text()` gives it.
    mesh: what its device numbers mean.

  Raises:
    hlo_loops.UnknownLoopError: for a loop whose number of trips it does not tell.
    ValueError: for a text that is no HLO module.
  """
  return _Account(hlo.parse(text), mesh).program()


class _Total:
  """FLOPs, bytes, collectives and kernels of one computation, loops included."""

  def __init__(self):
    self.flops = self.product_bytes = 0.0
    self.collectives: list[Collective] = []
    self.kernels: list[Kernel] = []

  def add(self, other: '_Total', times: int = 1) -> None:
    """Adds what another computation does in `times` runs."""
    self.flops += times * other.flops
    self.product_bytes += times * other.product_bytes
    self.collectives += [_times(c, times) for c in other.collectives]
    self.kernels += [
      Kernel(k.name, k.flops and k.flops * times, k.count * times)
      for k in other.kernels
    ]

  def weight(self) -> tuple[float, float]:
    """For choosing the costliest branch."""
    return self.flops, sum(c.wire_bytes for c in self.collectives)


class _Account:
  def __init__(self, module: Module, mesh: Mesh):
    self._module, self._mesh, self._loops = module, mesh, Loops(module)
    self._saved = 0

  def program(self) -> Program:
    total = self._computation(Frame(self._module.entry))
    arguments = []
    for instruction in self._module.computations[self._module.entry].values():
      if instruction.opcode == 'parameter':
        size = sum(array.padded_bytes for array in instruction.arrays)
        arguments.append((instruction.op_name or instruction.name, size))
    return Program(
      flops=total.flops,
      kernels=tuple(_joined_kernels(total.kernels)),
      collectives=tuple(_joined(total.collectives)),
      product_bytes=total.product_bytes,
      arguments=tuple(arguments),
      saved_bytes=self._saved,
    )

  def _computation(self, frame: Frame) -> _Total:
    total = _Total()
    computation = self._module.computations[frame.computation]
    for instruction in computation.values():
      self._instruction(instruction, computation, frame, total)
    return total

  def _instruction(self, instruction, computation, frame: Frame, total: _Total):
    opcode = instruction.opcode
    if opcode in ('dot', 'convolution'):
      total.flops += hlo_flops.flops(instruction, computation)
      if not _in_fusion(frame):
        total.product_bytes += hlo_traffic.of_product(instruction, computation)
    elif opcode == 'while':
      trips = self._loops.trips(instruction, frame)
      body = instruction.attribute('body').lstrip('%')
      total.add(self._computation(Frame(body, instruction, frame)), trips)
      self._saved += self._stacked(instruction, trips)
    elif opcode == 'conditional':
      branches = [
        self._computation(Frame(name, instruction, frame))
        for name in instruction.called
      ]
      total.add(max(branches, key=_Total.weight))
    elif opcode in ('fusion', 'call', 'async-start'):
      inner = self._computation(Frame(instruction.called[0], instruction, frame))
      if opcode == 'fusion' and inner.flops and not _in_fusion(frame):
        inner.product_bytes = hlo_traffic.of_fusion(instruction, self._module)
      total.add(inner)
    elif opcode == 'custom-call':
      if instruction.attribute('custom_call_target') == '"tpu_custom_call"':
        total.kernels.append(_kernel(instruction, computation))
    elif opcode == 'send':
      total.collectives += self._send(instruction, computation)
    else:
      kind = opcode.removesuffix('-start')
      if kind in KINDS:
        total.collectives += self._collective(kind, instruction, computation, frame)

  def _collective(self, kind, instruction, computation, frame) -> Iterator[Collective]:
    if 'chain_id=' in instruction.attributes and not _starts_a_chain(computation):
      return  # a later piece of a collective that was counted where it began
    operands = [computation[name].arrays[0] for name in instruction.operands]
    results = instruction.arrays
    if instruction.opcode.endswith('-start') and kind != 'all-reduce':
      results = results[len(operands) : 2 * len(operands)]
    elif kind == 'all-reduce':
      scattered = _scattered(computation, instruction)
      if scattered and _in_fusion(frame):
        kind, results = 'reduce-scatter', [scattered]
    axes, size = hlo_groups.axes(instruction, self._mesh.axes, self._mesh.in_slice)
    if size < 2:
      return
    network = DCN if set(axes) & set(self._mesh.slices) else ICI
    for operand, result in zip(operands, results, strict=False):
      put, got = operand.bytes, result.bytes
      wire = wire_bytes(kind, size, got, put)
      yield Collective(kind, axes, network, operand.dtype, size, got, put, wire, 1)

  def _send(self, instruction, computation) -> Iterator[Collective]:
    """Megascale: what one slice sends to the others over the data-centre network."""
    how = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if not how:
      return
    data = computation[instruction.operands[0]].arrays[0]
    axes = tuple(self._mesh.slices)
    size = max(2, hlo_groups.product(self._mesh.slices.values()))
    kind = how[1].lower().replace('_', '-')
    kind = kind if kind in KINDS else 'transfer'
    wire = wire_bytes(kind, size, data.bytes * size, data.bytes)
    yield Collective(
      *(kind, axes, DCN, data.dtype, size, data.bytes, data.bytes, wire, 1)
    )

  def _stacked(self, loop: Instruction, trips: int) -> int:
    """Bytes that a forward loop leaves stacked, one piece of each trip."""
    if 'transpose(' in loop.op_name or trips < 2:
      return 0
    return sum(
      array.padded_bytes
      for index, array in enumerate(loop.arrays)
      if len(array.dims) > 1
      and array.dims[0] == trips
      and not self._loops.carried_unchanged(loop, index)
    )


def _in_fusion(frame: Frame) -> bool:
  return frame.caller is not None and frame.caller.opcode == 'fusion'


def _starts_a_chain(computation) -> bool:
  """Whether the fusion begins an asynchronous collective that others carry on."""
  return any('"AsyncCollectiveStart"' in i.attributes for i in computation.values())


def _scattered(computation, reduce: Instruction) -> Array | None:
  """What a fused all-reduce keeps, where that is only this chip's slice of it."""
  names = {reduce.name}
  for instruction in computation.values():
    if not names & set(instruction.operands[:1]):
      continue
    if instruction.opcode == 'dynamic-slice':
      return instruction.arrays[0]
    if instruction.opcode in ('bitcast', 'copy', 'reshape', 'convert', 'transpose'):
      names.add(instruction.name)
  return None


def _kernel(instruction: Instruction, computation) -> Kernel:
  name, flops = hlo_flops.kernel(instruction, computation)
  return Kernel(name, flops, 1)


def _times(c: Collective, n: int) -> Collective:
  return dataclasses.replace(
    c,
    result_bytes=c.result_bytes * n,
    operand_bytes=c.operand_bytes * n,
    wire_bytes=c.wire_bytes * n,
    count=c.count * n,
  )


def _joined(parts: list[Collective]) -> list[Collective]:
  """Adds up what has kind, axes, network, dtype and group size in common."""
  rows: dict[tuple, Collective] = {}
  for c in parts:
    key = (c.network, c.axes, c.kind, c.dtype, c.size)
    old = rows.get(key)
    rows[key] = c if old is None else _sum(old, c)
  return sorted(rows.values(), key=lambda c: (c.network, c.axes, -c.wire_bytes))


def _sum(a: Collective, b: Collective) -> Collective:
  return dataclasses.replace(
    a,
    result_bytes=a.result_bytes + b.result_bytes,
    operand_bytes=a.operand_bytes + b.operand_bytes,
    wire_bytes=a.wire_bytes + b.wire_bytes,
    count=a.count + b.count,
  )


def _joined_kernels(parts: list[Kernel]) -> list[Kernel]:
  rows: dict[str, Kernel] = {}
  for k in parts:
    old = rows.get(k.name)
    if old is not None:
      known = None not in (old.flops, k.flops)
      flops = old.flops + k.flops if known else None
      k = Kernel(k.name, flops, old.count + k.count)
    rows[k.name] = k
  return sorted(rows.values())

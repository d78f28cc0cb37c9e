"""Reads the text of an optimized HLO module: its computations and instructions.

Works on `compiled.as_text()` and on dumps of XLA, of CPU and of TPU. Nothing is
computed by XLA here, so that a program for 6,144 chips is read on a laptop.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

ITEM_BITS = {
  'pred': 8,
  **{f'{kind}{bits}': bits for kind in 'su' for bits in (2, 4, 8, 16, 32, 64)},
  **{'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128},
  **{'token': 0, 'opaque': 0},
}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([^\s=]+) = ')
_ARRAY = re.compile(r'([a-z]+[0-9a-z]*)\[([0-9,]*)\](?:\{([^}]*)\})?')
_OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'(?:calls|body|condition|to_apply|branch_computations|true_computation'
  r'|false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  """Type and layout of one array in a program.

  Attributes:
    dtype: as HLO writes it, such as 'bf16'.
    dims: sizes.
    layout: minor-to-major order and tiles, as written between braces, or ''.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: str = ''

  @property
  def elements(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of the elements alone."""
    bits = ITEM_BITS.get(self.dtype)
    if bits is None:  # f8e4m3fn and its like
      bits = int(re.match(r'[a-z]+(\d+)', self.dtype)[1])
    return -(-self.elements * bits // 8)

  @property
  def padded_bytes(self) -> int:
    """Bytes in memory: the minor axes are rounded up to whole tiles."""
    tile = re.search(r'T\(([\d,]+)\)', self.layout)
    if not tile or not self.dims:
      return self.bytes
    order = [int(n) for n in self.layout.partition(':')[0].split(',')]
    dims = [self.dims[axis] for axis in reversed(order)]  # major to minor
    sizes = [int(n) for n in tile[1].split(',')]
    dims = [1] * (len(sizes) - len(dims)) + dims
    first = len(dims) - len(sizes)
    for i, size in enumerate(sizes):
      dims[first + i] = -(-dims[first + i] // size) * size
    return Array(self.dtype, tuple(dims)).bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    opcode: such as 'fusion'.
    arrays: the result, or the parts of a tuple in order, however nested.
    operands: names of the operands.
    text: what is between the operands' parentheses.
    attributes: everything after them.
    root: whether it is the computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str
  attributes: str
  root: bool = False

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations it calls, in the order in which they are written."""
    names: list[str] = []
    for found in _CALLED.findall(self.attributes):
      names += [name.strip().lstrip('%') for name in found.strip('{}').split(',')]
    return tuple(names)

  def attribute(self, name: str) -> str | None:
    """The text of `name=...` up to the next comma outside of brackets, or None."""
    found = re.search(rf'(?:^|[ ,]){name}=', self.attributes)
    if not found:
      return None
    rest = self.attributes[found.end() :]
    return rest[: _end_of_value(rest)]

  @property
  def op_name(self) -> str:
    """What JAX calls the operation: metadata's op_name, or ''."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1].replace("\\'", "'") if found else ''


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, and which of them is run."""

  computations: Mapping[str, Computation]
  entry: str

  def root(self, computation: str) -> Instruction:
    """The instruction whose result the computation returns."""
    return next(i for i in self.computations[computation].values() if i.root)

  def parameter(self, computation: str, index: int) -> Instruction:
    """The parameter with this number."""
    return next(
      i
      for i in self.computations[computation].values()
      if i.opcode == 'parameter' and i.text == str(index)
    )


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: if the text has no entry computation, or one of them no result.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, name = None, None
  pending: list[str] = []  # the lines of one instruction: attributes may hold breaks

  def finish() -> None:
    if pending:
      instruction = _instruction('\n'.join(pending))
      computations[name][instruction.name] = instruction
      pending.clear()

  for line in text.splitlines():
    found = _COMPUTATION.match(line) if name is None else None
    if found:
      name = found[2]
      computations[name] = {}
      entry = name if found[1] else entry
    elif name is not None and line.rstrip() == '}':
      finish()
      if not any(i.root for i in computations[name].values()):
        raise ValueError(f'the computation %{name} has no result: its text is cut')
      name = None
    elif name is not None and _INSTRUCTION.match(line):
      finish()
      pending.append(line)
    elif pending:
      pending.append(line)
  if entry is None or name is not None:
    raise ValueError('this text is no whole HLO module: an ENTRY with its end')
  return Module(computations, entry)


def arrays_of(text: str) -> tuple[Array, ...]:
  """The arrays in a type's text: one, or those of a tuple."""
  return tuple(
    Array(kind, tuple(int(n) for n in dims.split(',') if n), layout)
    for kind, dims, layout in _ARRAY.findall(re.sub(r'/\*.*?\*/', '', text))
  )


def _instruction(line: str) -> Instruction:
  found = _INSTRUCTION.match(line)
  rest = line[found.end() :]
  cut = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  arrays, rest = arrays_of(rest[:cut]), rest[cut:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  opcode, text = rest[:opening], rest[opening + 1 : closing]
  operands = () if opcode in ('constant', 'parameter') else _OPERAND.findall(text)
  attributes = rest[closing + 1 :].lstrip(', ')
  return Instruction(
    found[2], opcode, arrays, tuple(operands), text, attributes, bool(found[1])
  )


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens at `opening` is closed."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  return len(text)


def _end_of_value(text: str) -> int:
  depth = 0
  for match in re.finditer(r'[\[{(\])},]', text):
    if match[0] in '[{(':
      depth += 1
    elif match[0] in '])}':
      depth -= 1
    elif depth == 0:
      return match.start()
    if depth < 0:
      return match.start()
  return len(text)

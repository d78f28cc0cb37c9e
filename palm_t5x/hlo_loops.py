"""How often the loops of an HLO module turn, from the arithmetic of their counters.

XLA notes the number of trips on a loop where it has kept it (CPU); on TPU the text only
holds the counter's start, step and limit, the start often outside of the loop and
handed in through loops around it. What cannot be followed raises: a loop of unknown
length would make every total a guess.
"""

import dataclasses
import re
from typing import NamedTuple

from palm_t5x.hlo import Instruction, Module

_SAME = (
  *('copy', 'bitcast', 'convert', 'reshape', 'broadcast'),
  *('optimization-barrier', 'copy-done', 'copy-start'),
)


class UnknownLoopError(ValueError):
  """A loop whose number of trips the program's text does not tell."""


@dataclasses.dataclass(frozen=True)
class Frame:
  """One call on the way from the entry to a computation.

  Attributes:
    computation: what is being run.
    caller: the instruction of `outer` that calls it; None for the entry.
    outer: the caller's own frame.
  """

  computation: str
  caller: Instruction | None = None
  outer: 'Frame | None' = None


class _Carried(NamedTuple):
  """Element `index` of what the loop under study carries, plus `offset`."""

  index: int
  offset: int = 0


class Loops:
  """Counts the trips of one module's loops."""

  def __init__(self, module: Module):
    self._module = module

  def trips(self, loop: Instruction, frame: Frame) -> int:
    """How often the body of `loop` is run when it is reached once.

    Args:
      loop: a `while`.
      frame: where it stands.

    Raises:
      UnknownLoopError: if the text does not tell.
    """
    noted = re.search(r'known_trip_count\W+n\W+(\d+)', loop.attributes)
    if noted:
      return int(noted[1])
    condition = loop.attribute('condition').lstrip('%')
    inside = Frame(condition, loop, frame)
    compare, where = self._result(condition, inside)
    if compare.opcode != 'compare':
      raise self._unknown(loop)
    sides = [self._value(name, where, inside) for name in compare.operands]
    sides = [self._unless_fixed(side, loop, frame) for side in sides]
    direction = compare.attribute('direction')
    if isinstance(sides[0], int):  # limit > counter is counter < limit
      sides, direction = sides[::-1], direction.translate(str.maketrans('LG', 'GL'))
    counter, limit = sides
    if not isinstance(counter, _Carried) or not isinstance(limit, int):
      raise self._unknown(loop)
    start = self._element(loop.operands[0], counter.index, frame, None)
    after = self._after_a_trip(loop, counter.index, frame)
    if not isinstance(start, int) or not isinstance(after, _Carried):
      raise self._unknown(loop)
    if after.index != counter.index or not after.offset:
      raise self._unknown(loop)
    count = _count(start + counter.offset, limit, after.offset, direction)
    if count is None:
      raise self._unknown(loop)
    return count

  def carried_unchanged(self, loop: Instruction, index: int) -> bool:
    """Whether each trip hands element `index` on as it is."""
    body = loop.attribute('body').lstrip('%')
    frame = Frame(body, loop)
    return self._element(self._module.root(body).name, index, frame, frame) == _Carried(
      index
    )

  def _unknown(self, loop: Instruction) -> UnknownLoopError:
    return UnknownLoopError(
      f'the compiled program does not say how often its loop %{loop.name} turns'
      f'{f" ({loop.op_name})" if loop.op_name else ""}'
    )

  def _result(self, computation: str, frame: Frame) -> tuple[Instruction, Frame]:
    """What a computation returns, seen through fusions and copies."""
    root = self._module.root(computation)
    while True:
      if root.opcode in ('fusion', 'call') and root.called:
        frame = Frame(root.called[0], root, frame)
        root = self._module.root(frame.computation)
      elif root.opcode in _SAME:
        root = self._module.computations[frame.computation][root.operands[0]]
      else:
        return root, frame

  def _unless_fixed(self, value, loop: Instruction, frame: Frame):
    """A carried value that no trip changes is what it was at the start."""
    if not isinstance(value, _Carried):
      return value
    if self._after_a_trip(loop, value.index, frame) != _Carried(value.index):
      return value
    start = self._element(loop.operands[0], value.index, frame, None)
    return start + value.offset if isinstance(start, int) else None

  def _after_a_trip(self, loop: Instruction, index: int, frame: Frame):
    body = loop.attribute('body').lstrip('%')
    inside = Frame(body, loop, frame)
    return self._element(self._module.root(body).name, index, inside, inside)

  def _value(self, name: str, frame: Frame, loop: Frame | None):
    """An int, a _Carried of the frame `loop`, or None for what cannot be followed."""
    instruction = self._module.computations[frame.computation][name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == 'constant':
      return int(instruction.text) if instruction.text.lstrip('-').isdigit() else None
    if opcode in _SAME:
      return self._value(operands[0], frame, loop)
    if opcode in ('add', 'subtract', 'multiply'):
      return _arithmetic(opcode, *(self._value(o, frame, loop) for o in operands))
    if opcode == 'get-tuple-element':
      index = int(instruction.attribute('index'))
      return self._element(operands[0], index, frame, loop)
    if opcode == 'parameter' and frame.caller and frame.caller.opcode != 'while':
      given = frame.caller.operands[int(instruction.text)]
      return self._value(given, frame.outer, loop)
    if opcode in ('fusion', 'call') and instruction.called:
      called = instruction.called[0]
      root = self._module.root(called).name
      return self._value(root, Frame(called, instruction, frame), loop)
    return None

  def _element(self, name: str, index: int, frame: Frame, loop: Frame | None):
    """Element `index` of the tuple `name`."""
    instruction = self._module.computations[frame.computation][name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == 'tuple':
      return self._value(operands[index], frame, loop)
    if opcode in _SAME:
      return self._element(operands[0], index, frame, loop)
    if opcode == 'parameter' and frame.caller:
      if frame == loop:
        return _Carried(index)
      if frame.caller.opcode != 'while':
        given = frame.caller.operands[int(instruction.text)]
        return self._element(given, index, frame.outer, loop)
      if self.carried_unchanged(frame.caller, index) and frame.outer:
        return self._element(frame.caller.operands[0], index, frame.outer, None)
    elif opcode == 'while' and self.carried_unchanged(instruction, index):
      return self._element(operands[0], index, frame, loop)
    elif opcode in ('fusion', 'call') and instruction.called:
      called = instruction.called[0]
      root = self._module.root(called).name
      return self._element(root, index, Frame(called, instruction, frame), loop)
    return None


def _arithmetic(opcode: str, a, b):
  if isinstance(a, int) and isinstance(b, int):
    return {'add': a + b, 'subtract': a - b, 'multiply': a * b}[opcode]
  if opcode == 'add' and isinstance(a, int):
    a, b = b, a
  if isinstance(a, _Carried) and isinstance(b, int) and opcode != 'multiply':
    return a._replace(offset=a.offset + (b if opcode == 'add' else -b))
  return None


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
  """Trips of `for (i = start; i DIRECTION limit; i += step)`; None if endless."""
  if direction in ('GT', 'GE'):
    start, limit, step = -start, -limit, -step
    direction = direction.replace('G', 'L')
  if direction == 'NE':
    whole = (limit - start) % step == 0 and (limit - start) // step >= 0
    return (limit - start) // step if whole else None
  if direction not in ('LT', 'LE') or step < 1:
    return None
  limit += direction == 'LE'
  return max(0, -(-(limit - start) // step))

"""Bytes that a matrix product moves through main memory: its operands and its result.

Each is counted once, as if it were read or written without repetition, and only where
its layout says that it lies in main memory. Of an array that a fusion only cuts a slice
from, or puts a slice into, the slice counts. So the count is never too high.
"""

import re

from palm_t5x.hlo import Array, Instruction, Module

_PRODUCTS = ('dot', 'convolution')


def of_product(instruction: Instruction, computation) -> float:
  """Of a `dot` or `convolution` that stands by itself."""
  operands = [computation[name].arrays[0] for name in instruction.operands[:2]]
  return float(sum(_bytes(array) for array in (*instruction.arrays, *operands)))


def of_fusion(instruction: Instruction, module: Module) -> float:
  """Of a fusion that holds a product; what else rides along in it is left out."""
  inside = module.computations[instruction.called[0]]
  after = _descendants(inside, module)
  root = module.root(instruction.called[0])
  results = root.operands if root.opcode == 'tuple' else (root.name,)
  total = 0.0
  for name, array in zip(results, instruction.arrays, strict=True):
    if name in after:
      total += min(_bytes(array), _written(inside[name], inside))
  for name in _parameters_before(inside, after):
    total += min(_bytes(inside[name].arrays[0]), _read(name, inside, module))
  return total


def _bytes(array: Array) -> int:
  """Zero where the layout names another memory: S(1) and the like."""
  return 0 if re.search(r'S\([1-9]', array.layout) else array.bytes


def _descendants(inside, module: Module) -> set[str]:
  """Products, and all that is computed from them."""
  found: set[str] = set()
  for instruction in inside.values():  # operands come before their users
    if instruction.opcode in ('tuple', 'custom-call'):
      continue
    if found & set(instruction.operands) or _has_product(instruction, module):
      found.add(instruction.name)
  return found


def _has_product(instruction: Instruction, module: Module) -> bool:
  if instruction.opcode in _PRODUCTS:
    return True
  if instruction.opcode not in ('fusion', 'call'):
    return False
  called = module.computations[instruction.called[0]]
  return any(_has_product(i, module) for i in called.values())


def _parameters_before(inside, names: set[str]) -> list[str]:
  """Parameters that go into any of these instructions."""
  seen, waiting = set(), list(names)
  while waiting:
    name = waiting.pop()
    if name not in seen:
      seen.add(name)
      waiting += inside[name].operands
  return [name for name in seen if inside[name].opcode == 'parameter']


def _written(result: Instruction, inside) -> float:
  if result.opcode == 'bitcast':
    result = inside[result.operands[0]]
  if result.opcode == 'dynamic-update-slice':
    return inside[result.operands[1]].arrays[0].bytes
  return float('inf')


def _read(name: str, inside, module: Module) -> float:
  """Bytes of an array that the instructions of a fusion look at."""
  total = 0.0
  for user in inside.values():
    if name not in user.operands:
      continue
    if user.opcode in ('dynamic-slice', 'slice'):
      total += user.arrays[0].bytes
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      total += 0
    elif user.opcode == 'bitcast':
      total += _read(user.name, inside, module)
    elif user.opcode == 'fusion':
      called = user.called[0]
      for index, operand in enumerate(user.operands):
        if operand == name:
          parameter = module.parameter(called, index)
          total += _read(parameter.name, module.computations[called], module)
    elif user.opcode != 'tuple':
      return float('inf')
  return total

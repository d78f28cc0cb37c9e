"""Which mesh axes a collective runs over: from its device numbers to axis names."""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from palm_t5x.hlo import Instruction


def product(numbers: Iterable[int]) -> int:
  """Of all of them; 1 of none."""
  return math.prod(numbers)


def axes(
  instruction: Instruction, mesh: Mapping[str, int], in_slice: Mapping[str, int]
) -> tuple[tuple[str, ...], int]:
  """(names of the axes along which members differ, members of a group).

  Args:
    instruction: with `replica_groups` or `source_target_pairs`.
    mesh: axis name to size; devices are numbered along it, the last axis fastest.
    in_slice: the same inside one slice, by which a program for several slices counts.

  Raises:
    ValueError: for device numbers that the mesh does not have.
  """
  pairs = instruction.attribute('source_target_pairs')
  whole, one = product(mesh.values()), product(in_slice.values())
  if pairs is not None:
    groups = _explicit(pairs)
    groups = groups[groups[:, 0] != groups[:, 1]]
  else:
    groups = _groups(instruction.attribute('replica_groups') or '', one)
  if not groups.size:
    return (), 1
  sizes = in_slice if groups.max() < one else mesh
  if groups.max() >= product(sizes.values()):
    raise ValueError(
      f'%{instruction.name} names device {groups.max()}; the mesh has {whole}'
    )
  places = np.stack(np.unravel_index(groups, tuple(sizes.values())))
  differ = (places != places[..., :1]).any(axis=(1, 2))
  names = tuple(name for name, d in zip(sizes, differ, strict=True) if d)
  if pairs is not None:
    return names, product(sizes[name] for name in names)
  return names, groups.shape[1]


def _groups(text: str, devices: int) -> np.ndarray:
  """[groups, members] of either way in which HLO writes them."""
  iota = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    shape, source = (_numbers(part) for part in iota.groups()[:2])
    ids = np.arange(product(source)).reshape(source)
    if iota[3]:
      ids = ids.transpose(_numbers(iota[3]))
    return ids.reshape(shape)
  found = _explicit(text)
  return found if found.size else np.arange(devices)[None]


def _explicit(text: str) -> np.ndarray:
  rows = [_numbers(row) for row in re.findall(r'\{([\d,]+)\}', text)]
  return np.array(rows, int) if rows else np.zeros((0, 2), int)


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]

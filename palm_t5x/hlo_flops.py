"""FLOPs of single HLO instructions, from shapes and dimension numbers.

A multiplication and an addition are two. Only matrix products count (dot and
convolution, which is what a TPU turns a dot into); the rest is not what bounds a step.
"""

import math
import re

import numpy as np

from palm_t5x.hlo import Array, Instruction


def flops(instruction: Instruction, computation) -> float:
  """FLOPs of a `dot` or `convolution`."""
  sides = [computation[name].arrays[0] for name in instruction.operands[:2]]
  if instruction.opcode == 'dot':
    contracted = _numbers(instruction.attribute('lhs_contracting_dims'))
    depth = math.prod(sides[0].dims[axis] for axis in contracted)
    return 2.0 * instruction.arrays[0].elements * depth
  return 2.0 * _convolution(instruction, *sides)


def _numbers(text: str | None) -> list[int]:
  return [int(n) for n in re.findall(r'-?\d+', text or '')]


def _convolution(instruction: Instruction, lhs: Array, rhs: Array) -> float:
  """Multiplications: those with padding or with a hole of a dilation are none."""
  labels = re.match(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels'))
  left, right, out = labels.groups()
  window = _window(instruction.attribute('window'), len(left) - 2)
  result = instruction.arrays[0]
  places = 1.0
  for axis, options in enumerate(window):
    label = str(axis)
    places *= _valid(
      lhs.dims[left.index(label)],
      rhs.dims[right.index(label)],
      result.dims[out.index(label)],
      **options,
    )
  groups = int(instruction.attribute('batch_group_count') or 1)
  batch = lhs.dims[left.index('b')] // groups
  return places * batch * rhs.dims[right.index('i')] * result.dims[out.index('f')]


def _window(text: str | None, axes: int) -> list[dict[str, int]]:
  """Stride, padding and dilations of each spatial axis."""
  given = dict(part.split('=') for part in (text or '').strip('{}').split() if part)

  def each(name: str, default: str) -> list[str]:
    return given[name].split('x') if name in given else [default] * axes

  return [
    {
      'stride': int(each('stride', '1')[axis]),
      'low': int(each('pad', '0_0')[axis].partition('_')[0]),
      'hole': int(each('lhs_dilate', '1')[axis]),
      'step': int(each('rhs_dilate', '1')[axis]),
    }
    for axis in range(axes)
  ]


def _valid(lhs, kernel, result, stride, low, hole, step) -> int:
  """Pairs of kernel and result positions that meet an element of the input."""
  out = np.arange(result)[:, None] * stride
  place = out - low + np.arange(kernel)[None] * step
  return int(np.sum((place % hole == 0) & (place >= 0) & (place < lhs * hole)))


# Products of one pass of a Pallas attention kernel. Each is as large as q k'.
_ATTENTION_PRODUCTS = (
  (r'splash\w*fwd|flash_attention(?!\w*bwd)', 2),  # q k', p v
  (r'splash\w*_dq(?!\w*dkv)|flash\w*bwd_dq', 3),  # q k', do v', ds k
  (r'splash\w*dkv|flash\w*bwd_dkv', 4),  # q k', do v', p' do, ds' q
)


def kernel(instruction: Instruction, computation) -> tuple[str, float | None]:
  """(name, FLOPs) of a Pallas kernel; None where no rule is known for it.

  Attention is taken to be causal and to skip all that is masked, so that each of its
  products counts half: a kernel of blocks does more, never less.
  """
  name = kernel_name(instruction)
  for pattern, products in _ATTENTION_PRODUCTS:
    if re.search(pattern, name):
      operands = [computation[n].arrays[0] for n in instruction.operands]
      arrays = [a for a in operands if a.dtype in ('bf16', 'f32') and len(a.dims) > 1]
      if len(arrays) < 2:
        return name, None
      q, k = arrays[:2]
      if 'dkv' in name and any(len(a.dims) > len(q.dims) for a in instruction.arrays):
        products += 1  # it gives parts of dq too
      one = 2.0 * q.elements * k.dims[-2]  # [.., heads, T, K] x [.., S, K]
      return name, products * one / 2
  return name, None


def kernel_name(instruction: Instruction) -> str:
  """What the kernel's author called it."""
  named = re.search(r'kernel_name\W+([\w.\-]+)', instruction.attributes)
  if named:
    return named[1]
  parts = [p for p in instruction.op_name.split('/') if p != 'pallas_call']
  return parts[-1] if parts else instruction.name

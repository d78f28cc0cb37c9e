"""Published rates of TPU chips, and the least time a program can take on them.

Every figure is the vendor's statement, not a measurement of ours. Times that follow are
lower bounds: nothing here predicts what a run reaches.
"""

import dataclasses
from collections.abc import Mapping

from palm_t5x.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do; a Gin binding replaces a figure of the table below.

  Attributes:
    peak_flops: dense bf16 FLOP/s.
    hbm_bytes: main memory that a program may use, as libtpu's compiler says.
    hbm_bytes_per_second: rate of main memory.
    ici_bytes_per_second: of one link to a neighbour, one way.
    ici_links: links of a chip, two for each axis of the torus.
    dcn_bytes_per_second: one chip's share of its host's network, one way.
  """

  peak_flops: float | None = None
  hbm_bytes: float | None = None
  hbm_bytes_per_second: float | None = None
  ici_bytes_per_second: float | None = None
  ici_links: int | None = None
  dcn_bytes_per_second: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and not value > 0:
        raise UserError(
          f'chips.Chip.{field.name}={value!r}: it is above zero, or None.'
        )

  def over(self, published: 'Chip') -> 'Chip':
    """These figures where they are given, `published` where they are not."""
    given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
    return dataclasses.replace(published, **given)


GIB = 2.0**30

# FLOP/s, bytes, bytes/s and links: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; those
# pages give ICI both ways and per chip, here it is one way and per link. v4's rates of
# memory and links: Jouppi et al. 2023 (arXiv 2304.01433), table 4: 1,228 GB/s, 6 links
# of 50 GB/s. DCN: v5e 6.4 Tbit/s and v6e 25.6 Tbit/s per pod of 256 chips, v5p
# 50 Gbit/s per chip; for v4 nothing is published, and 100 Gbit/s for a host of 4 chips
# is assumed (the PaLM paper's burst, 81 Tbit/s over 6,144 chips, is half of that).
PUBLISHED: Mapping[str, Chip] = {
  'v4': Chip(275e12, 30.75 * GIB, 1228e9, 50e9, 6, 3.125e9),
  'v5e': Chip(197e12, 15.75 * GIB, 819e9, 50e9, 4, 3.125e9),
  'v5p': Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 6, 6.25e9),
  'v6e': Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 4, 12.5e9),
}


def bounds(
  chip: Chip,
  flops: float,
  hbm_bytes: float,
  ici_bytes: Mapping[str, float],
  links: Mapping[str, int],
  dcn_bytes: float,
) -> dict[str, float]:
  """Least seconds of each part of a step, by the chip's rates.

  Args:
    chip: with every figure.
    flops: of one chip.
    hbm_bytes: that it moves through main memory.
    ici_bytes: mesh axis to bytes that it sends.
    links: mesh axis to links that lie along it.
    dcn_bytes: that it sends to other slices.

  Returns:
    'compute', 'hbm', 'ici <axis>' and 'dcn', in seconds.
  """
  seconds = {
    'compute': flops / chip.peak_flops,
    'hbm': hbm_bytes / chip.hbm_bytes_per_second,
  }
  for axis, sent in ici_bytes.items():
    rate = chip.ici_bytes_per_second * (links.get(axis) or chip.ici_links)
    seconds[f'ici {axis}'] = sent / rate
  seconds['dcn'] = dcn_bytes / chip.dcn_bytes_per_second
  return seconds

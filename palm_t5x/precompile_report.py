"""How `t5x precompile` shows what it found: aligned, on one screen."""

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2.0**30

# PaLM 540B on 6,144 TPU v4 (paper, section 4.1 and table 3): the only size for which
# it gives throughput.
PAPER = {540: {'tokens_per_second': 238.3e3, 'mfu': 0.462, 'hfu': 0.578}}


def heading(facts: Mapping[str, Any]) -> str:
  """What is compiled, for which machine, at which stated rates."""
  slices, mesh = facts['num_slices'], facts['mesh']
  machine = f'{slices} x {facts["topology"]}' if slices > 1 else facts['topology']
  axes = ' x '.join(f'{name} {n}' for name, n in mesh.items())
  rows = [
    (
      'model',
      f'{facts["parameters"] / 1e9:.4g} B parameters, {facts["dtype"]}, '
      f'attention {facts["attention_kernel"]}',
    ),
    ('machine', f'{machine}: {facts["chips"]:,} devices ({facts["device_kind"]})'),
    ('mesh', axes),
    ('compiler', ', '.join(f'{k} {v}' for k, v in facts['versions'].items())),
  ]
  chip = facts['chip']
  if chip:
    rows.append(
      (
        'stated rates',
        f'{chip["peak_flops"] / 1e12:.0f} TFLOP/s, HBM '
        f'{chip["hbm_bytes_per_second"] / 1e9:.0f} GB/s, ICI {chip["ici_links"]} links '
        f'of {chip["ici_bytes_per_second"] / 1e9:.0f} GB/s, DCN '
        f'{chip["dcn_bytes_per_second"] / 1e9:.3g} GB/s per chip',
      )
    )
  return _columns(rows)


def program(facts: Mapping[str, Any]) -> str:
  """One compiled step: memory, traffic, FLOPs, bounds."""
  seconds = facts['seconds']
  lines = [
    '',
    f'Train step of {facts["batch_size"]:,} sequences{_ways(facts)}',
    f'  compiled in {seconds["compile"]:.0f} s, after {seconds["trace"]:.0f} s of '
    f'tracing; {facts["host_bytes"] / GIB:.2f} GiB of this machine',
    '',
    'Bytes of a chip',
    *_memory(facts['memory']),
    '',
    'Traffic of a chip in one step',
    *_traffic(facts['collectives']),
    '',
    'FLOPs',
    *_flops(facts['flops']),
  ]
  if facts['bounds']:
    lines += ['', *_bounds(facts['bounds'], facts)]
  return '\n'.join(lines)


def _ways(facts: Mapping[str, Any]) -> str:
  parts = []
  if facts['microbatches'] > 1:
    parts.append(f'in {facts["microbatches"]} microbatches')
  if facts['remat_policy']:
    parts.append(f'remat {facts["remat_policy"]}')
  parts += [f'{k}={v}' for k, v in facts['compiler_options'].items()]
  return ', ' + ', '.join(parts) if parts else ''


def _memory(memory: Mapping[str, float]) -> list[str]:
  limit = memory['limit']
  names = ('parameters', 'optimizer', 'activations', 'temporaries', 'total')
  size, unit = (GIB, 'GiB') if memory['total'] >= GIB / 8 else (2.0**20, 'MiB')
  lines = [f'  {name:14}{memory[name] / size:10.2f} {unit}' for name in names]
  if limit:
    share = 100 * memory['total'] / limit
    lines[-1] += f' of {limit / size:,.2f} usable ({share:.0f} %)'
  return lines


def _traffic(collectives: Sequence[Mapping[str, Any]]) -> list[str]:
  """By axis and kind; what is under a thousandth of its network's bytes is summed."""
  most = max((c['wire_bytes'] for c in collectives), default=0)
  unit, size = ('GB', 1e9) if most >= 1e8 else ('MB', 1e6)
  lines = [
    f'  axis        kind                 dtype   count   result {unit}     sent {unit}'
  ]
  for network in ('ici', 'dcn'):
    rows = [c for c in collectives if c['network'] == network]
    least = sum(c['wire_bytes'] for c in rows) / 1000
    shown = [c for c in rows if c['wire_bytes'] >= least or network == 'dcn']
    for c in shown:
      lines.append(
        f'  {_axis(c):11} {c["kind"]:20} {c["dtype"]:5} {c["count"]:7,} '
        f'{c["result_bytes"] / size:11.3f} {c["wire_bytes"] / size:11.3f}'
      )
    rest = [c for c in rows if c not in shown]
    if rest:
      lines.append(
        f'  {"others":11} {"small ones":20} {"":5} '
        f'{sum(c["count"] for c in rest):7,} '
        f'{sum(c["result_bytes"] for c in rest) / size:11.3f} '
        f'{sum(c["wire_bytes"] for c in rest) / size:11.3f}'
      )
  return lines if len(lines) > 1 else ['  none']


def _axis(collective: Mapping[str, Any]) -> str:
  name = collective['axis'] or 'all'
  return f'{name} (DCN)' if collective['network'] == 'dcn' else name


def _flops(flops: Mapping[str, Any]) -> list[str]:
  model = flops['model_per_token']
  hardware = flops['hardware_per_token']
  rows = [
    ('model, per token', f'{_short(model)} (PaLM App. B)'),
    (
      'hardware, per token',
      f'{_short(hardware)}, {hardware / model:.3f} of the '
      "model's: counted in the program, recomputation included",
    ),
    ('hardware, per chip', f'{_short(flops["hardware_per_chip"])} per step'),
  ]
  if flops['all_recomputed_per_token']:
    again = flops['all_recomputed_per_token']
    rows.insert(1, ('if all recomputed', f'{_short(again)} (App. B, shares 1 and 1)'))
  for kernel in flops['kernels_per_chip']:
    known = kernel['flops'] is not None
    text = (
      f'{_short(kernel["flops"])}, by its shapes' if known else 'unknown, not counted'
    )
    rows.append((f'  kernel {kernel["name"]}', f'{text} ({kernel["count"]:,} runs)'))
  return ['  ' + line for line in _columns(rows).splitlines()]


def _bounds(bounds: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
  seconds = {
    k: v
    for k, v in bounds['seconds'].items()
    if v >= 0.001 * bounds['summed']['seconds']
  }
  parts = ', '.join(f'{k} {v:.3g}' for k, v in seconds.items())
  lines = [
    'Bounds from the stated rates: at most, never a prediction',
    f'  least seconds: {parts}',
    '                                   step s    tokens/s     MFU     HFU',
  ]
  named = {
    'overlapped': 'if all overlaps perfectly',
    'summed': 'if nothing overlaps',
  }
  for key, text in named.items():
    lines.append(_row(text, bounds[key], bounds[key]['seconds']))
  if facts['paper']:
    lines.append(_row('paper, reached on 6,144 v4', facts['paper'], None))
  return lines


def _row(text: str, rates: Mapping[str, float], seconds: float | None) -> str:
  shown = f'{seconds:8.3g}' if seconds else ' ' * 8
  return (
    f'  {text:30} {shown} {rates["tokens_per_second"]:11,.0f} '
    f'{100 * rates["mfu"]:6.1f}% {100 * rates["hfu"]:6.1f}%'
  )


def ranking(tried: Sequence[Mapping[str, Any]]) -> str:
  """The table of a search: what fits by the summed bound, then what does not."""
  lines = ['', '      step s   tokens/s     MFU    HBM GiB   configuration']
  fitting = [t for t in tried if t['fits']]
  for place, one in enumerate(fitting, 1):
    bound = one['bounds']['summed'] if one['bounds'] else None
    numbers = (
      f'{bound["seconds"]:8.2f} {bound["tokens_per_second"]:10,.0f} '
      f'{100 * bound["mfu"]:6.1f}%'
      if bound
      else ' ' * 27
    )
    lines.append(
      f'{place:3} {numbers} {one["memory"]["total"] / GIB:9.2f}   {one["text"]}'
    )
  for one in tried:
    if not one['fits']:
      lines.append(
        f'  -  does not fit: {one["used"] / GIB:7.2f} of {one["limit"] / GIB:.2f} GiB'
        f'   {one["text"]}'
      )
  lines.append(
    f'Ranked by the summed bound among the {len(fitting)} of {len(tried)} that fit. '
    'Bounds, not predictions:'
  )
  lines.append('an option that only lets transfers overlap does not change them.')
  return '\n'.join(lines)


def _short(number: float) -> str:
  for size, unit in ((1e15, 'PFLOP'), (1e12, 'TFLOP'), (1e9, 'GFLOP'), (1e6, 'MFLOP')):
    if number >= size:
      return f'{number / size:.4g} {unit}'
  return f'{number:.4g} FLOP'


def _columns(rows: Sequence[tuple[str, str]]) -> str:
  width = max(len(left) for left, _ in rows)
  return '\n'.join(f'{left:{width}}  {right}' for left, right in rows)

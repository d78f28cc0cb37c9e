"""The report on a corpus: report.json, report.md and plots, from a `facts.Tally`."""

import json
import os
from collections.abc import Mapping, Sequence

from palm_t5x.corpus import code_languages, identity_terms, storage
from palm_t5x.corpus.facts import QUALITY_BINS, Tally

# Percent of the paper's documents (Appendix C).
PAPER = {
  'they/them': 41.0, 'he/him': 30.0, 'she/her': 14.0, 'email': 0.7, 'phone': 1.5,
  'address': 1.75,
}  # fmt: skip
# Millions of pronouns in the paper's corpus (section 10.1.1).
PAPER_PRONOUNS = {'they/them': 770.0, 'he/him': 620.0, 'she/her': 381.0}
PAPER_TOLL_FREE = 10.0  # percent of the documents with phone numbers
_TOP = 25  # languages in a plot


def report(
  tally: Tally,
  dropped: Mapping[str, int],
  duplicates: Mapping[str, int],
  folder: str,
  *,
  language_rows: Sequence[Sequence] | None = None,
  dropped_tally: Tally | None = None,
  title: str = 'corpus',
) -> list[str]:
  """Writes report.json, report.md and the plots it shows into a folder.

  Args:
    tally: of the documents that were kept.
    dropped: reason -> documents.
    duplicates: kind, such as 'exact' or 'near' -> documents.
    folder: is made; a report that lies there is written over.
    language_rows: rows of (language, ours, the paper's) as text or numbers, a table
      made elsewhere; without it, the languages of the tally are listed.
    dropped_tally: of the documents that were dropped, for the plot of quality.
    title: what the report calls the corpus.

  Returns:
    the names of the files.
  """
  rows = {
    'tally': tally.to_json(),
    'dropped': dict(sorted(dropped.items())),
    'duplicates': dict(sorted(duplicates.items())),
    'shares': shares(tally),
  }
  plots = _plots(tally, dropped_tally, folder)
  text = _markdown(tally, dropped, duplicates, language_rows, plots, title)
  for name, content in (
    ('report.json', json.dumps(rows, indent=1, ensure_ascii=False) + '\n'),
    ('report.md', text),
  ):
    storage.write_bytes(storage.join(folder, name), content.encode())
  return ['report.json', 'report.md', *plots]


def shares(tally: Tally) -> dict[str, float]:
  """Percent of documents that have a pronoun, an e-mail address, and so on."""
  documents = tally.group('total')['documents'] or 1
  found, pronouns = tally.group('found'), tally.group('pronouns.documents')
  out = {k: 100 * pronouns[k] / documents for k in identity_terms.PRONOUNS}
  out |= {k: 100 * found[k] / documents for k in ('email', 'phone', 'address')}
  out['toll_free'] = 100 * found['toll_free'] / (found['phone'] or 1)
  return out


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
  lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
  return '\n'.join('| ' + ' | '.join(map(_cell, line)) + ' |' for line in lines) + '\n'


def _cell(value) -> str:
  if value is None:
    return ''
  if isinstance(value, float):
    return f'{value:.2f}' if value < 10 else f'{value:.1f}'
  return f'{value:,}' if isinstance(value, int) else str(value).replace('|', '\\|')


def _markdown(tally, dropped, duplicates, language_rows, plots, title) -> str:
  total, share = tally.group('total'), shares(tally)
  documents = total['documents'] or 1
  parts = [f'# Facts about {title}\n']
  parts.append(
    _table(
      ('kept', 'number'),
      [(name, total[name]) for name in ('documents', 'bytes', 'characters')]
      + ([('tokens', total['tokens'])] if total['tokens'] else [])
      + [('bytes per document', total['bytes'] / documents)],
    )
  )
  parts.append('## Dropped\n')
  gone = [(f'duplicate ({kind})', n) for kind, n in sorted(duplicates.items())]
  gone += sorted(dropped.items(), key=lambda row: (-row[1], row[0]))
  parts.append(_table(('why', 'documents'), gone) if gone else 'Nothing.\n')
  if language_rows:
    parts.append('## Languages\n')
    parts.append(_table(('language', 'here', 'PaLM'), language_rows))
  elif tally.group('language.bytes'):
    parts.append('## Languages\n')
    rows = tally.group('language.bytes').most_common()
    parts.append(
      _table(
        ('language', 'documents', 'bytes'),
        [(name, tally.group('language.documents')[name], n) for name, n in rows],
      )
    )
  if code := tally.group('code_language.bytes'):
    parts.append('## Languages of code, percent of bytes\n')
    rows = [
      (name, ours, '<0.1' if paper is None else paper)
      for name, ours, paper in code_languages.table(code)
    ]
    parts.append(_table(('language', 'here', 'PaLM (Table 28)'), rows))
  parts.append('## People, percent of documents\n')
  names = {
    'email': 'e-mail address',
    'phone': 'phone number',
    'address': 'street address (approximate)',
  }
  rows = [(names.get(name, name), share[name], PAPER[name]) for name in PAPER]
  rows.append(
    ('toll-free, of those with a phone number', share['toll_free'], PAPER_TOLL_FREE)
  )
  rows.append(('name of a person', 'not measured', 32.0))
  parts.append(_table(('documents with', 'here', 'PaLM (App. C)'), rows))
  parts.append('## Pronouns\n')
  ours, paper = tally.group('pronouns'), sum(PAPER_PRONOUNS.values())
  count = sum(ours.values()) or 1
  parts.append(
    _table(
      ('pronoun', 'number', 'percent', 'PaLM (§10.1.1)'),
      [
        (name, ours[name], 100 * ours[name] / count, 100 * millions / paper)
        for name, millions in PAPER_PRONOUNS.items()
      ],
    )
  )
  parts.append('## Identity terms\n')
  parts.append(_table(('term', 'number', 'percent of documents'), _terms(tally)))
  parts += [f'![{name}]({name})\n' for name in plots]
  return '\n'.join(parts)


def _terms(tally) -> list[tuple]:
  documents = tally.group('total')['documents'] or 1
  having = tally.group('terms.documents')
  rows = []
  for category, (source, _) in identity_terms.TERMS.items():
    mine = {
      k: n for k, n in tally.group('terms').items() if k.startswith(f'{category}: ')
    }
    rows.append((f'**{category}** ({source})', sum(mine.values()), ''))
    rows += [
      (name.split(': ')[1], n, 100 * having[name] / documents)
      for name, n in sorted(mine.items(), key=lambda row: (-row[1], row[0]))
    ]
  return rows


def _plots(tally: Tally, dropped: Tally | None, folder: str) -> list[str]:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  drawn = []

  def save(name, figure):
    path = storage.join(folder, name)
    if not storage.is_remote(folder):
      os.makedirs(folder, exist_ok=True)
    with storage.writing(path):
      figure.savefig(path, dpi=100, metadata={'Software': None})
    pyplot.close(figure)
    drawn.append(name)

  for kind in ('language', 'code_language'):
    if sizes := tally.group(f'{kind}.bytes'):
      save(f'{kind}s.png', _bars(pyplot, kind, sizes))
  if lengths := tally.group('length'):
    figure, axes = pyplot.subplots(figsize=(8, 4), layout='constrained')
    places = range(min(map(int, lengths)), max(map(int, lengths)) + 1)
    axes.bar([_power(i) for i in places], [lengths[str(i)] for i in places])
    axes.set(xlabel='bytes, from', ylabel='documents', title='Document lengths')
    axes.tick_params(axis='x', rotation=60)
    save('lengths.png', figure)
  if tally.group('quality') or (dropped and dropped.group('quality')):
    figure, axes = pyplot.subplots(figsize=(8, 4), layout='constrained')
    edges, below = [i / QUALITY_BINS for i in range(QUALITY_BINS)], [0] * QUALITY_BINS
    for label, one in (('kept', tally), ('dropped', dropped)):
      if one is not None:
        heights = [one.group('quality')[str(i)] for i in range(QUALITY_BINS)]
        axes.bar(edges, heights, 1 / QUALITY_BINS, below, align='edge', label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set(xlabel='quality score', ylabel='documents', title='Quality')
    axes.legend()
    save('quality.png', figure)
  return drawn


def _power(exponent: int) -> str:
  """2**exponent, as '64', '4 Ki', '1 Mi'."""
  units = ('', ' Ki', ' Mi', ' Gi', ' Ti')
  unit = min(exponent // 10, len(units) - 1)
  return f'{1 << (exponent - 10 * unit)}{units[unit]}'


def _bars(pyplot, kind, sizes):
  """Horizontal bars of shares; beside Table 28's for code."""
  total = sum(sizes.values()) or 1
  if kind == 'language':
    rows = [(name, 100 * n / total, None) for name, n in sizes.most_common(_TOP)]
  else:
    rows = code_languages.table(sizes)
  figure, axes = pyplot.subplots(
    figsize=(8, 1.5 + 0.27 * len(rows)), layout='constrained'
  )
  places = range(len(rows))
  if kind == 'language':
    axes.barh(places, [row[1] for row in rows], label='here')
  else:
    axes.barh([p - 0.2 for p in places], [row[1] for row in rows], 0.4, label='here')
    paper = [row[2] or 0 for row in rows]
    axes.barh([p + 0.2 for p in places], paper, 0.4, label='PaLM (Table 28)')
    axes.legend()
  axes.set_yticks(list(places), [row[0] for row in rows])
  axes.invert_yaxis()
  axes.set(
    xlabel='percent of bytes',
    title='Languages of code' if kind == 'code_language' else 'Languages',
  )
  return figure

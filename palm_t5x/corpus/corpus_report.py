"""The report of a sub-corpus, and of several together: JSON, tables and plots.

`write` is the last but one thing that making a sub-corpus does; `report` is
`t5x corpus --report`.
"""

import collections
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palm_t5x import errors, places
from palm_t5x.corpus import (
  facts,
  facts_report,
  language,
  processed,
  quality_report,
  storage,
)

_FACTS = 'facts.json'
_TOGETHER = 'report'  # folder of the report on all sub-corpora, in CORPUS_DIR
_SHOWN = 12  # languages in the printed table


def write(
  folder: str,
  manifest: processed.Manifest,
  tally: facts.Tally,
  scores: quality_report.Tally,
) -> None:
  """Writes report.md, report.json, plots, and facts.json, which `report` adds up.

  Args:
    folder: of the sub-corpus.
    manifest: its manifest, which need not be written yet.
    tally: of the documents that were kept.
    scores: of the documents that went through a quality classifier.
  """
  _write(folder, manifest.name, [manifest], tally, scores)
  storage.write_bytes(
    os.path.join(folder, _FACTS),
    json.dumps({'tally': tally.to_json(), 'scores': scores.facts()}).encode(),
  )


def _write(folder, title, manifests: Sequence[processed.Manifest], tally, scores):
  dropped: collections.Counter[str] = collections.Counter()
  duplicates: collections.Counter[str] = collections.Counter()
  for manifest in manifests:
    dropped.update({k: v['documents'] for k, v in manifest.dropped.items()})
    dropped.update(manifest.broken)
    duplicates.update(
      exact=manifest.counts['duplicates'], near=manifest.counts['near_duplicates']
    )
  gone = facts.Tally()
  gone.group('quality').update({str(i): n for i, n in enumerate(scores.dropped) if n})
  facts_report.report(
    tally,
    dropped,
    {kind: number for kind, number in duplicates.items() if number},
    folder,
    language_rows=list(_language_rows(tally.group('language.bytes'))),
    dropped_tally=gone,
    title=title,
  )
  path = os.path.join(folder, 'report.md')
  text = storage.read_bytes(path).decode() + _examples(manifests, scores)
  storage.write_bytes(path, text.encode())


def _language_rows(sizes: Mapping[str, int]) -> Iterable[tuple[str, Any, Any]]:
  """(language, percent of bytes, the paper's percent of tokens), ours first."""
  if not sizes:
    return
  rows = language.language_table(sizes)
  for row in sorted(rows, key=lambda row: (-(row.tokens or 0), row.tokens is None)):
    ours = 'not distinguishable' if row.share is None else f'{row.share:.3f} %'
    paper = '' if row.paper_share is None else f'{row.paper_share:.3f} %'
    yield row.code, ours, paper


def _examples(manifests, scores: quality_report.Tally) -> str:
  """What was dropped and kept, to look at."""
  parts = []
  if sum(scores.kept) + sum(scores.dropped):
    parts.append('\n## Quality\n\n| score | kept | dropped | kept, percent |')
    parts.append('| ---: | ---: | ---: | ---: |')
    parts += [
      f'| {bin_} | {kept:,} | {dropped:,} | {100 * share:.1f} |'
      for bin_, kept, dropped, share in scores.rows()
      if kept + dropped
    ]
    for kind, bands in scores.examples.items():
      for band, examples in enumerate(bands):
        for _, name, score, text in examples:
          where = f'{band / len(bands):.1f} to {(band + 1) / len(bands):.1f}'
          parts.append(f'\n{kind}, {where}: `{name}`, {score:.3f}\n\n{_quoted(text)}')
  for manifest in manifests:
    for reason, entry in sorted(manifest.dropped.items()):
      parts.append(f'\n## Dropped from {manifest.name}: {reason}')
      parts += [
        f'\n`{example["id"]}`\n\n{_quoted(example["text"])}'
        for example in entry['examples']
      ]
    if manifest.near_duplicate_examples:
      parts.append(f'\n## Near-duplicates in {manifest.name}: dropped, kept\n')
      parts += [f'* `{a}`, `{b}`' for a, b in manifest.near_duplicate_examples]
    if manifest.broken_places:
      parts.append(f'\n## Broken in {manifest.name}\n')
      parts += [f'* {place}' for place in manifest.broken_places]
  return '\n'.join(parts) + '\n'


def _quoted(text: str) -> str:
  return '\n'.join(f'    {line}' for line in text.splitlines()[:8])


def report(names: Sequence[str] | None = None) -> None:
  """Prints the facts of finished sub-corpora, and writes a report on all together.

  Args:
    names: of sub-corpora; None: all in CORPUS_DIR.

  Raises:
    UserError: there are none.
    Failure: facts are missing or damaged.
  """
  manifests = processed.finished()
  if names is not None:
    manifests = {name: m for name, m in manifests.items() if name in names}
  if not manifests:
    what = f'no finished sub-corpus {", ".join(names)}' if names else 'no sub-corpora'
    raise errors.UserError(
      f'There is {what} in {places.corpus_dir()}: make one with t5x corpus '
      '--gin_file=corpus/books.gin --data_dir=FOLDER, or name another folder with '
      '--gin.CORPUS_DIR=FOLDER.'
    )
  tally, scores = facts.Tally(), quality_report.Tally()
  print(
    f'{"sub-corpus":16}{"documents":>14}{"MB":>12}{"dropped":>10}{"duplicates":>12}'
  )
  for name, manifest in manifests.items():
    own, own_scores = _load(name)
    tally.merge(own)
    scores.merge(own_scores)
    print(_line(manifest, own))
  if names is None:
    folder = os.path.join(places.corpus_dir(), _TOGETHER)
    _write(folder, 'all sub-corpora', list(manifests.values()), tally, scores)
  else:
    folder = processed.folder(next(iter(manifests)))
  _print_languages(tally.group('language.bytes'))
  found = facts_report.shares(tally)
  print(
    f'\ne-mail addresses in {found["email"]:.2f} %, phone numbers in '
    f'{found["phone"]:.2f} % of the documents (paper: 0.7 %, 1.5 %)'
  )
  print(f'tables and plots: {os.path.join(folder, "report.md")}')


def _line(manifest: processed.Manifest, tally: facts.Tally) -> str:
  counts, total = manifest.counts, tally.group('total')
  dropped = sum(entry['documents'] for entry in manifest.dropped.values())
  read = max(counts['read'], 1)
  same = counts['duplicates'] + counts['near_duplicates']
  return (
    f'{manifest.name:16}{total["documents"]:14,}{total["bytes"] / 1e6:12,.1f}'
    f'{100 * dropped / read:9.2f}%{100 * same / max(counts["kept"], 1):11.2f}%'
  )


def _print_languages(sizes: Mapping[str, int]) -> None:
  rows = list(_language_rows(sizes))
  found = [row for row in rows if row[0] in sizes]
  if found:
    print(f'\n{"language":16}{"of bytes":>12}{"paper, of tokens":>18}')
  for code, ours, paper in found[:_SHOWN]:
    print(f'{code:16}{ours:>12}{paper:>18}')
  if found:
    blind = sum(ours == 'not distinguishable' for _, ours, _ in rows)
    absent = len(rows) - len(found) - blind
    more = f'{len(found) - _SHOWN} more; ' if len(found) > _SHOWN else ''
    print(f'{more}{absent} of the paper without text here, {blind} not distinguishable')


def _load(name: str) -> tuple[facts.Tally, quality_report.Tally]:
  path = os.path.join(processed.folder(name), _FACTS)
  try:
    values = json.loads(storage.read_bytes(path) or b'')
    return (
      facts.Tally.from_json(values['tally']),
      quality_report.Tally(**values['scores']),
    )
  except (ValueError, KeyError, TypeError) as e:
    raise errors.Failure(
      f'The facts in {path} are missing or damaged ({e}): delete the folder and make '
      'the sub-corpus again.'
    ) from e

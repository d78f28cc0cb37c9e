"""What a run will really read: weights, tokens, epochs, languages, from manifests."""

import dataclasses
import textwrap
from typing import Any

from palm_t5x import utils
from palm_t5x.corpus import language, plan, prepare, token_store
from palm_t5x.corpus.sampling import BatchSchedule
from palm_t5x.errors import Failure, UserError


@dataclasses.dataclass(frozen=True)
class Planned(plan.Share):
  """A `plan.Share` with what its store's manifest says.

  Attributes:
    problem: why there is no store to read, if so.
    languages: language -> tokens, of texts whose language is known.
  """

  problem: str | None = None
  languages: dict[str, int] = dataclasses.field(default_factory=dict)


def of_run(
  cfg: utils.DatasetConfig,
  vocabulary: Any,
  cache_dir: str,
  seed: int,
  total_steps: int,
) -> list[Planned]:
  """The plan of a run of so many steps; a store that is not there is no error.

  Raises:
    UserError: there is no such mixture.
  """
  tasks = prepare.tasks_and_weights(cfg.mixture_or_task_name, cfg.split)
  seed = seed if cfg.seed is None else cfg.seed
  found = {
    task.name: _manifest(task, cfg, vocabulary, cache_dir, seed) for task, _ in tasks
  }
  rows = {
    name: None if manifest is None else max(0, (manifest.num_tokens - 1) // cfg.length)
    for name, (manifest, _) in found.items()
  }
  shares = plan.shares(
    {task.name: weight for task, weight in tasks},
    rows,
    cfg.length,
    BatchSchedule(cfg.batch_size).offset(total_steps),
  )
  return [
    Planned(
      **vars(share),
      problem=found[share.name][1],
      languages=found[share.name][0].languages if found[share.name][0] else {},
    )
    for share in shares
  ]


def _manifest(task, cfg, vocabulary, cache_dir, seed):
  """(the manifest of a task's token store, None), or (None, why there is none)."""
  if not getattr(vocabulary, 'exists', lambda: True)():
    return None, 'no vocabulary yet: t5x vocab'
  try:
    path = prepare.store_path(cache_dir, task, cfg.split, vocabulary, seed)
    manifest = token_store.read_manifest(path)
  except (UserError, Failure) as e:
    return None, str(e).partition(': ')[0]
  return manifest, None if manifest else 'no token store yet: t5x cache'


def language_table(shares: list[Planned]) -> list[str]:
  """Tokens by language that the run will read, beside the paper's Table 29.

  A sub-corpus counts by the tokens that are read of it; code has no part in it, as in
  the paper. Languages without text here are named below the table, apart from those
  that the identifier cannot tell from others.
  """
  read: dict[str, float] = {}
  for share in shares:
    for name, tokens in share.languages.items() if share.available else ():
      read[name] = read.get(name, 0) + tokens * share.needed / share.available
  known = language.distinguishable() | set(language.PAPER_TABLE_29)
  read = {name: tokens for name, tokens in read.items() if name in known}
  if not read:
    return []
  rows = language.language_table(read)
  lines = [f'{"language":24}{"read":>12}{"share":>10}{"paper":>10}']
  for row in sorted((row for row in rows if row.tokens), key=lambda row: -row.tokens):
    paper = '-' if row.paper_share is None else f'{row.paper_share:.3f}%'
    lines.append(f'{row.code:24}{_tokens(row.tokens):>12}{row.share:9.3f}%{paper:>10}')
  for what, codes in (
    ('no text in', [row.code for row in rows if row.tokens == 0]),
    ('not distinguishable', [row.code for row in rows if row.tokens is None]),
  ):
    if codes:
      lines += textwrap.wrap(f'{what}: {", ".join(codes)}', 88, subsequent_indent='  ')
  return lines


def table(shares: list[Planned]) -> list[str]:
  """The plan as lines of text."""
  lines = [f'{"task":24}{"weight":>9}{"needed":>12}{"available":>12}{"epochs":>9}']
  for share in shares:
    have = '-' if share.available is None else _tokens(share.available)
    epochs = '-' if share.epochs is None else f'{share.epochs:.3f}'
    note = share.problem or ('repeats' if share.epochs and share.epochs > 1 else '')
    lines.append(
      f'{share.name:24}{100 * share.weight:8.3g}%{_tokens(share.needed):>12}{have:>12}'
      f'{epochs:>9}  {note}'.rstrip()
    )
  return lines


def _tokens(count: float) -> str:
  """A number of tokens, as '390.0 B' or '2.9 M'."""
  for unit, size in (('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if count >= size:
      return f'{count / size:.1f} {unit}'
  return f'{count:.0f}'

"""What a run will read of each sub-corpus, from the sizes of the token stores alone."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from palm_t5x import errors
from palm_t5x.corpus import sampling


@dataclasses.dataclass(frozen=True)
class Share:
  """One sub-corpus's part in a run; tokens are predicted tokens, whole rows of them.

  Attributes:
    name: of the task.
    weight: its share of the rows, 0 to 1.
    needed: tokens that the run reads.
    available: tokens in its store; None where there is no store yet.
  """

  name: str
  weight: float
  needed: int
  available: int | None

  @property
  def epochs(self) -> float | None:
    """How often the store is read through; None where there is none yet."""
    if self.available is None:
      return None
    return self.needed / self.available if self.available else float('inf')


def shares(
  weights: Mapping[str, float],
  rows: Mapping[str, int | None],
  length: int,
  num_examples: int,
) -> list[Share]:
  """The plan of the first `num_examples` rows of a mixture.

  Args:
    weights: task -> its rate, relative to the others'.
    rows: task -> rows in its store; None where there is no store yet.
    length: tokens per row.
    num_examples: rows that the run reads: `BatchSchedule.offset` of its last step.
  """
  names = [name for name, weight in weights.items() if weight]
  schedule = sampling.MixtureSchedule([weights[name] for name in names])
  turns, rest = divmod(num_examples, schedule.period)
  task, _ = schedule.lookup(np.arange(rest))
  counts = turns * np.asarray(schedule.counts, np.int64)
  counts = counts + np.bincount(task, minlength=len(names))
  return [
    Share(
      name,
      float(schedule.counts[i]) / schedule.period,
      int(counts[i]) * length,
      None if rows.get(name) is None else rows[name] * length,
    )
    for i, name in enumerate(names)
  ]


def check(plan: Sequence[Share]) -> None:
  """Refuses a run that would read text twice.

  Raises:
    UserError: naming each sub-corpus that is too short, and by how much.
  """
  short = [share for share in plan if share.epochs is not None and share.epochs > 1]
  if short:
    named = '; '.join(
      f'{share.name} has {share.available:,} tokens and {share.needed:,} are needed '
      f'({share.needed - share.available:,} short, {share.epochs:.2f} epochs)'
      for share in short
    )
    raise errors.UserError(
      f'The run would read text more than once: {named}. Give more text, lower '
      'TRAIN_STEPS or its weight, or allow it with --gin.ALLOW_REPEATS=True.'
    )

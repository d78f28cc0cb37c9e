"""`t5x tasks`: what is registered, and what an example of it looks like."""

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

from palm_t5x.errors import Failure, UserError


def tasks(*, names: Sequence[str] | str = (), vocabulary: Any = None) -> None:
  """Prints the registry, or the named tasks with one example of each split.

  Args:
    names: tasks or mixtures to show; none lists them all.
    vocabulary: what tasks of this project are tokenised with, if given.

  Raises:
    UserError: for a name that is not registered.
  """
  import seqio

  if vocabulary is not None:
    from palm_t5x.corpus import vocabulary as vocabulary_lib

    vocabulary_lib.use(vocabulary)
  names = [names] if isinstance(names, str) else list(names)
  if not names:
    _list(seqio)
    return
  known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, 3)
      hint = f' Did you mean {" or ".join(near)}?' if near else ''
      raise UserError(f'no task or mixture is named {name!r}.{hint}')
    _show(seqio.get_mixture_or_task(name))


def _list(seqio: Any):
  mixtures = sorted(seqio.MixtureRegistry.names())
  print('Mixtures')
  for name in mixtures:
    mixture = seqio.MixtureRegistry.get(name)
    rates = [(task.name, mixture.get_rate(task)) for task in mixture.tasks]
    total = sum(rate for _, rate in rates)
    parts = ', '.join(f'{task} {100 * rate / total:g} %' for task, rate in rates)
    print(f'  {name:24} {parts}')
  print('Tasks')
  for name in sorted(seqio.TaskRegistry.names()):
    task = seqio.TaskRegistry.get(name)
    metrics = ', '.join(_metric_names(task)) or 'loss'
    print(f'  {name:24} {", ".join(task.output_features):18} {metrics}')
    print(f'    {_example_line(task)}')
  print('\n`t5x tasks NAME` shows an example; docs/your_data.md adds a task.')


def _metric_names(task: Any) -> list[str]:
  functions = [*task.metric_fns]
  return [getattr(f, '__name__', type(f).__name__) for f in functions]


def _show(provider: Any):
  """One mixture's tasks, or one task's first example, as its source gives it."""
  for task in getattr(provider, 'tasks', None) or [provider]:
    splits = task.splits
    splits = list(splits) if not isinstance(splits, str) else [splits]
    print(f'{task.name}: splits {", ".join(splits)}')
    for split in splits:
      print(f'  {split}')
      for key, value in _first_example(task, split).items():
        print(f'    {key}: {_shortened(value)}')


def _first_example(task: Any, split: str) -> dict[str, Any]:
  """The first raw example; the source is read, nothing is tokenised.

  Raises:
    Failure: if the source cannot be read, with its reason.
  """
  source = task.source
  try:
    if hasattr(source, 'documents'):
      first = next(iter(source.documents(split)), None)
      return first if isinstance(first, dict) else {'text': first}
    dataset = source.get_dataset(split, shuffle=False)
    return next(dataset.take(1).as_numpy_iterator(), {})
  except UserError:
    raise
  except Exception as e:
    reason = str(e).strip().splitlines()[0][:200] if str(e) else type(e).__name__
    raise Failure(f'{task.name} cannot be read: {reason}') from e


def _example_line(task: Any, longest: int = 90) -> str:
  """The beginning of a task's first example, or why there is none, in one line."""
  splits = [task.splits] if isinstance(task.splits, str) else list(task.splits)
  try:
    example = _first_example(task, splits[0])
  except (UserError, Failure) as e:
    return f'(no example: {str(e).partition(": ")[0]})'
  parts = (f'{k}: {_shortened(v, longest)}' for k, v in (example or {}).items())
  return '  '.join(itertools.islice(parts, 2)) or '(empty)'


def _shortened(value: Any, longest: int = 400) -> str:
  if isinstance(value, bytes):
    value = value.decode('utf-8', 'replace')
  text = repr(value)
  return (
    text if len(text) <= longest else f'{text[:longest]}... ({len(text)} characters)'
  )

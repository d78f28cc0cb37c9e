"""`t5x cache`: builds the token stores that training reads, on any number of machines.

What `t5x train` would do by itself on one machine before its first step, in parallel,
in shards, or by Apache Beam; and `--verify`, which reads what was built.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from palm_t5x.errors import Failure, UserError
from palm_t5x.progress import PrepareProgress


class _Store(NamedTuple):
  """A token store that is asked for."""

  label: str
  task: Any
  split: str
  path: str


def cache(
  *,
  mixture_or_task_name: Any,
  vocabulary: Any,
  cache_dir: str,
  splits: Sequence[str] = ('train', 'validation'),
  seed: int | None = 0,
  use_cached: bool = False,
  workers: int | None = None,
  shard_id: int = 0,
  num_shards: int = 1,
  verify: bool = False,
  runner: Callable | None = None,
) -> list[str]:
  """Builds the token stores of a mixture's tasks where they are missing.

  Args:
    mixture_or_task_name: whose text to tokenise.
    vocabulary: to tokenise it with; learned first if it is missing and says from what.
    cache_dir: the stores lie in <cache_dir>/token_stores.
    splits: of the tasks; those that no task has are passed over.
    seed: of the documents' order: the seed that the run trains with; None means 0.
    use_cached: read SeqIO's own cache of a task where there is one.
    workers: processes of this machine; None: one for each core.
    shard_id, num_shards: this machine's share of the work; all shards run the same
      command, in any order or at once, with one `cache_dir`.
    verify: build nothing, but read every store and compare it with its checksums.
    runner: does the work by other means: `corpus.beam_runner.Beam`.

  Returns:
    the paths of the stores.

  Raises:
    UserError: for an unknown task, a task without text, or shards that do not exist.
    Failure: a full disk; with `verify`, stores that are damaged.
  """
  from palm_t5x import datasets
  from palm_t5x.corpus import jobs

  seed = seed or 0
  workers = jobs.default_workers(workers)
  jobs.check_shard(shard_id, num_shards)
  if verify:
    _check_exists(vocabulary)
    stores = _stores(mixture_or_task_name, splits, vocabulary, cache_dir, seed)
    _verify(stores, workers)
    return [store.path for store in stores]
  datasets.learn_vocabulary(vocabulary, cache_dir)
  stores = _stores(mixture_or_task_name, splits, vocabulary, cache_dir, seed)
  with jobs.Pool(workers) as pool:
    build = functools.partial(
      _build,
      vocabulary=vocabulary,
      seed=seed,
      use_cached=use_cached,
      workers=pool,
      shard_id=shard_id,
      num_shards=num_shards,
      runner=runner,
    )
    waiting = [store for store in stores if not build(store)]
    # Others may have been a store behind: what they are done with now is finished here.
    waiting = [store for store in waiting if not build(store)]
  _say_what_is_next(waiting, shard_id, num_shards)
  return [store.path for store in stores]


def _check_exists(vocabulary: Any):
  if getattr(vocabulary, 'learn_from', None) and not vocabulary.exists():
    raise UserError(
      f'There is no vocabulary file at {vocabulary.path}, so there are no token stores '
      'to verify: run without --verify to build them.'
    )


def _stores(
  name: Any, splits: Sequence[str], vocabulary: Any, cache_dir: str, seed: int
) -> list[_Store]:
  """All stores that are asked for."""
  import seqio

  from palm_t5x.corpus import prepare

  splits = [splits] if isinstance(splits, str) else list(splits)
  known = prepare.mixture_or_task(name).splits
  missing = [split for split in splits if split.split('[')[0] not in known]
  if len(missing) == len(splits):
    raise UserError(
      f"'{name}' has none of the splits {', '.join(splits) or '()'}: it has "
      f'{", ".join(sorted(known))}.'
    )
  found = []
  for split in splits:
    if split in missing:
      print(f"'{name}' has no split '{split}'.")
      continue
    provider = prepare.mixture_or_task(name)
    empty = [t for t in seqio.get_subtasks(provider) if prepare.is_empty(t, split)]
    for task in empty:
      print(f"'{task.name}' has no documents in its split '{split}'.")
    if len(empty) == len(seqio.get_subtasks(provider)):
      continue
    for task, _ in prepare.tasks_and_weights(name, split):
      path = prepare.store_path(cache_dir, task, split, vocabulary, seed)
      found.append(_Store(f'{task.name}/{split}', task, split, path))
  return found


def _build(store: _Store, *, vocabulary: Any, num_shards: int, **how) -> bool:
  """Builds a store and says what is in it; False if other shards must do more."""
  from palm_t5x.corpus import prepare

  manifest = prepare.build_store(
    store.path,
    store.task,
    store.split,
    vocabulary,
    num_shards=num_shards,
    progress=PrepareProgress(),
    **how,
  )
  if manifest is None:
    return False
  prepare.open_store(store.path, vocabulary)
  print(f'{store.label}: {_summary(manifest)}', flush=True)
  return True


def _summary(manifest: Any) -> str:
  """'1,204 documents, 3,400,120 tokens, 4.21 bytes per token'."""
  ratio = manifest.num_bytes / manifest.num_tokens
  text = (
    f'{_count(manifest.num_documents, "document")}, {manifest.num_tokens:,} tokens, '
    f'{ratio:.2f} bytes per token'
  )
  if manifest.num_empty:
    text += f'; left out: {_count(manifest.num_empty, "empty document")}'
  return text


def _count(number: int, what: str) -> str:
  return f'{number:,} {what}' + ('' if number == 1 else 's')


def _say_what_is_next(waiting: Sequence[_Store], shard_id: int, num_shards: int):
  from palm_t5x.corpus import store_builder

  if not waiting:
    print(
      'All token stores are whole. `t5x train` with the same --gin_file and --gin '
      'flags reads them; --verify checks them again.'
    )
    return
  left = set()
  for store in waiting:
    shards = store_builder.outstanding(store.path, num_shards)
    left |= set(shards)
    print(f'{store.label}: not whole yet; to be done: shard {_names(shards)}')
  flags = ' and '.join(
    f'--shard_id={i}' for i in sorted(left)[:8] if i != shard_id or left == {shard_id}
  )
  more = ', and so on' if len(left) > 8 else ''
  print(f'Next: the same command with --num_shards={num_shards} {flags}{more}.')


def _names(numbers: Sequence[int]) -> str:
  """'0, 2 and 5'."""
  *most, last = map(str, numbers)
  return f'{", ".join(most)} and {last}' if most else last


def _verify(stores: Sequence[_Store], workers: int):
  """Reads every store and prints whether it is whole.

  Raises:
    Failure: if any is not.
  """
  from palm_t5x.corpus import token_store

  damaged = missing = 0
  for store in stores:
    progress = functools.partial(PrepareProgress(), f'reading {store.label}')
    try:
      manifest = token_store.read_manifest(store.path)
      if manifest is None:
        missing += 1
        print(f'{store.label}: not built: there is no {store.path}')
        continue
      token_store.TokenStore(store.path).verify(progress, workers)
      print(f'{store.label}: whole: {_summary(manifest)}', flush=True)
    except Failure as e:
      damaged += 1
      print(f'{store.label}: {e}', flush=True)
  if damaged or missing:
    raise Failure(
      f'of {_count(len(stores), "token store")}, {damaged} damaged and {missing} not '
      'built: see above. Run without --verify to build what is missing.'
    )

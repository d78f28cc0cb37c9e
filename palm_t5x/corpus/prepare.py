"""Makes ready what training reads: one token store per task.

They are made once and kept under the cache directory; later runs open them.
"""

import difflib

import numpy as np
import seqio

from palm_t5x import errors
from palm_t5x.corpus import (
  codec,
  sources,
  storage,
  store_builder,
  token_store,
)
from palm_t5x.corpus import vocabulary as vocabulary_lib


def mixture_or_task(name) -> seqio.Task | seqio.Mixture:
  """The registered task or mixture of this name, or `name` itself if it is one.

  Raises:
    UserError: there is none; the message names close ones.
  """
  if isinstance(name, seqio.Task | seqio.Mixture):
    return name
  names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in names:
    close = difflib.get_close_matches(str(name), names, n=3)
    meant = f' Did you mean {" or ".join(repr(n) for n in close)}?' if close else ''
    raise errors.UserError(
      f"There is no task or mixture '{name}'.{meant} `t5x tasks` lists them all; a "
      'module of your own that registers one must be imported by a Gin file.'
    )
  return seqio.get_mixture_or_task(name)


def tasks_and_weights(name, split: str) -> list[tuple[seqio.Task, float]]:
  """The tasks of a mixture (or the task itself) that have `split`, with their rates.

  Weights are relative; a task that has no such split is left out, as SeqIO does.

  Raises:
    UserError: no such mixture, no task has the split, or a rate cannot be computed.
  """
  provider = mixture_or_task(name)
  base = split.split('[')[0]
  chosen = [task for task in seqio.get_subtasks(provider) if base in task.splits]
  if base != split and not all(_can_slice(task.source) for task in chosen):
    raise errors.UserError(
      f"'{provider.name}' has no split '{split}': parts of a split can be had of TFDS "
      f"data only. Use '{base}'."
    )
  if not chosen:
    known = ', '.join(sorted(provider.splits))
    raise errors.UserError(f"'{provider.name}' has no split '{split}': it has {known}.")
  chosen = [task for task in chosen if not is_empty(task, base)]
  if not chosen:
    raise errors.UserError(
      f"'{provider.name}' has no documents in its split '{split}'."
    )
  if isinstance(provider, seqio.Task):
    return [(provider, 1.0)]
  try:
    weighted = [(task, float(provider.get_rate(task))) for task in chosen]
  except (AssertionError, TypeError, ValueError) as e:
    raise errors.UserError(
      f"The rates of mixture '{provider.name}' cannot be computed ({e}): give it "
      'numbers, or cache its tasks with seqio_cache_tasks.'
    ) from e
  return [(task, weight) for task, weight in weighted if weight > 0]


def is_empty(task: seqio.Task, split: str) -> bool:
  """Whether the split is known to have no documents."""
  return getattr(task.source, 'is_empty', lambda split: False)(split)


def _can_slice(source: seqio.DataSource) -> bool:
  return isinstance(source, seqio.TfdsDataSource)


def store_path(
  cache_dir: str, task: seqio.Task, split: str, vocabulary, seed: int = 0
) -> str:
  """Where the token store of a task lies: one folder per text, vocabulary and format.

  Where the task's source says that its text is not on this machine, that is the one
  folder that was made from some text of it.

  Raises:
    UserError: there are several of those.
  """
  folder = storage.join(storage.normalise(cache_dir), 'token_stores', task.name)
  parts = [split.replace('/', '_'), codec.hash_of(vocabulary)[:12]]
  fingerprint = getattr(task.source, 'fingerprint', lambda split: '')(split)
  end = [f'seed{seed}'] if seed else []
  end.append(f'v{token_store.FORMAT}')
  if fingerprint is None:
    return _only_store(folder, '-'.join(parts) + '-', '-' + '-'.join(end), task, split)
  parts += [fingerprint] if fingerprint else []
  return storage.join(folder, '-'.join([*parts, *end]))


def _only_store(folder: str, begin: str, end: str, task: seqio.Task, split: str) -> str:
  names = storage.list_folders(folder)
  made = [
    name
    for name in names
    if name.startswith(begin)
    and name.endswith(end)
    and '-' not in name[len(begin) : -len(end)]
    and storage.read_bytes(storage.join(folder, name, 'manifest.json')) is not None
  ]
  if len(made) > 1:
    raise errors.UserError(
      f"The text of task '{task.name}' is not on this machine, and its split '{split}' "
      f'has several token stores in {folder}: {", ".join(made)}. Leave the one that is '
      'meant, or say where the text is.'
    )
  if made:
    return storage.join(folder, made[0])
  next(iter(task.source.documents(split)), None)  # The source knows what is missing.
  raise errors.UserError(
    f"The text of task '{task.name}' is not on this machine, and there is no token "
    f'store {begin}*{end} in {folder}: say where the text is, or copy the store there.'
  )


def prepare(
  mixture_or_task_name: str | seqio.Task | seqio.Mixture,
  split: str,
  vocabulary: seqio.Vocabulary,
  cache_dir: str,
  *,
  seed: int = 0,
  use_cached: bool = False,
  progress=None,
) -> list[tuple[str, token_store.TokenStore, float]]:
  """Opens the token stores of a mixture's tasks, building those that are missing.

  Args:
    mixture_or_task_name: any registered SeqIO task or mixture with a 'targets' feature,
      with or without 'inputs'.
    split: such as 'train'.
    vocabulary: the model's; its file must exist.
    cache_dir: stores lie in <cache_dir>/token_stores/<task>/<split>-<vocabulary>...
    seed: of the documents' order within each store.
    use_cached: read SeqIO's own cache of a task where there is one.
    progress: called as progress(label, done, total) while a store is being built.

  Returns:
    (task name, store, weight) for each task; weights are relative shares of rows.

  Raises:
    UserError: unknown name or split, a task without text, or of another vocabulary.
    Failure: a damaged store, a full disk.
  """
  stores = []
  for task, weight in tasks_and_weights(mixture_or_task_name, split):
    path = store_path(cache_dir, task, split, vocabulary, seed)
    build_store(
      path, task, split, vocabulary, seed=seed, use_cached=use_cached, progress=progress
    )
    stores.append((task.name, open_store(path, vocabulary), weight))
  return stores


def open_store(path: str, vocabulary: seqio.Vocabulary) -> token_store.TokenStore:
  """The whole token store at `path`.

  Raises:
    Failure: there is none, it is damaged, or another vocabulary made it.
  """
  store = token_store.TokenStore(path)
  ours, theirs = codec.hash_of(vocabulary), store.manifest.vocabulary_hash
  if ours != theirs:
    raise errors.Failure(
      f'The token store at {path} was made with another vocabulary ({theirs[:12]}) '
      f'than {vocabulary} ({ours[:12]}): delete that folder and run again, or name the '
      'vocabulary it was made with.'
    )
  return store


def build_store(
  path: str,
  task: seqio.Task,
  split: str,
  vocabulary: seqio.Vocabulary,
  *,
  seed: int = 0,
  use_cached: bool = False,
  **how,
) -> token_store.Manifest | None:
  """Builds the token store of a task's split at `path`, unless it is there.

  Args:
    how: `store_builder.build`'s workers, shard_id, num_shards, runner and progress.

  Returns:
    the manifest; None if other shards have yet to do their part.
  """
  _check_vocabulary(task, vocabulary)

  def documents():
    parts = None
    if sources.is_plain_text(task) and not use_cached:
      parts = task.source.parts(split)
    return parts or examples(task, split, vocabulary, use_cached)

  return store_builder.build(
    path, documents, vocabulary, task=task.name, split=split, seed=seed, **how
  )


def _check_vocabulary(task: seqio.Task, vocabulary) -> None:
  if 'targets' not in task.output_features:
    raise errors.UserError(
      f"Task '{task.name}' has no 'targets' feature, only "
      f'{", ".join(task.output_features)}: a language model is trained on targets.'
    )
  for key in ('inputs', 'targets'):
    feature = task.output_features.get(key)
    theirs = feature and feature.vocabulary
    if theirs is None or isinstance(
      theirs, vocabulary_lib.RunVocabulary | seqio.PassThroughVocabulary
    ):
      continue
    if codec.hash_of(theirs) != codec.hash_of(vocabulary):
      raise errors.UserError(
        f"The feature '{key}' of task '{task.name}' is tokenised with {theirs}, the "
        f'model with {vocabulary}: bind the same one, or give the feature '
        'palm_t5x.corpus.vocabulary.RunVocabulary().'
      )


def examples(task, split, vocabulary, use_cached=False):
  """What `store_builder.build` wants: texts, or examples that SeqIO has tokenised."""
  if sources.is_plain_text(task) and not use_cached:
    yield from task.source.documents(split)
    return
  with vocabulary_lib.using(vocabulary):
    dataset = task.get_dataset(
      sequence_length=None,
      split=split,
      use_cached=use_cached and bool(task.cache_dir),
      shuffle=False,
      seed=0,
      num_epochs=1,
    )
    for example in dataset.as_numpy_iterator():
      yield _example(task.name, example, vocabulary)


def _example(name: str, example: dict, vocabulary) -> dict:
  document = {}
  for key in ('inputs', 'targets'):
    if key not in example:
      continue
    ids = np.asarray(example[key])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise errors.UserError(
        f"The feature '{key}' of task '{name}' is {ids.dtype} of shape {ids.shape}, "
        'not a sequence of token ids: it needs seqio.preprocessors.tokenize.'
      )
    document[key] = ids
  text = example.get('targets_pretokenized')
  if not isinstance(text, bytes):
    text = vocabulary.decode(document['targets'].tolist()).encode()
  return {**document, 'bytes': len(text)}

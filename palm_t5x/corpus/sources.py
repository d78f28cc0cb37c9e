"""Text that Python can iterate over, as the source of a SeqIO task.

The token-store builder reads `documents(split)` without TensorFlow, or, where there are
many, the split's `parts` in several processes; SeqIO's own pipeline reads the same
documents in the same order through `get_dataset`.
"""

import functools
import itertools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.corpus.documents import Part

# What turns a document into targets. A task with exactly these preprocessors is
# tokenised by the store builder directly; any other runs through SeqIO's pipeline.
PLAIN_TEXT = (
  functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
  seqio.preprocessors.tokenize,
  seqio.preprocessors.append_eos,
)


class DocumentSource(seqio.DataSource):
  """Documents that a Python function yields.

  Args:
    documents: split -> iterable of documents: str, or dicts of str with one set of keys
      (such as inputs and targets). Called anew for each pass; must repeat itself. None:
      those of `parts`, one after the other.
    splits: the names of the splits.
    fingerprint: split -> a short string (letters, digits, '_') that changes when the
      text does; token stores are kept apart by it. It may return None where the text is
      not on this machine: a token store that is there then serves. None: the text never
      changes.
    identity: a function that returns a short name of *which* text this is, where one
      task serves many, such as a hash of the user's globs. A learned vocabulary's file
      is named after it. None: the task's name says it all.
    parts: split -> list of `Part`s that hold its documents, so that several processes
      can read them; they import what a part's `read` is defined in, which should
      therefore not be TensorFlow.
    is_empty: split -> whether it is known to have no documents; a mixture then does
      without it. None: no split is.
  """

  def __init__(
    self,
    documents=None,
    splits=('train', 'validation'),
    fingerprint=None,
    identity=None,
    parts=None,
    is_empty=None,
  ):
    if documents is None and parts is None:
      raise ValueError('a source needs documents or parts')
    self._documents = documents
    self._parts = parts
    self._is_empty = is_empty
    self._fingerprint = fingerprint
    self._identity = identity
    super().__init__(splits=splits, caching_permitted=True)

  @property
  def identity(self) -> str:
    """Which text this is, where the task's name does not say it; else ''."""
    return self._identity() if self._identity else ''

  def fingerprint(self, split: str) -> str | None:
    """A short string that changes when the text of the split does; '' if it cannot.

    None: the text is not here.
    """
    return self._fingerprint(split) if self._fingerprint else ''

  def is_empty(self, split: str) -> bool:
    """Whether the split is known to have no documents."""
    return bool(self._is_empty and self._is_empty(split))

  def parts(self, split: str) -> Sequence[Part] | None:
    """What several processes can read the documents of a split from, if they can."""
    self._check(split)
    return self._parts and list(self._parts(split))

  def documents(self, split: str):
    """Iterates over the documents of a split, in an order that does not change."""
    self._check(split)
    if self._documents is not None:
      return iter(self._documents(split))
    read = (part.read() for part in self._parts(split))
    return (getattr(d, 'text', d) for d in itertools.chain.from_iterable(read))

  def _check(self, split: str):
    if split not in self.splits:
      raise ValueError(f"there is no split '{split}', only {', '.join(self.splits)}")

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length=None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """As seqio.DataSource: string documents become {'text': document}."""
    del sequence_length, use_cached, num_epochs
    # From a list, not from a generator: tf.data can save its iterators and no Python
    # thread can be left waiting for the interpreter's lock.
    documents = list(self.documents(split))
    if shard_info:
      documents = documents[shard_info.index :: shard_info.num_shards]
    if documents and isinstance(documents[0], dict):
      columns = {key: [d[key] for d in documents] for key in documents[0]}
    else:
      columns = {'text': documents}
    columns = {key: tf.constant(values, tf.string) for key, values in columns.items()}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    if shuffle and documents:
      dataset = dataset.shuffle(len(documents), seed=seed)
    return dataset


def add_text_task(name: str, source: seqio.DataSource, **kwargs) -> seqio.Task:
  """Registers a language-modelling task over the documents of `source`.

  Its only feature is 'targets', tokenised with the vocabulary of the model being run
  and ending with [eod]. `kwargs` go to `seqio.TaskRegistry.add` (metric_fns, ...).
  """
  feature = seqio.Feature(vocabulary=vocabulary_lib.RunVocabulary(), add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=PLAIN_TEXT,
    output_features={'targets': feature},
    **kwargs,
  )


def is_plain_text(task: seqio.Task) -> bool:
  """Whether `task` was made by `add_text_task` from a `DocumentSource`."""
  return isinstance(task.source, DocumentSource) and (
    tuple(task.preprocessors) == PLAIN_TEXT
  )

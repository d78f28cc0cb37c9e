"""Tasks over the sub-corpora that `t5x corpus` makes."""

import functools

import seqio

from palm_t5x.corpus import processed, sources


def add_corpus_task(name: str) -> seqio.Task:
  """Registers a task over the sub-corpus in CORPUS_DIR/`name`.

  The folder is looked at when the task is read: `t5x corpus` may make it later, and a
  machine that has the token stores can do without it.
  """
  source = sources.DocumentSource(
    splits=('train', 'validation'),
    fingerprint=functools.partial(processed.fingerprint, name),
    parts=functools.partial(processed.parts, name),
    is_empty=functools.partial(processed.is_empty, name),
  )
  return sources.add_text_task(name, source)

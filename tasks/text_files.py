"""The user's own text: task `text_files`, over the files that TEXT_FILES names.

    t5x train --gin_file=palm_tiny.gin --gin.TEXT_FILES='my/*.txt'

.jsonl files hold one object per line with the document under 'text'; any other file is
one document. One file in twenty is held out for validation, by a hash of its name; of
fewer than twenty files, one paragraph block in twenty of each.
"""

import glob
import hashlib
import json
import os

from palm_t5x import errors
from palm_t5x.corpus import sources

NAME = 'text_files'
_VALIDATION_SHARE = 20  # one file, or one block, in so many
_BLOCK_CHARACTERS = 2_000  # paragraphs are held out together, about this much at a time

_patterns: tuple[str, ...] = ()


def training_text(text_files=None, otherwise: str = 'palm_tiny') -> str:
  """The mixture or task to train on: `text_files` if files are named, else `otherwise`.

  Args:
    text_files: a glob, or several in a list or separated by commas; ** goes into
      folders. None or '' for none.
    otherwise: the task or mixture for that case.

  Raises:
    UserError: no file matches.
  """
  if not text_files:
    return otherwise
  use_files(text_files)
  return NAME


def use_files(text_files) -> list[str]:
  """Makes `text_files` (as in `training_text`) what the task reads; returns the files.

  Raises:
    UserError: no file matches.
  """
  global _patterns
  patterns = text_files.split(',') if isinstance(text_files, str) else text_files
  _patterns = tuple(
    os.path.abspath(os.path.expanduser(p.strip())) for p in patterns if p.strip()
  )
  return _files()


def _files() -> list[str]:
  if not _patterns:
    raise errors.UserError(
      "The task 'text_files' reads the files that TEXT_FILES names, and it names none: "
      "pass --gin.TEXT_FILES='my/*.txt' (quotes keep the shell from expanding it)."
    )
  found = {f for p in _patterns for f in glob.glob(p, recursive=True)}
  files = sorted(f for f in found if os.path.isfile(f))
  if not files:
    raise errors.UserError(
      f"TEXT_FILES = '{','.join(_patterns)}' matches no file: check the path (it is "
      f'relative to {os.getcwd()}) and the pattern, such as my/*.txt or my/**/*.md.'
    )
  return files


def _held_out(name: str) -> bool:
  digest = hashlib.blake2b(name.encode(errors='replace'), digest_size=8).digest()
  return int.from_bytes(digest, 'little') % _VALIDATION_SHARE == 0


def _read(path: str):
  """(label, document) of one file; labels do not depend on its folder."""
  name = os.path.basename(path)
  with open(path, encoding='utf-8', errors='replace', newline='') as f:
    if not path.endswith('.jsonl'):
      yield name, f.read()
      return
    for number, line in enumerate(f, start=1):
      if not line.strip():
        continue
      try:
        text = json.loads(line)['text']
      except (ValueError, TypeError, KeyError):
        text = None
      if not isinstance(text, str):
        raise errors.UserError(
          f"Line {number} of {path} is not a JSON object with a string under 'text', "
          'such as {"text": "..."}.'
        )
      yield f'{name}:{number}', text


def _blocks(text: str):
  """Consecutive paragraphs, about `_BLOCK_CHARACTERS` at a time; joined, the text."""
  block, size = [], 0
  for paragraph in text.split('\n\n'):
    block.append(paragraph)
    size += len(paragraph) + 2
    if size >= _BLOCK_CHARACTERS:
      yield '\n\n'.join(block)
      block, size = [], 0
  if block:
    yield '\n\n'.join(block)


def _documents(split: str):
  documents = [entry for path in _files() for entry in _read(path)]
  if not any(text.strip() for _, text in documents):
    raise errors.UserError(
      f"TEXT_FILES = '{','.join(_patterns)}' matches {len(_files())} file(s), and "
      'there is no text in them: name others.'
    )
  wanted = split == 'validation'
  if len(documents) >= _VALIDATION_SHARE:
    held = {label for label, _ in documents if _held_out(label)}
    held = held or {documents[-1][0]}
    yield from (text for label, text in documents if (label in held) == wanted)
    return
  blocks = [
    (f'{label}#{number}', block)
    for label, text in documents
    for number, block in enumerate(_blocks(text))
  ]
  held = {label for label, _ in blocks if _held_out(label)} or {blocks[-1][0]}
  if len(blocks) == 1:
    held = {blocks[0][0]} if wanted else set()  # too little to hold any of it out
  yield from _joined(blocks, held, wanted)


def _joined(blocks, held, wanted):
  """The wanted blocks, neighbours put together again."""
  run: list[str] = []
  previous = None
  for label, block in blocks:
    follows = previous is not None and previous == label.rsplit('#', 1)[0]
    if run and not ((label in held) == wanted and follows):
      yield '\n\n'.join(run)
      run = []
    if (label in held) == wanted:
      run.append(block)
    previous = label.rsplit('#', 1)[0]
  if run:
    yield '\n\n'.join(run)


def _fingerprint(split: str) -> str:
  """Changes when a file is added, removed or edited."""
  del split
  digest = hashlib.blake2b(digest_size=4)
  for path in _files():
    digest.update(f'{path} '.encode(errors='replace'))
    with open(path, 'rb') as f:
      digest.update(hashlib.file_digest(f, 'blake2b').digest())
  return digest.hexdigest()


def _identity() -> str:
  """Which files: a hash of the patterns, so that each has a vocabulary of its own."""
  _files()
  data = '\n'.join(_patterns).encode(errors='replace')
  return hashlib.blake2b(data, digest_size=4).hexdigest()


sources.add_text_task(
  NAME,
  sources.DocumentSource(_documents, fingerprint=_fingerprint, identity=_identity),
)

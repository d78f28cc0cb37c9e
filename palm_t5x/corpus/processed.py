"""Finished sub-corpora: their manifests, and tasks that read them.

<CORPUS_DIR>/<name>/ holds train-*.jsonl.zst and validation-*.jsonl.zst
(`documents.Writer`), and manifest.json, written last.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from palm_t5x import errors, places
from palm_t5x.corpus import documents, storage

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a sub-corpus holds.

  Attributes:
    name: of the sub-corpus.
    settings: what it was made with (`sub_corpus.settings`).
    splits: split -> {documents, bytes, files: [{name, checksum, documents, bytes}]}.
    counts: records read, kept by the steps, broken and ignored; exact and
      near-duplicates left out.
    broken: reason -> number of records that could not be read or are no documents.
    broken_places: of the first few.
    dropped: reason -> {documents, bytes, examples}.
    near_duplicate_examples: pairs (dropped, kept).
  """

  name: str
  settings: Mapping[str, Any]
  splits: Mapping[str, Any]
  counts: Mapping[str, int]
  broken: Mapping[str, int]
  broken_places: Sequence[str]
  dropped: Mapping[str, Any]
  near_duplicate_examples: Sequence[Sequence[str]] = ()
  format: int = FORMAT


def folder(name: str) -> str:
  """Where a sub-corpus lies."""
  return os.path.join(places.corpus_dir(), name)


def read_manifest(path: str) -> Manifest | None:
  """The manifest of the sub-corpus in the folder `path`, or None if it is not whole.

  Raises:
    Failure: it cannot be understood, or was edited.
  """
  data = storage.read_bytes(os.path.join(path, 'manifest.json'))
  if data is None:
    return None
  try:
    values = json.loads(data)
    checksum = values.pop('checksum')
    if values['format'] != FORMAT:
      raise ValueError(f'its format is {values["format"]}, this version reads {FORMAT}')
    if checksum != _checksum(values):
      raise ValueError('it was changed after it was written')
    return Manifest(**values)
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise errors.Failure(
      f'The manifest.json of the sub-corpus in {path} cannot be trusted ({e}): delete '
      'that folder and run t5x corpus again.'
    ) from e


def _checksum(values: Mapping[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True, separators=(',', ':'))
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_manifest(path: str, manifest: Manifest) -> None:
  """Makes a folder of documents a whole sub-corpus."""
  values = json.loads(json.dumps(dataclasses.asdict(manifest)))
  values['checksum'] = _checksum(values)
  text = json.dumps(values, indent=1, sort_keys=True) + '\n'
  storage.write_bytes(os.path.join(path, 'manifest.json'), text.encode())


def finished() -> dict[str, Manifest]:
  """Name -> manifest of every sub-corpus in CORPUS_DIR, sorted."""
  root, found = places.corpus_dir(), {}
  for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
    manifest = read_manifest(os.path.join(root, name))
    if manifest is not None:
      found[name] = manifest
  return found


def verify(path: str) -> None:
  """Reads every file of a sub-corpus and compares it with the manifest.

  Raises:
    Failure: one differs, or is gone.
  """
  manifest = _manifest(os.path.basename(path), path)
  for split in manifest.splits.values():
    for file in split['files']:
      digest, place = hashlib.blake2b(digest_size=16), os.path.join(path, file['name'])
      for line in documents.lines(place):
        digest.update(line + b'\n')
      if digest.hexdigest() != file['checksum']:
        raise errors.Failure(
          f'{place} is not what the manifest says: its checksum differs. Delete the '
          f'folder {path} and run t5x corpus again.'
        )


def _manifest(name: str, path: str | None = None) -> Manifest:
  path = path or folder(name)
  manifest = read_manifest(path)
  if manifest is None:
    raise errors.UserError(
      f"There is no sub-corpus '{name}' in {os.path.dirname(path)}: make it with "
      f't5x corpus --gin_file=corpus/{name}.gin --data_dir=FOLDER, or name the folder '
      'that has it with --gin.CORPUS_DIR=FOLDER.'
    )
  return manifest


def parts(name: str, split: str) -> list[documents.Part]:
  """The files of a split, as documents with their languages, for `DocumentSource`.

  Raises:
    UserError: the sub-corpus has not been made.
  """
  manifest = _manifest(name)
  return [
    documents.Part(
      file['name'].removesuffix('.jsonl.zst'),
      functools.partial(documents.read, os.path.join(folder(name), file['name'])),
      file['bytes'],
    )
    for file in manifest.splits[split]['files']
    if file['documents']
  ]


def texts(name: str, split: str):
  """Every text of a split, in the order of the files."""
  for part in parts(name, split):
    for document in part.read():
      yield document.text


def is_empty(name: str, split: str) -> bool:
  """Whether the sub-corpus is there and has no documents in the split."""
  manifest = read_manifest(folder(name))
  return manifest is not None and not manifest.splits[split]['documents']


def fingerprint(name: str, split: str) -> str | None:
  """A short string that changes when the texts do; None where they are not here."""
  manifest = read_manifest(folder(name))
  if manifest is None:
    return None
  checksums = '\n'.join(file['checksum'] for file in manifest.splits[split]['files'])
  return hashlib.blake2b(checksums.encode(), digest_size=4).hexdigest()

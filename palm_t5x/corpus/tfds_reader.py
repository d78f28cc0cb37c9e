"""Text that TensorFlow Datasets has prepared, as a stream of documents."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from palm_t5x import errors
from palm_t5x.corpus import documents, records
from palm_t5x.corpus.records import Broken


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A dataset that TensorFlow Datasets has prepared, such as 'c4/en:3.1.0'.

  Its shards are the parts. The folder is TFDS's own data_dir.

  Attributes:
    name: 'name/config:version'; 'tfds:' in front of it is passed over.
    split: one of its splits.
    text_key: the feature that holds the text.
    source_key: one that says where it is from, if there is one.
  """

  name: str
  split: str = 'train'
  text_key: str = 'text'
  source_key: str | None = 'url'

  def parts(self, data_dir: str | None = None) -> list[documents.Part]:
    """See `records.Reader`. None: ~/tensorflow_datasets, or TFDS_DATA_DIR."""
    builder = _builder(self.name, data_dir)
    splits = builder.info.splits
    if self.split not in splits:
      raise errors.UserError(
        f'{self.name} has no split {self.split!r}, only {", ".join(splits)}.'
      )
    if self.text_key not in builder.info.features:
      raise errors.UserError(
        f'{self.name} has no feature {self.text_key!r}, only '
        f'{", ".join(builder.info.features)}.'
      )
    split = splits[self.split]
    return [
      documents.Part(
        f'{i:05d}-{records.slug(self.name)}-{self.split}',
        functools.partial(_read_tfds, self, data_dir, i),
        split.num_bytes // split.num_shards,
      )
      for i in range(split.num_shards)
    ]


def _builder(name: str, data_dir: str | None):
  """TFDS's builder, whose data are there.

  Raises:
    UserError: there is no such dataset, or it was not prepared.
  """
  import tensorflow_datasets as tfds

  name = name.removeprefix('tfds:')
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as e:
    problem = (str(e).strip().splitlines() or [''])[0]
    raise errors.UserError(f'TFDS cannot build {name!r}: {problem}') from e
  # Not left to TFDS: without a network it retries for minutes.
  if not builder.data_path.exists():
    raise errors.UserError(
      f'{name} is not prepared: there is no {builder.data_path}. Prepare it with `tfds '
      f'build {name}` where there is a network, or set --data_dir to the folder that '
      'holds it.'
    )
  return builder


def _read_tfds(reader: Tfds, data_dir: str | None, shard: int) -> Iterator[Any]:
  import tensorflow_datasets as tfds

  builder = _builder(reader.name, data_dir)
  dataset = builder.as_dataset(
    split=f'{reader.split}[{shard}shard]', shuffle_files=False
  )
  for i, example in enumerate(tfds.as_numpy(dataset)):
    place = f'{reader.split}-{shard:05d}:{i}'
    source = example.get(reader.source_key) if reader.source_key else None
    try:
      text = example[reader.text_key].decode()
    except UnicodeDecodeError:
      yield Broken(place, 'invalid UTF-8')
      continue
    except AttributeError:
      yield Broken(place, f'{reader.text_key} is no string')
      continue
    source = source.decode(errors='replace') if isinstance(source, bytes) else ''
    yield documents.Document(place, text, source or reader.name)

"""The classifier that web pages are scored with: found, or trained when needed."""

import dataclasses
import logging
import os
from collections.abc import Sequence

from palm_t5x import errors, places
from palm_t5x.corpus import documents, processed, quality, readers, storage
from palm_t5x.corpus.sub_corpus import Stream
from palm_t5x.corpus.token_store import only_builder

logger = logging.getLogger(__name__)


def model_path(path: str | None, cache_dir: str) -> str | None:
  """The folder of a model; a relative one lies in the cache directory."""
  if path is None or storage.is_remote(path):
    return path
  return os.path.join(storage.normalise(cache_dir), os.path.expanduser(path))


def step(path: str | None, cache_dir: str, **options) -> quality.QualityStep | None:
  """`quality.QualityStep` with the model at `path`; None, which is no step, without."""
  found = model_path(path, cache_dir)
  return None if found is None else quality.QualityStep(found, **options)


@dataclasses.dataclass(frozen=True)
class Training:
  """Trains the model on curated against crawled text, unless it is there; call it.

  Attributes:
    path, cache_dir: where the model lies; a path of None makes it do nothing.
    curated: names of finished sub-corpora, or folders of text, that good pages are
      like. The paper names no more than 'known high-quality collections'.
    crawled: raw pages, with the steps that they go through before they are scored.
    max_documents: of either kind that are looked at.
    num_features: hashed features of the linear model.
    max_broken, max_broken_share: broken records that are passed over, as in SubCorpus.
  """

  path: str | None
  cache_dir: str
  curated: Sequence[str]
  crawled: Stream
  max_documents: int = 50_000
  num_features: int = 1 << 18
  max_broken: int = 100
  max_broken_share: float = 0.01

  def __call__(self) -> None:
    """Makes sure that there is a model.

    Raises:
      UserError: there is nothing to train it on.
    """
    path = model_path(self.path, self.cache_dir)
    if path is None:
      return
    if quality.exists(path):
      logger.info('scoring by the classifier in %s; delete it to train another', path)
      return
    curated = [part for name in self._names() for part in self._curated(name, path)]
    folder = os.path.join(places.data_dir(), self.crawled.folder)
    with only_builder(path):
      if quality.exists(path):
        return
      quality.train(
        curated,
        self.crawled.reader.parts(folder),
        path,
        crawled_steps=self.crawled.steps,
        max_documents=self.max_documents,
        num_features=self.num_features,
        max_broken=self.max_broken,
        max_broken_share=self.max_broken_share,
      )

  def _names(self) -> Sequence[str]:
    names = self.curated
    return (
      [name.strip() for name in names.split(',')] if isinstance(names, str) else names
    )

  def _curated(self, name: str, path: str) -> list[documents.Part]:
    if os.sep not in name and processed.read_manifest(processed.folder(name)):
      return processed.parts(name, 'train')
    if os.path.isdir(os.path.expanduser(name)):
      return readers.Files().parts(name)
    raise errors.UserError(
      f'There is no quality classifier in {path} yet, and {name!r}, of the curated '
      'text to train it on, is neither a folder nor a finished sub-corpus in '
      f'{places.corpus_dir()}: make it first, name other text with '
      '--gin.CURATED=FOLDER, or keep all pages with --gin.QUALITY_MODEL=None.'
    )

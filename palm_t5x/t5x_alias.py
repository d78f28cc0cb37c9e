"""Inside the `t5x` command, `t5x.X` is `palm_t5x.X`: the same module objects.

Gin files and task modules written for Google's T5X say `from t5x import utils`. The
finder below answers those imports with this package, so that such files run unchanged
and every name has one identity for Gin. What T5X has and this package has not is
refused with a sentence that says what there is instead.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
import types

from palm_t5x.errors import UserError
from palm_t5x.gin_files import did_you_mean

DECODER_ONLY = 't5x.examples.decoder_only.network'

_NOT_PALM = (
  f"{DECODER_ONLY} is T5X's own decoder-only architecture (serial blocks, relative "
  "position biases), which is not PaLM's and is not part of this package. Take the "
  "model from a PaLM file: add --gin_file=models/palm_8b.gin after T5X's model file."
)
ENCODER_DECODER = (
  'EncoderDecoderModel: this package trains decoder-only models; others need '
  "Google's T5X. Use models.DecoderOnlyModel, or --gin_file=models/palm_8b.gin."
)


class T5XImportError(UserError, ModuleNotFoundError):
  """An import of a part of T5X that is not here; an ImportError for who catches it."""


class TransformerConfig:
  """Stands for T5X's decoder-only TransformerConfig, so that its Gin files parse.

  Raises:
    UserError: when it is used.
  """

  gin_refusal = _NOT_PALM

  def __init__(
    self,
    vocab_size,
    dtype='float32',
    emb_dim=512,
    num_heads=8,
    num_layers=6,
    head_dim=64,
    mlp_dim=2048,
    mlp_activations=('relu',),
    dropout_rate=0.1,
    logits_via_embedding=False,
  ):
    raise UserError(_NOT_PALM)


class DecoderWrapper:
  """Stands for T5X's decoder-only network, so that its Gin files parse.

  Raises:
    UserError: when it is used.
  """

  gin_refusal = _NOT_PALM

  def __init__(self, config):
    raise UserError(_NOT_PALM)


def _decoder_only_network() -> types.ModuleType:
  """The module that Gin files import under T5X's name."""
  module = types.ModuleType(DECODER_ONLY, _NOT_PALM)
  module.TransformerConfig = TransformerConfig
  module.DecoderWrapper = DecoderWrapper
  return module


def _available() -> list[str]:
  """Names of modules that `t5x.X` can be."""
  import palm_t5x

  modules = pkgutil.iter_modules(palm_t5x.__path__)
  return sorted(m.name for m in modules if not m.name.startswith('_'))


def explain_missing(name: str) -> str:
  """Why `import name` cannot be answered, and what there is."""
  if name.startswith('t5x.examples') and not name.startswith(DECODER_ONLY):
    return (
      f'{name}: encoder-decoder models and other architectures of T5X are not part of '
      'this package, which trains PaLM: see --gin_file=models/palm_8b.gin.'
    )
  root = name.split('.')[1]
  there = ', '.join(f't5x.{n}' for n in _KNOWN if n in _available())
  return (
    f'{name} is not part of this package.{did_you_mean(root, _available())} '
    f'Modules of T5X that are: {there}.'
  )


_KNOWN = (
  'adafactor',
  'checkpoints',
  'decoding',
  'eval',
  'export',
  'gin_utils',
  'infer',
  'interactive_model',
  'losses',
  'metrics',
  'models',
  'optimizers',
  'partitioning',
  'precompile',
  'train',
  'train_state',
  'trainer',
  'utils',
)


class _Loader(importlib.abc.Loader):
  """Hands out a module that exists already, and leaves it as it was."""

  def __init__(self, module: types.ModuleType):
    self._module = module
    self._spec = module.__spec__

  def create_module(self, spec):
    return self._module

  def exec_module(self, module):
    # The import system has just written the alias's spec into the module.
    if self._spec is not None:
      module.__spec__ = self._spec


class Finder(importlib.abc.MetaPathFinder):
  """Answers `import t5x` and `import t5x.X` with this package's modules."""

  def find_spec(self, fullname, path=None, target=None):
    if fullname.partition('.')[0] != 't5x':
      return None
    module = _module_for(fullname)
    return importlib.machinery.ModuleSpec(
      fullname, _Loader(module), is_package=hasattr(module, '__path__')
    )


def _module_for(fullname: str) -> types.ModuleType:
  """The module that answers for a T5X name.

  Raises:
    T5XImportError: if none does.
  """
  if fullname == DECODER_ONLY:
    return _decoder_only_network()
  if DECODER_ONLY.startswith(fullname + '.') and fullname != 't5x':
    package = types.ModuleType(fullname)
    package.__path__ = []
    return package
  own = 'palm_t5x' + fullname.removeprefix('t5x')
  try:
    if importlib.util.find_spec(own) is None:
      raise T5XImportError(explain_missing(fullname), name=fullname)
  except ModuleNotFoundError as error:
    if isinstance(error, T5XImportError):
      raise
    raise T5XImportError(explain_missing(fullname), name=fullname) from error
  return importlib.import_module(own)


def install() -> None:
  """Makes `import t5x` mean this package, until `uninstall`."""
  if not any(isinstance(finder, Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder())


def uninstall() -> None:
  """Takes the finder and the aliases out again."""
  sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, Finder)]
  for name in [n for n in sys.modules if n == 't5x' or n.startswith('t5x.')]:
    del sys.modules[name]

"""What `t5x MODE` can be: one row per mode, and each mode's function by attribute.

`modes.train` is `palm_t5x.train.train`, imported when asked for. Gin files written for
T5X say `import __main__ as train_script`, because T5X puts the function of the chosen
mode into `__main__`; here that import means this module, which has them all.
"""

import importlib
import sys
from typing import NamedTuple


class Mode(NamedTuple):
  """One mode of the command.

  Attributes:
    module: where its function lives; imported only when the mode is used.
    function: the function's name in that module, which is T5X's name for it.
    summary: one line for `t5x --help`.
    gin: our Gin file whose macros `t5x MODE --help` lists.
    example: the arguments of an example command.
    reads: the parameter that text after the mode's name is bound to, if any.
    reads_many: whether it gets a list of words, and not one text.
    files: Gin files read before the user's.
    compiles_only: whether its programs are for the machine TOPOLOGY, and never run.
    computes: whether it runs on all devices, and so joins the processes of its job.
  """

  module: str
  function: str
  summary: str
  gin: str
  example: str
  reads: str | None = None
  reads_many: bool = False
  files: tuple[str, ...] = ()
  compiles_only: bool = False
  computes: bool = False


MODES = {
  'train': Mode(
    'palm_t5x.train',
    'train',
    'train a model; run the same command again to continue',
    'runs/pretrain.gin',
    '--gin_file=palm_tiny.gin --gin.MODEL_DIR=runs/palm_tiny',
    computes=True,
  ),
  'eval': Mode(
    'palm_t5x.eval',
    'evaluate',
    'compute the metrics of SeqIO tasks for a checkpoint',
    'runs/eval.gin',
    '--gin_file=palm_tiny.gin --gin.MODEL_DIR=runs/palm_tiny',
    computes=True,
  ),
  'infer': Mode(
    'palm_t5x.infer',
    'infer',
    "write a model's predictions or scores for a task as JSON lines",
    'runs/infer.gin',
    '--gin_file=palm_tiny.gin --gin.MODEL_DIR=runs/palm_tiny',
    computes=True,
  ),
  'complete': Mode(
    'palm_t5x.commands.complete',
    'complete',
    'continue a prompt, printing as it goes',
    'runs/complete.gin',
    "--gin_file=palm_tiny.gin --gin.MODEL_DIR=runs/palm_tiny 'The function returns'",
    reads='prompt',
    computes=True,
  ),
  'describe': Mode(
    'palm_t5x.commands.describe',
    'describe',
    'parameters, memory and FLOPs of a configuration, and what it will read',
    'runs/describe.gin',
    '--gin_file=palm_540b.gin',
  ),
  'cache': Mode(
    'palm_t5x.commands.cache',
    'cache',
    'tokenise the text of a mixture ahead of training, on one machine or many',
    'runs/cache.gin',
    '--gin_file=palm_tiny.gin',
  ),
  'precompile': Mode(
    'palm_t5x.precompile',
    'precompile',
    'compile the train step for TPUs that are not here: memory, traffic, bounds',
    'runs/precompile.gin',
    '--gin_file=palm_540b.gin',
    compiles_only=True,
  ),
  'vocab': Mode(
    'palm_t5x.commands.vocab',
    'vocab',
    'learn a lossless SentencePiece vocabulary from a sample of text',
    'runs/vocab.gin',
    '--gin_file=corpus/palm_256k.gin --gin.SOURCES=my/texts',
  ),
  'corpus': Mode(
    'palm_t5x.commands.corpus',
    'corpus',
    'filter, deduplicate and label raw files; --report: the facts about the result',
    'runs/corpus.gin',
    '--gin_file=corpus/books.gin --data_dir=raw/books',
    files=('runs/corpus.gin',),
  ),
  'tasks': Mode(
    'palm_t5x.commands.tasks',
    'tasks',
    'list the registered tasks and mixtures, with an example of each',
    'runs/tasks.gin',
    '',
    reads='names',
    reads_many=True,
    files=('runs/tasks.gin',),
  ),
}


def load(name: str):
  """Imports a mode's module and returns its function."""
  mode = MODES[name]
  return getattr(importlib.import_module(mode.module), mode.function)


def __getattr__(name: str):
  """A mode's function by its T5X name, else what the running script defines."""
  for mode_name, mode in MODES.items():
    if mode.function == name:
      return load(mode_name)
  script = sys.modules.get('__main__')
  if not name.startswith('__') and hasattr(script, name):
    return getattr(script, name)
  known = ', '.join(sorted(mode.function for mode in MODES.values()))
  raise AttributeError(f'no mode has a function called {name!r}; there are: {known}')

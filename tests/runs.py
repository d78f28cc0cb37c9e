"""Small runs of the `t5x` command for tests: their Gin file, and the doors to it.

`t5x(...)` runs a mode inside this process, which saves the seconds that an import of
jax and TensorFlow takes; `command` and `run` start a process of its own, for what only
a process shows: signals, kills, limits on files.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import NamedTuple

import gin
import tensorstore

from palm_t5x import main, t5x_alias
from palm_t5x.corpus import vocabulary as vocabulary_lib
from palm_t5x.metric_writers import read_metrics

HERE = pathlib.Path(__file__).parent
VOCABULARY = HERE / 'fixtures' / 'vocabulary' / 'fixture.model'
STEPS = 12
CONFIG = """
from __gin__ import dynamic_registration
import fixture_tasks
from palm_t5x import network
from palm_t5x.corpus import vocabulary

include 'models/base.gin'
include 'runs/all.gin'

DTYPE = 'float32'
VOCABULARY_PATH = '{vocabulary}'
vocabulary.SentencePieceVocabulary.vocab_size = 512
network.TransformerConfig:
  vocab_size = 512
  emb_dim = 64
  num_heads = 2
  num_layers = 2
  head_dim = 32
  mlp_dim = 128
MIXTURE_OR_TASK_NAME = 'fixture_text'
TASK_FEATURE_LENGTHS = {{'targets': 64}}
TRAIN_STEPS = {steps}
ALLOW_REPEATS = True
BATCH_SIZE = 8
EVAL_BATCH_SIZE = 8
EVAL_PERIOD = None
EVAL_STEPS = 2
STATS_PERIOD = 1
CHECKPOINT_PERIOD = 3
CHECKPOINT_KEEP = 3
"""


# Python that gives a process's own peak of memory in MiB. Not ru_maxrss: a program
# started by a large process inherits what that one had.
PEAK = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024"


def write_config(folder: pathlib.Path) -> None:
  """Writes `tiny.gin`, which every run of the tests starts from."""
  text = CONFIG.format(vocabulary=VOCABULARY, steps=STEPS)
  (folder / 'tiny.gin').write_text(text)


def arguments(workspace, mode, model_dir, *bindings, words=()) -> list[str]:
  """The words after `t5x`: bindings are `NAME=VALUE`, or flags with their dashes."""
  flags = [b if b.startswith('--') else f'--gin.{b}' for b in bindings]
  return [
    mode,
    f'--gin_file={workspace / "tiny.gin"}',
    f'--gin.MODEL_DIR={model_dir}',
    f'--gin.CACHE_DIR={workspace / "cache"}',
    *flags,
    *words,
  ]


class Done(NamedTuple):
  """What a finished command left: exit code, stdout, stderr."""

  code: int
  out: str
  err: str

  @property
  def error(self) -> str:
    """The one line that a mistake gives; fails the test if it is more than that."""
    lines = [line for line in self.err.splitlines() if 't5x: error: ' in line]
    assert len(lines) == 1 and 'Traceback' not in self.err, self.err[-3000:]
    assert self.err.splitlines()[-1] == lines[0], 'the error is the last line'
    return lines[0].removeprefix('t5x: error: ')


def t5x(*args: str) -> Done:
  """Runs `t5x ARGS` in this process and leaves Gin and imports as they were."""
  finders, path = list(sys.meta_path), list(sys.path)
  out, err = io.StringIO(), io.StringIO()
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = main.main([str(a) for a in args])
  finally:
    t5x_alias.uninstall()
    sys.meta_path[:], sys.path[:] = finders, path
    gin.clear_config()
    vocabulary_lib.use(None)
  return Done(code, out.getvalue(), err.getvalue())


def here(workspace, mode, model_dir, *bindings, words=()) -> Done:
  """`t5x MODE --gin_file=tiny.gin ...` in this process."""
  return t5x(*arguments(workspace, mode, model_dir, *bindings, words=words))


def command(workspace, model_dir, *bindings, devices=1, mode='train', words=()):
  """Arguments and environment of one `t5x` process."""
  environment = dict(os.environ)
  environment['XLA_FLAGS'] = (
    '--xla_cpu_collective_call_terminate_timeout_seconds=600 '
    f'--xla_force_host_platform_device_count={devices}'
  )
  environment['NPROC'] = '2'
  environment['PYTHONPATH'] = os.pathsep.join([str(HERE.parent), str(HERE)])
  args = [sys.executable, '-m', 'palm_t5x']
  args += arguments(workspace, mode, model_dir, *bindings, words=words)
  return {'args': args, 'env': environment, 'cwd': workspace, 'text': True}


def run(workspace, model_dir, *bindings, devices=1, **kwargs):
  """Runs to the end; returns the finished process."""
  options = command(workspace, model_dir, *bindings, devices=devices, **kwargs)
  return subprocess.run(**options, capture_output=True, timeout=300, check=False)


def free_port() -> int:
  """A TCP port that nothing listens on."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def arrays(folder):
  """Every array of a checkpoint, by name, read without this project's code."""
  names = json.loads((folder / 'state' / '_METADATA').read_text())['tree_metadata']
  found = {}
  for entry in names.values():
    if entry['value_metadata'].get('skip_deserialize'):
      continue
    name = '.'.join(str(key['key']) for key in entry['key_metadata'])
    spec = {
      'driver': 'zarr',
      'kvstore': {
        'driver': 'ocdbt',
        'base': f'file://{folder / "state"}/',
        'path': f'{name}/',
      },
    }
    found[name] = tensorstore.open(spec, read=True).result().read().result()
  return found


SIZES = {
  'num_layers': 2,
  'num_heads': 2,
  'head_dim': 32,
  'mlp_dim': 128,
  'parallel_block': True,
  'norm': 'rms',
}  # of CONFIG's model, for palm_reference.forward


def params(folder) -> dict:
  """A checkpoint's parameters as a nested dict of NumPy arrays."""
  tree = {}
  for name, value in arrays(folder).items():
    root, *path, last = name.split('.')
    if root != 'target':
      continue
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def losses(model_dir):
  """Training loss by step, from metrics.jsonl."""
  return {row['step']: row['loss'] for row in read_metrics(str(model_dir), 'train')}


def hashes(folder: pathlib.Path) -> dict[str, str]:
  """Contents of every file below a folder, by relative path: what must not change."""
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def json_lines(path) -> list[dict]:
  """The objects of a JSONL file."""
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def damage(folder: pathlib.Path, rng) -> pathlib.Path:
  """Flips one bit of a checkpoint's largest array file."""
  files = [p for p in (folder / 'state').rglob('*') if p.is_file()]
  victim = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  victim.write_bytes(bytes(data))
  return victim

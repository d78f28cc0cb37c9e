"""The rules of the layout: sizes, and which way imports point."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / 'palm_t5x'

MAX_FILE, MAX_FUNCTION = 500, 80
MAX_FUNCTION_OF = {('trainer.py', 'train_step'): 60}
MAX_LAYERS_AND_NETWORK = 480

# What may not know of the engine, the command or the domains above them.
ENGINE = {
  'ahead',
  'checkpoints',
  'commands',
  'command_line',
  'datasets',
  'eval',
  'evaluation',
  'generation',
  'gin_check',
  'gin_command_line',
  'gin_files',
  'gin_loader',
  'gin_utils',
  'hooks',
  'infer',
  'interactive_model',
  'layer_layout',
  'main',
  'models',
  'modes',
  'network',
  'partitioning',
  'precompile',
  'export',
  'restored',
  'rewind',
  'run_dir',
  'spikes',
  'timeline',
  'train',
  'train_state',
  'trainer',
  'training_run',
  'utils',
}
BELOW_THE_ENGINE = ('corpus', 'fewshot', 'analysis', 'losses', 'decoding', 'metrics')


def python_files(*folders):
  """Python files under the named folders of the repository."""
  for folder in folders or ('palm_t5x', 'tasks', 'mixtures', 'tests', 'benchmarks'):
    yield from sorted((ROOT / folder).rglob('*.py'))


def imports(path):
  """Every module a file imports, at the top or inside functions, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for name in node.names:
        yield name.name
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      for name in node.names:
        yield f'{node.module}.{name.name}'


def ours(path):
  """Top-level names inside palm_t5x that a file imports."""
  return {name.split('.')[1] for name in imports(path) if name.startswith('palm_t5x.')}


def files_of(module):
  """The files of a module or package of the library that exists."""
  one = LIBRARY / f'{module}.py'
  return [one] if one.exists() else sorted((LIBRARY / module).rglob('*.py'))


def test_no_long_files():
  long = {
    str(path.relative_to(ROOT)): lines
    for path in python_files()
    if (lines := len(path.read_text().splitlines())) > MAX_FILE
  }
  assert not long


def test_no_long_functions():
  long = []
  for path in python_files('palm_t5x', 'tasks', 'mixtures', 'benchmarks'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        limit = MAX_FUNCTION_OF.get((path.name, node.name), MAX_FUNCTION)
        lines = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
        if lines > limit:
          long.append(f'{path.relative_to(ROOT)}:{node.name}: {lines} > {limit}')
  assert not long


def _docstring_lines(node):
  """Lines of a function's docstring, which the limit does not count."""
  if ast.get_docstring(node) is None:
    return 0
  return node.body[0].end_lineno - node.body[0].lineno + 1


def test_the_model_fits_on_a_few_pages():
  files = [LIBRARY / 'layers.py', LIBRARY / 'network.py']
  assert sum(len(f.read_text().splitlines()) for f in files) <= MAX_LAYERS_AND_NETWORK


@pytest.mark.parametrize('module', BELOW_THE_ENGINE)
def test_domains_know_nothing_of_the_engine(module):
  for path in files_of(module):
    assert not ours(path) & ENGINE, path


def test_the_model_points_down():
  above = {
    'layers': {'network', 'models', 'trainer', 'utils', 'train'},
    'network': {'models', 'trainer', 'utils', 'train'},
    'models': {'trainer', 'utils', 'train', 'partitioning', 'checkpoints'},
    'partitioning': {'trainer', 'train', 'checkpoints', 'models'},
    'train_state': {'trainer', 'train', 'checkpoints'},
    'checkpoints': {'trainer', 'train', 'rewind'},
    'timeline': {'checkpoints', 'rewind', 'trainer', 'train'},
    'trainer': {'train', 'eval', 'infer'},
  }
  for module, names in above.items():
    for path in files_of(module):
      assert not ours(path) & names, path


def test_nothing_imports_the_command():
  for path in python_files('palm_t5x', 'tasks', 'mixtures'):
    if path.name not in ('__main__.py', 'main.py'):
      assert 'main' not in ours(path), path


def test_corpus_does_without_jax():
  for path in files_of('corpus'):
    used = {name.split('.')[0] for name in imports(path)}
    assert not used & {'jax', 'flax', 'optax', 'orbax'}, path


def test_tasks_import_seqio_and_the_domains_only():
  allowed = {'corpus', 'fewshot', 'tasks', 'mixtures', 'errors', 'places'}
  for path in python_files('tasks', 'mixtures'):
    assert ours(path) <= allowed, path
    used = {name.split('.')[0] for name in imports(path)}
    assert not used & {'jax', 'flax', 'optax', 'orbax', 'tensorflow'}, path


def test_the_library_does_not_import_tasks():
  for path in python_files('palm_t5x'):
    assert not ours(path) & {'tasks', 'mixtures'}, path


def test_gin_is_no_package():
  """A gin/__init__.py would hide gin-config from whoever runs in a checkout."""
  assert not list((ROOT / 'gin').rglob('__init__.py'))
  assert not list((ROOT / 'gin').rglob('*.py'))


def test_gin_files_have_headers():
  for path in sorted((ROOT / 'gin').rglob('*.gin')):
    assert path.read_text().startswith('# '), path


def test_the_registry_file_names_every_task_and_mixture():
  text = (ROOT / 'gin/runs/tasks.gin').read_text()
  for folder in ('tasks', 'mixtures'):
    for path in (ROOT / folder).glob('*.py'):
      if path.stem != '__init__':
        assert f'import palm_t5x.{folder}.{path.stem}\n' in text, path

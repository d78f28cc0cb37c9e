"""Every trap of T5X's Gin handling, and the rules of the command line."""

import sys

import gin
import pytest

from palm_t5x import gin_check, gin_command_line, gin_files, gin_loader, gin_utils
from palm_t5x.errors import UserError

HEADER = """
from __gin__ import dynamic_registration
import gin_toy
from palm_t5x import gin_utils
"""

TOY = '''
"""A pretend training library: what a Gin file of a user would name."""

import dataclasses


@dataclasses.dataclass
class DatasetConfig:
  name: str
  batch_size: int
  seed: int | None = None


class Model:
  def __init__(self, width: int = 8, optimizer=None):
    self.width, self.optimizer = width, optimizer

  def predict(self, num_decodes=1):
    return num_decodes


def adam(beta: float = 0.9):
  return beta


def train(*, model, dataset_cfg, eval_cfg=None, total_steps: int, model_dir, ratio=1.0):
  return dict(locals())


def infer(*, model, checkpoint_path):
  return dict(locals())


LIMIT = 3
'''

RUN = (
  HEADER
  + """
import gin_toy as train_script

MODEL = @gin_toy.Model()
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 255000
NAME = 'c4'
CHECKPOINT_PATH = %gin.REQUIRED

train_script.train:
  model = %MODEL
  dataset_cfg = @train/gin_toy.DatasetConfig()
  eval_cfg = @eval/gin_toy.DatasetConfig()
  total_steps = %TRAIN_STEPS
  model_dir = %MODEL_DIR

train/gin_toy.DatasetConfig:
  name = %NAME
  batch_size = 4
eval/gin_toy.DatasetConfig:
  name = %NAME
  batch_size = 2

gin_toy.infer:
  model = %MODEL
  checkpoint_path = %CHECKPOINT_PATH
"""
)


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
  """A folder with a module and a Gin file, and a clean gin."""
  (tmp_path / 'gin_toy.py').write_text(TOY)
  (tmp_path / 'run.gin').write_text(RUN)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  gin.clear_config()
  sys.modules.pop('gin_toy', None)
  yield
  gin.clear_config()
  for selector in [s for s, _ in gin.config._REGISTRY.items() if 'gin_toy' in s]:
    gin.config._REGISTRY.pop(selector)


def configure(*bindings, text=None, path='run.gin'):
  """Loads a file and command-line bindings as the command does."""
  if text is not None:
    with open(path, 'w') as f:
      f.write(text)
  return gin_utils.parse_gin_flags(['.'], [path], bindings)


def run(*bindings, entry='train', **kwargs):
  """The arguments that a mode's function gets."""
  import gin_toy

  loader = configure(*bindings, **kwargs)
  function = getattr(gin_toy, entry)
  gin_check.Reached(loader.register(function)).check(f't5x {entry}')
  return gin.get_configurable(function)()


def error(*args, **kwargs):
  """The message of the UserError that a configuration raises: one line."""
  with pytest.raises(UserError) as caught:
    run(*args, **kwargs)
  message = str(caught.value)
  assert '\n' not in message
  return message


# --- Names from a shell.


def test_values_arrive():
  got = run('MODEL_DIR=runs/m', 'TRAIN_STEPS=7')
  assert got['model_dir'] == 'runs/m'
  assert got['total_steps'] == 7
  assert got['dataset_cfg'].batch_size == 4


@pytest.mark.parametrize(
  'name',
  [
    'train.total_steps',
    'train_script.train.total_steps',
    'gin_toy.train.total_steps',
  ],
)
def test_any_name_of_the_function(name):
  assert run('MODEL_DIR=m', f'{name}=5')['total_steps'] == 5


@pytest.mark.parametrize(
  'name', ['train/DatasetConfig.seed', 'train/gin_toy.DatasetConfig.seed']
)
def test_scoped_names(name):
  got = run('MODEL_DIR=m', f'{name}=5')
  assert got['dataset_cfg'].seed == 5
  assert got['eval_cfg'].seed is None


def test_class_that_no_file_mentions_can_be_bound():
  got = run('MODEL_DIR=m', 'train.model=@train_script.Model()', 'gin_toy.Model.width=3')
  assert got['model'].width == 3


def test_method_parameters():
  text = RUN + 'gin_toy.Model.predict.num_decodes = 3\n'
  got = run('MODEL_DIR=m', 'gin_toy.Model.predict.num_decodes=4', text=text)
  assert got['model'].predict() == 4


def test_reference_on_the_command_line():
  got = run('MODEL_DIR=m', 'Model.optimizer=@gin_toy.adam()', 'gin_toy.adam.beta=0.5')
  assert got['model'].optimizer == 0.5


def test_later_files_and_the_command_line_win(tmp_path):
  (tmp_path / 'a.gin').write_text(RUN + "MODEL_DIR = 'a'\nTRAIN_STEPS = 1\n")
  (tmp_path / 'b.gin').write_text('TRAIN_STEPS = 2\n')
  loader = gin_utils.parse_gin_flags(['.'], ['a.gin', 'b.gin'], ['NAME=pile'])
  import gin_toy

  loader.register(gin_toy.train)
  got = gin.get_configurable(gin_toy.train)()
  assert got['total_steps'] == 2
  assert got['dataset_cfg'].name == 'pile'


def test_one_alias_may_mean_different_modules_in_different_files(tmp_path):
  (tmp_path / 'other_toy.py').write_text(TOY)
  (tmp_path / 'a.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'import other_toy as gin_toy\n'
    'gin_toy.adam.beta = 0.25\n'
  )
  loader = gin_utils.parse_gin_flags(['.'], ['run.gin', 'a.gin'], ['MODEL_DIR=m'])
  with pytest.raises(UserError, match='ambiguous'):
    loader.bind(gin_command_line.parse_binding('gin_toy.adam.beta=0.1'))


def test_unscoped_binding_that_cannot_win_is_noted():
  loader = configure('MODEL_DIR=m', 'DatasetConfig.batch_size=5')
  assert len(loader.notes) == 1
  assert 'train/' in loader.notes[0] and 'eval/' in loader.notes[0]


# --- Typos.


def test_macro_typo():
  message = error('MODEL_DIR=m', 'TRAIN_STEPZ=5')
  assert 'TRAIN_STEPZ' in message and 'Did you mean TRAIN_STEPS' in message


def test_scope_typo():
  message = error('MODEL_DIR=m', 'trian/DatasetConfig.batch_size=5')
  assert "'trian'" in message and 'Did you mean train' in message


def test_parameter_typo():
  message = error('MODEL_DIR=m', 'train.total_stepz=5')
  assert 'total_stepz' in message and 'Did you mean total_steps' in message


def test_configurable_typo():
  message = error('MODEL_DIR=m', 'gin_toy.DatasetCfg.batch_size=5')
  assert 'DatasetCfg' in message and 'DatasetConfig' in message


def test_macro_that_a_file_only_refers_to_can_be_set():
  text = RUN.replace("NAME = 'c4'\n", '')
  assert run('MODEL_DIR=m', 'NAME=pile', text=text)['dataset_cfg'].name == 'pile'


def test_macro_of_a_file_that_nothing_uses_is_legal():
  run('MODEL_DIR=m', 'SPARE=2', text=RUN + 'SPARE = 1\n')


def test_file_typo():
  with pytest.raises(UserError, match=r'Did you mean run\.gin'):
    gin_utils.parse_gin_flags(['.'], ['runn.gin'])


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('gin_toy.train.total_stepz = 5', 'Did you mean total_steps'),
    ('gin_toy.trian.total_steps = 5', 'Did you mean train'),
    ('gin_toj.train.total_steps = 5', 'Did you mean gin_toy'),
    ('gin_toy.LIMIT.x = 5', 'no class or function'),
    ('NAME = c4', 'text in quotes'),
    ('NAME = ', 'Unable to parse value'),
    ('NAME c4', "expected ':' or '='"),
    ("NAME = 'c4", ''),
    ('TRAIN_STEPS = @gin_toy.steps()', 'has no steps'),
    ("include 'runs/pretrian.gin'", 'Did you mean runs/pretrain.gin'),
    ('import gin_toy_tasks', "no module 'gin_toy_tasks'"),
    ('from gin_toy import tasks', 'cannot import'),
    ('from gin_toy import train', 'Gin imports modules: write import gin_toy'),
    ('from palm_t5x import utilz', 'cannot import'),
  ],
)
def test_file_errors_say_file_and_line(line, expected):
  text = RUN + '\n' + line + '\n'
  message = error('MODEL_DIR=m', text=text)
  number = text[: text.rindex(line)].count('\n') + 1
  assert message.startswith(f'run.gin:{number}: ')
  assert expected in message


def test_error_in_an_included_file_names_that_file(tmp_path):
  (tmp_path / 'inner.gin').write_text(HEADER + 'gin_toy.train.x = 1\n')
  message = error(text="# one\ninclude 'inner.gin'\n", path='outer.gin')
  assert message.startswith('inner.gin:5: ')


def test_file_that_includes_itself(tmp_path):
  (tmp_path / 'a.gin').write_text("include 'b.gin'\n")
  (tmp_path / 'b.gin').write_text("include 'a.gin'\n")
  with pytest.raises(UserError, match='includes itself'):
    gin_utils.parse_gin_flags(['.'], ['a.gin'])


def test_broken_module_of_the_user_keeps_its_trace(tmp_path):
  (tmp_path / 'broken_toy.py').write_text('import gin_toy_is_not_there\n')
  with pytest.raises(ModuleNotFoundError, match='gin_toy_is_not_there'):
    configure(text=RUN + 'import broken_toy\n')


# --- What is missing.


def test_all_missing_are_listed_at_once():
  text = RUN.replace('TRAIN_STEPS = 255000', 'TRAIN_STEPS = %gin.REQUIRED').replace(
    '  batch_size = 2\n', ''
  )
  message = error(text=text)
  assert 'MODEL_DIR' in message and 'TRAIN_STEPS' in message
  assert 'eval/gin_toy.DatasetConfig.batch_size' in message
  assert 'CHECKPOINT_PATH' not in message


def test_macro_that_nothing_defines_is_missing():
  message = error('MODEL_DIR=m', text=RUN.replace('MODEL = @gin_toy.Model()\n', ''))
  assert 'MODEL (for' in message and '--gin_file=models/' in message


def test_only_the_chosen_mode_counts():
  assert run('CHECKPOINT_PATH=c', entry='infer')['checkpoint_path'] == 'c'
  message = error(entry='infer')
  assert 'CHECKPOINT_PATH' in message and 'MODEL_DIR' not in message


def test_missing_arguments_of_a_bare_function():
  message = error(text=HEADER)
  for name in ('model', 'dataset_cfg', 'total_steps', 'model_dir'):
    assert f'train.{name}' in message


@pytest.mark.parametrize(
  ('binding', 'expected'),
  [
    ('TRAIN_STEPS=eight', "a whole number, not TRAIN_STEPS='eight'"),
    ('TRAIN_STEPS=1e5', 'a whole number, not TRAIN_STEPS=100000.0'),
    ('train/DatasetConfig.seed=none1', 'a whole number'),
    ('gin_toy.Model.width=wide', 'a whole number'),
  ],
)
def test_text_for_a_number(binding, expected):
  assert expected in error('MODEL_DIR=m', binding)


# --- Search path.


def test_users_copy_wins_over_ours(tmp_path):
  folder = tmp_path / 't5x/configs/runs'
  folder.mkdir(parents=True)
  (folder / 'pretrain.gin').write_text("NAME = 'mine'\n")
  text = RUN + "include 't5x/configs/runs/pretrain.gin'\n"
  assert run('MODEL_DIR=m', text=text)['dataset_cfg'].name == 'mine'


def test_include_beside_the_including_file(tmp_path):
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep/a.gin').write_text(RUN + "include 'b.gin'\n")
  (tmp_path / 'deep/b.gin').write_text('TRAIN_STEPS = 3\n')
  assert run('MODEL_DIR=m', path='deep/a.gin')['total_steps'] == 3


def test_search_paths_come_in_order(tmp_path):
  for name in 'pq':
    (tmp_path / name).mkdir()
    (tmp_path / name / 'x.gin').write_text(f'X = {name!r}\n')
  for order in ('pq', 'qp'):
    scan = gin_files.scan(['x.gin'], gin_files.SearchPath(tuple(order)))
    assert scan.value('X') == order[0]


def test_package_gin_files_are_always_found():
  search = gin_files.SearchPath()
  for name in ('palm_540b.gin', 'runs/pretrain.gin', 't5x/configs/runs/infer.gin'):
    assert search.find(name)


def test_gin_is_silent(caplog, capfd):
  run('MODEL_DIR=m')
  assert 'Path not found' not in caplog.text + ''.join(capfd.readouterr())


# --- Reading names as text.


def test_scan_knows_macros_without_importing():
  scan = gin_files.Scan()
  scan.add('', 'NPROC', '', 4)
  scan.add('', 'A', '', gin_files.Macro('NPROC'))
  assert scan.value('A') == 4
  assert scan.value('B', 'none') == 'none'


def test_scan_does_not_import(tmp_path):
  (tmp_path / 'a.gin').write_text('import a_module_that_is_not\nNPROC = 3\n')
  assert gin_files.scan(['a.gin'], gin_files.SearchPath()).value('NPROC') == 3
  assert 'a_module_that_is_not' not in sys.modules


# --- The configuration as text.


def test_reached_text_says_the_same(tmp_path):
  import gin_toy

  loader = configure('MODEL_DIR=m', 'train/DatasetConfig.seed=3')
  text = gin_check.Reached(loader.register(gin_toy.train)).text()
  assert 'CHECKPOINT_PATH' not in text
  gin.clear_config()
  got = run(text=text, path='again.gin')
  assert got['dataset_cfg'] == gin_toy.DatasetConfig('c4', 4, 3)
  assert got['model_dir'] == 'm'


def test_summarize_gin_config_writes_a_file_that_parses(tmp_path):
  configure('MODEL_DIR=m')
  folder = tmp_path / 'out' / 'run'
  gin_utils.summarize_gin_config(str(folder), None, 0)
  text = (folder / 'config.gin').read_text()
  assert [p.name for p in folder.iterdir()] == ['config.gin']
  gin.clear_config()
  assert run(text=text, path='config.gin')['total_steps'] == 255000


def test_helpers_inside_gin_files():
  text = RUN + (
    'MODEL_DIR = @a/gin_utils.sum_fn()\n'
    'a/gin_utils.sum_fn.var1 = @gin_utils.string_split_fn()\n'
    "a/gin_utils.sum_fn.var2 = '/run'\n"
    "gin_utils.string_split_fn:\n  text = 'x,y'\n  separator = ','\n  index = 1\n"
  )
  assert run(text=text)['model_dir'] == 'y/run'
  assert gin_utils.bool_fn('x') is True


def test_loader_registers_a_function_no_file_mentions():
  import gin_toy

  loader = gin_loader.Loader(gin_files.SearchPath())
  assert loader.register(gin_toy.infer).wrapped is gin_toy.infer

"""The wheel is the checkout: same modules, every Gin file, and it runs anywhere."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import palm_t5x
from palm_t5x import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """A wheel built from a copy of the checkout, so that nothing is left behind in it."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  for name in ('palm_t5x', 'gin', 'tasks', 'mixtures'):
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    if (ROOT / name).exists():
      shutil.copy(ROOT / name, source / name)
  command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation']
  done = subprocess.run(
    [*command, '-q', '-w', str(folder), str(source)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """A folder with the installed wheel alone; its dependencies come from this Python."""
  folder = tmp_path_factory.mktemp('installed')
  command = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '-q']
  subprocess.run([*command, '--target', str(folder), str(wheel)], check=True)
  return folder


def t5x(installed, cwd, *args):
  """The installed console script, in a folder that is not the checkout."""
  code = (
    'import sys; from importlib.metadata import entry_points\n'
    "entry_points(group='console_scripts', name='t5x')['t5x'].load()()"
  )
  return subprocess.run(
    [sys.executable, '-c', code, *args],
    cwd=cwd,
    env={**os.environ, 'PYTHONPATH': str(installed)},
    capture_output=True,
    text=True,
    timeout=300,
  )


def names(wheel):
  with zipfile.ZipFile(wheel) as archive:
    return set(archive.namelist())


def test_wheel_has_every_gin_file(wheel):
  expected = {
    f'palm_t5x/gin/{path.relative_to(ROOT / "gin").as_posix()}'
    for path in (ROOT / 'gin').rglob('*.gin')
  }
  assert expected and expected <= names(wheel)
  assert 'palm_t5x/gin/__init__.py' not in names(wheel)


def test_wheel_has_every_module(wheel):
  expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'palm_t5x').rglob('*.py')}
  for folder in ('tasks', 'mixtures'):
    expected |= {
      f'palm_t5x/{p.relative_to(ROOT).as_posix()}'
      for p in (ROOT / folder).rglob('*.py')
    }
  assert expected <= names(wheel)


def test_wheel_has_nothing_else(wheel):
  """No top-level `tasks` or `gin` that would hide other people's, no tests."""
  assert {name.split('/')[0] for name in names(wheel)} == {
    'palm_t5x',
    next(n.split('/')[0] for n in names(wheel) if '.dist-info/' in n),
  }


def test_dry_run_from_an_empty_folder(installed, tmp_path):
  done = t5x(installed, tmp_path, 'train', '--gin_file=palm_540b.gin', '--dry_run')
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  assert 'ici_mesh_shape = (1, 256, 12)' in done.stdout
  assert 'num_layers = 118' in done.stdout
  assert not list(tmp_path.iterdir())


def test_checkout_and_wheel_import_alike(installed, tmp_path):
  code = (
    'import importlib.util, gin\n'
    "print(importlib.util.find_spec('palm_t5x.tasks.local_text').origin)\n"
    'print(gin.__file__)'
  )
  for path, inside in ((installed, 'palm_t5x/tasks'), (ROOT, 'tasks')):
    done = subprocess.run(
      [sys.executable, '-c', code],
      cwd=path if path is ROOT else tmp_path,
      env={**os.environ, 'PYTHONPATH': str(path)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    file, gin_file = done.stdout.split()
    assert file == str(path / inside / 'local_text.py')
    assert 'site-packages' in gin_file


def test_gin_files_of_the_checkout_are_found():
  assert os.path.samefile(environment.package_gin_dir(), ROOT / 'gin')
  assert str(ROOT) in palm_t5x.__path__


def setup():
  """setup.cfg, parsed."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def test_every_package_is_listed():
  listed = set(setup()['options']['packages'].split())
  found = {'palm_t5x.gin', 'palm_t5x.tasks', 'palm_t5x.mixtures'}
  for path in (ROOT / 'palm_t5x').rglob('__init__.py'):
    found.add('.'.join(path.parent.relative_to(ROOT).parts))
  assert listed == found


def test_constraints_pin_every_dependency():
  pinned = {
    re.split('==', line)[0].lower().replace('_', '-'): line.split('==')[1]
    for line in (ROOT / 'constraints.txt').read_text().split()
  }
  assert 'palm-t5x' not in pinned
  for line in setup()['options']['install_requires'].split():
    name = re.split(r'[\[<>=]', line)[0].lower().replace('_', '-')
    assert name in pinned, f'{name}: run `make constraints`'
    assert re.search('[<>]=?', line), f'{name} has no bound'


def test_python_version_is_said_everywhere():
  assert setup()['options']['python_requires'] == '>=3.11'
  assert '3.11 or newer' in (ROOT / 'Makefile').read_text()

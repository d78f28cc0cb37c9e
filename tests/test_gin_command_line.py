"""Values on the command line: lost quotes are put right, wrong ones refused."""

import gin
import pytest

from palm_t5x import gin_command_line, gin_files, gin_utils
from palm_t5x.errors import UserError


@pytest.mark.parametrize(
  'text',
  [
    'runs/m',
    'py_lm',
    'gs://bucket/run1',
    'my/*.txt',
    'train[:1%]',
    '8b',
    '2024-01-01',
    '~/data',
    'palm_8b.gin',
    'a b c',
    "it's",
    '10k',
    '100%',
    'C:\\runs',
    'x=y',
    '...',
  ],
)
def test_bare_text_is_quoted(text):
  quoted = gin_command_line.quote(text)
  assert gin.config.parse_value(quoted) == text


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('5', 5),
    ('-5', -5),
    ('1e-3', 1e-3),
    ('255_000', 255000),
    ('(1, 256, 12)', (1, 256, 12)),
    ('[]', []),
    ("{'inputs': 8, 'targets': 16}", {'inputs': 8, 'targets': 16}),
    ('((0, 512), (50_000, 1024))', ((0, 512), (50000, 1024))),
    ('None', None),
    ('True', True),
    ("'quoted'", 'quoted'),
    ('"quoted"', 'quoted'),
    ("''", ''),
  ],
)
def test_gin_values_stay(text, value):
  assert gin.config.parse_value(gin_command_line.quote(text)) == value


@pytest.mark.parametrize(
  'text', ['@gin_toy.adam()', '@a/gin_toy.adam', '%NAME', '[%A, @b]']
)
def test_references_stay(text):
  assert gin_command_line.quote(text) == text


@pytest.mark.parametrize(
  'text', ["'runs/m", 'runs/m"', '(1, 2', "{'a': 3", '[a, b]', '@', '"a\'', '{a: 1}']
)
def test_misquoted_values_are_refused(text):
  with pytest.raises(UserError, match='no Gin value'):
    gin_command_line.quote(text, 'X')


@pytest.mark.parametrize('text', ['true', 'false', 'none', 'null', 'FALSE'])
def test_lower_case_keywords_are_refused(text):
  with pytest.raises(UserError, match=r'write (True|False|None)'):
    gin_command_line.quote(text, 'X')


def test_binding_needs_a_value():
  with pytest.raises(UserError, match="with the '='"):
    gin_command_line.parse_binding('BATCH_SIZE')
  with pytest.raises(UserError, match='no value'):
    gin_command_line.parse_binding('BATCH_SIZE=')
  with pytest.raises(UserError, match='no name'):
    gin_command_line.parse_binding('BATCH-SIZE=3')


def test_rewrite_gin_args_is_t5xs():
  assert gin_utils.rewrite_gin_args(['--gin.A=x/y', '--gin.B=3', '--other']) == [
    "--gin_bindings=A = 'x/y'",
    '--gin_bindings=B = 3',
    '--other',
  ]


def test_own_macros_are_known_whatever_the_files_say():
  bindings = [
    gin_command_line.parse_binding(t) for t in ('NPROC=4', 'CACHE_DIR=some/cache')
  ]
  gin_command_line.check_names(bindings, gin_files.Scan())


def test_a_binding_may_use_what_another_one_sets():
  texts = ('NPROC=%THREADS', 'THREADS=4')
  bindings = [gin_command_line.parse_binding(t) for t in texts]
  gin_command_line.check_names(bindings, gin_files.Scan())

"""Every command in README.md, CONTRIBUTING.md and docs/ is run, page by page.

A page is a script. Blocks marked `sh` hold commands; blocks marked `console` hold
commands after `$` and what they print, `...` standing for what varies; Python and Gin
blocks whose first line is a file's name (`# my_tasks.py`) are those files. All of it
happens in an empty folder that holds docs/ and a trained run, as a clone would after
`make train`.

Commands that name a large model, a bucket or several processes are resolved with
`--dry_run`. Others run for real in this process, on a smaller model, for two steps, on
the fixture corpus (or the files they name) instead of the machine's.
"""

import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import fixture_tasks
import gin
import pytest

from palm_t5x import gin_files, main, t5x_alias
from palm_t5x.corpus import vocabulary

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md'))]
PAGE = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)

BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r'# ([\w/]+\.(?:py|gin))\n')
LENGTH = re.compile(r"('(?:inputs|targets)': )\d+")
FEW_SHOT = ('python_next_line', 'fixture_sums')
NOT_HERE = re.compile(r'8b|62b|540b|gs://|--process_count')

# Before what the page binds, which wins.
SMALLER = [
  'network.TransformerConfig.emb_dim=32',
  'network.TransformerConfig.mlp_dim=64',
  'network.TransformerConfig.num_heads=4',
  'network.TransformerConfig.num_layers=1',
  'network.TransformerConfig.head_dim=8',
  'SAMPLE_PROMPTS=()',
]
# After it: what a page may ask for and a test has no time to wait for.
SHORTER = [
  'TRAIN_STEPS=2',
  'STATS_PERIOD=1',
  'EVAL_PERIOD=None',
  'EVAL_STEPS=1',
  'FINAL_EVAL_STEPS=1',
  'CHECKPOINT_PERIOD=2',
  'BATCH_SIZE=16',
  'EVAL_BATCH_SIZE=8',
  'INFER_BATCH_SIZE=8',
  'MAX_NEW_TOKENS=4',
  'EVALUATOR_NUM_EXAMPLES=8',
  'WORKERS=1',
]
# A stand-in for palm_tiny's corpus, and for its few-shot task.
FIXTURE_TEXT = [
  'MIXTURE_OR_TASK_NAME=fixture_text',
  f'VOCABULARY_PATH={fixture_tasks.VOCABULARY_PATH}',
  *(
    f'{name}={fixture_tasks.VOCAB_SIZE}'
    for name in (
      'vocabulary.SentencePieceVocabulary.vocab_size',
      'network.TransformerConfig.vocab_size',
      'network.TransformerConfig.num_real_tokens',
    )
  ),
]
# `make train`: samples and few-shot task are part of it, and of no other page.
TRAINED = [
  *('t5x', 'train', '--gin_file=palm_tiny.gin', '--gin.MODEL_DIR=runs/palm_tiny'),
  '--gin.train.infer_eval_dataset_cfg=@infer_eval/utils.DatasetConfig()',
  '--gin.infer_eval/utils.DatasetConfig.mixture_or_task_name=fixture_sums',
  "--gin.SAMPLE_PROMPTS=('On Monday',)",
]


def blocks(page, *kinds):
  """(kind, text) of a page's fenced blocks of these kinds, in order."""
  found = [(m[1], m[2]) for m in BLOCK.finditer(page.read_text())]
  return [(kind, text) for kind, text in found if kind in kinds]


def shell_commands(text):
  """Commands of an `sh` block: continued lines joined, comments left out."""
  lines = text.replace('\\\n', ' ').splitlines()
  return [words for line in lines if (words := shlex.split(line, comments=True))]


def console_commands(text):
  """(words, expected output) of a `console` block."""
  found = []
  for line in text.splitlines():
    if line.startswith('$ '):
      found.append((shlex.split(line[2:]), []))
    else:
      found[-1][1].append(line)
  return [(words, '\n'.join(output)) for words, output in found]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with runs/palm_tiny, as `make train` leaves it, at test size."""
  folder = tmp_path_factory.mktemp('docs')
  with pytest.MonkeyPatch.context() as patch:
    enter(patch, folder, folder / 'cache')
    assert t5x(TRAINED) == 0
    leave()
  return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
  """The folder that a page's commands are run in."""
  shutil.copytree(trained / 'runs', tmp_path / 'runs')
  shutil.copytree(ROOT / 'docs', tmp_path / 'docs')
  enter(monkeypatch, tmp_path, trained / 'cache')
  before, path = list(sys.meta_path), list(sys.path)
  yield tmp_path
  sys.meta_path[:], sys.path[:] = before, path
  leave()


def enter(patch, folder, cache):
  """Makes `folder` the current one, and `cache` the user's cache."""
  patch.chdir(folder)
  patch.setenv('XDG_CACHE_HOME', str(cache))
  patch.setenv('TF_ENABLE_ONEDNN_OPTS', '0')
  patch.setenv('MPLCONFIGDIR', str(cache))


def leave():
  """What the command leaves in this process, taken away."""
  gin.clear_config()
  t5x_alias.uninstall()
  vocabulary.use(None)


def at_test_size(words):
  """The arguments of a `t5x` command, with bindings that make it small."""
  if NOT_HERE.search(' '.join(words)):
    return words if 'describe' in words else [*words, '--dry_run']
  files = [w.partition('=')[2] for w in words if w.startswith('--gin_file=')]
  if not files or '--dry_run' in words or words[0] in ('describe', 'tasks'):
    return words
  if words[0] in ('corpus', 'vocab'):  # no model
    return [*words, '--gin.WORKERS=1']
  scan = gin_files.scan(files, gin_files.SearchPath())
  given = [w.removeprefix('--gin.') for w in words if w.startswith('--gin.')]
  bound = {text.partition('=')[0] for text in given}
  smaller = list(SMALLER)
  if scan.value('MIXTURE_OR_TASK_NAME') in (None, 'palm_tiny', 'fixture_text'):
    if 'TEXT_FILES' not in bound and not scan.value('TEXT_FILES'):
      smaller += FIXTURE_TEXT
    smaller.append('train.infer_eval_dataset_cfg=None')
  if 'inputs' not in (scan.value('TASK_FEATURE_LENGTHS') or ()):
    smaller.append("TASK_FEATURE_LENGTHS={'targets': 32}")
  known = {*scan.macros, *scan.macro_uses}

  def flags(bindings):
    names = [binding.partition('=')[0] for binding in bindings]
    pairs = zip(bindings, names, strict=True)
    return [f'--gin.{b}' for b, name in pairs if '.' in name or name in known]

  return [
    words[0],
    '--gin_bindings=import fixture_tasks',
    *flags([b for b in smaller if b.partition('=')[0] not in bound]),
    *(LENGTH.sub(r'\g<1>32', w.replace(*FEW_SHOT)) for w in words[1:]),
    *flags(SHORTER),
  ]


def t5x(words):
  """Runs `t5x ...` in this process, at test size; the exit code."""
  return main.main(at_test_size(words[1:]))


def run(words):
  """Runs a command of an `sh` block; the exit code."""
  program = words[0]
  if words[:3] == ['python', '-m', 'palm_t5x']:
    return t5x(words[2:])
  if program == 't5x':
    return t5x(words)
  if program == 'make':
    return subprocess.run(['make', '-n', *words[1:]], cwd=ROOT).returncode
  if program == '.ci/run':
    return subprocess.run(['bash', '-n', ROOT / '.ci/run']).returncode
  assert program == 'python', f'nobody knows how to test {program}'
  script = pathlib.Path(words[1]).resolve()  # a file of the page, or of a clone
  script = script if script.exists() else ROOT / words[1]
  measures = script.parent.name == 'benchmarks'  # for minutes: only its options here
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', [*words[1:], *['--help'] * measures])
    patch.syspath_prepend(str(script.parent))
    try:
      runpy.run_path(str(script), run_name='__main__')
    except SystemExit as ended:
      return ended.code or 0
  return 0


def one_line(text):
  """The text with all white space as single spaces."""
  return ' '.join(text.split())


@PAGE
def test_commands_run(page, workplace, capsys):
  for kind, text in blocks(page, 'python', 'gin', 'sh', 'console'):
    if kind in ('python', 'gin'):
      name = FILE_NAME.match(text)
      assert name, f'a {kind} block begins with the name of its file'
      (workplace / name[1]).write_text(text)
    elif kind == 'sh':
      for words in shell_commands(text):
        code = run(words)
        output = capsys.readouterr()
        assert code == 0, f'{shlex.join(words)}\n{output.out}{output.err}'
    else:
      for words, expected in console_commands(text):
        code = main.main(words[1:])
        output = capsys.readouterr()
        shown = one_line(output.err + output.out)
        assert code == (2 if 'error:' in expected else 0), shown
        pattern = re.escape(one_line(expected)).replace(r'\.\.\.', '.*')
        assert re.search(pattern, shown), f'{shlex.join(words)}\n{shown}'


@PAGE
def test_links_lead_somewhere(page):
  text = page.read_text()
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if '://' in target:
      continue
    name, _, anchor = target.partition('#')
    path = page.parent / name if name else page
    assert path.exists(), target
    if anchor:
      titles = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
      slugs = [re.sub(r'[^\w -]', '', t).lower().replace(' ', '-') for t in titles]
      assert anchor in slugs, target


@PAGE
def test_files_named_in_a_page_exist(page):
  """Paths of this repository in running text and tables, such as palm_t5x/train.py."""
  folders = 'palm_t5x|gin|tasks|mixtures|tests|benchmarks|docs'
  text = page.read_text().replace('no `gin/__init__.py`', '')
  found = re.findall(rf'(?<![\w/.])((?:{folders})/[\w/]+\.\w+)', text)
  assert [name for name in found if not (ROOT / name).exists()] == []


def test_the_tree_of_the_readme_is_the_tree():
  text = (ROOT / 'README.md').read_text()
  tree = text[text.index('## The tree') :]
  named = set(re.findall(r'\b(\w+)\.py\b', tree))
  assert {f'{name}.py' for name in named} <= {
    p.name for p in (ROOT / 'palm_t5x').rglob('*.py')
  }


def test_there_are_at_most_eight_pages():
  assert len(list((ROOT / 'docs').glob('*.md'))) <= 8


@PAGE
def test_pages_are_short_lines(page):
  """Running text stays within a terminal; tables and code may be wider."""
  inside = False
  for number, line in enumerate(page.read_text().splitlines(), 1):
    inside ^= line.startswith('```')
    if not inside and not line.startswith(('|', '    ', '![')):
      assert len(line) <= 100, f'{page.name}:{number}'

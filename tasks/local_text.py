"""Real text that is already on the machine: the corpus of `palm_tiny`.

Four tasks, whose files come with Python itself or with a package this project needs:

  python_code        the standard library's sources, without its tests (over half of
                     it); docstrings stay where they are
  python_docstrings  docstrings of a few packages, under their signatures, without
  python_dialogues   the doctest sessions in them (and in some more packages')
  python_prose       Python's own help topics and long descriptions of packages

A source file is in the training or the validation split by a hash of its name, before
anything is taken out of it, so all that derives from a file is on its side. Lines that
many files share (licences, headings, idioms) would leak all the same: a line of 50 or
more characters that occurs in training is left out of the validation documents.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sysconfig

from palm_t5x.corpus import sources

SHARED_LINE = 50  # characters from which on a shared line is dropped from validation
_VALIDATION_SHARE = 25  # one source file in so many
# Few files are large, so a draw may hold out anything from 1 % to 12 % of a sub-corpus;
# this one holds out about 4 % of each.
_SALT = 'palm_tiny 2685'
_RULES = 1  # raise it when what is taken from the files changes

# Tests, what is installed beside the library, and the help topics (they are prose).
_LEFT_OUT = {
  '__pycache__', 'test', 'tests', 'idle_test', 'testing', '_examples', 'site-packages',
  'dist-packages', 'lib-dynload', 'pydoc_data',
}  # fmt: skip
_DOCSTRINGS_OF = ('numpy', 'flax', 'optax')
_DIALOGUES_OF = ('numpy', 'scipy', 'jax', 'flax', 'optax')
_DESCRIPTIONS_OF = (
  'absl-py', 'attrs', 'click', 'clu', 'etils', 'flax', 'gin-config', 'h5py', 'humanize',
  'jax', 'jinja2', 'joblib', 'lxml', 'matplotlib', 'ml_collections', 'numpy', 'optax',
  'orbax-checkpoint', 'packaging', 'pip', 'portalocker', 'psutil', 'pygments',
  'pyparsing', 'rapidfuzz', 'requests', 'rich', 'sacrebleu', 'scikit-learn', 'scipy',
  'sentencepiece', 'seqio', 'setuptools', 'six', 'tabulate', 'tensorboard',
  'tensorflow', 'tensorstore', 'tqdm', 'urllib3', 'werkzeug', 'wheel', 'wrapt',
)  # fmt: skip
# Badges, pictures and their targets: markup, not prose.
_MARKUP = re.compile(r'^\s*(\[!\[|\[[^]]*\]: |\.\. (image|_|\|)|<|:\w+:|\|).*\n?', re.M)

# Comments and all kinds of string literals, in one pass. Only a triple-quoted one has
# the groups; the others are there so that quotes inside them are not mistaken for one.
_STRINGS = re.compile(
  r"""\#[^\n]*
  | [rRbBuUfF]{0,2} (?P<quote>\"\"\"|''') (?P<text>.*?) (?<!\\)(?:\\\\)* (?P=quote)
  | [rRbBuUfF]{0,2} "(?:\\.|[^"\\\n])*"
  | [rRbBuUfF]{0,2} '(?:\\.|[^'\\\n])*'""",
  re.DOTALL | re.VERBOSE,
)
_DEFINITION = re.compile(
  r'^[ \t]*(?:async[ ]+)?(?:def|class)[ ]+(\w+[^\n]*(?:\n[^\n]*)*?):[ \t]*(?:\#.*)?$',
  re.MULTILINE,
)
_MIN_DOCSTRING = 100  # characters: shorter ones say little without their code


def is_validation(name: str) -> bool:
  """Whether the source file of this name is held out; it depends on the name alone."""
  digest = hashlib.blake2b(f'{_SALT} {name}'.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little') % _VALIDATION_SHARE == 0


def _python_files(root: str, prefix: str):
  """(name, path) of the .py files below `root` that are not left out, sorted."""
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(
      f for f in folders if f not in _LEFT_OUT and not f.startswith('config-')
    )
    for file in sorted(files):
      generated = file.startswith(('_sysconfigdata', 'test_')) or 'test.' in file
      if file.endswith('.py') and not generated:
        path = os.path.join(folder, file)
        name = os.path.relpath(path, root).replace(os.sep, '/')
        yield f'{prefix}/{name}', path


def _read(path: str) -> str:
  with open(path, encoding='utf-8', errors='replace') as f:
    return f.read()


def _roots() -> list[tuple[str, str]]:
  """(folder, name): the standard library, then the packages with docstrings."""
  roots = [(sysconfig.get_paths()['stdlib'], 'stdlib')]
  for package in sorted({*_DOCSTRINGS_OF, *_DIALOGUES_OF}):
    spec = importlib.util.find_spec(package)  # finds, does not import
    roots += [
      (root, package) for root in (spec and spec.submodule_search_locations) or ()
    ]
  return roots


def _code():
  """(source file, document): one document per file of the standard library."""
  for name, path in _python_files(*_roots()[0]):
    yield name, _read(path)


def _docstrings_of(text: str):
  """(signature, docstring) of each long docstring in a source text, in order."""
  since = 0
  for match in _STRINGS.finditer(text):
    quoted = match['text']
    if quoted is None or len(quoted) < _MIN_DOCSTRING:
      continue
    line_start = text.rfind('\n', 0, match.start()) + 1
    if text[line_start : match.start()].strip():
      continue  # part of an expression
    before = list(_DEFINITION.finditer(text, since, match.start()))
    signature = ' '.join(before[-1][1].split()) if before else ''
    since = match.end()
    yield signature[:200], inspect.cleandoc(quoted)


def _split_dialogues(docstring: str) -> tuple[str, str]:
  """(the docstring without its doctest sessions, the sessions)."""
  prose, sessions, margin = [], [], None
  for line in docstring.split('\n'):
    stripped = line.strip()
    if margin is None and stripped.startswith('>>>'):
      margin = len(line) - len(line.lstrip())  # a session begins
    if margin is not None and not stripped:
      sessions.append('')  # and a blank line ends it
      margin = None
    elif margin is not None:
      sessions.append(line[min(margin, len(line) - len(line.lstrip())) :])
    else:
      prose.append(line)
  text = re.sub(r'\n{3,}', '\n\n', '\n'.join(prose)).strip('\n')
  return text, '\n'.join(sessions).strip('\n')


@functools.cache
def _package_docstrings() -> tuple:
  """(source file, [(signature, prose, sessions), ...]) of the documented packages."""
  found = []
  for root, package in _roots()[1:]:
    for name, path in _python_files(root, package):
      entries = [
        (signature, *_split_dialogues(docstring))
        for signature, docstring in _docstrings_of(_read(path))
      ]
      found.append((name, entries))
  return tuple(found)


def _docstrings():
  """(source file, document): one document per file, entries under their signatures."""
  for name, entries in _package_docstrings():
    if name.split('/')[0] not in _DOCSTRINGS_OF:
      continue
    parts = [
      f'{signature}\n\n{prose}' if signature else prose
      for signature, prose, _ in entries
      if prose
    ]
    if parts:
      yield name, '\n\n\n'.join([name, *parts]) + '\n'


def _dialogues():
  """(source file, document): one document per docstring that has doctest sessions."""
  for name, entries in _package_docstrings():
    for _, _, sessions in entries:
      if sessions and name.split('/')[0] in _DIALOGUES_OF:
        yield name, sessions + '\n'


def _prose():
  """(source file, document): help topics, then the packages' descriptions."""
  if importlib.util.find_spec('pydoc_data') is not None:
    from pydoc_data import topics

    for _, text in sorted(topics.topics.items()):
      yield 'stdlib/pydoc_data/topics.py', text
  for package in _DESCRIPTIONS_OF:
    try:
      metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
      continue
    text = metadata.get('Description') or metadata.get_payload() or ''
    text = _MARKUP.sub('', text)
    if text.strip():
      yield f'{package}/METADATA', text


_CORPORA = {
  'python_code': _code,
  'python_docstrings': _docstrings,
  'python_dialogues': _dialogues,
  'python_prose': _prose,
}


def line_key(line: str) -> str:
  """What two lines have in common that differ in indentation or comment marks only."""
  return line.strip(' \t\r\f\v#*;"\'`|:.,-=/<>') or line.strip()


@functools.cache
def _training_lines() -> frozenset[int]:
  """Hashes of the lines of all training documents, of all sub-corpora together."""
  keys: set[int] = set()
  for documents in _CORPORA.values():
    for name, text in documents():
      if not is_validation(name):
        keys.update(map(hash, map(line_key, text.split('\n'))))
  return frozenset(keys)


def _without_shared_lines(text: str) -> str:
  shared = _training_lines()
  return '\n'.join(
    line
    for line in text.split('\n')
    if len(line) < SHARED_LINE or hash(line_key(line)) not in shared
  )


def _split(documents, split: str):
  for name, text in documents():
    if is_validation(name) != (split == 'validation'):
      continue
    if split == 'validation':
      text = _without_shared_lines(text)
    if text.strip():
      yield text


@functools.cache
def _fingerprint(split: str) -> str:
  """Changes when Python or a package is upgraded; one for both splits."""
  del split
  found = [str(_RULES)]
  for root, prefix in _roots():
    for name, path in _python_files(root, prefix):
      found.append(f'{name} {os.path.getsize(path)}')
  for package in _DESCRIPTIONS_OF:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found.append(f'{package} {importlib.metadata.version(package)}')
  return hashlib.blake2b('\n'.join(found).encode(), digest_size=4).hexdigest()


for _name, _documents in _CORPORA.items():
  sources.add_text_task(
    _name,
    sources.DocumentSource(
      functools.partial(_split, _documents),
      fingerprint=_fingerprint,
    ),
  )

"""The language of a source file, by its extension, and by its text where that is open.

The list is Table 28 of the paper. Of its names, 'S' is taken for the S language and its
dialect R; assembly, whose files also end in .s, is not in the table.
"""

import json
import os
import re
from collections.abc import Mapping

# Percent of the paper's 196 GB of source code; None: less than 0.1.
PAPER_TABLE_28: dict[str, float | None] = {
  'Java': 18.8, 'HTML': 17.5, 'Javascript': 11.6, 'Python': 7.3, 'C': 7.3, 'PHP': 7.2,
  'C#': 6.4, 'C++': 6.3, 'XML': 4.8, 'Ruby': 2.7, 'Go': 2.6, 'Matlab': 1.8,
  'Typescript': 1.4, 'Shell': 0.5, 'Rust': 0.4, 'SQL': 0.3, 'Lua': 0.3,
  'Notebooks': 0.3, 'Dart': 0.2, 'Visual Basic': None, 'Perl': None, 'S': None,
  'Clojure': None, 'Emacs Lisp': None, 'TCL': None, 'Other': 0.6,
}  # fmt: skip
LANGUAGES = tuple(name for name in PAPER_TABLE_28 if name != 'Other')

_EXTENSIONS = {
  'Java': 'java', 'HTML': 'html htm xhtml', 'Javascript': 'js jsx mjs cjs',
  'Python': 'py pyw pyi pyx', 'C': 'c h', 'PHP': 'php php3 php4 php5 phtml inc',
  'C#': 'cs csx', 'C++': 'cc cpp cxx c++ hh hpp hxx h++ ipp inl tpp cu cuh',
  'XML': 'xml xsd xsl xslt wsdl xaml', 'Ruby': 'rb rake gemspec', 'Go': 'go',
  'Matlab': 'm', 'Typescript': 'ts tsx mts cts', 'Shell': 'sh bash zsh ksh',
  'Rust': 'rs', 'SQL': 'sql', 'Lua': 'lua', 'Notebooks': 'ipynb', 'Dart': 'dart',
  'Visual Basic': 'vb vbs bas frm', 'Perl': 'pl pm', 'S': 's r q',
  'Clojure': 'clj cljs cljc', 'Emacs Lisp': 'el', 'TCL': 'tcl tk',
}  # fmt: skip
_BY_EXTENSION = {
  extension: name for name, all in _EXTENSIONS.items() for extension in all.split()
}
_SHEBANG = re.compile(
  r'#!.*?\b(python|bash|zsh|ksh|sh|perl|ruby|node|lua|tclsh|wish|php|Rscript)'
)
_INTERPRETERS = {
  'python': 'Python', 'perl': 'Perl', 'ruby': 'Ruby', 'node': 'Javascript',
  'lua': 'Lua', 'tclsh': 'TCL', 'wish': 'TCL', 'php': 'PHP', 'Rscript': 'S',
}  # fmt: skip
_OBJECTIVE_C = re.compile(
  r'^[ \t]*(?:#import\b|@(?:interface|implementation|protocol|class|import|end)\b)',
  re.M,
)
_CPP = re.compile(
  r'^[ \t]*(?:class\s+\w+|namespace\b|template\s*<|using\s+\w+|public:'
  r'|private:|protected:)|\bstd::|\bnullptr\b|\bconstexpr\b'
  r'|^[ \t]*#[ \t]*include[ \t]*<[a-z_]+>',
  re.MULTILINE,
)
_PERL = re.compile(
  r'^#!.*perl|\buse\s+(?:strict|warnings|\w+::)|\bmy\s*[$@%(]|^=pod', re.M
)
_PROLOG = re.compile(r'^(?::-|[a-z]\w*(?:\([^)\n]*\))?\s*:-)|^%', re.MULTILINE)
_S = re.compile(r'<-\s*function\s*\(|^[^\S\n]*[\w.]+\s*<-\s|\blibrary\(', re.MULTILINE)
_ASSEMBLY = re.compile(
  r'^[^\S\n]*(?:\.(?:text|data|globl|global|section|align|file|type)|#include)\b'
  r'|\bmov[lqb]?\s',
  re.MULTILINE,
)
_START = 20_000  # characters that decide between languages of one extension


def extension_of(path: str) -> str:
  """'py' of 'a/b.py', in lower case; '' where there is none."""
  return os.path.splitext(path)[1][1:].lower()


def language_of(path: str, text: str) -> str | None:
  """A name of Table 28, or None for a language that is not in it.

  .h is C++ if it has a class, a namespace, std:: or the like, and C otherwise; .m is
  Matlab unless it looks like Objective-C or Mathematica; .pl may be Prolog, .ts a
  translation of Qt (which is XML), .s assembly.
  """
  extension, start = extension_of(path), text[:_START]
  if not extension:
    match = _SHEBANG.match(start)
    return _INTERPRETERS.get(match[1], 'Shell') if match else None
  name = _BY_EXTENSION.get(extension)
  if extension in ('h', 'm') and _OBJECTIVE_C.search(start):
    return None
  if extension == 'h':
    return 'C++' if _CPP.search(start) else 'C'
  if extension == 'm':
    return None if start.lstrip().startswith(('(*', '/*', '//', ':-')) else name
  if extension == 'pl':
    return None if not _PERL.search(start) and _PROLOG.search(start) else name
  if extension == 'ts':
    return (
      'XML' if start.lstrip('\ufeff \n').startswith(('<?xml', '<!DOCTYPE')) else name
    )
  if extension == 's':
    return name if _S.search(start) and not _ASSEMBLY.search(start) else None
  if extension == 'inc':
    return name if '<?php' in start else None
  return name


def notebook_text(text: str) -> str | None:
  """A notebook's cells as a script, without outputs; None if it is no notebook.

  Cells begin with '# %%', as editors know it; cells of prose with '# %% [markdown]',
  and their lines are comments.
  """
  try:
    notebook = json.loads(text)
    cells = notebook.get('cells')
    if cells is None:  # the format before version 4
      cells = [cell for sheet in notebook['worksheets'] for cell in sheet['cells']]
    parts = [_cell(cell) for cell in cells]
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return None
  return '\n\n'.join(part for part in parts if part) + '\n'


def _cell(cell) -> str:
  source = cell.get('source', cell.get('input', ''))
  source = (''.join(source) if isinstance(source, list) else source).strip('\n')
  if not source.strip():
    return ''
  if cell['cell_type'] == 'code':
    return f'# %%\n{source}'
  prose = '\n'.join(f'# {line}'.rstrip() for line in source.split('\n'))
  return f'# %% [markdown]\n{prose}'


def table(sizes: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
  """Language, our share and the paper's, in percent (None: below 0.1), as in Table 28.

  Args:
    sizes: language -> bytes, or tokens; what is not in the table is 'Other'.
  """
  total = sum(sizes.values()) or 1
  ours = {name: 100 * sizes.get(name, 0) / total for name in LANGUAGES}
  ours['Other'] = 100 * sum(v for k, v in sizes.items() if k not in ours) / total
  return [(name, ours[name], share) for name, share in PAPER_TABLE_28.items()]

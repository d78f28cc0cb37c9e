"""Code: repositories with their licences, languages, and files that nobody wrote."""

import json
import pickle

import pytest
import test_licences

from palm_t5x import errors
from palm_t5x.corpus import code, code_languages
from palm_t5x.corpus.documents import Document, Dropped
from palm_t5x.corpus.records import Broken, Ignored

BODY = 'def add(first, second):\n  """The sum."""\n  return first + second\n'


def write(root, files):
  for path, text in files.items():
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(text if isinstance(text, bytes) else text.encode())


def read(root, **options):
  """Everything that a folder's parts yield."""
  parts = code.Repositories(**options).parts(str(root))
  assert all(pickle.loads(pickle.dumps(part)).name == part.name for part in parts)
  return [item for part in parts for item in part.read()]


def kept(root, **options):
  keep = code.KeepLicences(**options)
  found = [keep(item) for item in read(root) if isinstance(item, Document)]
  return sorted(d.id for d in found if isinstance(d, Document))


@pytest.mark.parametrize('disguise', test_licences.DISGUISES)
def test_planted_copyleft_repositories_never_pass(tmp_path, disguise):
  """Among permissive ones, at the root and in a folder of a permissive repository."""
  for i, (name, text) in enumerate(test_licences.COPYLEFT.items()):
    evil = test_licences.DISGUISES[disguise](name, text)
    write(tmp_path, {f'evil/r{i}/{path}': t for path, t in evil.items()})
    write(
      tmp_path,
      {
        f'evil/r{i}/src/deep/main.py': BODY,
        f'good/r{i}/LICENSE': test_licences.MIT,
        f'good/r{i}/main.py': BODY,
        f'good/r{i}/vendored/a/x.py': BODY,
      },
    )
    evil.pop('README.md', None)
    write(tmp_path, {f'good/r{i}/vendored/{path}': t for path, t in evil.items()})
  passed = kept(tmp_path)
  assert not [path for path in passed if path.startswith('evil') or 'vendored' in path]
  assert sum(path.endswith('main.py') for path in passed) == len(test_licences.COPYLEFT)


@pytest.mark.parametrize('name', test_licences.COPYLEFT)
def test_a_copyleft_file_of_a_permissive_repository_is_dropped(tmp_path, name):
  notice = test_licences.comment(test_licences.COPYLEFT[name], '# ')
  files = {'a/b/LICENSE': test_licences.MIT, 'a/b/x.py': f'{notice}\n{BODY}'}
  write(tmp_path, {**files, 'a/b/y.py': f'# SPDX-License-Identifier: {name}\n{BODY}'})
  assert kept(tmp_path) == ['a/b/LICENSE']


def test_licences_of_folders(tmp_path):
  write(
    tmp_path,
    {
      'o/plain/main.py': BODY,
      'o/plain/lib/LICENSE': test_licences.BSD,
      'o/plain/lib/x.py': BODY,
      'o/plain/lib/strange/COPYING': test_licences.STRANGE,
      'o/plain/lib/strange/x.py': BODY,
      'o/gpl/COPYING': test_licences.COPYLEFT['GPL-2.0'],
      'o/gpl/lib/LICENSE': test_licences.MIT,
      'o/gpl/lib/x.py': BODY,
    },
  )
  assert kept(tmp_path) == ['o/plain/lib/LICENSE', 'o/plain/lib/x.py']
  assert 'o/plain/main.py' in kept(tmp_path, keep_unknown=True)
  assert not [p for p in kept(tmp_path, keep_unknown=True) if p.startswith('o/gpl')]
  meta = {d.id: d.meta for d in read(tmp_path)}['o/plain/lib/x.py']
  assert meta == {
    'repository': 'o/plain',
    'licence': 'BSD-2-Clause',
    'licence_kind': 'permissive',
    'licence_where': 'LICENSE',
    'language': 'Python',
    'extension': 'py',
  }


def test_files_that_cannot_be_read(tmp_path):
  write(
    tmp_path / 'raw',
    {
      'r/LICENSE': test_licences.MIT,
      'r/a.py': b'x = 1 # caf\xe9\n',
      'r/b.py': b'\x00\x01binary',
      'r/big.py': BODY * 100,
      'r/c.py': '\ufeff' + BODY,
      'r/.git/config': 'x',
      'r/.github/d.py': BODY,
    },
  )
  (tmp_path / 'raw/r/link.py').symlink_to(tmp_path / 'raw/r/c.py')
  (tmp_path / 'raw/r/loop').symlink_to(tmp_path / 'raw')
  found = read(tmp_path / 'raw', depth=1, max_file_bytes=2000)
  documents = {d.id: d.text for d in found if isinstance(d, Document)}
  assert sorted(documents) == ['r/.github/d.py', 'r/LICENSE', 'r/c.py']
  assert documents['r/c.py'] == BODY
  assert Broken('r/a.py', 'invalid UTF-8') in found
  assert Ignored('r/b.py', 'binary') in found
  assert Ignored('r/big.py', 'larger than max_file_bytes') in found


def test_parts_are_balanced_and_repeat_themselves(tmp_path):
  for i in range(40):
    write(tmp_path, {f'o{i % 3}/r{i:02d}/main.py': BODY * (1 + i % 5)})
  reader = code.Repositories(part_bytes=1500)
  parts = reader.parts(str(tmp_path))
  assert [p.name for p in parts] == [p.name for p in reader.parts(str(tmp_path))]
  assert len(parts) > 3 and max(p.num_bytes for p in parts) <= 1500
  ids = [d.id for p in parts for d in p.read()]
  assert len(set(ids)) == 40 and ids == [d.id for p in parts for d in p.read()]


@pytest.mark.parametrize('depth', [1, 2])
def test_no_repositories(tmp_path, depth):
  (tmp_path / 'file.py').write_text(BODY)
  with pytest.raises(errors.UserError, match='has no repositories'):
    code.Repositories(depth=depth).parts(str(tmp_path))


def test_the_papers_table():
  shares = code_languages.PAPER_TABLE_28
  assert len(shares) == 26 and len(code_languages.LANGUAGES) == 25
  assert sum(share or 0 for share in shares.values()) == pytest.approx(98.3)
  rows = code_languages.table({'Python': 30, 'Java': 60, 'Fortran': 10})
  assert [row[0] for row in rows] == list(shares)
  assert ('Java', 60, 18.8) in rows and ('Other', 10, 0.6) in rows
  assert ('Python', 30, 7.3) in rows and ('S', 0, None) in rows


@pytest.mark.parametrize(
  'path,text,expected',
  [
    ('a/b.py', '', 'Python'), ('A.JAVA', '', 'Java'), ('x.tsx', '', 'Typescript'),
    ('x.h', 'int f(void);\n', 'C'), ('x.h', 'namespace a {\n', 'C++'),
    ('x.h', '#include <vector>\n', 'C++'), ('x.h', '#include <stdio.h>\n', 'C'),
    ('x.h', '#import "a.h"\n@interface A\n', None), ('x.cc', '', 'C++'),
    ('x.m', '% comment\nfunction y = f(x)\n', 'Matlab'),
    ('x.m', '#import <Foundation/Foundation.h>\n', None),
    ('x.m', '(* Mathematica *)\n', None), ('x.m', '// a\n@implementation A\n', None),
    ('x.pl', '#!/usr/bin/perl\nuse strict;\n', 'Perl'), ('x.pm', '', 'Perl'),
    ('x.pl', ':- module(a, []).\nparent(X, Y) :- child(Y, X).\n', None),
    ('x.ts', '<?xml version="1.0"?><TS>', 'XML'), ('x.ts', 'let a = 1', 'Typescript'),
    ('x.s', '.globl main\nmain:\n  movl %eax, %ebx\n', None), ('x.R', '', 'S'),
    ('x.s', 'f <- function(x) x + 1\n', 'S'), ('run', '#!/bin/sh\n', 'Shell'),
    ('run', '#!/usr/bin/env python3\n', 'Python'), ('Makefile', 'all:\n', None),
    ('x.swift', '', None), ('x.ipynb', '{}', 'Notebooks'), ('init.el', '',
    'Emacs Lisp'),
    ('x.inc', '<?php echo 1;', 'PHP'), ('x.inc', 'mov ax, 1', None), ('x.cs', '', 'C#'),
  ],
)  # fmt: skip
def test_languages(path, text, expected):
  assert code_languages.language_of(path, text) == expected


def test_keep_languages():
  keep = code.KeepLanguages(languages=('Python',))
  assert keep(Document('a/x.py', BODY)).meta['language'] == 'Python'
  assert keep(Document('a/x.c', '')) == Dropped('another language')
  assert keep(Document('a/x', '', meta={'language': None})) == Dropped(
    'another language'
  )
  with pytest.raises(errors.UserError, match="'Pyton'"):
    code.KeepLanguages(languages=('Pyton',))


def test_notebooks():
  cells = [
    {'cell_type': 'markdown', 'source': ['# Title\n', '\n', 'words']},
    {'cell_type': 'code', 'source': 'x = 1\nx', 'outputs': [{'data': 'SECRET'}]},
    {'cell_type': 'code', 'source': []},
  ]
  expected = '# %% [markdown]\n# # Title\n#\n# words\n\n# %%\nx = 1\nx\n'
  meta = {'language': 'Notebooks'}
  old = [{**cell, 'input': cell.pop('source')} for cell in map(dict, cells)]
  render = code.RenderNotebooks()
  for notebook in ({'cells': cells}, {'worksheets': [{'cells': old}]}):
    document = Document('a.ipynb', json.dumps(notebook), meta=meta)
    assert render(document).text == expected
  for broken in ('', '[]', '{}', '{"cells": 3}', '{"cells": []}', '{"cells": [1]}'):
    assert isinstance(render(Document('a.ipynb', broken, meta=meta)), Dropped)
  assert render(Document('a.py', BODY)).text == BODY


LONG = 'var ' + ','.join(f'a{i}=b[{i}](c{i})' for i in range(200)) + ';\n'


@pytest.mark.parametrize(
  'path,text,reason',
  [
    ('a.py', BODY, None),
    ('a.py', BODY + 'x = "' + 'word ' * 40 + '"\n', None),
    ('a_pb2.py', BODY, 'generated, by its name'),
    ('jquery.min.js', BODY, 'generated, by its name'),
    ('package-lock.json', BODY, 'generated, by its name'),
    ('Cargo.lock', BODY, 'generated, by its name'),
    ('x.designer.cs', BODY, 'generated, by its name'),
    ('node_modules/a/b.js', BODY, 'vendored'),
    ('a.py', f'# Generated by the protocol buffer compiler.\n{BODY}', 'word'),
    ('a.go', f'// Code generated by x. DO NOT EDIT.\n{BODY}', 'word'),
    ('a.js', f'/** @generated */\n{BODY}', 'word'),
    ('a.c', f'/* This file was automatically generated */\n{BODY}', 'word'),
    ('a.py', f'# the report that was made by hand\n{BODY}', None),
    ('a.js', LONG * 5, 'long lines'),
    ('a.js', 'x;\n' * 1000 + LONG, 'a very long line'),
    ('a.py', 'x = [\n' + '  0x12, 0x34, 0x56,\n' * 200 + ']\n', 'few letters'),
    ('a.py', 'x = 1\n' * 9 + ('"' + 'QUJDREVG' * 60 + '"\n') * 1, 'encoded'),
    ('a.py', ' \n', 'too short'),
  ],
)
def test_generated_files(path, text, reason):
  document = Document(f'o/r/{path}', text, meta={'repository': 'o/r'})
  found = code.DropGenerated()(document)
  if reason is None:
    assert isinstance(found, Document)
  else:
    assert isinstance(found, Dropped) and reason in found.reason


def test_html_may_have_longer_lines():
  text = '<p>' + 'some words ' * 25 + '</p>\n'
  html = Document('a.html', text * 3, meta={'language': 'HTML'})
  assert isinstance(code.DropGenerated()(html), Document)
  other = Document('a.js', text * 3, meta={'language': 'Javascript'})
  assert isinstance(code.DropGenerated()(other), Dropped)
  vendored = Document('vendor/a.py', BODY)
  assert isinstance(code.DropGenerated(drop_vendored=False)(vendored), Document)


@pytest.mark.parametrize(
  'step',
  [code.KeepLicences(), code.KeepLanguages(), code.DropGenerated()],
)
def test_steps_pickle(step):
  assert pickle.loads(pickle.dumps(step)) == step


@pytest.mark.timeout(60)
@pytest.mark.parametrize('text', ['\n' * 100_000, ' \n' * 50_000, 'a\n ' * 30_000])
def test_languages_of_long_runs(text):
  for name in ('x.h', 'x.m', 'x.pl', 'x.s', 'x.ts', 'x.inc', 'x'):
    code_languages.language_of(name, text)


def test_links_to_licences(tmp_path):
  for name in ('inside', 'outside', 'broken', 'loop'):
    files = {'package.json': '{"license": "MIT"}', 'x.py': BODY}
    write(tmp_path, {f'o/{name}/{path}': text for path, text in files.items()})
  gpl = test_licences.COPYLEFT['GPL-3.0']
  write(tmp_path, {'o/inside/texts/three': gpl, 'elsewhere/r/text': test_licences.MIT})
  (tmp_path / 'o/inside/LICENSE').symlink_to('texts/three')
  (tmp_path / 'o/outside/LICENSE').symlink_to('../../elsewhere/r/text')
  (tmp_path / 'o/broken/LICENSE').symlink_to('nowhere')
  (tmp_path / 'o/loop/LICENSE').symlink_to('LICENSE')
  kinds = {d.id: d.meta['licence_kind'] for d in read(tmp_path)}
  assert kinds['o/inside/x.py'] == 'copyleft'
  assert {kinds[f'o/{n}/x.py'] for n in ('outside', 'broken', 'loop')} == {'unknown'}

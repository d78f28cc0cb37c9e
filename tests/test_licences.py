"""Licences: copyleft in any disguise is seen, choices and permissive ones are told."""

import textwrap

import pytest

from palm_t5x.corpus import licence_texts, licences

# SPDX id -> what its own text or its notice begins with.
COPYLEFT = {
  'GPL-2.0': (
    'GNU GENERAL PUBLIC LICENSE Version 2, June 1991. Everyone is permitted to copy '
    'and '
    'distribute verbatim copies of this license document, but changing it is not '
    'allowed.'
  ),
  'GPL-3.0': (
    'This program is free software: you can redistribute it and/or modify it under the '
    'terms of the GNU General Public License as published by the Free Software '
    'Foundation, either version 3 of the License, or (at your option) any later '
    'version.'
  ),
  'LGPL-2.1': (
    'GNU LESSER GENERAL PUBLIC LICENSE Version 2.1, February 1999. [This is the first '
    'released version of the Lesser GPL. It also counts as the successor.]'
  ),
  'LGPL-2.0': 'GNU LIBRARY GENERAL PUBLIC LICENSE Version 2, June 1991.',
  'AGPL-3.0': 'GNU AFFERO GENERAL PUBLIC LICENSE Version 3, 19 November 2007.',
  'GFDL-1.3': 'GNU Free Documentation License Version 1.3, 3 November 2008.',
  'MPL-2.0': (
    'This Source Code Form is subject to the terms of the Mozilla Public License, v. '
    '2.0. If a copy of the MPL was not distributed with this file, You can obtain one.'
  ),
  'EPL-2.0': (
    'Eclipse Public License - v 2.0. THE ACCOMPANYING PROGRAM IS PROVIDED UNDER THE '
    'TERMS OF THIS ECLIPSE PUBLIC LICENSE ("AGREEMENT").'
  ),
  'CPL-1.0': 'Common Public License Version 1.0. THE ACCOMPANYING PROGRAM IS PROVIDED',
  'CDDL-1.0': 'COMMON DEVELOPMENT AND DISTRIBUTION LICENSE (CDDL) Version 1.0',
  'EUPL-1.2': 'EUROPEAN UNION PUBLIC LICENCE v. 1.2 EUPL (c) the European Union 2016',
  'OSL-3.0': 'Licensed under the Open Software License version 3.0',
  'CECILL-2.1': 'CeCILL FREE SOFTWARE LICENSE AGREEMENT Version 2.1 dated 2013-06-21',
  'CC-BY-SA-4.0': 'Creative Commons Attribution-ShareAlike 4.0 International Public',
  'CC-BY-NC-4.0': 'Creative Commons Attribution-NonCommercial 4.0 International',
  'SSPL-1.0': 'Server Side Public License VERSION 1, OCTOBER 16, 2018',
  'BUSL-1.1': 'Business Source License 1.1. The Licensed Work is (c) someone.',
  'QPL-1.0': 'THE Q PUBLIC LICENSE version 1.0. Everyone is permitted to copy this.',
  'OFL-1.1': 'This Font Software is licensed under the SIL Open Font License, '
  'Version 1.1',
  'APSL-2.0': 'APPLE PUBLIC SOURCE LICENSE Version 2.0 - August 6, 2003',
  'MS-RL': 'Microsoft Reciprocal License (Ms-RL). This license governs use.',
  'RPL-1.5': 'Reciprocal Public License 1.5 (RPL1.5). Preamble: The Reciprocal',
  'ODbL-1.0': 'ODC Open Database License (ODbL). Preamble',
}
MIT = (
  'Permission is hereby granted, free of charge, to any person obtaining a copy of '
  'this '
  'software and associated documentation files (the "Software"), to deal in the '
  'Software '
  'without restriction. THE SOFTWARE IS PROVIDED "AS IS".'
)
APACHE = 'Licensed under the Apache License, Version 2.0 (the "License"); you may not'
BSD = (
  'Redistribution and use in source and binary forms, with or without modification, '
  'are '
  'permitted provided that the following conditions are met:'
)
ISC = (
  'Permission to use, copy, modify, and/or distribute this software for any purpose '
  'with '
  'or without fee is hereby granted.'
)
PERMISSIVE = {'MIT': MIT, 'Apache-2.0': APACHE, 'BSD-2-Clause': BSD, 'ISC': ISC}


def comment(text, prefix):
  lines = textwrap.wrap(text, 34)
  return '\n'.join(f'{prefix}{line}' for line in lines)


DISGUISES = {
  'COPYING': lambda name, text: {'COPYING': text},
  'reflowed': lambda name, text: {
    'License.md': '\n\n'.join(textwrap.wrap(f'Copyright (c) 2020 A. B.\n{text}', 31))
  },
  'capitals and a comment': lambda name, text: {
    'LICENCE.txt': comment(text.upper(), ' * ')
  },
  'markup': lambda name, text: {
    'license.html': '<p><b>' + text.replace(' ', '</b>&nbsp;<b>') + '</b></p>'
  },
  'LICENSES folder': lambda name, text: {'LICENSES/one.txt': text, 'LICENSE': MIT},
  'beside a permissive one': lambda name, text: {'LICENSE': MIT, 'COPYING': text},
  'below a permissive one': lambda name, text: {'LICENSE': f'{MIT}\n\n---\n\n{text}'},
  'SPDX line': lambda name, text: {
    'LICENSE': f'// SPDX-License-Identifier: {name}\n', 'README.md': 'Under MIT'
  },
  'package.json': lambda name, text: {'package.json': f'{{"license": "{name}"}}'},
  'old package.json': lambda name, text: {
    'package.json': f'{{"licenses": [{{"type": "MIT"}}, {{"type": "{name}"}}]}}'
  },
  'Cargo.toml': lambda name, text: {
    'Cargo.toml': f'[package]\nname = "a"\nlicense = "{name}"\n', 'LICENSE': MIT
  },
  'pyproject.toml': lambda name, text: {
    'pyproject.toml': f'[project]\nlicense = {{text = "{name}"}}\n'
  },
  'setup.py': lambda name, text: {'setup.py': f"setup(name='a', license='{name}')"},
  'setup.cfg': lambda name, text: {'setup.cfg': f'[metadata]\nlicense = {name}\n'},
  'gemspec': lambda name, text: {'a.gemspec': f'  s.licenses = ["MIT", "{name}"]\n'},
  'pom.xml': lambda name, text: {
    'pom.xml': f'<project><licenses><license><name>{name}</name></license></licenses>'
  },
  'composer.json': lambda name, text: {'composer.json': f'{{"license": ["{name}"]}}'},
  'AND': lambda name, text: {'package.json': f'{{"license": "MIT AND {name}"}}'},
  'choice among copyleft': lambda name, text: {
    'package.json': f'{{"license": "{name} OR GPL-3.0-only"}}'
  },
  'exception': lambda name, text: {
    'package.json': f'{{"license": "{name} WITH Classpath-exception-2.0"}}'
  },
  'README': lambda name, text: {
    'README.rst': f'A tool.\n\nLicense\n-------\n{text}\n', 'src.py': MIT
  },
}  # fmt: skip
PLACES = ('GNU_GPL.txt', 'license/gpl/LICENSE', 'docs/LICENSE', 'legal/COPYING')
for place in (*PLACES, 'NOTICE', 'EULA.txt'):
  DISGUISES[place] = lambda name, text, place=place: {
    'package.json': '{"license": "MIT"}', place: text
  }  # fmt: skip
DISGUISES['README.en.md'] = lambda name, text: {
  'package.json': '{"license": "MIT"}', 'README.en.md': f'A.\n\n## License\n\n{text}\n'
}  # fmt: skip


def test_notices_and_documents_permit_nothing():
  for path in ('NOTICE', 'EULA.txt', 'docs/LICENSE'):
    assert licences.detect({path: MIT}) == licences.UNKNOWN
    choice = {path: 'Licensed under MIT or GPL-3.0', 'COPYING': COPYLEFT['GPL-3.0']}
    assert licences.detect(choice).kind == 'copyleft'


@pytest.mark.parametrize('text', [
  '[' * 100_000, 'tool = 5', 'workspace = 3', 'workspace = [1]', 'a = ' + '9' * 9999,
  '{"license": "' + '(' * 100_000 + '"}', '"license":' + ' ' * 100_000,
  '<license>' * 11_000, '<license>' + '<' * 100_000 + '</license>', '-\n' * 50_000,
  '&#' + '9' * 100_000, ' mit or ' + '2 ' * 50_000,
  'mit 2 2 2 2 2 2 2 2 2 2 or ' * 4000,
  'SPDX-License-Identifier: ' + '(' * 100_000, 'MIT AND ' * 12_000,
], ids=lambda text: text[:20])  # fmt: skip
@pytest.mark.timeout(120)
def test_malicious_evidence(text):
  for path in ('package.json', 'Cargo.toml', 'pyproject.toml', 'pom.xml', 'LICENSE'):
    assert licences.detect({path: text}) is not None
  assert licences.of_file(text) is not None


@pytest.mark.parametrize('disguise', DISGUISES)
def test_copyleft_never_passes(disguise):
  for name, text in COPYLEFT.items():
    texts = DISGUISES[disguise](name, text)
    found = licences.detect(texts)
    assert found.kind == 'copyleft', (name, texts, found)


@pytest.mark.parametrize('name', COPYLEFT)
@pytest.mark.parametrize(
  'prefix', ['# ', '// ', ' * ', '-- ', '%% ', ';;; ', '" ', 'REM ']
)
def test_copyleft_notice_of_a_file(name, prefix):
  for text in (
    comment(f'Copyright 2001 A. B. {COPYLEFT[name]}', prefix) + '\n\nx = 1\n',
    f'#!/usr/bin/x\n{prefix}SPDX-License-Identifier: {name}\nx = 1\n',
  ):
    assert licences.of_file(text).kind == 'copyleft', text


@pytest.mark.parametrize('name', ['GPL-2.0', 'MPL-2.0', 'EPL-2.0', 'AGPL-3.0'])
def test_the_id_is_told(name):
  assert licences.detect({'COPYING': COPYLEFT[name]}).spdx_id == name


@pytest.mark.parametrize(
  'value',
  [
    'GPL', 'GPLv3', 'GPL-3.0+', 'gpl-3.0-or-later', 'GNU GPL v2', 'LGPLv2.1+', 'AGPL3',
    'GNU General Public License v3 or later (GPLv3+)', 'Mozilla Public License 2.0',
    'GPL (>= 2)', 'GPL-2 | GPL-3', 'GPL v2 or later, MIT', 'MIT/GPL', 'MIT, GPL-2.0',
    'MIT and GPL', '(MIT AND GPL-2.0)',
    'MIT AND (Apache-2.0 OR BSD-3-Clause) AND MPL-2.0',
    'UNLICENSED', 'Proprietary', 'Commercial', 'CC BY-NC 4.0', 'CC-BY-SA-3.0',
    'GPL-2.0-only WITH Linux-syscall-note', 'LicenseRef-GPL', 'EUPL-1.2', 'SSPL-1.0',
  ],
)  # fmt: skip
def test_names_that_are_copyleft(value):
  assert licences.detect({'setup.py': f'setup(license="{value}")'}).kind == 'copyleft'
  assert licences.detect({'setup.cfg': f'license = {value}\n'}).kind == 'copyleft'


@pytest.mark.parametrize(
  'value',
  [
    'MIT', 'mit', 'MIT License', 'The MIT License (MIT)', 'Apache 2.0', 'Apache-2.0',
    'Apache License, Version 2.0', 'BSD', 'BSD-3-Clause', 'New BSD License', 'ISC',
    '0BSD',
    'MIT OR Apache-2.0', 'MIT AND Zlib', 'GPL-3.0 OR MIT', '(MIT OR GPL-3.0-or-later)',
    'MIT or GPL-2.0', 'LGPL-2.1-or-later OR (MPL-2.0 OR BSD-2-Clause)', 'Unlicense',
    'Public Domain', 'MIT/X11', 'CC0-1.0', 'Apache-2.0 WITH LLVM-exception', 'zlib',
    'MIT OR (GPL-2.0 AND LGPL-2.1)', 'BSL-1.0', 'Python-2.0', 'WTFPL',
  ],
)  # fmt: skip
def test_names_that_are_permissive(value):
  found = licences.detect({'package.json': f'{{"license": "{value}"}}'})
  assert found.kind == 'permissive', found


@pytest.mark.parametrize('name', PERMISSIVE)
def test_permissive_texts(name):
  found = licences.detect(
    {'LICENSE': comment(f'Copyright (c) A. {PERMISSIVE[name]}', '')}
  )
  assert found == licences.Licence(name, 'permissive', 'LICENSE')
  found = licences.of_file(comment(PERMISSIVE[name], '# ') + '\n\nimport os\n')
  assert (found.spdx_id, found.kind) == (name, 'permissive')


@pytest.mark.parametrize(
  'texts',
  [
    {},
    {'README.md': 'Nothing is said of it.'},
    {'LICENSE': 'It is what the manual says it is.'},
    {'LICENSE': ''},
    {'package.json': '{"license": "SEE LICENSE IN LICENSE"}'},
    {'package.json': 'not json'},
    {'package.json': '[1, 2]'},
    {'pyproject.toml': '= broken'},
    {'src/main.py': MIT},
    {'license.py': MIT},
    {'vendor/LICENSE': MIT},
  ],
)
def test_unknown(texts):
  assert licences.detect(texts) == licences.UNKNOWN


@pytest.mark.parametrize(
  'text',
  [
    f'{BSD}\n\nAlternatively, this software may be distributed under the terms of '
    f'the GNU '
    'General Public License ("GPL") version 2.',
    'This program is licensed under the MIT license or the GNU General Public License.',
    'Licensed under either of the GPL version 2 or (at your option) any later '
    'version, or '
    'the MIT license.',
    'You may use this under the terms of the Apache license 2.0 or the GPL v3.',
  ],
)
def test_a_choice_in_words_is_permissive(text):
  assert licences.detect({'LICENSE': text}).kind == 'permissive'
  assert licences.of_file(comment(text, ' * ')).kind == 'permissive'
  # It says nothing of other licences in the same folder.
  assert licences.detect({'LICENSE': text, 'x/y': ''}).kind == 'permissive'
  other = {'LICENSE': text, 'COPYING': COPYLEFT['MPL-2.0']}
  assert licences.detect(other).kind == 'copyleft'


@pytest.mark.parametrize(
  'text',
  [
    f'{MIT} This program is free software; you can redistribute it and/or modify it '
    f'under '
    'the terms of the GNU General Public License.',
    'MIT License for the library; the programs are under the GPL version 2 or later.',
    'Dual licensed under the MIT and GPL licenses.',
    'Under the GPL version 2 or later. Apache code is included.',
    f'{MIT}\nThe Software may not be used for non-commercial purposes only.\n'
    'Commons Clause License Condition v1.0',
  ],
)
def test_no_choice(text):
  assert licences.detect({'LICENSE': text}).kind == 'copyleft'


def test_a_choice_in_the_metadata_covers_its_files():
  texts = {
    'COPYING': COPYLEFT['GPL-2.0'],
    'LICENSE-MIT': MIT,
    'Cargo.toml': '[package]\nlicense = "MIT/GPL-2.0"\n',
  }
  assert licences.detect(texts).kind == 'permissive'
  texts['NOTICE-LICENSE'] = COPYLEFT['EPL-2.0']
  assert licences.detect(texts).kind == 'copyleft'
  del texts['NOTICE-LICENSE'], texts['Cargo.toml']
  assert licences.detect(texts).kind == 'copyleft'


def test_words_about_the_gpl_are_no_licence():
  text = (
    f'{BSD} GPL-compatible does not mean that it is under the GPL. All Python '
    f'licenses, '
    'unlike the GPL, let you distribute a modified version.'
  ).replace('does not mean that it is under the GPL', 'it is')
  assert licences.detect({'LICENSE': text}).kind == 'permissive'


STRANGE = 'Whoever uses this shall sing, and give the source to all who hear it. ' * 6


def test_a_licence_that_is_not_recognised():
  expected = licences.Licence(where='COPYING')
  assert licences.detect({'COPYING': STRANGE}) == expected
  assert licences.detect({'COPYING': STRANGE, 'LICENSE': MIT}) == expected
  assert licences.detect({'COPYRIGHT': 'A. B., C. D.', 'LICENSE': MIT}).spdx_id == 'MIT'


def test_what_texts_are_taken_for_is_copyleft():
  for name, *_ in licence_texts._COPYLEFT_TEXTS:
    assert licence_texts.kind_of(name) == 'copyleft' or name.startswith('LicenseRef')
  for name, _ in licence_texts._PERMISSIVE_TEXTS + licence_texts._PERMISSIVE_NAMES:
    assert licence_texts.kind_of(name) == 'permissive', name


def test_readme_counts_little():
  assert (
    licences.detect({'README.md': '# A\n\n## License\n\nMIT\n'}).kind == 'permissive'
  )
  assert (
    licences.detect(
      {'README.md': 'This is released under the GPLv3.', 'LICENSE': MIT}
    ).kind
    == 'copyleft'
  )
  assert (
    licences.detect({'README.md': 'Works with GPL programs.', 'LICENSE': MIT}).kind
    == 'permissive'
  )


def test_the_lists_are_arguments():
  strict = licences.Rules(permissive=('MIT',))
  assert licences.detect({'LICENSE': APACHE}, strict).kind == 'unknown'
  lax = licences.Rules(
    copyleft=tuple(p for p in licences.COPYLEFT if p != 'MPL'),
    permissive=(*licences.PERMISSIVE, 'MPL'),
  )
  found = licences.detect({'package.json': '{"license": "MPL-2.0"}'}, lax)
  assert found.kind == 'permissive'


@pytest.mark.parametrize(
  'path,expected',
  [
    ('LICENSE', True), ('License.txt', True), ('COPYING.LESSER', True),
    ('UNLICENSE', True),
    ('MIT-LICENSE', True), ('LICENCE.md', True), ('LICENSES/MPL-2.0.txt', True),
    ('gpl-3.0.txt', True), ('package.json', True), ('x.gemspec', True),
    ('README', True),
    ('license.py', False), ('src/LICENSE', False), ('main.c', False),
    ('licensing.go', False),
  ],
)  # fmt: skip
def test_which_files_are_looked_at(path, expected):
  assert licences.is_evidence(path) == expected

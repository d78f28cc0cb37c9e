"""Which licence a text or a name speaks of: phrases and SPDX ids, as data.

Texts are matched after `normalised`, which leaves words only: comment signs, line
breaks, markup, case and punctuation make no difference, and 'licence' is 'license'.
"""

import functools
import html
import re
import unicodedata

# SPDX ids that begin so. Copyleft of any strength, and what forbids a use: never kept.
COPYLEFT = (
  'AGPL', 'GPL', 'LGPL', 'LGPLLR', 'GFDL', 'SMAIL-GPL', 'MPL', 'NPL', 'EPL', 'CPL',
  'IPL', 'CDDL', 'EUPL', 'OSL', 'NPOSL', 'RPL', 'CECILL-1', 'CECILL-2', 'CECILL-C',
  'CC-BY-SA', 'CC-SA', 'CC-BY-NC', 'CC-BY-ND', 'CC-NC', 'SSPL', 'BUSL', 'Elastic',
  'PolyForm', 'Parity', 'Hippocratic', 'QPL', 'Sleepycat', 'OFL', 'ODbL', 'APSL', 'APL',
  'CPAL', 'CPOL', 'CAL', 'CATOSL', 'CUA-OPL', 'ErlPL', 'Frameworx', 'FreeImage',
  'IPA', 'Interbase', 'LiLiQ-R', 'LPL', 'MS-RL', 'Motosoto', 'NASA', 'NGPL', 'NOSL',
  'Nokia', 'OCLC', 'OCCT-PL', 'OGTSL', 'OPL', 'OPUBL', 'OSET-PL', 'RPSL', 'RHeCos',
  'eCos', 'RSCPL', 'SISSL', 'SPL', 'SimPL', 'SugarCRM', 'TAPR-OHL', 'TGPPL', 'TMate',
  'TPL', 'TOSL', 'VOSTROM', 'Watcom', 'YPL', 'Zimbra', 'copyleft-next', 'gSOAP',
  'wxWindows', 'CERN-OHL-1', 'CERN-OHL-S', 'CERN-OHL-W', 'CDLA-Sharing', 'Aladdin',
  'Arphic', 'BSD-Protection', 'BitTorrent', 'D-FSL', 'EFL-1', 'DSL',
  'Linux-man-pages-copyleft', 'LAL', 'Latex2e', 'LPPL', 'MMIXware', 'Ubuntu-font',
  'JSON', 'Commons-Clause', 'LicenseRef-Proprietary', 'UNLICENSED',
  'SGI-B-1', 'SNIA', 'OLFL', 'OLDAP-1', 'PPL', 'iMatix', 'CDL', 'Sendmail', 'TPDL',
    'Xerox',
)  # fmt: skip
# SPDX ids that begin so, unless they are copyleft by the list above.
PERMISSIVE = (
  'MIT', '0BSD', 'BSD', 'Apache', 'ISC', 'Unlicense', 'Zlib', 'zlib', 'BSL-1.0',
  'CC0', 'CC-BY-1', 'CC-BY-2', 'CC-BY-3', 'CC-BY-4', 'CC-PDDC', 'CC-PDM', 'WTFPL',
  'PSF', 'Python', 'CNRI', 'PostgreSQL', 'NCSA', 'AFL', 'MS-PL', 'ECL', 'UPL',
  'BlueOak', 'MulanPSL', 'HPND', 'X11', 'OpenSSL', 'PHP', 'ZPL', 'W3C', 'Beerware',
  'Artistic-2.0', 'CECILL-B', 'EFL-2', 'FTL', 'Fair', 'FSFAP', 'FSFUL', 'ICU',
  'IJG', 'ImageMagick', 'Intel', 'Libpng', 'libpng', 'libtiff', 'NTP', 'Naumen',
  'OLDAP-2', 'PDDL', 'Ruby', 'SMLNJ', 'StandardML-NJ', 'TCL', 'Unicode', 'VSL',
  'Vim-P', 'Xnet', 'curl', 'bzip2', 'JasPer', 'LiLiQ-P', 'CDLA-Permissive', 'NAIST',
  'CERN-OHL-P', 'blessing', 'SAX-PD', 'LicenseRef-Public-Domain', 'Zend', 'EUDatagrid',
  'SGI-B-2.0', 'MirOS', 'Minpack', 'Spencer', 'TU-Berlin', 'Boehm-GC', 'Entessa',
)  # fmt: skip

_TAG = re.compile(r'</?[a-z][^<>]{0,200}>')
_WORD_COMMENT = re.compile(r'^[ \t]*(?:rem|dnl)[ \t]', re.MULTILINE)
# A word hyphenated at a line's end; a run with no word behind it is taken whole too,
# lest it be searched again from each of its lines.
_HYPHEN = re.compile(r'-\n[\s#*/;%!"\'|.:>-]*+([a-z])?')
_HUGE_NUMBER = re.compile('&#[0-9]{8,};?')  # Python reads no thousands of digits
_OTHER = re.compile(r'[^a-z0-9+]+')


def normalised(text: str) -> str:
  """The words of a text, in lower case, with one space around each."""
  if not text.isascii():
    text = unicodedata.normalize('NFKD', text)
    text = text.encode('ascii', 'ignore').decode()
  text = _WORD_COMMENT.sub('', text.lower())
  if '<' in text:
    text = _TAG.sub(' ', text)
  if '&' in text:
    text = html.unescape(_HUGE_NUMBER.sub(' ', text)).replace('\xa0', ' ')
  text = _HYPHEN.sub(lambda match: match[1] or match[0], text)
  text = text.replace('licence', 'license')
  return f' {_OTHER.sub(" ", text).strip()} '


# What texts of licences and notices say, as regular expressions over `normalised`
# text: (SPDX id, family, pattern). A choice between licences covers whole families.
_COPYLEFT_TEXTS = (
  ('AGPL', 'GNU',
    r'(?:gnu )?affero (?:general )?public|gnu affero|gnu agpl|agpl(?: |v\d)',
  ),
  ('LGPL', 'GNU',
    r'(?:gnu )?(?:lesser|library) (?:gnu )?general public|gnu lesser|gnu lgpl|'
    r'lgpl(?: |v\d)',
  ),
  ('GFDL', 'GNU', r'gnu free documentation|gfdl'),
  ('GPL', 'GNU',
    r'gnu (?:general )?public|general public license|gnu gpl|gpl(?: |v\d)|'
    r'gnu license|gnu copyleft|under (?:the )?(?:terms of )?(?:the )?gnu',
  ),
  ('MPL', 'MPL', r'mozilla public|mpl(?: v?\d|v\d)|netscape public license'),
  ('EPL', 'EPL', r'eclipse public|epl(?: v?\d|v\d)'),
  ('CPL-1.0', 'CPL', r'common public license'),
  ('IPL-1.0', 'CPL', r'ibm public license'),
  ('CDDL', 'CDDL', r'common development and distribution license|cddl(?: |v\d)'),
  ('EUPL', 'EUPL', r'european union public|eupl(?: |v\d)'),
  ('OSL', 'OSL', r'open software license'),
  ('CECILL-C', 'CECILL', r'cecill c '),
  ('CECILL-2.1', 'CECILL', r'cecill(?! b )(?: |v\d)|cea cnrs inria'),
  ('CC-BY-NC', 'CC',
    r'attribution ?(?:4 0 )?non ?commercial|cc by nc|'
    r'creativecommons org licenses by nc|licensed work for non ?commercial',
  ),
  ('CC-BY-SA', 'CC',
    r'attribution ?(?:\d \d )?share ?alike|cc by sa|'
    r'creativecommons org licenses by sa|creative commons share ?alike|cc sa ',
  ),
  ('CC-BY-ND', 'CC',
    r'attribution ?no ?deriv|cc by nd|creativecommons org licenses by nd',
  ),
  ('SSPL-1.0', 'SSPL', r'server side public license|sspl'),
  ('BUSL-1.1', 'BUSL', r'business source license|busl '),
  ('Elastic-2.0', 'Elastic', r'elastic license'),
  ('PolyForm', 'PolyForm',
    r'polyform \w+ license|'
    r'polyform (?:non ?commercial|small business|strict|shield|perimeter)',
  ),
  ('Parity', 'Parity', r'parity public license'),
  ('Commons-Clause', 'Clause', r'commons clause'),
  ('Hippocratic', 'Hippocratic', r'hippocratic license|do no harm license'),
  ('QPL-1.0', 'QPL', r' q public license'),
  ('Sleepycat', 'Sleepycat',
    r'must be accompanied by information on how to obtain complete source code|'
    r'sleepycat license',
  ),
  ('OFL-1.1', 'OFL', r'sil open font license'),
  ('ODbL-1.0', 'ODbL', r'open database license|odbl'),
  ('APSL', 'APSL', r'apple public source license'),
  ('CPAL-1.0', 'CPAL', r'common public attribution license'),
  ('MS-RL', 'MS-RL', r'microsoft reciprocal license'),
  ('RPL-1.5', 'RPL', r'reciprocal public license'),
  ('CAL-1.0', 'CAL', r'cryptographic autonomy license'),
  ('LiLiQ-R', 'LiLiQ',
    r'licence libre du quebec reciprocite|license libre du quebec reciprocite|'
    r'liliq r',
  ),
  ('LPPL', 'LPPL', r'latex project public license|lppl'),
  ('CERN-OHL-S-2.0', 'CERN',
    r'cern open hardware license(?! version 2 permissive)|cern ohl (?:s|w|1|v1)',
  ),
  ('copyleft-next', 'copyleft-next', r'copyleft next'),
  ('DSL', 'DSL', r'design science license'),
  ('LAL-1.3', 'LAL', r'free art license|license art libre'),
  ('JSON', 'JSON', r'shall be used for good not evil'),
  ('LicenseRef-Copyleft', 'other',
    r'(?:adaptive|arphic|cua office|erlang|frameworx open|lucent|motosoto|nethack '
    r'general|nokia open source|oclc research|open public|osset|real ?networks '
    r'public source|red hat ecos|ricoh source code|simple public|sun industry '
    r'standards source|sun public|sugarcrm public|tapr open hardware|transitive '
    r'grace period public|watcom open source|open watcom public|yahoo public|'
    r'zimbra public|gsoap public|jabber open source|interbase public|inprise '
    r'public|aladdin free public|bittorrent open source|phython public|open '
    r'publication|code project open|apache with commons|community data license '
    r'agreement sharing|digital peer|sgi free software license b version 1|'
    r'vostrom public|tmate open source|open group test suite|eiffel forum license '
    r'version 1|catosl|computer associates trusted open|open cascade technology '
    r'public|peer production|olfl|ubuntu font|reciprocal|free ?image public|'
    r'openldap public license version 1|openlogic|ipa font|nethack)(?: \w+){0,3} '
    r'licen[sc]e|nasa open source agreement|open content license',
  ),
  ('LicenseRef-Copyleft', 'other',
    r'weitergabe unter gleichen|nicht kommerziell|keine (?:kommerzielle|bearbeitung)|'
    r'utilisation commerciale|partage a l identique|share ?alike 1 0|'
    r'permission notice identical to this one|'
    r'(?:is|be) licensed as a whole at no charge to all third parties|'
    r'derivative works? (?:must|shall) (?:also )?be (?:licensed|distributed|'
    r'released) under (?:the )?(?:same|this)|under the terms of this same license|'
    r'no (?:additional )?(?:binary )?redistribution without source',
  ),
  ('LicenseRef-Proprietary', 'other',
    r'(?<!commercial and )(?<!commercial or )non ?commercial (?:use|purposes?|'
    r'research)|'
    r'not (?:for|licensed or intended for)(?: use in)?(?: the)?(?: \w+)? military|'
    r'sendmail (?:open source )?license|for commercial use (?:contact|please)|'
    r'not for commercial|'
    r'(?:may|must|can) not be (?:sold|used (?:for|in) (?:any )?commercial)|'
    r'proprietary and confidential|unauthorized copying of this|'
    r'commercial (?:use|distribution|redistribution) (?:is|are) (?:prohibited|not '
    r'permitted|forbidden)|'
    r'(?:academic|research|personal|educational)(?: \w+){0,3} (?:use|purposes?) '
    r'only|licensed for (?:military|use in the design)',
  ),
)  # fmt: skip
_PERMISSIVE_TEXTS = (
  ('Apache-2.0',
    r'apache (?:software )?licen[sc]e(?: version| v)? ?2|licensed under the apache',
  ),
  ('MIT',
    r'permission is hereby granted free of charge to any person obtaining a copy',
  ),
  ('BSD-4-Clause',
    r'redistribution and use in source and binary forms.{0,900} all advertising '
    r'materials mentioning',
  ),
  ('BSD-3-Clause',
    r'redistribution and use in source and binary forms.{0,900} (?:may not|must '
    r'not|nor the|not) be? ?(?:used to endorse|names? of)',
  ),
  ('BSD-2-Clause',
    r'redistributions? (?:and use )?(?:in|of) source (?:and binary forms|code)(?: '
    r'with or without modification)',
  ),
  ('ISC',
    r'permission to use copy modify and or distribute this software for any '
    r'purpose with or without fee is hereby granted',
  ),
  ('ISC',
    r'permission to use copy modify and distribute this software for any purpose '
    r'with or without fee is hereby granted',
  ),
  ('PostgreSQL',
    r'permission to use copy modify and distribute this software and its '
    r'documentation for any purpose without fee and without a written agreement',
  ),
  ('HPND',
    r'permission to use copy modify(?: and)? distribute(?: and sell)? this '
    r'software and its documentation(?: \w+){0,12} is hereby granted',
  ),
  ('MIT-CMU', r'by obtaining using and or copying this software'),
  ('TCL',
    r'authors hereby grant permission to use copy modify distribute and license '
    r'this software',
  ),
  ('Libpng',
    r'permission is hereby granted to use copy modify and distribute this source '
    r'code or portions hereof',
  ),
  ('FTL', r'freetype project license'),
  ('OLDAP-2.8', r'openldap public license version 2'),
  ('Unlicense',
    r'this is free and unencumbered software released into the public domain',
  ),
  ('Zlib',
    r'permission is granted to anyone to use this software for any purpose '
    r'including commercial applications',
  ),
  ('BSL-1.0', r'boost software license'),
  ('CC0-1.0',
    r'cc0 1 0|creative commons (?:cc0|zero)|creativecommons org publicdomain zero',
  ),
  ('CC-BY-4.0',
    r'creative commons attribution(?: license)?(?: v)? ?\d 0|'
    r'creativecommons org licenses by \d|legal code attribution \d',
  ),
  ('WTFPL', r'do what the fuck you want to'),
  ('PSF-2.0', r'python software foundation license|psf license agreement'),
  ('NCSA', r'ncsa open source license'),
  ('AFL-3.0', r'academic free license'),
  ('MS-PL', r'microsoft public license'),
  ('ECL-2.0', r'educational community license'),
  ('UPL-1.0', r'universal permissive license'),
  ('BlueOak-1.0.0', r'blue oak model license'),
  ('MulanPSL-2.0', r'mulan (?:permissive software license|psl)|mulanpsl'),
  ('CECILL-B', r'cecill b '),
  ('Artistic-2.0', r'artistic license(?: version)? 2'),
  ('PHP-3.01', r'php license version 3'),
  ('ZPL-2.1', r'zope public license'),
  ('W3C', r'w3c software notice and license'),
  ('Beerware', r'beer ?ware license'),
  ('FSFAP',
    r'copying and distribution of this file with or without modification are '
    r'permitted in any medium without royalty',
  ),
  ('LicenseRef-Public-Domain',
    r'(?:released|placed|dedicated|put) (?:in|into|to) the public domain|'
    r'this (?:\w+ )?is (?:hereby )?in the public domain',
  ),
)  # fmt: skip
# What else grants and names say: enough where a field or a sentence names a licence.
_PERMISSIVE_NAMES = (
  ('Apache-2.0', r'apache'),
  ('MIT-0', r'mit 0 |mit no attribution'),
  ('MIT', r'mit |expat|x11'),
  ('0BSD', r'0bsd|bsd zero clause|zero clause bsd'),
  ('BSD-3-Clause',
    r'bsd(?: style)? |new bsd|modified bsd|simplified bsd|3 clause|bsd\d? |'
    r'2 clause',
  ),
  ('ISC', r'isc |iscl '),
  ('Unlicense', r'unlicense |the unlicense'),
  ('Zlib', r'zlib|libpng'),
  ('BSL-1.0', r'boost|bsl 1 0'),
  ('CC0-1.0', r'cc0|creative commons zero'),
  ('CC-BY-4.0', r'cc by \d'),
  ('WTFPL', r'wtfpl'),
  ('PSF-2.0', r'python software foundation|psf |python license'),
  ('NCSA', r'ncsa'),
  ('PostgreSQL', r'postgresql'),
  ('MS-PL', r'ms pl '),
  ('UPL-1.0', r'upl '),
  ('LicenseRef-Public-Domain', r'public domain'),
)  # fmt: skip
_PROPRIETARY_NAMES = (
  r'unlicensed |proprietary|commercial|all rights reserved|non ?commercial'
)

# Permissive texts that speak of the GPL without being under it.
_HARMLESS = re.compile(
  r'unlike the gpl|(?:non )?gpl (?:in)?compatib\w+|compatib\w+ (?:licenses? )?with the '
  r'(?:gnu )?(?:general public license|gpl)|not (?:under|covered by|subject to) the '
  r'(?:gnu )?(?:gpl|general public license)|including the gnu public license'
  r'|previously distributed under the gnu general public license gpl'
  r'|with other software that is released under the gpl'
  r'|t mean that we re distributing python under the gpl'
)


@functools.cache
def _any(which: str) -> re.Pattern:
  """One search that rules most texts out."""
  tables = {
    'copyleft': [row[2] for row in _COPYLEFT_TEXTS],
    'permissive': [row[1] for row in _PERMISSIVE_TEXTS],
  }
  alternatives = '|'.join(pattern.lstrip() for pattern in tables[which])
  return re.compile(f' (?:{alternatives})')  # words begin after a space: much faster


@functools.cache
def _begins_with(prefixes: tuple[str, ...]) -> re.Pattern:
  names = '|'.join(map(re.escape, prefixes))
  return re.compile(rf'(?:{names})(?:$|[-_v.+\d ])', re.IGNORECASE)


def kind_of(spdx_id: str, copyleft=COPYLEFT, permissive=PERMISSIVE) -> str:
  """'copyleft', 'permissive' or 'unknown', by the beginning of an SPDX id."""
  if _begins_with(tuple(copyleft)).match(spdx_id):
    return 'copyleft'
  known = _begins_with(tuple(permissive)).match(spdx_id)
  return 'permissive' if known else 'unknown'


def copyleft_in(words: str) -> list[tuple[str, str]]:
  """The copyleft licences that `normalised` words speak of: (SPDX id, family)."""
  words = _HARMLESS.sub(' ', words)
  if not _any('copyleft').search(words):
    return []
  matches = []
  for number, (name, family, pattern) in enumerate(_COPYLEFT_TEXTS):
    match = re.search(f' (?:{pattern.lstrip()})', words)
    if match:
      after = words[match.end() :][:120]
      matches.append((match.start(), number, _versioned(name, after), family))
  found: dict[str, str] = {}  # of each family, what is named first
  for _, _, name, family in sorted(matches):
    found.setdefault(family, name)
  return [(name, family) for family, name in found.items()]


_DEFAULT_VERSIONS = {
  'GPL': '', 'LGPL': '', 'AGPL': '3.0', 'GFDL': '', 'MPL': '2.0', 'EPL': '',
  'CDDL': '1.0', 'EUPL': '1.2', 'OSL': '3.0',
}  # fmt: skip


def _versioned(name: str, after: str) -> str:
  if name not in _DEFAULT_VERSIONS:
    return name
  match = re.search(r'\b(?:v|version)? ?([1-3])(?: (\d))?\b', after)
  if match:
    return f'{name}-{match[1]}.{match[2] or 0}'
  default = _DEFAULT_VERSIONS[name]
  return f'{name}-{default}' if default else name


def permissive_in(words: str) -> list[str]:
  """SPDX ids of the permissive licences whose text or full name the words hold."""
  if not _any('permissive').search(words):
    return []
  return _first_of_each(_PERMISSIVE_TEXTS, words)


def _first_of_each(table, words) -> list[str]:
  found, kinds = [], set()
  for name, pattern in table:
    kind = name.split('-')[0]
    if kind not in kinds and re.search(f' (?:{pattern.lstrip()})', words):
      kinds.add(kind)
      found.append(name)
  return found


def named_in(words: str) -> list[str]:
  """SPDX ids of all licences a short phrase names, the copyleft ones first."""
  found = [name for name, _ in copyleft_in(words)]
  found += permissive_in(words) or _first_of_each(_PERMISSIVE_NAMES, words)
  if not found and re.search(f' (?:{_PROPRIETARY_NAMES})', words):
    found = ['LicenseRef-Proprietary']
  return found

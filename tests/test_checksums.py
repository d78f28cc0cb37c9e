"""Seals on folders: every byte counts, whatever block it is in."""

import hashlib
import json

import pytest

from palm_t5x import checksums


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(checksums, 'BLOCK', 8)
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep' / 'long').write_bytes(bytes(range(30)))
  (tmp_path / 'empty').write_bytes(b'')
  checksums.write(tmp_path)
  return tmp_path


def test_digests_are_blake2b_over_those_of_the_blocks(folder):
  data = bytes(range(30))
  short = lambda data: hashlib.blake2b(data, digest_size=16)
  whole = short(b''.join(short(data[i : i + 8]).digest() for i in range(0, 30, 8)))
  recorded = json.loads((folder / checksums.NAME).read_text())
  assert recorded['deep/long'] == whole.hexdigest()
  assert sorted(recorded) == ['deep/long', 'empty']
  assert checksums.damage(folder) is None


@pytest.mark.parametrize('place', range(0, 30, 3))
def test_any_changed_byte_is_damage(folder, place):
  data = bytearray((folder / 'deep' / 'long').read_bytes())
  data[place] ^= 1
  (folder / 'deep' / 'long').write_bytes(bytes(data))
  assert 'deep/long has changed' in checksums.damage(folder)


def test_longer_shorter_missing_and_strange_files_are_damage(folder):
  (folder / 'empty').write_bytes(b'x')
  assert 'empty has changed' in checksums.damage(folder)
  (folder / 'empty').unlink()
  assert 'empty is missing' in checksums.damage(folder)
  (folder / 'empty').write_bytes(b'')
  (folder / 'new').write_bytes(b'')
  assert 'new is in no' in checksums.damage(folder)


@pytest.mark.parametrize('text', ['', '[]', '{"a', '3'])
def test_an_unreadable_seal_is_damage(folder, text):
  (folder / checksums.NAME).write_text(text)
  assert 'unreadable' in checksums.damage(folder)

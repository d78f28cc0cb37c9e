"""The Gin files of the paper's sub-corpora, through the command."""

import json
import os
import pathlib

import pytest
import seqio
from palm_t5x.mixtures import pretrain
from runs import t5x
from test_bad_input import no_file_beyond

GIN = pathlib.Path(__file__).resolve().parent.parent / 'gin/corpus'
NAMES = sorted(path.stem for path in GIN.glob('*.gin') if path.stem != 'palm_256k')


def test_there_is_one_for_each_sub_corpus_of_the_paper():
  assert sorted({*pretrain.PALM_780B, *pretrain.PALM_REFRESHED}) == NAMES
  for name in NAMES:
    assert seqio.TaskRegistry.get(name).splits == ('train', 'validation')


@pytest.mark.parametrize('name', NAMES)
def test_it_is_complete(name):
  done = t5x('corpus', f'--gin_file=corpus/{name}.gin', '--data_dir=raw', '--dry_run')
  assert done.code == 0, done.err
  assert f"name = '{name}'" in done.out.replace('\\\n', '')


@pytest.mark.parametrize('name', ['wikipedia', 'books'])
def test_tfds_takes_the_place_of_files(name, tmp_path):
  """The reader is asked; there is no such dataset on this machine."""
  done = t5x(
    *('corpus', f'--gin_file=corpus/{name}.gin', f'--data_dir={tmp_path}'),
    *('--gin.READER=@readers.Tfds()', '--gin.readers.Tfds.name=wiki40b/en:1.3.0'),
    f'--gin.CORPUS_DIR={tmp_path}/corpora',
  )
  assert done.code == 2 and 'wiki40b/en:1.3.0 is not prepared' in done.err


def test_report_and_what_is_missing(tmp_path):
  (tmp_path / 'raw').mkdir()
  text = 'A piece of news that is long enough to be kept, about a harbour. ' * 9
  lines = [json.dumps({'text': f'{i} {text}'}) for i in range(30)]
  (tmp_path / 'raw/a.jsonl').write_text('\n'.join(lines))
  folder = f'--gin.CORPUS_DIR={tmp_path}/corpora'
  nothing = t5x('corpus', '--report', folder)
  assert nothing.code == 2 and 'There is no sub-corpora' in nothing.err
  made = t5x(
    *('corpus', '--gin_file=corpus/news.gin', f'--data_dir={tmp_path}/raw', folder),
    *('--gin.WORKERS=1', '--gin.VALIDATION_SHARE=0.2'),
  )
  assert made.code == 0, made.err
  done = t5x('corpus', '--report', folder)
  assert done.code == 0, done.err
  assert [line.split()[:2] for line in done.out.splitlines() if 'news' in line] == [
    ['news', '30']
  ]
  values = json.loads((tmp_path / 'corpora/report/report.json').read_text())
  assert values['tally']['total']['documents'] == 30
  assert values['tally']['language.documents'] == {'en': 30}
  report = (tmp_path / 'corpora/report/report.md').read_text()
  assert '| en | 100.000 % | 77.984 % |' in report
  assert '| ceb | not distinguishable |' in report and '| ceb | 0' not in report
  assert (tmp_path / 'corpora/report/lengths.png').stat().st_size > 5_000
  one = t5x('corpus', '--gin_file=corpus/books.gin', '--report', folder)
  assert one.code == 2 and 'no finished sub-corpus books' in one.err


def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path):
  (tmp_path / 'raw').mkdir()
  lines = [json.dumps({'text': f'{i} ' + os.urandom(300).hex()}) for i in range(300)]
  (tmp_path / 'raw/a.jsonl').write_text('\n'.join(lines))
  words = (
    *('corpus', '--gin_file=corpus/arxiv_math.gin', f'--data_dir={tmp_path}/raw'),
    *(f'--gin.CORPUS_DIR={tmp_path}/corpora', '--gin.WORKERS=1'),
  )
  with no_file_beyond(30_000):
    done = t5x(*words)
  assert done.code == 1 and 'the disk is full' in done.err.splitlines()[-1]
  assert not (tmp_path / 'corpora/arxiv_math/manifest.json').exists()
  assert not list((tmp_path / 'corpora').rglob('*.tmp'))
  assert t5x(*words).code == 0
  assert (tmp_path / 'corpora/arxiv_math/manifest.json').exists()

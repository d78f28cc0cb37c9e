"""`t5x complete`, `describe` and `tasks`, through the command."""

import io
import os
import re
import socket
import sys

import pytest
import runs

GREEDY = ('TEMPERATURE=0.0', 'TOPK=0', 'MAX_NEW_TOKENS=12')


@pytest.fixture(scope='module')
def complete(workspace, straight):
  """Runs `t5x complete WORDS` with the tiny run."""

  def run(*words, bindings=GREEDY, code=0):
    done = runs.here(workspace, 'complete', straight[0], *bindings, words=words)
    assert done.code == code, done.err
    return done

  return run


# --- complete.


def test_streaming_prints_what_sampling_at_once_gives(complete):
  streamed = complete('The harbour').out
  listed = complete('The harbour', bindings=(*GREEDY, 'NUM_SAMPLES=2')).out
  first, second = re.split(r'--- \d\n', listed)[1:]
  assert streamed.startswith('The harbour') and len(streamed) > len('The harbour') + 2
  assert streamed == first == second, 'greedy samples are all the same'


def test_words_are_one_prompt_and_stdin_another_way_to_give_it(complete, monkeypatch):
  expected = complete('The harbour').out
  assert complete('The', 'harbour').out == expected
  monkeypatch.setattr(sys, 'stdin', io.StringIO('The harbour'))
  assert complete('-').out == expected


def test_samples_differ_and_repeat_by_seed(complete):
  bindings = ('TEMPERATURE=1.0', 'TOPK=0', 'MAX_NEW_TOKENS=12', 'NUM_SAMPLES=3')
  first = complete('A', bindings=bindings).out
  assert len(set(re.split(r'--- \d\n', first)[1:])) == 3
  assert complete('A', bindings=bindings).out == first
  assert complete('A', bindings=(*bindings, 'SAMPLE_SEED=1')).out != first


def test_stop_strings_end_a_stream(complete):
  whole = complete('The harbour').out.removesuffix('\n')
  stop = whole[-3:-1]
  cut = complete('The harbour', bindings=(*GREEDY, f'STOP=({stop!r},)')).out
  text = whole.removeprefix('The harbour').partition(stop)[0]
  assert cut == f'The harbour{text}\n'


def test_a_run_needs_nothing_outside_its_folder(workspace, straight, complete):
  """The vocabulary's own file is gone: the run's copy serves."""
  expected = complete('The harbour').out
  done = complete('The harbour', bindings=(*GREEDY, 'VOCABULARY_PATH=gone.model'))
  assert done.out == expected


def test_bytes_that_are_no_text(complete, monkeypatch):
  expected = complete('caf\ufffd').out
  assert complete('caf\udce9').out == expected  # as the system hands over b'caf\xe9'
  latin = io.TextIOWrapper(io.BytesIO(b'caf\xe9'), encoding='ascii')
  monkeypatch.setattr(sys, 'stdin', latin)
  assert complete('-').out == expected


@pytest.mark.parametrize('words', [(), ('',), ('-',)])
def test_no_prompt(complete, monkeypatch, words):
  monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
  done = complete(*words, code=2)
  assert done.error.startswith('no prompt') and not done.out


# --- describe.

# Paper, Table 1; tokens in billions by its schedule of batch sizes; FLOPs of Table 22,
# which reckons with 780 B tokens for 540B.
PAPER = {
  'palm_8b': ('8.63 B', '780', 4.29e22),
  'palm_62b': ('62.50 B', '795', 3.08e23),
  'palm_540b': ('540.35 B', '775.9', 2.56e24 * 775.9 / 780),
}


@pytest.fixture
def alone(tmp_path, monkeypatch):
  """An empty folder, no home, no network."""

  def refuse(*args, **kwargs):
    raise AssertionError('the network was used')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  monkeypatch.setenv('HOME', str(tmp_path / 'nowhere'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'nowhere'))
  monkeypatch.chdir(tmp_path)
  yield tmp_path
  assert not os.listdir(tmp_path)


def facts(out):
  """`name    value` lines as a dict."""
  lines = out.partition('\n\n')[0].splitlines()  # the table of the mixture follows
  return dict(re.split(r'\s{2,}', line, maxsplit=1) for line in lines)


@pytest.mark.parametrize('name', PAPER)
def test_describe_says_what_the_paper_says(alone, name):
  done = runs.t5x('describe', f'--gin_file={name}.gin')
  assert done.code == 0, done.err
  parameters, tokens, flops = PAPER[name]
  found = facts(done.out)
  assert found['parameters (as the paper counts)'].endswith(f'({parameters})')
  count = int(found['training tokens'].split()[0].replace(',', ''))
  assert f'{count / 1e9:.1f}'.removesuffix('.0') == tokens
  assert float(found['training FLOPs']) == pytest.approx(flops, rel=3e-3)
  assert found['sequence length (tokens)'] == '2,048'


def test_describe_of_540b_names_its_mesh_and_schedule(alone):
  found = facts(runs.t5x('describe', '--gin_file=palm_540b.gin').out)
  assert found['mesh'].endswith('= 6144 devices')
  for size in ('512', '1024', '2048'):
    assert size in found['batch size (sequences)']
  assert found['carbon estimate (tCO2e)'] == '271.43'  # paper, App. B


def test_describe_follows_what_is_bound(alone):
  model = ('--gin_file=palm_8b.gin', '--gin.network.TransformerConfig.num_layers=1')
  one = facts(runs.t5x('describe', *model).out)
  two = facts(runs.t5x('describe', *model[:1], f'{model[1][:-1]}2').out)
  name = 'parameters (as the paper counts)'
  layer, table = (
    int(two[name].split()[0].replace(',', ''))
    - int(one[name].split()[0].replace(',', '')),
    4096 * 256_000,
  )
  # Queries and output 16 x 256, one key and value head, three 4d matrices.
  assert layer == 4096 * (2 * 16 * 256 + 2 * 256 + 3 * 4 * 4096)
  assert int(one[name].split()[0].replace(',', '')) == table + layer


# --- tasks.


def test_tasks_lists_the_registry(workspace):
  done = runs.t5x('tasks', f'--gin_file={workspace / "tiny.gin"}')
  assert done.code == 0, done.err
  assert re.search(r'fixture_mixture +fixture_code 30 %, fixture_prose 70 %', done.out)
  assert re.search(r'fixture_sums +inputs, targets +accuracy', done.out)
  assert re.search(r'fixture_text +targets +loss', done.out)
  assert 'palm_tiny' in done.out and 'text_files' in done.out


def test_tasks_shows_an_example(workspace):
  done = runs.t5x('tasks', 'fixture_sums', f'--gin_file={workspace / "tiny.gin"}')
  assert done.code == 0, done.err
  assert 'fixture_sums: splits train, validation' in done.out
  assert "inputs: '0 + 0 ='" in done.out and "targets: ' 0'" in done.out


def test_tasks_of_an_unknown_name(workspace):
  done = runs.t5x('tasks', 'fixture_sum', f'--gin_file={workspace / "tiny.gin"}')
  assert done.code == 2 and 'Did you mean fixture_sums' in done.error

"""`t5x infer`: what it writes, against a NumPy forward pass; shards, kills, resumption.

Greedy predictions and scores are recomputed in float64 from the arrays on disk.
"""

import signal
import subprocess

import fixture_tasks
import numpy as np
import palm_reference
import pytest
import runs

LENGTHS = "INFER_TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 6}"
SUMS = ('INFER_MIXTURE_OR_TASK_NAME=fixture_sums', LENGTHS, 'INFER_BATCH_SIZE=8')
NAME = 'fixture_sums-predict.jsonl-00000-of-00001'


@pytest.fixture(scope='module')
def infer(workspace, straight):
  """Runs `t5x infer` on the tiny run into a folder; returns (process, its lines)."""

  def run(folder, *bindings, code=0, shard='00000-of-00001'):
    done = runs.here(
      workspace, 'infer', straight[0], f'INFER_OUTPUT_DIR={folder}', *bindings
    )
    assert done.code == code, done.err
    (path,) = folder.glob(f'*.jsonl-{shard}') if not code else (None,)
    return done, path and runs.json_lines(path)

  return run


@pytest.fixture(scope='module')
def log_probs(straight):
  """ids -> float64 log-probabilities of the next token after each of them."""
  params = runs.params(straight[0] / f'checkpoint_{runs.STEPS}')

  def run(ids):
    logits = palm_reference.forward(params, [ids], runs.SIZES)[0]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  return run


@pytest.fixture(scope='module')
def predicted(infer, tmp_path_factory):
  """The uninterrupted predictions: (folder, lines)."""
  folder = tmp_path_factory.mktemp('predicted')
  return folder, infer(folder, *SUMS, 'infer.checkpoint_period=1')[1]


def encode(text):
  return fixture_tasks.vocabulary().encode(text)


def greedy(log_probs, prompt, total):
  """Argmax after argmax, by full forward passes, until [eod] or `total` tokens."""
  ids = [1, *prompt]
  while len(ids) <= total and (len(ids) == 1 + len(prompt) or ids[-1] != 1):
    ids.append(int(np.argmax(log_probs(ids)[-1])))
  return ids[1 + len(prompt) :]


def test_predictions_are_the_forward_passes(predicted, log_probs):
  _, lines = predicted
  examples = list(fixture_tasks.sums('validation'))
  assert [line['index'] for line in lines] == list(range(len(examples)))
  for line, example in zip(lines, examples, strict=True):
    assert line['inputs'] == {
      'inputs_pretokenized': example['inputs'],
      'targets_pretokenized': example['targets'],
    }
  for line in (lines[0], lines[-1]):
    prompt = encode(line['inputs']['inputs_pretokenized'])
    ids = greedy(log_probs, prompt, total=18)
    assert line['prediction'] == fixture_tasks.vocabulary().decode(
      ids[: ids.index(1)] if 1 in ids else ids
    )


def test_scores_are_the_targets_log_likelihoods(infer, tmp_path, log_probs):
  _, lines = infer(tmp_path, *SUMS, "infer.mode='score'")
  assert len(lines) == len(list(fixture_tasks.sums('validation')))
  for line in lines[::13]:
    prompt = encode(line['inputs']['inputs_pretokenized'])
    targets = [*encode(line['inputs']['targets_pretokenized']), 1]
    ids = [1, *prompt, *targets]
    rows = log_probs(ids[:-1])[-len(targets) :]
    expected = sum(rows[n, token] for n, token in enumerate(targets))
    assert line['score'] == pytest.approx(expected, rel=1e-4)
    assert 'prediction' not in line


def test_predictions_with_their_log_probabilities(
  infer, tmp_path, predicted, log_probs
):
  _, lines = infer(
    tmp_path,
    *SUMS,
    "infer.mode='predict_with_aux'",
    'decoding.temperature_sample.rescale_log_probs=False',
    'decoding.temperature_sample.temperature=0.0',
  )
  assert [x['prediction'] for x in lines] == [x['prediction'] for x in predicted[1]]
  prompt = encode(lines[3]['inputs']['inputs_pretokenized'])
  ids = greedy(log_probs, prompt, total=18)
  rows = log_probs([1, *prompt, *ids])[len(prompt) : -1]
  expected = sum(rows[n, token] for n, token in enumerate(ids))
  assert lines[3]['aux']['scores'] == pytest.approx(expected, rel=1e-4)


def test_a_task_without_inputs_is_a_list_of_prompts(infer, tmp_path, log_probs):
  _, lines = infer(
    tmp_path,
    "INFER_TASK_FEATURE_LENGTHS={'inputs': 20, 'targets': 4}",
    'INFER_BATCH_SIZE=64',
  )
  documents = list(fixture_tasks.documents('validation'))
  assert len(lines) == len(documents)
  for line, text in zip(lines, documents, strict=True):
    assert line['inputs']['targets_pretokenized'] == text
  prompt = encode(documents[1])[-20:]
  ids = greedy(log_probs, prompt, total=24)
  found = lines[1]['prediction']
  assert found == fixture_tasks.vocabulary().decode([i for i in ids if i != 1])


def test_shards_cover_every_example_once(infer, tmp_path, predicted):
  found = []
  for shard in range(3):
    flags = (f'--shard_id={shard}', '--num_shards=3')
    name = f'{shard:05d}-of-00003'
    found += infer(tmp_path, *SUMS, *flags, shard=name)[1]
  assert sorted(found, key=lambda line: line['index']) == predicted[1]
  assert [line['index'] for line in found[:3]] == [0, 3, 6]


def test_stop_strings_end_predictions(infer, tmp_path, predicted):
  stop = predicted[1][0]['prediction'][2:4]
  _, lines = infer(tmp_path, *SUMS, f'infer.stop=({stop!r},)')
  for line, whole in zip(lines, predicted[1], strict=True):
    assert line['prediction'] == whole['prediction'].partition(stop)[0]


def test_a_killed_run_resumes_to_the_same_file(
  workspace, straight, infer, predicted, tmp_path
):
  bindings = (*SUMS, 'infer.checkpoint_period=1')
  options = runs.command(
    workspace,
    straight[0],
    f'INFER_OUTPUT_DIR={tmp_path}',
    *bindings,
    devices=8,
    mode='infer',
  )
  process = subprocess.Popen(
    **options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
  )
  for line in process.stdout:
    if line.startswith('fixture_sums: 16 '):
      break
  process.send_signal(signal.SIGKILL)
  process.stdout.close()
  process.wait()
  chunks = tmp_path / f'tmp-{NAME.replace(".jsonl", "")}'
  whole = sorted(chunks.glob('*.jsonl'))
  assert whole and not (tmp_path / NAME).exists(), 'killed in the middle'
  (chunks / 'chunk-000006.jsonl.tmp').write_text('{"index": 48, "inp')  # torn
  done, _ = infer(tmp_path, *bindings)
  assert (tmp_path / NAME).read_bytes() == (predicted[0] / NAME).read_bytes()
  assert done.out.count(' examples') == 7 - len(whole), 'whole chunks were kept'
  assert not chunks.exists()


def test_a_finished_file_is_not_made_again(infer, predicted):
  folder, lines = predicted
  before = (folder / NAME).stat().st_mtime_ns
  done, again = infer(folder, *SUMS, 'infer.checkpoint_period=1')
  assert again == lines and (folder / NAME).stat().st_mtime_ns == before
  assert f'{NAME} is complete: nothing to do' in done.out


def test_results_of_another_checkpoint_are_not_passed_off(infer, straight, predicted):
  folder, _ = predicted
  before = runs.hashes(folder)
  other = straight[0] / 'checkpoint_6'
  done, _ = infer(
    folder, *SUMS, 'infer.checkpoint_period=1', f'CHECKPOINT_PATH={other}', code=2
  )
  assert 'checkpoint_12 there' in done.error and 'INFER_OUTPUT_DIR' in done.error
  assert runs.hashes(folder) == before


def test_chunks_of_another_size_are_not_mixed(infer, tmp_path):
  chunks = tmp_path / 'tmp-fixture_sums-predict-00000-of-00001'
  chunks.mkdir()
  (chunks / 'settings.json').write_text('{"checkpoint_period": 7}')
  (chunks / 'chunk-000000.jsonl').write_text('{}\n')
  done, _ = infer(tmp_path, *SUMS, 'infer.checkpoint_period=1', code=2)
  assert 'checkpoint_period 7 there, 1 here' in done.error
  assert 'remove it' in done.error

"""`t5x eval`: bits per byte of text, SeqIO's metrics, all checkpoints of a run."""

import math
import random
import shutil

import fixture_tasks
import pytest
import runs

from palm_t5x import checkpoints
from palm_t5x.metric_writers import read_metrics

LENGTHS = "EVAL_TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 6}"


@pytest.fixture(scope='module')
def evaluate(workspace, straight):
  """Runs `t5x eval` on the tiny run into a folder; returns (process, results.jsonl)."""

  def run(folder, *bindings, model_dir=None):
    done = runs.here(
      workspace,
      'eval',
      model_dir or straight[0],
      f'EVAL_OUTPUT_DIR={folder}',
      *bindings,
    )
    assert done.code == 0, done.err
    return done, runs.json_lines(folder / 'inference_eval' / 'results.jsonl')

  return run


def test_text_has_the_bits_per_byte_of_training(straight, evaluate, tmp_path):
  done, (row,) = evaluate(tmp_path)
  closing = read_metrics(str(straight[0]), 'training_eval/fixture_text')[-1]
  assert row['task'] == 'fixture_text' and row['step'] == closing['step'] == runs.STEPS
  assert row['checkpoint'] == str(straight[0] / f'checkpoint_{runs.STEPS}')
  for name in ('loss', 'bits_per_byte', 'accuracy'):
    assert row[name] == pytest.approx(closing[name], rel=1e-5)  # on another mesh
  documents = list(fixture_tasks.documents('validation'))
  assert row['bytes'] == closing['bytes'] == sum(len(d.encode()) for d in documents)
  encode = fixture_tasks.vocabulary().encode
  assert row['tokens'] == sum(len(encode(d)) + 1 for d in documents)
  nats = row['loss'] * row['tokens']
  assert row['bits_per_byte'] == pytest.approx(nats / math.log(2) / row['bytes'])
  assert 'fixture_text  bits_per_byte' in done.out and 'results.jsonl' in done.out
  assert (tmp_path / 'inference_eval' / 'config.gin').stat().st_size > 0


def test_a_mixture_adds_up_its_tasks(evaluate, tmp_path):
  _, rows = evaluate(tmp_path, 'EVAL_MIXTURE_OR_TASK_NAME=fixture_mixture')
  by_task = {row['task']: row for row in rows}
  assert set(by_task) == {'fixture_prose', 'fixture_code', 'fixture_mixture'}
  parts = [by_task['fixture_prose'], by_task['fixture_code']]
  whole = by_task['fixture_mixture']
  for name in ('tokens', 'bytes'):
    assert whole[name] == sum(part[name] for part in parts)
  nats = sum(part['loss'] * part['tokens'] for part in parts)
  assert whole['loss'] == pytest.approx(nats / whole['tokens'])
  assert whole['bits_per_byte'] == pytest.approx(nats / math.log(2) / whole['bytes'])


def test_predictions_are_judged_by_the_tasks_metric(evaluate, tmp_path):
  bindings = ('EVAL_MIXTURE_OR_TASK_NAME=fixture_sums', LENGTHS)
  done, (row,) = evaluate(tmp_path, *bindings)
  folder = tmp_path / 'inference_eval'
  lines = runs.json_lines(folder / f'fixture_sums-{runs.STEPS:06d}.jsonl')
  examples = list(fixture_tasks.sums('validation'))
  assert [x['input']['inputs_pretokenized'] for x in lines] == [
    e['inputs'] for e in examples
  ]
  assert [x['target'] for x in lines] == [e['targets'] for e in examples]
  right = [x['prediction'].strip() == x['target'].strip() for x in lines]
  assert row['accuracy'] == pytest.approx(100 * sum(right) / len(right))
  (metrics,) = runs.json_lines(folder / 'fixture_sums-metrics.jsonl')
  assert metrics == {'step': runs.STEPS, 'accuracy': row['accuracy']}
  assert list((folder / 'fixture_sums').glob('events.out.tfevents.*'))
  assert 'fixture_sums  accuracy' in done.out


def test_scores_are_judged_by_the_tasks_metric(workspace, straight, evaluate, tmp_path):
  bindings = ('EVAL_MIXTURE_OR_TASK_NAME=fixture_scored_sums', LENGTHS)
  _, (row,) = evaluate(tmp_path, *bindings)
  infer = runs.here(
    workspace,
    'infer',
    straight[0],
    f'INFER_OUTPUT_DIR={tmp_path}/infer',
    "infer.mode='score'",
    *(b.replace('EVAL_', 'INFER_') for b in bindings),
  )
  assert infer.code == 0, infer.err
  (path,) = (tmp_path / 'infer').glob('*.jsonl-*-00001')
  scores = [line['score'] for line in runs.json_lines(path)]
  assert row['log_likelihood'] == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_fewer_examples_by_gin(evaluate, tmp_path):
  evaluate(
    tmp_path,
    'EVAL_MIXTURE_OR_TASK_NAME=fixture_sums',
    LENGTHS,
    'EVALUATOR_NUM_EXAMPLES=5',
  )
  folder = tmp_path / 'inference_eval'
  assert len(runs.json_lines(folder / f'fixture_sums-{runs.STEPS:06d}.jsonl')) == 5


def test_every_checkpoint_of_a_run(straight, evaluate, tmp_path):
  """Those that are whole; a damaged one is named and passed over."""
  model_dir = tmp_path / 'run'
  shutil.copytree(straight[0], model_dir)
  runs.damage(model_dir / 'checkpoint_9', random.Random(0))
  done, rows = evaluate(
    tmp_path / 'out',
    "eval/utils.RestoreCheckpointConfig.mode='all'",
    model_dir=model_dir,
  )
  assert [row['step'] for row in rows] == [6, 12]
  assert rows[0]['loss'] > rows[1]['loss']
  assert 'checkpoint_9 is damaged' in done.err
  assert checkpoints.steps_in(model_dir) == [6, 9, 12]

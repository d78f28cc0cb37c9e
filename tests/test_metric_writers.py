"""metrics.jsonl after kills, rewinds and full disks; TensorBoard; the progress line."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from palm_t5x import metric_writers, progress
from palm_t5x.errors import Failure
from palm_t5x.metric_writers import MetricsWriter, read_metrics
from palm_t5x.metrics import Ratio


def write_steps(model_dir, split, steps, **kwargs):
  writer = MetricsWriter(str(model_dir), split, tensorboard=False, **kwargs)
  for step in steps:
    writer.write_scalars(step, {'loss': step / 10})
  writer.close()


def steps_of(model_dir, split):
  return [row['step'] for row in read_metrics(str(model_dir), split)]


def test_rows_are_json_with_numbers_only(tmp_path):
  with MetricsWriter(str(tmp_path), tensorboard=False) as writer:
    writer.write_scalars(
      np.int64(3),
      {'a': jnp.float32(1.5), 'b': Ratio(6.0, 4.0), 'nan': np.nan, 'inf': math.inf},
    )
  text = (tmp_path / 'metrics.jsonl').read_text()
  strict = json.loads(text, parse_constant=pytest.fail)
  expected = {'step': 3, 'split': 'train', 'a': 1.5, 'b': 1.5, 'nan': None, 'inf': None}
  assert strict == expected and list(strict)[:2] == ['step', 'split']


def test_resume_drops_what_will_be_written_again(tmp_path):
  write_steps(tmp_path, 'train', [10, 20, 30])
  write_steps(tmp_path, 'eval', [20, 30])
  write_steps(tmp_path, 'train', [20, 40], first_step=20)
  assert steps_of(tmp_path, 'train') == [10, 20, 40]
  assert steps_of(tmp_path, 'eval') == [20, 30]
  write_steps(tmp_path, 'train', [50])  # no first_step: nothing is removed
  assert steps_of(tmp_path, 'train') == [10, 20, 40, 50]


def test_rewind_in_the_middle_of_a_run(tmp_path):
  train = MetricsWriter(str(tmp_path), 'train', tensorboard=False)
  other = MetricsWriter(str(tmp_path), 'eval', tensorboard=False)
  for step in (1, 2, 3):
    train.write_scalars(step, {'loss': 1})
    other.write_scalars(step, {'loss': 1})
  train.drop_from(2)
  train.write_scalars(2, {'loss': 5})
  other.write_scalars(4, {'loss': 1})
  assert steps_of(tmp_path, 'train') == [1, 2]
  assert steps_of(tmp_path, 'eval') == [1, 2, 3, 4]


@pytest.mark.parametrize('torn', ['{"step": 3, "spl', '{"step": 3', '\x00\x00', '{}'])
def test_a_torn_last_line_is_removed(tmp_path, torn):
  write_steps(tmp_path, 'train', [1, 2])
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text()
  path.write_text(whole + torn)
  assert steps_of(tmp_path, 'train') == [1, 2]
  write_steps(tmp_path, 'train', [3])
  rows = path.read_text()
  assert rows.startswith(whole) and len(rows.splitlines()) == 3


def test_a_kill_loses_no_written_row(tmp_path):
  script = (
    'import os, signal, sys\n'
    'from palm_t5x.metric_writers import MetricsWriter\n'
    'w = MetricsWriter(sys.argv[1], tensorboard=False)\n'
    'for s in range(1, 6): w.write_scalars(s, {"loss": 1})\n'
    'os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  result = subprocess.run([sys.executable, '-c', script, str(tmp_path)], env=os.environ)
  assert result.returncode == -signal.SIGKILL
  assert steps_of(tmp_path, 'train') == [1, 2, 3, 4, 5]


def test_a_kill_while_rewriting_leaves_the_old_file(tmp_path, monkeypatch):
  write_steps(tmp_path, 'train', [1, 2, 3])

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    write_steps(tmp_path, 'train', [], first_step=2)
  assert steps_of(tmp_path, 'train') == [1, 2, 3]


def test_unwritable_and_full_name_the_file(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  with pytest.raises(Failure, match=r'Cannot write .*metrics\.jsonl'):
    MetricsWriter(str(tmp_path / 'file'), tensorboard=False)
  writer = MetricsWriter(str(tmp_path), tensorboard=False)
  if os.path.exists('/dev/full'):
    monkeypatch.setattr(writer._rows, '_path', '/dev/full')
    with pytest.raises(Failure, match=r'/dev/full: No space left on device.*Make room'):
      writer.write_scalars(1, {'loss': 1})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metric_writers.jax, 'process_index', lambda: 1)
  with MetricsWriter(str(tmp_path), first_step=0) as writer:
    writer.write_scalars(1, {'loss': 1})
    writer.write_texts(1, {'config': 'x'})
  assert not list(tmp_path.iterdir())


def test_remote_rows_are_the_same_rows(tmp_path, monkeypatch):
  """A path with a scheme is rewritten whole: file:// stands in for a bucket."""
  monkeypatch.setattr(metric_writers._RemoteRows, '_lines_of', {})
  monkeypatch.setattr(
    metric_writers.epath, 'Path', lambda p: __import__('pathlib').Path(str(p)[7:])
  )
  write_steps(f'file://{tmp_path}', 'train', [1, 2, 3])
  write_steps(f'file://{tmp_path}', 'eval', [2])
  write_steps(f'file://{tmp_path}', 'train', [3, 4], first_step=3)
  rows = [json.loads(x) for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  expected = [(1, 'train'), (2, 'train'), (2, 'eval'), (3, 'train'), (4, 'train')]
  assert [(r['step'], r['split']) for r in rows] == expected


def test_tensorboard_reads_the_scalars(tmp_path):
  with MetricsWriter(str(tmp_path), 'train') as writer:
    writer.write_scalars(10, {'loss': 2.5, 'lr': 0.01})
    writer.write_scalars(20, {'loss': 2.25, 'lr': 0.01})
    writer.write_texts(0, {'config': '**x**'})
    writer.write_hparams({'width': 8})
  events = event_accumulator.EventAccumulator(
    str(tmp_path / 'train'), size_guidance={'tensors': 0}
  )
  events.Reload()
  value = lambda e: float(np.frombuffer(e.tensor_proto.tensor_content, np.float32)[0])
  loss = [(e.step, value(e)) for e in events.Tensors('loss')]
  assert loss == [(10, 2.5), (20, 2.25)]
  assert 'config' in events.Tags()['tensors']
  assert steps_of(tmp_path, 'train') == [10, 20]


def test_a_broken_tensorboard_does_not_end_the_run(tmp_path, monkeypatch, caplog):
  def broken(logdir):
    raise RuntimeError('no events today')

  monkeypatch.setattr(metric_writers, '_summary_writer', broken)
  writer = MetricsWriter(str(tmp_path))
  writer.write_scalars(1, {'loss': 1})
  writer.write_scalars(2, {'loss': 1})
  assert caplog.text.count('no events today') == 1
  assert steps_of(tmp_path, 'train') == [1, 2]


# -- the progress line --


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


NUMBERS = dict(
  loss=3.21424,
  bits_per_byte=1.5849,
  learning_rate=0.01,
  grad_norm=0.4321,
  tokens_per_second=7412.3,
  mfu=0.5214,
  mfu_without_attention=0.4573,
  hfu=0.5783,
)


def test_plain_line():
  stream, clock = io.StringIO(), Clock()
  with progress.ProgressLine(1600, stream, clock) as line:
    line.tick(1)  # compiled
    clock.now = 9.9
    line.report(100, **NUMBERS)
  # 1,500 steps to go at 0.1 s each
  assert stream.getvalue() == (
    'step   100/1,600  loss 3.2142  1.585 bits/byte  lr 1.00e-02  grad 0.432  '
    '7,412 tok/s  MFU 52.1% (45.7% without attention, HFU 57.8%)  ETA 2:30\n'
  )


def test_what_is_unknown_is_left_out():
  stream = io.StringIO()
  line = progress.ProgressLine(10, stream, Clock())
  line.report(5, loss=1.0, mfu=0.5, mfu_label='of measured peak')
  line.message('saved')
  assert stream.getvalue() == (
    'step  5/10  loss 1.0000  of measured peak 50.0%\nsaved\n'
  )


def test_eta_follows_the_recent_speed_and_survives_a_rewind():
  clock = Clock()
  line = progress.ProgressLine(1000, io.StringIO(), clock)
  line.tick(0)
  for i in range(1, 20):
    clock.now += 100 if i < 5 else 10
    line.report(10 * i)
  assert line.eta_seconds(190) == pytest.approx(810)
  line.tick(100)  # rewound
  assert line.eta_seconds(100) is None
  clock.now += 20
  line.report(110)
  assert line.eta_seconds(110) == pytest.approx(890 * 2)


def test_terminal_has_a_bar_and_the_same_numbers():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream, clock = Terminal(), Clock()
  with progress.ProgressLine(1600, stream, clock) as line:
    line.tick(1)
    clock.now = 9.9
    line.report(100, **NUMBERS)
    line.message('[not markup]')
  text = stream.getvalue()
  assert '\x1b[' in text  # colours and the bar
  for shown in ('3.2142', '1.585 bits/byte', '7,412 tok/s', '2:30', '[not markup]'):
    assert shown in text


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0, '0:00'),
    (7.4, '0:07'),
    (59.6, '1:00'),
    (192, '3:12'),
    (3723, '1:02:03'),
    (183_600, '2d 03h'),
  ],
)
def test_duration(seconds, text):
  assert progress.duration(seconds) == text

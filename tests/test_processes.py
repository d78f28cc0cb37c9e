"""Several processes on this machine are one run: same data, same end, no survivors."""

import random
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import runs

from palm_t5x import checkpoints

STEPS, HEARTBEAT = 40, 5
LONG = (f'TRAIN_STEPS={STEPS}', 'CHECKPOINT_PERIOD=10', 'CHECKPOINT_KEEP=None')


class Together:
  """`count` processes of one run; `own` are further bindings of each."""

  def __init__(
    self, workspace, model_dir, count, *bindings, own=(), mode='train', words=()
  ):
    self.model_dir, self.count = model_dir, count
    self.logs = workspace / f'logs_{model_dir.name}_{random.random()}'
    self.logs.mkdir()
    address = f'--coordinator_address=127.0.0.1:{runs.free_port()}'
    self.processes = []
    for i in range(count):
      flags = [address, f'--process_count={count}', f'--process_index={i}']
      flags += [f'HEARTBEAT_TIMEOUT={HEARTBEAT}', '--initialization_timeout=120']
      more = own[i] if i < len(own) else ()
      options = runs.command(
        workspace, model_dir, *flags, *bindings, *more, mode=mode, words=words
      )
      options['env']['READS'] = str(self.logs / f'reads{i}')
      out, err = (self.logs / f'out{i}').open('w'), (self.logs / f'err{i}').open('w')
      with out, err:
        self.processes.append(subprocess.Popen(**options, stdout=out, stderr=err))

  def wait(self, which=None, timeout=300):
    """Exit codes; whoever is left after `timeout` seconds is killed, and a failure."""
    try:
      chosen = range(self.count) if which is None else which
      return [self.processes[i].wait(timeout) for i in chosen]
    finally:
      for process in self.processes:
        process.kill()
        process.wait()

  def wait_for_step(self, step):
    """Returns when process 0 has reported the step."""
    while not re.search(rf'^step +{step}/', self.out(0), re.MULTILINE):
      assert all(p.poll() is None for p in self.processes), self.err(0) + self.err(1)
      try:
        self.processes[0].wait(0.02)
      except subprocess.TimeoutExpired:
        continue

  def out(self, i):
    return (self.logs / f'out{i}').read_text()

  def err(self, i):
    return (self.logs / f'err{i}').read_text()

  def reads(self, i):
    return runs.json_lines(self.logs / f'reads{i}')


@pytest.fixture(scope='module')
def two(workspace):
  """An uninterrupted run of two processes."""
  probe = '--gin_bindings=import reading_probe'
  run = Together(workspace, workspace / 'two_processes', 2, *LONG, probe)
  assert run.wait() == [0, 0], run.err(0) + run.err(1)
  return run


def test_two_processes_train_as_one(two, straight):
  expected, found = runs.losses(straight[0]), runs.losses(two.model_dir)
  assert sorted(found) == list(range(1, STEPS + 1))
  for step, loss in expected.items():
    assert found[step] == pytest.approx(loss, rel=2e-5)


def test_each_process_reads_only_its_rows(two):
  reads = [two.reads(i) for i in range(2)]
  assert all(len(rows) == 4 for part in reads for rows in part)  # of a batch of 8
  wanted = range(8 * STEPS)
  parts = [[i for rows in part for i in rows if i in wanted] for part in reads]
  assert not set(parts[0]) & set(parts[1])
  assert sorted(parts[0] + parts[1]) == list(wanted)


def test_only_process_0_speaks_and_writes(two):
  assert f'step {STEPS}/{STEPS}' in two.out(0) and 'Next:' in two.out(0)
  assert [x for x in two.out(1).splitlines() if not x.startswith('[Gloo]')] == []
  assert two.err(1) == ''
  rows = runs.json_lines(two.model_dir / 'metrics.jsonl')
  assert len(rows) == STEPS + 1
  assert checkpoints.steps_in(two.model_dir) == [10, 20, 30, 40]
  assert checkpoints.damage(two.model_dir / f'checkpoint_{STEPS}') is None
  assert len(list((two.model_dir / 'train').glob('events.*'))) == 1


def drill(workspace, model_dir, victim, number, count=2):
  """Stops one process in the middle of training; returns the group, ended."""
  group = Together(workspace, model_dir, count, *LONG)
  group.wait_for_step(12)
  group.processes[victim].send_signal(number)
  survivors = [i for i in range(count) if i != victim]
  codes = group.wait(survivors, timeout=2 * HEARTBEAT)
  assert codes == [1] * len(survivors)
  for i in survivors:
    last = group.err(i).splitlines()[-1]
    if victim:
      assert f'unhealthy (stopped sending heartbeats): {victim}.' in last, last
    else:
      assert 'coordinator unreachable' in last, last
    assert last.startswith('t5x: error: ') and 'Traceback' not in group.err(i)
  return group


def assert_same_bits(one, other):
  expected, found = (runs.arrays(d / f'checkpoint_{STEPS}') for d in (one, other))
  assert expected.keys() == found.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(value, found[name], err_msg=name)
  assert runs.losses(one) == runs.losses(other)


def test_a_killed_peer_ends_all_and_the_restart_is_bit_identical(workspace, two):
  model_dir = workspace / 'two_killed'
  drill(workspace, model_dir, 1, signal.SIGKILL)
  assert max(runs.losses(model_dir)) < STEPS
  again = Together(workspace, model_dir, 2, *LONG)
  assert again.wait() == [0, 0], again.err(0) + again.err(1)
  assert_same_bits(two.model_dir, model_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('victim', 'number', 'count'),
  [
    (0, signal.SIGKILL, 2),
    (1, signal.SIGSTOP, 2),
    (0, signal.SIGSTOP, 2),
    (2, signal.SIGKILL, 4),
  ],
)
def test_drills(workspace, victim, number, count):
  drill(workspace, workspace / f'drill{victim}_{number}_{count}', victim, number, count)


def test_another_number_of_processes_goes_on_to_rounding(workspace, two):
  model_dir = workspace / 'from_two_to_one'
  shutil.copytree(two.model_dir, model_dir)
  for step in (30, 40):
    shutil.rmtree(model_dir / f'checkpoint_{step}')
  done = runs.here(workspace, 'train', model_dir, *LONG)
  assert done.code == 0, done.err
  assert 'num_processes 2 -> 1' in done.err and 'from step 20' in done.err
  expected, found = runs.losses(two.model_dir), runs.losses(model_dir)
  assert expected.keys() == found.keys()
  for step, loss in expected.items():
    assert found[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_four_processes_and_back_to_two(workspace, two, straight):
  model_dir = workspace / 'four_processes'
  four = Together(workspace, model_dir, 4, 'TRAIN_STEPS=20', 'CHECKPOINT_PERIOD=10')
  assert four.wait() == [0] * 4, four.err(0)
  for step, loss in runs.losses(straight[0]).items():
    assert runs.losses(model_dir)[step] == pytest.approx(loss, rel=2e-5)
  again = Together(workspace, model_dir, 2, *LONG)
  assert again.wait() == [0, 0], again.err(0)
  expected, found = runs.losses(two.model_dir), runs.losses(model_dir)
  for step, loss in expected.items():
    assert found[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_sigterm_to_one_ends_all_at_one_step_with_a_checkpoint(workspace):
  model_dir = workspace / 'two_signalled'
  group = Together(
    workspace, model_dir, 2, 'TRAIN_STEPS=5000', 'CHECKPOINT_PERIOD=5000'
  )
  group.wait_for_step(3)
  group.processes[1].send_signal(signal.SIGTERM)
  assert group.wait() == [128 + signal.SIGTERM] * 2
  (step,) = checkpoints.steps_in(model_dir)
  assert checkpoints.damage(model_dir / f'checkpoint_{step}') is None
  assert f'checkpoint_{step} is saved' in group.out(0)


@pytest.mark.slow
def test_a_peer_with_another_configuration_is_named(workspace):
  model_dir = workspace / 'differing'
  own = ((), ('BATCH_SIZE=16', 'NPROC=3', f'CACHE_DIR={workspace / "elsewhere"}'))
  group = Together(workspace, model_dir, 2, own=own)
  assert group.wait() == [2, 2], group.err(0) + group.err(1)
  for i in range(2):
    (line,) = group.err(i).splitlines()
    assert 'process 1 has BATCH_SIZE = 16, not 8; NPROC = 3, not 2.' in line
  assert not model_dir.exists()


@pytest.mark.slow
def test_the_failure_of_one_ends_the_others_with_its_reason(workspace):
  own = ((), ('--gin_bindings=import a_probe_that_fails',))
  (workspace / 'a_probe_that_fails.py').write_text(
    'from palm_t5x import errors, partitioning\n'
    'def check_batch(self, *args, **kwargs):\n'
    "  raise errors.Failure('this host has no disk.')\n"
    'partitioning.PjitPartitioner.check_batch = check_batch\n'
  )
  group = Together(workspace, workspace / 'one_fails', 2, own=own)
  assert group.wait() == [1, 1]
  assert group.err(1).splitlines()[-1] == 't5x: error: this host has no disk.'
  last = group.err(0).splitlines()[-1]
  assert 'process 1 has failed' in last and last.endswith('this host has no disk.')


@pytest.mark.slow
def test_eval_infer_and_complete_with_two_processes(workspace, two, tmp_path):
  """Each gives what one process gives."""
  sums = "TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 6}"
  cases = (
    ('infer', (f'INFER_{sums}', 'INFER_MIXTURE_OR_TASK_NAME=fixture_sums')),
    ('eval', (f'EVAL_{sums}', 'EVAL_MIXTURE_OR_TASK_NAME=fixture_scored_sums')),
    ('complete', ('complete.temperature=0.0', 'complete.max_new_tokens=8')),
  )
  for mode, bindings in cases:
    found = []
    for count in (1, 2):
      out = tmp_path / f'{mode}{count}'
      names = {'infer': 'INFER_OUTPUT_DIR', 'eval': 'EVAL_OUTPUT_DIR'}
      given = [*bindings, *([f'{names[mode]}={out}'] if mode in names else [])]
      words = ('--', 'the sea') if mode == 'complete' else ()
      if count == 1:
        done = runs.here(workspace, mode, two.model_dir, *given, words=words)
        assert done.code == 0, done.err
        text = done.out
      else:
        group = Together(workspace, two.model_dir, 2, *given, mode=mode, words=words)
        assert group.wait() == [0, 0], group.err(0) + group.err(1)
        text = group.out(0)
      if mode == 'infer':
        text = next(out.glob('*.jsonl-*-00001')).read_text()
      if mode == 'eval':
        text = runs.json_lines(out / 'inference_eval' / 'results.jsonl')
        text = [round(row['log_likelihood'], 4) for row in text]
      found.append(text)
    if mode == 'complete':  # Gloo says on standard output that it is connected
      found[1] = re.sub(r'\[Gloo\].*\n', '', found[1])
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_coordinator_that_stays_alone_says_so(workspace, tmp_path):
  address = f'127.0.0.1:{runs.free_port()}'
  done = runs.run(
    workspace,
    tmp_path / 'run',
    f'--coordinator_address={address}',
    '--process_count=2',
    '--process_index=0',
    '--initialization_timeout=3',
  )
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert f'not all of the 2 processes came to {address} within 3 s' in last


@pytest.mark.slow
def test_two_processes_go_back_past_a_spike_together(workspace):
  """As test_rewind's one process: the same spike, checkpoint and skipped batches."""
  recovery = 'spikes.LossSpikeRecovery'
  group = Together(
    workspace,
    workspace / 'spiked_together',
    2,
    '--gin_bindings=import planting_probe',
    'TRAIN_STEPS=90',
    'utils.create_learning_rate_scheduler.base_learning_rate=3.0',
    'LOSS_SPIKE_RECOVERY=@spikes.LossSpikeRecovery()',
    *(f'{recovery}.window=15', f'{recovery}.rewind_steps=5'),
    *(f'{recovery}.skip_batches=20', f'{recovery}.patience=3'),
    *('CHECKPOINT_PERIOD=10', 'CHECKPOINT_KEEP=None'),
  )
  assert group.wait() == [0, 0], group.err(0) + group.err(1)
  (event,) = runs.json_lines(group.model_dir / 'events.jsonl')
  assert (event['spike_began'], event['checkpoint']) == (51, 40)
  assert event['skipped_batches'] == [45, 65]
  assert group.out(0).count('Loss spike from step 51') == 1
  assert sorted(runs.losses(group.model_dir)) == list(range(1, 91))

"""How processes find each other and agree, played inside this one."""

import collections
import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest
import runs

from palm_t5x import joining, last_words, modes, peers, processes
from palm_t5x.errors import Failure, UserError


def test_an_unreachable_coordinator_is_one_line(workspace, tmp_path):
  address = f'127.0.0.1:{runs.free_port()}'
  flags = [f'--coordinator_address={address}', '--process_count=2', '--process_index=1']
  flags += ['--initialization_timeout=1']
  done = runs.here(workspace, 'train', tmp_path / 'run', *flags)
  assert done.code == 1 and not (tmp_path / 'run').exists()
  assert f'coordinator unreachable: nothing answers at {address} within 1 s' in (
    done.error
  )


class Store:
  """The coordination service's store and barriers, for threads of this process."""

  def __init__(self, count):
    self._values, self._changed = {}, threading.Condition()
    self._barriers = collections.defaultdict(lambda: threading.Barrier(count))

  def key_value_set(self, key, value):
    with self._changed:
      assert key not in self._values
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      assert self._changed.wait_for(lambda: key in self._values, 10)
      return self._values[key]

  def key_value_dir_get(self, prefix):
    with self._changed:
      return [item for item in self._values.items() if item[0].startswith(prefix)]

  def wait_at_barrier(self, name, timeout_in_ms):
    with self._changed:
      barrier = self._barriers[name]
    barrier.wait(10)


def as_processes(monkeypatch, function, count):
  """What `function(index)` gives in each of so many processes, played by threads."""
  store, local = Store(count), threading.local()

  class Group(processes.Group):
    client = store

  monkeypatch.setattr(processes, '_group', Played(local))

  def play(index):
    local.group = Group('h:1', count, index, 5)
    try:
      return function(index)
    except (UserError, Failure) as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    return list(pool.map(play, range(count)))


class Played:
  """Each thread sees the group of the process that it plays."""

  def __init__(self, local):
    self.__dict__['_local'] = local

  def __getattr__(self, name):
    return getattr(self._local.group, name)


def test_differences_are_named_in_every_process(monkeypatch):
  facts = [{'A': '1', 'B': '2'}, {'A': '1', 'B': '3'}, {'A': '1', 'B': '2'}, {'A': '1'}]
  found = as_processes(
    monkeypatch, lambda i: processes.agree('configuration', facts[i], 'Mend it.'), 4
  )
  assert {type(error) for error in found} == {UserError}
  assert {str(error) for error in found} == {
    'the processes have another configuration than process 0: process 1 has B = 3, not '
    '2; process 3 has B = nothing, not 2. Mend it.'
  }
  assert (
    as_processes(monkeypatch, lambda i: processes.agree('x', {'A': '1'}, ''), 3)
    == [None] * 3
  )


def test_process_0_decides_for_all(monkeypatch):
  def decide(index):
    return [processes.decide(lambda: index), processes.decide(lambda: [index, 'x'])]

  assert as_processes(monkeypatch, decide, 3) == [[0, [0, 'x']]] * 3

  def fail():
    raise Failure('no disk.')

  found = as_processes(monkeypatch, lambda i: processes.decide(fail), 3)
  assert [(type(e), str(e)) for e in found] == [(Failure, 'no disk.')] * 3


def test_process_0_goes_first(monkeypatch):
  order = []
  as_processes(
    monkeypatch, lambda i: processes.first(lambda: order.append(processes.index())), 3
  )
  assert order[0] == 0 and sorted(order) == [0, 1, 2]


@pytest.fixture
def calls(monkeypatch):
  """What jax.distributed.initialize is called with; it starts nothing."""
  import jax

  made = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **kw: made.append(kw))
  monkeypatch.setattr(joining.last_words, 'LastWords', lambda explain: None)
  monkeypatch.setattr(joining.last_words, 'set_handler', lambda *args: None)
  monkeypatch.setattr(processes, 'listen', lambda group: None)
  monkeypatch.setattr(processes, '_group', None)
  for name in list(os.environ):
    if name.startswith(('SLURM', 'OMPI', 'JAX_COORD', 'KUBERNETES', 'TPU_')):
      monkeypatch.delenv(name)
  return made


SLURM = {
  'SLURM_JOB_ID': '4242',
  'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '0',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}


@pytest.mark.parametrize('environment', [SLURM, OPEN_MPI])
def test_schedulers_are_found(calls, monkeypatch, environment):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  joining.join({}, 7)
  (call,) = calls
  assert (call['num_processes'], call['process_id']) == (2, 0)
  assert call['heartbeat_timeout_seconds'] == 7
  assert processes.count() == 2 and processes.index() == 0


def test_one_task_of_a_scheduler_joins_nobody(calls, monkeypatch):
  for name, value in {**SLURM, 'SLURM_NTASKS': '1'}.items():
    monkeypatch.setenv(name, value)
  joining.join({}, 7)
  assert not calls and processes.count() == 1


def test_a_plain_run_asks_no_network(calls, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('no network')

  monkeypatch.setattr(socket, 'socket', refuse)
  monkeypatch.setattr(socket, 'create_connection', refuse)
  monkeypatch.setattr(socket, 'gethostbyname', refuse)
  joining.join({}, 7)
  assert not calls


def test_only_modes_that_compute_join_by_themselves():
  joined = {name for name, mode in modes.MODES.items() if mode.computes}
  assert joined == {'train', 'eval', 'infer', 'complete'}


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'process_count': 2}, '--coordinator_address, --process_index'),
    (
      {'coordinator_address': 'h', 'process_count': 2, 'process_index': 0},
      'HOST:PORT',
    ),
    (
      {'coordinator_address': 'h:1', 'process_count': 2, 'process_index': 2},
      'must be in 0..1',
    ),
  ],
)
def test_impossible_flags_are_refused(calls, flags, message):
  with pytest.raises(UserError, match=message):
    joining.join(flags, 7)


def test_a_port_in_use_is_a_failure(calls):
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    port = taken.getsockname()[1]
    flags = {'coordinator_address': f'localhost:{port}', 'process_count': 2}
    with pytest.raises(Failure, match=f'cannot listen on port {port}'):
      joining.join({**flags, 'process_index': 0}, 7)


@pytest.mark.parametrize('value', [0, 2.5, True, '30'])
def test_heartbeat_timeouts_that_are_none(value):
  with pytest.raises(UserError, match='HEARTBEAT_TIMEOUT='):
    joining.heartbeat_timeout(value)


def test_pathways_starts_its_controller_and_nothing_else(calls, monkeypatch):
  import jax

  started = []
  fake = types.ModuleType('pathwaysutils')
  fake.initialize = lambda: started.append(1)
  monkeypatch.setitem(sys.modules, 'pathwaysutils', fake)
  monkeypatch.setattr(
    joining, '_platforms', lambda: 'proxy,cpu'
  )  # jax's own setting must stay what it is for the other tests
  joining.join({}, 7)
  assert started == [1] and not calls and processes.count() == 1
  assert jax.process_count() == 1
  with pytest.raises(UserError, match='one controller'):
    joining.join({'process_count': 2}, 7)
  monkeypatch.setitem(sys.modules, 'pathwaysutils', None)
  with pytest.raises(UserError, match='pip install pathwaysutils'):
    joining.join({}, 7)


def test_facts_name_bindings_as_the_command_line_does(monkeypatch):
  monkeypatch.setenv('NPROC', '2')
  config = {
    ('BATCH_SIZE', 'gin.macro'): {'value': 8},
    ('CACHE_DIR', 'gin.macro'): {'value': '/here'},
    ('train', 'palm_t5x.utils.DatasetConfig'): {'seed': 7},
  }
  facts = peers.facts(config, {'jax_x': 'y'})
  assert facts['BATCH_SIZE'] == '8' and facts['train/utils.DatasetConfig.seed'] == '7'
  assert facts['NPROC'] == '2' and facts['--jax_x'] == 'y' and 'CACHE_DIR' not in facts


@pytest.mark.parametrize(
  ('said', 'tasks'),
  [
    (
      'UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n'
      '1\n12\nThe tasks have crashed. Check the task logs',
      '1, 12',
    ),
    ('INTERNAL: Barrier failed because: Task 3 heartbeat timeout. This', '3'),
  ],
)
def test_the_services_list_in_one_line(said, tasks):
  assert last_words.unhealthy(said) == (
    f'The following tasks are unhealthy (stopped sending heartbeats): {tasks}'
  )
  assert last_words.unhealthy('UNAVAILABLE: Failed to send RPC') is None


ABORT = """
import os, sys
sys.path.insert(0, {root!r})
from palm_t5x import last_words
words = last_words.LastWords(lambda said: 'LAST ' + said)
os.write(2, b'before\\n')
os.write(2, {text!r})
os.abort()
"""


@pytest.mark.parametrize('ours', [True, False])
def test_an_abort_by_the_service_ends_with_our_words(ours):
  text = b'F1 JAX distributed service detected fatal errors. absl::Status: it is gone\n'
  text = (
    text if ours else b'F1 another bug\n'
  ) + b'*** Check failure stack trace: ***\n'
  code = ABORT.format(root=str(runs.HERE.parent), text=text + b'    @  0x7f  f()\n')
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  lines = done.stderr.splitlines()
  assert lines[0] == 'before'
  if ours:
    assert done.returncode == 1
    assert lines[-1] == 'LAST it is gone' and '0x7f' not in done.stderr
  else:
    assert done.returncode == -signal.SIGABRT
    assert lines[-1].endswith('f()')

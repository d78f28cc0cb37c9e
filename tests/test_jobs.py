"""Jobs: each unit once, whatever is killed, on any number of processes and shards."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
import toy_jobs

from palm_t5x import errors
from palm_t5x.corpus import jobs


@pytest.fixture
def out(tmp_path):
  """Where units leave their notes."""
  (tmp_path / 'out').mkdir()
  return tmp_path / 'out'


@pytest.fixture
def folder(tmp_path):
  return str(tmp_path / 'job')


def notes(out):
  """Unit -> how often it was done."""
  return {path.name: len(path.read_text().split()) for path in out.iterdir()}


ONCE = {f'u{i}': 1 for i in range(6)}


def test_every_unit_once_and_stages_in_turn(folder, out):
  calls = []
  assert toy_jobs.run(folder, out, progress=lambda *call: calls.append(call))
  assert notes(out) == ONCE
  assert jobs.Job(folder).facts_of('sum', 's1') == sorted(ONCE)
  assert calls[:3] == [('working', 0, 12), ('working', 2, 12), ('working', 4, 12)]
  assert calls[-1] == ('sum', 3, 3)
  assert toy_jobs.run(folder, out) and notes(out) == ONCE, 'nothing is done again'


def test_a_pool_serves_several_jobs(tmp_path, folder, out):
  with jobs.Pool(2) as pool:
    assert toy_jobs.run(folder, out, workers=pool)
    (tmp_path / 'out2').mkdir()
    assert toy_jobs.run(folder + '2', tmp_path / 'out2', workers=pool)
  assert notes(out) == notes(tmp_path / 'out2') == ONCE
  facts = [*jobs.Job(folder).facts('work').values()]
  facts += jobs.Job(folder + '2').facts('work').values()
  workers = {fact['worker'] for fact in facts}
  assert os.getpid() not in workers and len(workers) <= 2


def test_local_stages_stay_here(folder, out):
  stages = toy_jobs.stages(folder, out)
  here = jobs.Stage('work', stages[0].units, local=True)
  assert jobs.run(jobs.Job(folder), [here], workers=2)
  facts = jobs.Job(folder).facts('work').values()
  assert {fact['worker'] for fact in facts} == {os.getpid()}


def test_facts_cut_short_do_not_count(folder, out):
  toy_jobs.run(folder, out)
  path = pathlib.Path(folder, 'work', 'u3.json')
  path.write_text(path.read_text()[:5])
  assert jobs.Job(folder).facts_of('work', 'u3') is None


def test_shards_one_after_the_other(folder, out):
  shard = {'num_shards': 3}
  assert not toy_jobs.run(folder, out, shard_id=1, **shard)
  assert set(notes(out)) == {'u1', 'u4'}
  assert not toy_jobs.run(folder, out, shard_id=1, **shard)
  assert not toy_jobs.run(folder, out, shard_id=0, **shard)
  assert toy_jobs.run(folder, out, shard_id=2, **shard)
  assert notes(out) == ONCE
  assert jobs.Job(folder).done('sum') == {'s0', 's1', 's2'}


SHARD = """
import sys
sys.path.insert(0, TESTS)
import toy_jobs
from palm_t5x.corpus import jobs
jobs._BEAT_SECONDS = 0.2
folder, out, shard = sys.argv[1:]
print(toy_jobs.run(folder, out, seconds=0.3, shard_id=int(shard), num_shards=2))
""".replace('TESTS', repr(os.path.dirname(__file__)))


def start(folder, out, shard):
  args = [sys.executable, '-c', SHARD, folder, str(out), str(shard)]
  return subprocess.Popen(args, stdout=subprocess.PIPE, text=True)


def test_shards_wait_for_each_other(folder, out):
  processes = [start(folder, out, shard) for shard in range(2)]
  said = [process.communicate(timeout=60)[0].strip() for process in processes]
  assert 'True' in said and notes(out) == ONCE
  assert jobs.Job(folder).done('sum') == {'s0', 's1', 's2'}


def test_a_dead_shards_later_units_are_taken_over(folder, out, monkeypatch):
  """Shard 1 dies in the second stage; shard 0, which waits for it, does its units."""
  monkeypatch.setattr(jobs, '_BEAT_SECONDS', 0.05)
  monkeypatch.setattr(jobs, '_ALIVE_SECONDS', 0.5)
  assert not toy_jobs.run(folder, out, shard_id=0, num_shards=2)
  work = toy_jobs.stages(folder, out)[:1]
  jobs.run(jobs.Job(folder), work, shard_id=1, num_shards=2)
  pathlib.Path(folder, 'alive', '1').write_text(str(time.time()))
  assert toy_jobs.run(folder, out, shard_id=0, num_shards=2)
  assert jobs.Job(folder).done('sum') == {'s0', 's1', 's2'}


def test_a_shard_with_another_clock_is_alive_while_it_beats(folder, monkeypatch):
  monkeypatch.setattr(jobs, '_ALIVE_SECONDS', 0.3)
  shards = jobs._Shards(jobs.Job(folder), 0, 2, lambda: False)
  path = pathlib.Path(folder, 'alive', '1')
  assert shards.alive() == set()
  path.parent.mkdir(parents=True)
  path.write_text('1000.0')
  assert shards.alive() == set(), 'an old sign, at first sight'
  path.write_text('1005.0')
  assert shards.alive() == {1}
  time.sleep(0.35)
  assert shards.alive() == set(), 'the sign does not change'
  path.write_text('0')
  assert shards.alive() == set()


def test_a_finished_job_may_be_gone(folder, out):
  """A shard whose units are missing because the other deleted the folder."""
  assert toy_jobs.run(
    folder, out, shard_id=0, num_shards=2, finished=lambda: bool(notes(out))
  )
  assert set(notes(out)) == {'u0', 'u2', 'u4'}


@pytest.mark.parametrize(('shard', 'of'), [(2, 2), (-1, 2), (0, 0)])
def test_no_such_shard(folder, out, shard, of):
  with pytest.raises(errors.UserError, match=f'--shard_id={shard} with --num_shards'):
    toy_jobs.run(folder, out, shard_id=shard, num_shards=of)


def test_other_settings(folder):
  jobs.Job(folder, {'a': 1, 'b': [1, 2]})
  jobs.Job(folder, {'b': (1, 2), 'a': 1})
  with pytest.raises(errors.UserError, match=r'other settings: a was 1, is 2\. Delete'):
    jobs.Job(folder, {'a': 2, 'b': [1, 2]})
  assert jobs.Job(folder).path('x') == os.path.join(folder, 'x')


def test_a_folder_without_settings_does_not_count(folder, out):
  jobs.Job(folder, {'a': 1})
  toy_jobs.run(folder, out)
  os.unlink(os.path.join(folder, 'settings.json'))
  assert jobs.Job(folder, {'a': 1}).done('work') == set()


@pytest.mark.parametrize('name', ['', 'a/b', 'a b', '..', 'x?', 'ü'])
def test_names_are_safe_in_buckets(name):
  with pytest.raises(ValueError, match='cannot name a unit'):
    jobs.Unit(name, print)


@pytest.mark.parametrize(
  ('kind', 'error', 'text'),
  [
    ('die', errors.Failure, r'A worker process died while breaking .*fewer WORKERS'),
    ('failure', errors.Failure, '^as it was told$'),
    ('bug', ZeroDivisionError, 'as it was told'),
  ],
)
def test_what_goes_wrong_in_a_worker(folder, out, kind, error, text):
  units = [
    jobs.Unit('a', toy_jobs.note, (out, 'a')),
    jobs.Unit('b', toy_jobs.fail, (kind,)),
  ]
  stage = jobs.Stage('work', lambda job: units, 'breaking')
  with pytest.raises(error, match=text) as e:
    jobs.run(jobs.Job(folder), [stage], workers=2)
  assert '\n' not in str(e.value)
  assert 'b' not in jobs.Job(folder).done('work')


PARENT = """
import sys
sys.path.insert(0, TESTS)
import toy_jobs
if __name__ == '__main__':
  toy_jobs.run(sys.argv[1], sys.argv[2], seconds=1.0, workers=2)
""".replace('TESTS', repr(os.path.dirname(__file__)))


def test_workers_die_with_their_parent(tmp_path, folder, out):
  script = tmp_path / 'parent.py'
  script.write_text(PARENT)
  parent = subprocess.Popen([sys.executable, str(script), folder, str(out)])
  while not notes(out):
    time.sleep(0.05)
    assert parent.poll() is None
  children = _children(parent.pid)
  assert len(children) >= 2
  parent.kill()
  parent.wait()
  deadline = time.monotonic() + 20
  while any(map(_runs, children)):
    assert time.monotonic() < deadline, children
    time.sleep(0.1)
  assert toy_jobs.run(folder, out)
  assert max(notes(out).values()) <= 2 and set(notes(out)) == set(ONCE)


def test_default_workers():
  assert jobs.default_workers(None) == len(os.sched_getaffinity(0))
  assert jobs.default_workers(3) == 3
  for wrong in (0, -1, 1.5, '2', True):
    with pytest.raises(errors.UserError, match=f'WORKERS = {wrong!r}'):
      jobs.default_workers(wrong)


def _children(pid):
  found = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  return [*map(int, found)]


def _runs(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().split(')')[1].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def test_shards_that_begin_at_once_do_not_delete_each_others_work(tmp_path):
  """Every one of them finds the settings of whoever was first."""
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    for number in range(15):
      barrier = threading.Barrier(4)

      def begin(shard, number=number, barrier=barrier):
        barrier.wait()
        job = jobs.Job(str(tmp_path / str(number)), {'a': 1})
        job.perform('work', jobs.Unit(f'u{shard}', int))
        return job

      for job in list(threads.map(begin, range(4))):
        assert job.done('work') == {'u0', 'u1', 'u2', 'u3'}

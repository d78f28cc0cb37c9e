"""Being one of several processes: agree, and end together.

Once `joining` has brought them together, `agree` finds out what differs between the
processes, `decide` lets process 0 decide for all, and `together` sees to it that none
outlives the others: a failure in one ends all with its reason, and a peer that is
killed, or that hangs, ends the others within twice the heartbeat time-out, named by
jax's coordination service. All of it does nothing in a single process.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from palm_t5x import last_words
from palm_t5x.errors import Failure, UserError

_DAY_MS = 86_400_000  # a wait that only a lost peer ends, and then the service does
_LEAVING_SECONDS = 3.0  # how long a process that fails stays, so that others hear why
_GRACE_SECONDS = 2.0  # how long others have to come to the same error themselves
_ERRORS = {'UserError': UserError, 'Failure': Failure}
# What a collective, a barrier or a transfer says when the other side has gone.
_LOST = re.compile(
  'Gloo|NCCL|Connection (closed|reset|refused)|Socket closed|heartbeat|'
  'CoordinationService|[Bb]arrier|UNAVAILABLE|DEADLINE_EXCEEDED|peer'
)


class Group:
  """The processes that this one has joined."""

  def __init__(self, address: str, count: int, index: int, heartbeat: int):
    self.address, self.count, self.index = address, count, index
    self.heartbeat = heartbeat
    self.joined = self.ending = False
    self.step: int | None = None
    self.turn = itertools.count()
    self.calls = itertools.count()
    self.last_words: last_words.LastWords | None = None
    self.preemption_handler: int | None = None

  @property
  def client(self) -> Any:
    """jax's connection to the coordination service; it has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


_group: Group | None = None


def start(group: Group) -> None:
  """Everything here is about `group` from now on; `joining` calls it."""
  global _group
  _group = group


def count() -> int:
  """How many processes have joined; 1 in a run of one process, and under Pathways."""
  return _group.count if _group else 1


def index() -> int:
  """Which of them this is; 0 writes what the run writes once."""
  return _group.index if _group else 0


# -- agreement --


def decide(choose: Callable[[], Any]) -> Any:
  """What `choose()` returns in process 0, where alone it is called, for all of them.

  Every process must call it at the same place. The value goes through JSON; a UserError
  or a Failure is raised by all. The others wait as long as it takes.
  """
  if _group is None:
    return choose()
  key = f'palm_t5x/decision/{next(_group.turn)}'
  if _group.index:
    kind, value = json.loads(_group.client.blocking_key_value_get(key, _DAY_MS))
    if kind in _ERRORS:
      raise _ERRORS[kind](value)
    return value
  try:
    value = choose()
    _group.client.key_value_set(key, json.dumps(['value', value]))
    return value
  except tuple(_ERRORS.values()) as error:
    _group.client.key_value_set(key, json.dumps([type(error).__name__, str(error)]))
    raise


def first(make: Callable[[], Any]) -> Any:
  """`make()` in process 0, and when that is done in all others."""
  if index() == 0:
    made = make()
    decide(lambda: None)
    return made
  decide(lambda: None)
  return make()


def agree(topic: str, facts: Mapping[str, str], remedy: str) -> None:
  """Compares what each process holds to be true with process 0.

  Args:
    topic: what it is about, for the message.
    facts: names to values as text.
    remedy: what the user can do.

  Raises:
    UserError: in every process, naming the processes that differ, and in what.
  """
  if _group is None:
    return
  theirs = decide(lambda: dict(facts))
  names = [n for n in sorted({*facts, *theirs}) if facts.get(n) != theirs.get(n)]
  turn = next(_group.turn)
  prefix = f'palm_t5x/differs/{turn}/'
  client = _group.client
  if names:
    shown = [
      f'{n} = {_short(facts.get(n))}, not {_short(theirs.get(n))}' for n in names
    ]
    more = f' and {len(shown) - 3} more' if len(shown) > 3 else ''
    client.key_value_set(f'{prefix}{_group.index}', '; '.join(shown[:3]) + more)
  client.wait_at_barrier(f'palm_t5x/agree/{turn}', _DAY_MS)
  found = client.key_value_dir_get(prefix)
  if found:
    differing = sorted((int(key.rpartition('/')[2]), text) for key, text in found)
    lines = [f'process {number} has {text}' for number, text in differing[:3]]
    more = f'; so have {len(differing) - 3} others' if len(differing) > 3 else ''
    raise UserError(
      f'the processes have another {topic} than process 0: {"; ".join(lines)}{more}. '
      f'{remedy}'
    )


def _short(text: str | None) -> str:
  if text is None:
    return 'nothing'
  return text if len(text) <= 80 else text[:77] + '...'


# -- signals --


@contextlib.contextmanager
def preemption() -> Iterator[None]:
  """SIGTERM inside the block is a notice to all processes, which `preempted` tells."""
  if _group is None or not _group.preemption_handler:
    yield
    return
  last_words.set_handler(signal.SIGTERM, _group.preemption_handler)
  try:
    yield
  finally:
    last_words.set_handler(signal.SIGTERM, 0)


def preempted(step: int) -> bool:
  """Whether all processes are to stop after this step, because one got SIGTERM.

  To be called after every step; it answers True at the same step everywhere.
  """
  if _group is None:
    return False
  from jax.experimental import multihost_utils

  _group.step = step
  # Not the step: after a loss spike that goes back.
  return multihost_utils.reached_preemption_sync_point(next(_group.calls))


# -- end --


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends with the others: waits for them, or tells them why this process fails."""
  if _group is None:
    yield
    return
  try:
    yield
  except SystemExit:
    _leave(_group)
    raise
  except BaseException as error:
    lost = _lost_peer(error) if isinstance(error, Exception) else None
    if lost is not None:
      _await_verdict(_group, lost)
    _announce(_group, error)
    raise
  _leave(_group)


def close(code: int) -> None:
  """Gives standard error back; a process that failed then ends without waiting.

  jax's own exit handler would wait for processes that will never come.
  """
  if _group is None or _group.last_words is None:
    return
  _group.last_words.close()
  _group.last_words = None
  if code and _group.client is not None:
    sys.stdout.flush()
    os._exit(code)


def _leave(group: Group):
  group.client.wait_at_barrier('palm_t5x/done', _DAY_MS)
  group.ending = True
  import jax

  jax.distributed.shutdown()


def _announce(group: Group, error: BaseException):
  """Tells the others why this process ends, and stays until they know."""
  group.ending = True
  with contextlib.suppress(Exception):
    text = first_line(error) or type(error).__name__
    reason = json.dumps([group.index, text])
    group.client.key_value_set('palm_t5x/failed', reason)
  with contextlib.suppress(Exception):  # those that fail alike need not wait
    group.client.wait_at_barrier('palm_t5x/leaving', int(1000 * _LEAVING_SECONDS))


def listen(group: Group):
  """Ends this process when another one says that it has failed (a thread)."""
  try:
    reason = group.client.blocking_key_value_get('palm_t5x/failed', _DAY_MS)
  except Exception:  # the run is over, or the service is; then others say so
    return
  # Process 0 goes last: the others would take its end for the loss of a peer.
  time.sleep(_GRACE_SECONDS if group.index else _LEAVING_SECONDS + _GRACE_SECONDS)
  if group.ending:
    return
  number, text = json.loads(reason)
  say(f'error: process {number} has failed, and this one ends with it: {text}')
  sys.stdout.flush()
  group.last_words.close()
  os._exit(1)


def _lost_peer(error: BaseException | None) -> BaseException | None:
  """The broken connection that an error is, or was caused by; None for others."""
  import jax

  while error is not None:
    ours = isinstance(error, UserError | Failure | OSError)
    theirs = not ours and isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    if theirs and _LOST.search(str(error)):
      return error
    error = error.__cause__ or error.__context__
  return None


def _await_verdict(group: Group, error: BaseException):
  """Waits for the coordination service to name the lost peer, which ends the process.

  Should it not, this process ends by itself, before twice the heartbeat time-out.
  """
  patience = 1.5 * group.heartbeat
  say(
    f'a peer was lost{_at(group)}; waiting up to {patience:g} s for the coordination '
    f'service to name it. ({first_line(error)})'
  )
  time.sleep(patience)
  say(
    f'error: a peer was lost{_at(group)}, and the coordination service did not name it '
    f'within {patience:g} s. Start all processes again: the run goes on from its last '
    'checkpoint.'
  )
  sys.stdout.flush()
  group.last_words.close()
  os._exit(1)


def verdict(group: Group, said: str) -> str:
  """The last line of a process that the coordination service aborts."""
  again = 'Start all processes again: the run goes on from its last checkpoint.'
  tasks = last_words.unhealthy(said)
  if tasks:
    return f'error: a peer was lost{_at(group)}. {tasks}. {again}'
  said = ' '.join(said.split()).partition('. ')[0][:300]
  if group.index == 0:
    return f'error: the coordination service failed{_at(group)}: {said}. {again}'
  return (
    f'error: coordinator unreachable{_at(group)}: process 0 at {group.address} is '
    f'lost, or the network to it ({said}). {again}'
  )


def _at(group: Group) -> str:
  return '' if group.step is None else f' after step {group.step}'


def first_line(error: BaseException) -> str:
  return ' '.join((str(error).strip() or type(error).__name__).splitlines()[0].split())


def say(text: str) -> None:
  print(f't5x: {text}', file=sys.stderr, flush=True)

"""How several processes find each other: flags, a scheduler, or Pathways.

jax aborts a process that cannot reach the others, and crashes on a port in use; what it
would stumble over is looked at here first, so that every failure is one line.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from palm_t5x import last_words, processes
from palm_t5x.errors import Failure, UserError

HEARTBEAT_TIMEOUT = 30  # seconds; the macro of this name in gin/runs/common.gin
_JOIN_SECONDS = 300
_FLAGS = ('coordinator_address', 'process_count', 'process_index')


def heartbeat_timeout(value: Any) -> int:
  """The macro HEARTBEAT_TIMEOUT, checked.

  Raises:
    UserError: if it is no whole number of seconds above zero.
  """
  value = HEARTBEAT_TIMEOUT if value is None else value
  if type(value) is not int or value < 1:
    raise UserError(f'HEARTBEAT_TIMEOUT={value!r}: whole seconds, 1 or more.')
  return value


def join(flags: Mapping[str, Any], heartbeat: int, automatic: bool = True) -> None:
  """Joins the other processes, if flags ask for it or a scheduler has started several.

  Args:
    flags: those of the command line that were given.
    heartbeat: seconds after which a silent process is taken for lost.
    automatic: look for Slurm, Open MPI, GKE and TPU pods where no flag was given.

  Raises:
    UserError: for flags that contradict each other, or Pathways without its client.
    Failure: if the coordinator cannot be reached, or its port is taken.
  """
  asked = flags.get('multiprocess_gpu') or any(name in flags for name in _FLAGS)
  if 'proxy' in _platforms():
    if any(name in flags for name in _FLAGS):
      raise UserError(
        'JAX_PLATFORMS=proxy is Pathways, which has one controller: leave out '
        '--coordinator_address, --process_count and --process_index.'
      )
    return _start_pathways()
  if not asked and not (automatic and _scheduler_started_several()):
    return None
  timeout = flags.get('initialization_timeout', _JOIN_SECONDS)
  deadline = time.monotonic() + timeout
  address, number, which, local = _parameters(flags, timeout)
  group = processes.Group(address, number, which, heartbeat)
  _await_coordinator(group, timeout, deadline)
  processes.start(group)
  _connect(group, timeout, deadline, local)
  return None


def _platforms() -> str:
  return (
    os.environ.get('JAX_PLATFORMS', '')
    if 'jax' not in sys.modules
    else (sys.modules['jax'].config.jax_platforms or '')
  )


def _start_pathways() -> None:
  """One controller drives all chips: no other process to join."""
  try:
    import pathwaysutils
  except ImportError:
    raise UserError(
      'JAX_PLATFORMS=proxy asks for Pathways, whose client is not installed: pip '
      'install pathwaysutils, or unset JAX_PLATFORMS.'
    ) from None
  pathwaysutils.initialize()


def _scheduler_started_several() -> bool:
  """Whether Slurm, Open MPI, GKE or a TPU pod says that there are more processes.

  Looks at environment variables only, except on a TPU host or in an indexed Kubernetes
  job, where jax asks the metadata server.
  """
  from jax._src import clusters

  try:
    for cluster in clusters.ClusterEnv._cluster_types:
      plain_pod = cluster.name == 'k8s' and 'JOB_COMPLETION_INDEX' not in os.environ
      if cluster.opt_in_only_method or plain_pod or not cluster.is_env_present():
        continue
      return cluster.get_process_count() > 1
  except Exception as error:
    raise Failure(
      f'the other processes of this job cannot be found '
      f'({processes.first_line(error)}): give --coordinator_address, --process_count '
      'and --process_index.'
    ) from error
  return False


def _parameters(flags: Mapping[str, Any], timeout: int) -> tuple[str, int, int, Any]:
  """Address, count, index and local devices: flags, and what jax finds of the rest.

  Raises:
    UserError: if something is missing or impossible.
    Failure: if the scheduler cannot be asked.
  """
  from jax._src import clusters

  given = [flags.get(name) for name in _FLAGS]
  given[0] = given[0] or os.environ.get('JAX_COORDINATOR_ADDRESS')
  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      *given, None, None, timeout
    )
  except Exception as error:
    raise Failure(
      f'the other processes of this job cannot be found: {processes.first_line(error)}'
    ) from error
  missing = [
    f'--{name}' for name, value in zip(_FLAGS, found, strict=False) if value is None
  ]
  if missing:
    raise UserError(
      f'no scheduler was found that says {", ".join(missing)}: give all of '
      f'{", ".join("--" + name for name in _FLAGS)}.'
    )
  address, number, which, local = found
  if not re.fullmatch(r'.+:\d{1,5}', address):
    raise UserError(f'--coordinator_address={address}: it is HOST:PORT of process 0.')
  if not 0 <= which < number:
    raise UserError(
      f'--process_index={which} must be in 0..{number - 1} (--process_count={number}).'
    )
  return address, number, which, local


def _await_coordinator(group: processes.Group, timeout: float, deadline: float):
  """Waits until something listens at the coordinator's address, or can listen here.

  jax itself would abort the process where it fails, and crash on a port in use.

  Raises:
    Failure: naming the address.
  """
  host, _, port = group.address.rpartition(':')
  host = host.strip('[]')
  if group.index == 0:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(('', int(port)))
        probe.listen(1)
      except (OSError, OverflowError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise Failure(
          f'the coordinator cannot listen on port {port} ({reason}): '
          'give all processes another --coordinator_address.'
        ) from None
    return
  reason: Any = 'no answer'
  while (left := deadline - time.monotonic()) > 0:
    try:
      socket.create_connection((host, int(port)), timeout=max(0.1, left)).close()
      return
    except (OSError, OverflowError) as error:
      reason = getattr(error, 'strerror', None) or error
      time.sleep(min(0.2, max(left, 0)))
  raise Failure(_unreachable(group, timeout, reason))


def _unreachable(group: processes.Group, timeout: float, reason: Any) -> str:
  return (
    f'coordinator unreachable: nothing answers at {group.address} within {timeout:g} s '
    f'({reason}). Start process 0 there, or correct --coordinator_address; '
    '--initialization_timeout is how long to wait.'
  )


def _connect(group: processes.Group, timeout: float, deadline: float, local: Any):
  """jax.distributed.initialize, with an end to its waiting, and our last words."""
  import jax

  incomplete = (
    f'error: not all of the {group.count} processes came to {group.address} within '
    f'{timeout:g} s (this is process {group.index}). Start them all, with the same '
    '--coordinator_address and --process_count.'
  )

  def give_up():
    processes.say(incomplete)
    group.last_words.close()
    os._exit(1)

  def explain(said: str) -> str:
    return f't5x: {processes.verdict(group, said) if group.joined else incomplete}'

  group.last_words = last_words.LastWords(explain)
  # jax aborts the process when its own time is up, at about twice what it is given.
  alarm = threading.Timer(max(deadline - time.monotonic(), 0.5), give_up)
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      coordinator_address=group.address,
      num_processes=group.count,
      process_id=group.index,
      local_device_ids=local,
      initialization_timeout=max(1, round(deadline - time.monotonic())),
      heartbeat_timeout_seconds=group.heartbeat,
    )
  except (RuntimeError, ValueError) as error:
    raise Failure(
      f'the processes could not be joined at {group.address}: '
      f'{processes.first_line(error)}'
    ) from error
  finally:
    alarm.cancel()
  group.joined = True
  # jax has set its own handler of SIGTERM, which only train knows what to do with.
  group.preemption_handler = last_words.set_handler(signal.SIGTERM, 0)
  threading.Thread(
    target=processes.listen, args=[group], daemon=True, name='peers'
  ).start()

"""Settled before jax and TensorFlow are imported: folders, threads, caches.

jax reads its options, its thread count and its cache folder once, on import; so `main`
calls `prepare` first, with what a syntactic look at the Gin files has found.
"""

import ctypes
import glob
import importlib.util
import os
import sys
from collections.abc import Mapping


def cache_dir(path: str | None = None) -> str:
  """The folder for everything that can be made again: token stores, vocabularies, XLA.

  Args:
    path: the macro CACHE_DIR; None means $XDG_CACHE_HOME/palm_t5x, or
      ~/.cache/palm_t5x.
  """
  if path is None:
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
    path = os.path.join(home, 'palm_t5x')
  if '://' in path:
    return path
  return os.path.abspath(os.path.expanduser(os.path.expandvars(path)))


def package_gin_dir() -> str:
  """The folder of Gin files that belongs to this package, installed or checked out."""
  here = os.path.dirname(os.path.abspath(__file__))
  installed = os.path.join(here, 'gin')
  checkout = os.path.join(os.path.dirname(here), 'gin')
  return installed if os.path.isdir(installed) else checkout


def prepare(
  nproc: int | None = None,
  cache: str | None = None,
  jax_flags: Mapping[str, str] | None = None,
) -> None:
  """Sets the environment for jax and TensorFlow; the user's own settings win.

  Args:
    nproc: threads that XLA's CPU backend uses (macro NPROC). Results on CPU depend on
      it, so a run that must repeat on another machine pins it. None: what is there.
    cache: the macro CACHE_DIR; compiled programs are kept in its folder `xla`.
    jax_flags: `--jax_*` flags, name to value, as jax reads them from its environment.
  """
  keep_freed_memory()
  if nproc is not None:
    os.environ['NPROC'] = str(nproc)
  os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', os.path.join(cache_dir(cache), 'xla')
  )
  if _tpu_compiler_without_tpu():
    # Else jax would load it in search of chips, and it would write to the terminal.
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  # TensorFlow only feeds data here. It must neither speak of CUDA nor take GPU memory.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
  for name, value in (jax_flags or {}).items():
    os.environ[name.upper()] = value
    if 'jax' in sys.modules:
      _update_jax(name, value)


def compile_only(topology: object, num_slices: object = 1) -> None:
  """Readies a process that compiles for another machine and runs nothing.

  No accelerator is looked for, and as many CPU devices are simulated as `topology`,
  such as 'cpu:64', asks for. The user's own settings win.

  Args:
    topology: the macro TOPOLOGY; None means this machine, and changes nothing.
    num_slices: the macro NUM_SLICES: how many times as many.
  """
  if not isinstance(topology, str):
    return
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  kind, _, count = topology.partition(':')
  flags = os.environ.get('XLA_FLAGS', '')
  option = '--xla_force_host_platform_device_count'
  if kind == 'cpu' and count.isdigit() and option not in flags:
    devices = int(count) * (num_slices if isinstance(num_slices, int) else 1)
    os.environ['XLA_FLAGS'] = f'{flags} {option}={devices}'.strip()


def quiet_libtpu(cache: str | None = None) -> None:
  """Settings under which libtpu works without a TPU and says nothing.

  It would ask Google's metadata server where it is, refuse to be loaded by a second
  process, and write its logs to a shared folder.

  Args:
    cache: the folder below which its logs go, CACHE_DIR.
  """
  logs = os.path.join(cache_dir(cache), 'libtpu_logs')
  os.makedirs(logs, exist_ok=True)
  for name, value in {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v4-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_LOG_DIR': logs,
    'TPU_STDERR_LOG_LEVEL': '3',
  }.items():
    os.environ.setdefault(name, value)


def _tpu_compiler_without_tpu() -> bool:
  """Whether libtpu is installed (for `t5x precompile`) and there is no accelerator."""
  installed = importlib.util.find_spec
  chips = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(installed('libtpu') and not chips and not installed('jax_plugins'))


def keep_freed_memory() -> None:
  """Tells glibc to keep what is freed instead of returning it to the kernel.

  XLA's CPU backend allocates all of a step's temporaries anew each step. Given back and
  faulted in again page by page, they cost up to a quarter of the step. Anywhere but on
  Linux with glibc this does nothing.
  """
  if not sys.platform.startswith('linux'):
    return
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return
  trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # glibc's malloc.h
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, -1)
  mallopt(top_pad, 1 << 28)
  mallopt(arena_max, 1)


def unknown_jax_flags(names) -> list[str]:
  """Those of `names` that the imported jax does not know."""
  import jax

  return [name for name in names if not hasattr(jax.config, name)]


def _update_jax(name: str, value: str) -> None:
  """Sets an option of an already imported jax, converting the text to its type."""
  import jax

  old = getattr(jax.config, name, None)
  if isinstance(old, bool):
    jax.config.update(name, value.lower() in ('1', 'true', 'y', 'yes', 'on'))
  elif isinstance(old, int | float):
    jax.config.update(name, type(old)(value))
  elif hasattr(jax.config, name):
    jax.config.update(name, value)

"""Looks for ways to compile a step: those that fit, and the fastest of them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from palm_t5x.errors import Failure, UserError
from palm_t5x.network_config import REMAT_POLICIES
from palm_t5x.step_compiler import GIB, Compiler, DoesNotFitError, Step, Variant

# Options of libtpu's compiler that let transfers run beside computation.
ASYNC_OPTIONS = (
  {'xla_enable_async_all_gather': 'true'},
  {
    'xla_enable_async_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
  },
)
_REMEDIES = 5  # compilations that an error may cost


def search(
  compiler: Compiler,
  first: Variant,
  tries: int,
  account: Callable[[Step], dict[str, Any]],
) -> list[dict[str, Any]]:
  """Compiles variants of a configuration, one after another, and ranks them.

  First every rematerialisation policy, then other microbatch counts and asynchronous
  collectives with the best of them.

  Args:
    compiler: of the configuration.
    first: the configuration as it is; always tried.
    tries: programs to compile at most.
    account: what is known of a compiled step, with its bounds.

  Returns:
    One entry for each try: those that fit, by the summed bound (bytes where there is
    none), then those that do not.

  Raises:
    UserError: if `tries` is not a number above zero.
  """
  if type(tries) is not int or tries < 1:
    raise UserError(f'SEARCH_TRIES={tries!r}: it is a number of programs, 1 or more.')
  found: list[dict[str, Any]] = []
  seen: list[Variant] = []

  def attempt(variant: Variant) -> None:
    if variant in seen or len(seen) >= tries:
      return
    seen.append(variant)
    print(f'{len(seen):3} of at most {tries}: {variant.text()} ...', flush=True)
    found.append(_attempt(compiler, variant, account))

  attempt(first)
  if first.remat_policy is not None:
    for policy in _worth_trying(first.remat_policy):
      attempt(dataclasses.replace(first, remat_policy=policy))
      if not found[-1]['fits'] and _saves_more(policy, first.remat_policy):
        break  # those that save still more do not fit either
  for variant in _around(_best(found, seen) or first):
    attempt(variant)
  return sorted(found, key=_rank)


def remedy(compiler: Compiler, variant: Variant) -> str:
  """What makes a step fit, found by compiling it: one sentence or two."""
  tried = []
  for other in _smaller(compiler, variant):
    if len(tried) == _REMEDIES:
      break
    tried.append(other.text())
    try:
      step = compiler.compile(other)
    except (DoesNotFitError, UserError, Failure):
      continue
    return f'With {_binding(variant, other)} it fits: {step.total_bytes / GIB:.2f} GiB.'
  return (
    f'Nor does it fit with {"; ".join(tried)}: use more chips, a larger model axis, or '
    'a smaller batch.'
    if tried
    else 'Use more chips, a larger model axis, or a smaller batch.'
  )


def _binding(old: Variant, new: Variant) -> str:
  """The Gin bindings that lead from one to the other."""
  parts = []
  if new.remat_policy != old.remat_policy:
    parts.append(f"--gin.network.TransformerConfig.remat_policy='{new.remat_policy}'")
  if new.microbatches != old.microbatches:
    parts.append(f'--gin.MICROBATCHES={new.microbatches}')
  return ' '.join(parts)


def _smaller(compiler: Compiler, variant: Variant) -> Iterator[Variant]:
  """Variants that need less memory, the least costly in time first."""
  rows = variant.batch_size // compiler.partitioner.num_data_shards
  counts = [n for n in (2, 4, 8, 16) if n > variant.microbatches and rows % n == 0]
  names = list(REMAT_POLICIES)
  policies = []
  if variant.remat_policy is not None:
    policies = names[: names.index(variant.remat_policy)][::-1]
  for policy in (*policies[:1], *policies[-1:]):
    yield dataclasses.replace(variant, remat_policy=policy)
  least = policies[-1] if policies else variant.remat_policy
  for count in (*counts[:1], *counts[-1:]):
    yield dataclasses.replace(variant, microbatches=count, remat_policy=least)


def _worth_trying(policy: str) -> Sequence[str]:
  """Cheaper policies first, so that a search that is cut short has one that fits."""
  return [name for name in REMAT_POLICIES if name != policy]


def _saves_more(policy: str, other: str) -> bool:
  names = list(REMAT_POLICIES)
  return names.index(policy) > names.index(other)


def _around(best: Variant) -> Iterator[Variant]:
  """Microbatches and options beside the best so far."""
  counts = {best.microbatches * 2, max(1, best.microbatches // 2)}
  for count in sorted(counts - {best.microbatches}):
    yield dataclasses.replace(best, microbatches=count)
  for options in ASYNC_OPTIONS:
    yield dataclasses.replace(best, options={**best.options, **options})


def _attempt(compiler, variant: Variant, account) -> dict[str, Any]:
  try:
    facts = account(compiler.compile(variant))
  except DoesNotFitError as error:
    needs = {'used': error.used, 'limit': error.limit}
    return {'fits': False, 'text': variant.text(), **needs}
  except UserError as error:
    return {'fits': False, 'text': f'{variant.text()}: {error}', 'used': 0, 'limit': 0}
  return {'fits': True, 'text': variant.text(), **facts}


def _best(found: list[dict[str, Any]], seen: list[Variant]) -> Variant | None:
  pairs = [(_rank(one), n) for n, one in enumerate(found) if one['fits']]
  return seen[min(pairs)[1]] if pairs else None


def _rank(one: dict[str, Any]) -> tuple:
  if not one['fits']:
    return (1, one['used'], 0.0)
  bounds = one['bounds']
  total = one['memory']['total']
  return (0, bounds['summed']['seconds'] if bounds else total, total)

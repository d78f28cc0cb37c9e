"""Which dimensions of a parameter Adafactor averages over, and which it factors.

A rule gives every dimension a `FactorDim`: by logical axis name
(`standard_logical_factor_rules`), by path (`HParamMap`), or by the paper's heuristic.
All names are T5X's and are reached as `adafactor.<name>`.
"""

import dataclasses
import difflib
import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_t5x.errors import UserError


class FactorDim(enum.Enum):
  """What factoring does with one dimension of a parameter (T5X `FactorDim`)."""

  NONE = None  # Not factored.
  BATCH = 1  # One parameter per index: never averaged over.
  ROW = 2
  COLUMN = 3


class HeuristicRule(enum.Enum):
  """The rule of the paper: the two largest dimensions, if both are large enough."""

  token = 1


HEURISTIC_RULE = HeuristicRule.token


class HParamMap:
  """A value per parameter: the first rule whose regex is found in its path wins.

  Rules are pairs (regex, value), paths look like 'layers/kv_fused' (T5X
  `adafactor.HParamMap`). A path that no rule matches is a UserError.
  """

  def __init__(self, rules: Sequence[tuple[str, Any]]):
    self._rules = [(re.compile(pattern), value) for pattern, value in rules]

  def __getitem__(self, path: str) -> Any:
    for pattern, value in self._rules:
      if pattern.search(path):
        return value
    raise UserError(
      f'No rule of this HParamMap matches parameter {path!r}: add a last rule '
      "('.*', value) for all others."
    )


def standard_logical_factor_rules() -> dict[str, FactorDim]:
  """Logical axis name -> FactorDim: T5X's table, and the names of palm_t5x.network."""
  return {
    'vocab': FactorDim.COLUMN,
    'embed': FactorDim.ROW,
    'kv_embed': FactorDim.ROW,
    'mlp': FactorDim.COLUMN,
    'heads': FactorDim.COLUMN,
    'kv': FactorDim.COLUMN,
    'kv_heads': FactorDim.COLUMN,
    'fused': FactorDim.COLUMN,
    'joined_kv': FactorDim.COLUMN,
    'relpos_buckets': FactorDim.NONE,
    'layers': FactorDim.BATCH,
    'stack': FactorDim.BATCH,
    'q_wi_fused': FactorDim.COLUMN,
    'o_wo_fused': FactorDim.COLUMN,
    'multiquery_heads': FactorDim.COLUMN,
    'kv_fused': FactorDim.COLUMN,
    'layer_norm_scale': FactorDim.NONE,
  }


def factor_name_to_factordim(name: str | FactorDim) -> FactorDim:
  """'row', 'col(umn)', 'batch', 'none', 'unfactorized' (any case) -> FactorDim."""
  if not isinstance(name, str):
    return name
  names = {'col': 'COLUMN', 'unfactorized': 'NONE'}
  try:
    return FactorDim[names.get(name.lower(), name.upper())]
  except KeyError:
    raise UserError(
      f'Unknown factor dimension {name!r}: use row, column, batch or none.'
    ) from None


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """How one parameter's statistics are taken: all axis numbers, fixed by its shape.

  `averaging`: axes of an RMS. `rows`, `columns`: the factored axes, both empty where
  the second moment is kept whole.
  """

  averaging: tuple[int, ...]
  rows: tuple[int, ...] = ()
  columns: tuple[int, ...] = ()

  def rms(self, x: jax.Array) -> jax.Array:
    """Root mean square per layer, kept broadcastable against x."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=self.averaging, keepdims=True))


Rule = tuple[FactorDim, ...] | HeuristicRule | None


class Planner:
  """(path, shape, logical axes or None) -> LeafPlan, by Adafactor's keywords."""

  def __init__(
    self,
    factored: bool,
    min_dim_size_to_factor: int,
    factor_map: HParamMap | None,
    logical_factor_rules: Mapping[str, FactorDim | str] | None,
  ):
    self.factored = factored
    self.min_dim_size_to_factor = min_dim_size_to_factor
    self.factor_map = factor_map
    self.logical_factor_rules = logical_factor_rules

  def __call__(self, path: str, shape: tuple[int, ...], axes: Any) -> LeafPlan:
    """The plan of one parameter; UserError where no rule fits it."""
    rule = self._rule(path, axes)
    dims = rule if isinstance(rule, tuple) else ()
    if dims and len(dims) != len(shape):
      raise UserError(
        f'Adafactor: parameter {path!r} has shape {shape}, but its factor rule has '
        f'{len(dims)} entries: {[d.name for d in dims]}.'
      )
    batch = _where(dims, FactorDim.BATCH)
    averaging = tuple(d for d in range(len(shape)) if d not in batch)
    if not self.factored or rule is None:
      return LeafPlan(averaging)
    if not batch and len(shape) <= 2:
      # As T5X: vectors and matrices follow the paper, whatever their rule says.
      return LeafPlan(averaging, *self._largest_two(shape))
    if rule is HEURISTIC_RULE:
      raise UserError(
        f'Adafactor: parameter {path!r} has {len(shape)} dimensions and no factor '
        'rule. Bind logical axes, give a factor_map, or set factored = False.'
      )
    rows, columns = _where(dims, FactorDim.ROW), _where(dims, FactorDim.COLUMN)
    return (
      LeafPlan(averaging, rows, columns) if rows and columns else LeafPlan(averaging)
    )

  def _rule(self, path: str, axes: Any) -> Rule:
    """A FactorDim per dimension, the heuristic, or None: keep v whole."""
    rules = self.logical_factor_rules
    if axes is None or (rules is None and self.factor_map is not None):
      rule = HEURISTIC_RULE if self.factor_map is None else self.factor_map[path]
      if rule is None or rule is HEURISTIC_RULE:
        return rule
      return tuple(map(factor_name_to_factordim, rule))
    rules = standard_logical_factor_rules() if rules is None else rules
    rule = tuple(_lookup(rules, path, name, self.factored) for name in axes)
    if self.factored and {FactorDim.ROW, FactorDim.COLUMN, FactorDim.NONE} <= set(rule):
      raise UserError(
        f'Adafactor: the factor rules make {path!r} with axes {tuple(axes)} rows, '
        f'columns and none at once: {[d.name for d in rule]}. Each dimension must be '
        'row, column or batch, or none of them row and column.'
      )
    return rule

  def _largest_two(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if len(shape) < 2 or min(shape) < self.min_dim_size_to_factor:
      return (), ()
    row, column = np.argsort(shape, kind='stable')
    return (int(row),), (int(column),)


def _where(rule: Sequence[FactorDim], kind: FactorDim) -> tuple[int, ...]:
  return tuple(d for d, value in enumerate(rule) if value is kind)


def _lookup(
  rules: Mapping[str, FactorDim | str], path: str, name: str | None, strict: bool
) -> FactorDim:
  """The FactorDim of one axis; an unknown name matters only when factoring."""
  if name in rules:
    return factor_name_to_factordim(rules[name])
  if name is None or not strict:
    return FactorDim.NONE
  near = difflib.get_close_matches(name, rules, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  raise UserError(
    f'Adafactor: axis {name!r} of parameter {path!r} is not in logical_factor_rules.'
    f'{hint} Known axes: {", ".join(sorted(rules))}.'
  )

"""`t5x precompile`: what it counts against hand arithmetic, and what it refuses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import runs

from palm_t5x import chips, precompile_report, precompile_search, topology
from palm_t5x.compiled_program import Program
from palm_t5x.errors import Failure, UserError
from palm_t5x.network_config import REMAT_POLICIES
from palm_t5x.step_compiler import GIB, DoesNotFitError, Step, Variant

# runs.CONFIG's model on rows of 64 tokens.
LAYERS, WIDTH, HEADS, HEAD, INNER, VOCABULARY, LENGTH = 2, 64, 2, 32, 128, 512, 64
IN = WIDTH * (HEADS * HEAD + 2 * INNER)  # q and both branches
KV = WIDTH * 2 * HEAD
OUT = (HEADS * HEAD + INNER) * WIDTH
KERNELS = VOCABULARY * WIDTH + LAYERS * (IN + OUT)  # all but kv and the norms
PAIRS = LENGTH * HEADS * HEAD  # of one token's queries with all keys

FSDP = (
  'partitioning.PjitPartitioner.num_partitions=None',
  'partitioning.standard_logical_axis_rules.activation_partitioning_dims=2',
  'partitioning.standard_logical_axis_rules.parameter_partitioning_dims=2',
)


def mesh(ici, dcn=(1, 1, 1)):
  """Bindings of a mesh with the paper's rules."""
  shape = 'partitioning.PjitPartitioner'
  return (*FSDP, f'{shape}.ici_mesh_shape={ici}', f'{shape}.dcn_mesh_shape={dcn}')


@pytest.fixture(scope='module')
def precompile(workspace):
  """(bindings) -> (what was printed, the program's facts); runs each once."""
  known = {}

  def call(*bindings):
    if bindings not in known:
      model_dir = workspace / f'precompiled_{len(known)}'
      done = runs.here(workspace, 'precompile', model_dir, *bindings)
      assert done.code == 0, done.err
      written = json.loads((model_dir / 'precompile.json').read_text())
      known[bindings] = done, written
    done, written = known[bindings]
    return done, written['programs'][-1]

  return call


def sent(facts, axis, kind=None):
  """Bytes that a chip sends over an axis."""
  return sum(
    c['wire_bytes']
    for c in facts['collectives']
    if c['axis'] == axis and kind in (None, c['kind'])
  )


# --- Simulated devices.

REMAT = 'network.TransformerConfig.remat_policy'
# Unrolled, as on a CPU by default, XLA sees that what is computed again is known.
LOOP = 'network.TransformerConfig.scan_unroll=1'


def recomputed(policy):
  """FLOPs per token of a layer that the backward pass does again, by hand.

  'full' keeps the layer's input: all but the output projection, which no gradient
  needs. 'save_wi' keeps q, k, v, both branches and what attention gave: scores again.
  """
  return {'none': 0, 'full': 2 * (IN + KV) + 4 * PAIRS, 'save_wi': 2 * PAIRS}[policy]


@pytest.mark.parametrize(
  ('policy', 'ici'),
  [
    ('none', (1, 4, 2)),
    ('full', (1, 4, 2)),
    ('save_wi', (1, 4, 2)),
    ('full', (1, 8, 1)),
  ],
)
def test_flops_equal_hand_arithmetic(precompile, policy, ici):
  _, facts = precompile('TOPOLOGY=cpu:8', *mesh(ici), f"{REMAT}='{policy}'", LOOP)
  once = LAYERS * (2 * (IN + KV + OUT) + 4 * PAIRS) + 2 * VOCABULARY * WIDTH
  expected = 3 * once + LAYERS * recomputed(policy)
  assert facts['flops']['hardware_per_token'] == expected


@pytest.mark.parametrize('ici', [(1, 4, 2), (1, 8, 1)])
def test_state_is_sharded_over_all_chips(precompile, ici):
  _, facts = precompile('TOPOLOGY=cpu:8', *mesh(ici), f'{REMAT}=full')
  memory = facts['memory']
  assert KERNELS * 4 / 8 < memory['parameters'] < (KERNELS + 2 * KV + 1000) * 4 / 4
  assert 0 <= memory['optimizer'] - 2 * memory['parameters'] <= 64  # and a counter
  parts = ('parameters', 'optimizer', 'activations', 'temporaries')
  assert memory['total'] == pytest.approx(sum(memory[part] for part in parts))


@pytest.mark.parametrize('microbatches', [1, 2])
def test_gradients_cross_the_pods_once_as_shards(precompile, microbatches):
  _, facts = precompile(
    *('TOPOLOGY=cpu:4', 'NUM_SLICES=2', f'MICROBATCHES={microbatches}'),
    *mesh((1, 2, 2), (2, 1, 1)),
  )
  shards = facts['memory']['parameters']
  assert shards <= sent(facts, 'pod') < shards + 4096  # a few metrics ride along
  assert {c['network'] for c in facts['collectives'] if c['axis'] == 'pod'} == {'dcn'}
  assert not [
    c for c in facts['collectives'] if 'pod' in c['axes'] and c['kind'] == 'all-gather'
  ]


def test_text_is_one_screen(precompile):
  done, facts = precompile('TOPOLOGY=cpu:8', *mesh((1, 4, 2)), f'{REMAT}=full')
  lines = done.out.splitlines()
  assert len(lines) < 50 and max(map(len, lines[:-1])) <= 110
  assert not done.err
  assert facts['bounds'] is None and 'Bounds' not in done.out


def test_every_size_of_the_ramp(workspace, tmp_path):
  done = runs.here(
    *(workspace, 'precompile', tmp_path, 'TOPOLOGY=cpu:1'),
    *('BATCH_SIZE=((0, 2), (5, 4), (9, 2))', 'PRECOMPILE_BATCH_SIZE=all'),
    'network.TransformerConfig.num_layers=1',
  )
  assert done.code == 0, done.err
  programs = json.loads((tmp_path / 'precompile.json').read_text())['programs']
  assert [p['batch_size'] for p in programs] == [2, 4]


def test_the_file_that_t5x_configurations_include(workspace, tmp_path):
  """T5X's scopes and macros, its backend='tpu', no vocabulary and no task anywhere."""
  (tmp_path / 'mine.gin').write_text("""
from __gin__ import dynamic_registration
from t5x import partitioning
from palm_t5x import network
include 'models/base.gin'
include 't5x/configs/runs/precompile.gin'
CACHE_DIR = '/nowhere'
VOCABULARY_PATH = 'nowhere.model'
network.TransformerConfig:
  vocab_size = 512
  emb_dim = 32
  num_heads = 2
  num_layers = 1
  head_dim = 16
  mlp_dim = 64
MIXTURE_OR_TASK_NAME = 'no_such_task'
TASK_FEATURE_LENGTHS = {'targets': 16}
BATCH_SIZE = 4
partitioning.PjitPartitioner.num_partitions = 2
""")
  model_dir = tmp_path / 'run'
  words = [f'--gin_file={tmp_path}/mine.gin', f'--gin.MODEL_DIR={model_dir}']
  done = runs.t5x('precompile', *words, '--gin.precompile.topology_name=cpu:4')
  assert done.code == 0, done.err
  assert [path.name for path in model_dir.iterdir()] == ['precompile.json']
  done = runs.t5x('precompile', *words)
  assert 'this machine has no tpu' in done.error


# --- The real compiler, for a small machine.

# Larger, so that a few metrics and padding to whole tiles do not matter.
BIG = 512
BIG_KERNELS = VOCABULARY * BIG + LAYERS * (
  BIG * (HEADS * HEAD + 2 * 4 * BIG) + (HEADS * HEAD + 4 * BIG) * BIG
)
TPU = (
  *('TOPOLOGY=v4:2x2x1', 'NUM_SLICES=2', 'DTYPE=auto'),
  f'network.TransformerConfig.emb_dim={BIG}',
  f'network.TransformerConfig.mlp_dim={4 * BIG}',
  *mesh((1, 2, 2), (2, 1, 1)),
)


@pytest.mark.parametrize(
  ('dtype', 'size', 'microbatches'), [('float32', 4, 1), ('bfloat16', 2, 2)]
)
def test_a_program_for_two_slices(precompile, dtype, size, microbatches):
  done, facts = precompile(
    *TPU,
    f'POD_GRADIENT_DTYPE={dtype}',
    f'MICROBATCHES={microbatches}',
  )
  assert not done.err, 'libtpu is quiet'
  assert 'TPU v4' in done.out and 'bfloat16' in done.out
  across = [c for c in facts['collectives'] if c['network'] == 'dcn']
  assert {c['axis'] for c in across} == {'pod'}
  assert 'all-gather' not in {c['kind'] for c in across}
  shards = BIG_KERNELS // 4 * size
  assert sum(c['wire_bytes'] for c in across) == pytest.approx(shards, rel=0.1)
  memory = facts['memory']
  assert 3 * BIG_KERNELS < memory['parameters'] + memory['optimizer'] < memory['total']
  assert memory['total'] < memory['limit'] == 30.75 * GIB
  bounds = facts['bounds']
  assert bounds['summed']['seconds'] == pytest.approx(sum(bounds['seconds'].values()))
  assert bounds['overlapped']['seconds'] == max(bounds['seconds'].values())
  dcn = (
    sum(c['wire_bytes'] for c in across) / chips.PUBLISHED['v4'].dcn_bytes_per_second
  )
  assert bounds['seconds']['dcn'] == pytest.approx(dcn)


@pytest.mark.slow
def test_what_does_not_fit_says_what_does(workspace, tmp_path):
  """The remedy is compiled before it is named."""
  done = runs.here(
    *(workspace, 'precompile', tmp_path, 'TOPOLOGY=v5e:1x1', 'DTYPE=auto'),
    *("TASK_FEATURE_LENGTHS={'targets': 2048}", 'BATCH_SIZE=4096', f'{REMAT}=full'),
    'LOSS_CHUNK_LENGTH=128',
  )
  assert done.code == 2
  assert 'of a chip, which has 15.75 GiB' in done.error
  assert 'GiB too much. With --gin.MICROBATCHES=' in done.error


# --- Mistakes.


@pytest.mark.parametrize(
  ('bindings', 'expected'),
  [
    (['TOPOLOGY=v4:12x16'], 'Did you mean v4:12x16x16'),
    (['TOPOLOGY=v7:2x2x1'], "TOPOLOGY='v7:2x2x1' is unknown"),
    (['TOPOLOGY=v4:3x2x1'], 'not divisible by'),
    (['TOPOLOGY=12'], 'TOPOLOGY=12 is unknown'),
    (['TOPOLOGY=cpu:4096x2'], 'is unknown'),
    (['TOPOLOGY=cpu:9'], 'XLA simulates 8 in this process'),
    (['NUM_SLICES=0', 'TOPOLOGY=cpu:8'], 'NUM_SLICES=0'),
    (['NUM_SLICES=2'], 'needs TOPOLOGY'),
    (['partitioning.PjitPartitioner.backend=tpu'], 'this machine has no tpu'),
    (['PRECOMPILE_BATCH_SIZE=most'], "'all' for every size"),
    (['TOPOLOGY=cpu:8', 'BATCH_SIZE=9'], 'Use 8 or 16'),
    (['TOPOLOGY=cpu:8', 'MICROBATCHES=3'], 'times 3 microbatches'),
    (['TOPOLOGY=cpu:8', *mesh((1, 2, 4))], 'does not divide by the 4 devices'),
    (['TOPOLOGY=cpu:8', *mesh((1, 4, 4))], 'needs 16 devices, but there are 8'),
    (['TOPOLOGY=v4:2x2x1', '--search', 'SEARCH_TRIES=0'], 'SEARCH_TRIES=0'),
    (['chips.Chip.peak_flops=-1'], 'chips.Chip.peak_flops=-1'),
    (
      ['TOPOLOGY=cpu:1', "COMPILER_OPTIONS={'xla_nonsense': 'true'}"],
      "No such compile option: 'xla_nonsense'",
    ),
  ],
)
def test_mistakes_are_one_line(workspace, tmp_path, bindings, expected):
  done = runs.here(workspace, 'precompile', tmp_path / 'run', *bindings)
  assert done.code in (1, 2)
  assert expected in done.error


def test_libtpu_is_missing(workspace, tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda n, *a: None if n == 'libtpu' else find(n, *a)
  )
  done = runs.here(workspace, 'precompile', tmp_path, 'TOPOLOGY=v4:2x2x1')
  assert done.code == 1 and "pip install 'palm_t5x[tpu]'" in done.error


def test_other_modes_have_no_search(workspace, tmp_path):
  done = runs.here(workspace, 'train', tmp_path, '--search')
  assert done.code == 2 and 'it belongs to t5x precompile' in done.error


# --- Rates.


def test_bounds_are_quotients():
  chip = chips.Chip(100.0, 1.0, 10.0, 5.0, 6, 2.0)
  seconds = chips.bounds(chip, 300.0, 20.0, {'data': 40.0, 'x': 30.0}, {'data': 4}, 6.0)
  assert seconds == {
    'compute': 3.0,
    'hbm': 2.0,
    'ici data': 2.0,  # 4 links of 5
    'ici x': 1.0,  # all 6
    'dcn': 3.0,
  }


def test_given_rates_replace_published_ones():
  published = chips.PUBLISHED['v4']
  mixed = chips.Chip(peak_flops=1e15).over(published)
  assert mixed == dataclasses.replace(published, peak_flops=1e15)
  with pytest.raises(UserError, match='above zero'):
    chips.Chip(ici_links=0)


def test_links_of_a_mesh_axis_are_those_of_its_torus_axes():
  """12-way model on the axis of 12, 256-way data on the two of 16."""
  from palm_t5x import partitioning

  where = topology.find('v4:12x16x16', 2)
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=(1, 256, 12), dcn_mesh_shape=(2, 1, 1), devices=where.devices
  )
  links = where.links(partitioner.mesh)
  assert (links['model'], links['data'], links['data+model']) == (2, 4, 6)
  numbers = where.mesh(partitioner.mesh)
  assert numbers.slices == {'pod': 2}
  assert numbers.in_slice == {'pod': 1, 'data': 256, 'model': 12}


# --- Search, over a compiler that knows what everything costs.


class FakeCompiler:
  """Takes 10 GiB for each policy after the first, less with microbatches."""

  def __init__(self, limit=31):
    self.limit, self.asked = limit, []
    self.partitioner = self
    self.num_data_shards = 4

  def compile(self, variant):
    self.asked.append(variant)
    place = list(REMAT_POLICIES).index(variant.remat_policy)
    used = (5 + 10 * place) / variant.microbatches
    if used > self.limit:
      raise DoesNotFitError(used * GIB, self.limit * GIB)
    program = Program(0.0, (), (), 0.0, (), 0)
    return Step(variant, program, int(used * GIB), 0.0, 0.0, 0)


def account(step):
  """More saved, less time; more microbatches, more time."""
  place = list(REMAT_POLICIES).index(step.variant.remat_policy)
  seconds = 10.0 - place + 2 * step.variant.microbatches
  bound = {'seconds': seconds, 'tokens_per_second': 1 / seconds, 'mfu': 0.5, 'hfu': 0.5}
  return {'memory': {'total': step.total_bytes}, 'bounds': {'summed': bound}}


def test_search_ranks_what_fits_by_the_summed_bound(capsys):
  compiler = FakeCompiler()
  tried = precompile_search.search(compiler, Variant(64, 1, 'full'), 10, account)
  assert len(tried) == len(compiler.asked) <= 10
  fits = [t for t in tried if t['fits']]
  seconds = [t['bounds']['summed']['seconds'] for t in fits]
  assert seconds == sorted(seconds) and tried[: len(fits)] == fits
  assert 'save_qkv' in tried[0]['text']  # 25 GiB; the next takes 35
  assert {'save_gated'} == {
    t['text'].split('=')[1].split(',')[0] for t in tried if not t['fits']
  }
  assert any('xla_enable_async_all_gather' in t['text'] for t in fits)
  text = precompile_report.ranking(tried)
  assert '35.00 of 31.00 GiB' in text
  assert 'Ranked by the summed bound among' in text
  assert 'of at most 10' in capsys.readouterr().out


def test_search_stops_at_its_limit():
  compiler = FakeCompiler()
  assert (
    len(precompile_search.search(compiler, Variant(64, 1, 'full'), 2, account)) == 2
  )
  with pytest.raises(UserError, match='SEARCH_TRIES'):
    precompile_search.search(compiler, Variant(64, 1, 'full'), 0, account)


@pytest.mark.parametrize(
  ('limit', 'microbatches', 'expected'),
  [
    (31, 1, "remat_policy='save_qkv' it fits: 25.00"),
    (6, 1, "remat_policy='full' it fits: 5.00"),
    (3, 1, "remat_policy='full' --gin.MICROBATCHES=2 it fits: 2.50"),
    (0.4, 1, "remat_policy='full' --gin.MICROBATCHES=16 it fits: 0.31"),
    (0.1, 1, 'Nor does it fit with'),
  ],
)
def test_remedies_are_true(limit, microbatches, expected):
  compiler = FakeCompiler(limit)
  variant = Variant(64, microbatches, 'save_gated')
  assert expected in precompile_search.remedy(compiler, variant)
  assert len(compiler.asked) <= 5


def test_topology_errors_are_of_the_right_kind(monkeypatch):
  with pytest.raises(UserError):
    topology.find('v4:0x2x2')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(Failure):
    topology.find('v4:2x2x2')


# --- The paper's machine.

PALM_540B = 540.35e9


@pytest.mark.slow
@pytest.mark.parametrize(
  ('dtype', 'size', 'microbatches'),
  [('bfloat16', 2, 1), ('float32', 4, 1), ('bfloat16', 2, 2)],
)
def test_540b_on_6144_chips(tmp_path, dtype, size, microbatches):
  """What the paper's machine must be able to hold and do, as palm_540b.gin has it."""
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'palm_t5x', 'precompile', '--gin_file=palm_540b.gin'),
      *(f'--gin.MODEL_DIR={tmp_path}', f'--gin.CACHE_DIR={tmp_path}'),
      f'--gin.POD_GRADIENT_DTYPE={dtype}',
      f'--gin.MICROBATCHES={microbatches}',
    ],
    env={**os.environ, 'PYTHONPATH': str(runs.HERE.parent)},
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
  )
  facts = json.loads((tmp_path / 'precompile.json').read_text())
  (program,) = facts['programs']
  assert facts['chips'] == 6144 and facts['mesh'] == {
    'pod': 2,
    'data': 256,
    'model': 12,
  }
  assert program['batch_size'] == 2048
  assert 'TPU v4' in done.stdout and not done.stderr
  assert program['seconds']['compile'] < 120
  assert program['host_bytes'] < 4 * GIB
  assert program['memory']['total'] <= 30.75 * GIB
  across = [c for c in program['collectives'] if c['network'] == 'dcn']
  assert 'all-gather' not in {c['kind'] for c in across}
  crossing = sum(c['wire_bytes'] for c in across)
  assert crossing == pytest.approx(PALM_540B / 3072 * size, rel=0.1)
  # Two gathers of the layers' kernels in bf16, a twelfth each.
  layers = 118 * 18432 * 48 * (3328 + 1792) / 12
  gathered = sum(
    c['result_bytes']
    for c in program['collectives']
    if c['axis'] == 'data' and c['kind'] == 'all-gather'
  )
  assert gathered == pytest.approx(2 * 2 * layers * microbatches, rel=0.1)
  # 118 layers run each of the attention kernels, the forward one twice.
  assert facts['attention_kernel'] == 'splash'
  runs_of = {k['name']: k['count'] for k in program['flops']['kernels_per_chip']}
  assert sorted(runs_of.values()) == [118 * n * microbatches for n in (1, 1, 2)]
  assert all(name.startswith('splash_mqa') for name in runs_of)
  # Between the model's own, the causal half of attention left out, and all of it twice.
  flops = program['flops']
  assert flops['model_per_token'] == pytest.approx(3.28e12, rel=1e-3)
  assert 0.9 < flops['hardware_per_token'] / flops['model_per_token'] < 4 / 3
  assert (
    program['bounds']['summed']['mfu'] < program['bounds']['overlapped']['mfu'] <= 1
  )

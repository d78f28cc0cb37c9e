"""Counting what compiled programs do: HLO written by hand, and small real programs.

The oracles are arithmetic: FLOPs from shapes, bytes from the algorithm of a collective.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palm_t5x import compiled_program, hlo, hlo_flops, hlo_groups
from palm_t5x.compiled_program import analyze, wire_bytes
from palm_t5x.hlo_loops import UnknownLoopError

MESH = compiled_program.Mesh({'pod': 1, 'data': 4, 'model': 2}, {})
TWO_PODS = compiled_program.Mesh({'pod': 2, 'data': 2, 'model': 2}, {'pod': 2})


def module(body, *computations):
  """A module whose entry has these lines, after other computations."""
  lines = '\n'.join(f'  {line}' for line in body.strip().splitlines())
  entry = f'ENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n'
  return 'HloModule m\n\n' + '\n'.join(computations) + '\n' + entry


def rows(program):
  """{(kind, axis): (result bytes, wire bytes, count)}."""
  return {
    (c.kind, c.axis): (c.result_bytes, c.wire_bytes, c.count)
    for c in program.collectives
  }


# ruff: noqa: E501 (lines of HLO are as long as they are)

# --- FLOPs.


def test_flops_of_a_batched_dot():
  program = analyze(
    module("""
%a = bf16[3,5,7]{2,1,0} parameter(0)
%b = bf16[3,7,11]{2,1,0} parameter(1)
ROOT %d = f32[3,5,11]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
"""),
    MESH,
  )
  assert program.flops == 2 * 3 * 5 * 11 * 7
  assert program.product_bytes == 2 * (3 * 5 * 7 + 3 * 7 * 11) + 4 * 3 * 5 * 11


# As libtpu writes PaLM 540B's products, with their sizes: (input, kernel, result,
# window, labels, multiplications by hand).
CONVOLUTIONS = {
  'projection of two shards': (
    ('4,2048,2,1536,1', '2,1536,4,3328,1', '4,2048,4,3328,1'),
    'size=1x4x2 pad=0_0x3_3x0_0 rhs_reversal=0x1x0',
    '0b2f1_2i1o0->0b1f2',
    (4 * 2048) * (2 * 1536) * (4 * 3328),
  ),
  'scores of each row': (
    ('4,2048,4,256', '4,2048,256,1', '4,2048,4,2048'),
    'size=4x1 stride=3x1 lhs_dilate=4x1',
    '0b1f_0oi1->0b1f',
    4 * (2048 * 4) * 256 * 2048,
  ),
  'gradient summed over rows': (
    ('4,2048,512', '4,2048,1536', '512,1536,1'),
    'size=4',
    '0fb_0io->bf0',
    (4 * 2048) * 512 * 1536,
  ),
}


@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_flops_of_products_written_as_convolutions(case):
  (left, right, out), window, labels, products = CONVOLUTIONS[case]
  text = module(f"""
%a = bf16[{left}] parameter(0)
%b = bf16[{right}] parameter(1)
ROOT %c = bf16[{out}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}
""")
  assert analyze(text, MESH).flops == 2 * products


@pytest.mark.parametrize(
  ('name', 'products'),
  [
    ('splash_mqa_fwd_residuals', 2),
    ('splash_mqa_dq', 3),
    ('splash_mqa_dkv', 4),
    ('something_else', None),
  ],
)
def test_flops_of_pallas_kernels_come_from_their_shapes(name, products):
  """Causal: each product of [T, K] with [K, S] counts half."""
  program = analyze(
    module(f"""
%q = bf16[4,8,256,64]{{3,2,1,0}} parameter(0)
%k = bf16[4,256,64]{{2,1,0}} parameter(1)
ROOT %o = bf16[4,8,256,64] custom-call(%q, %k), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{name}"}}
"""),
    MESH,
  )
  (kernel,) = program.kernels
  one = 2 * 4 * 8 * 256 * 64 * 256
  assert kernel.name == name and program.flops == 0
  assert kernel.flops == (products and products * one / 2)


def test_attributes_may_hold_line_breaks():
  """JAX writes a Pallas kernel's metadata over several lines."""
  text = (
    module("""
%q = bf16[4,8,256,64]{3,2,1,0} parameter(0)
%k = bf16[4,256,64]{2,1,0} parameter(1)
%o = (bf16[2,4,8,256,64], bf16[4,256,64]) custom-call(%q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/splash_mqa_dkv_no_residuals/pallas_call"}
ROOT %d = f32[8,8] dot(%k, %k), lhs_contracting_dims={0,1}, rhs_contracting_dims={0,1}
""")
    .replace('  "xprof', '"xprof')
    .replace('  }}, meta', '}}, meta')
  )
  program = analyze(text, MESH)
  (kernel,) = program.kernels
  assert kernel.name == 'splash_mqa_dkv_no_residuals'
  assert kernel.flops == 5 / 2 * 2 * 4 * 8 * 256 * 64 * 256  # dq's parts too
  assert program.flops == 2 * 8 * 8 * 4 * 256
  with pytest.raises(ValueError, match='its text is cut'):
    analyze(text.replace('ROOT ', ''), MESH)


# --- Loops.

LOOP = """
%body (t: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {{
  %t = (s32[], f32[8,8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,8] get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[8,8], s32[]) tuple(%next, %y, %n)
}}

%cond (t: (s32[], f32[8,8], s32[])) -> pred[] {{
  %t = (s32[], f32[8,8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %c = pred[] compare(%i, %n), direction={direction}
}}
"""
CALL = """
%p = f32[8,8] parameter(0)
%from = s32[] {start}
%to = s32[] constant({limit})
%tuple = (s32[], f32[8,8], s32[]) tuple(%from, %p, %to)
ROOT %w = (s32[], f32[8,8], s32[]) while(%tuple), condition=%cond, body=%body
"""


def looped(start='constant(0)', limit=6, step=2, direction='LT'):
  """A loop around one product of 2 * 8 * 8 * 8 FLOPs."""
  body = CALL.format(start=start, limit=limit)
  return module(body, LOOP.format(step=step, direction=direction))


@pytest.mark.parametrize(
  ('arguments', 'trips'),
  [
    ({}, 3),
    ({'limit': 7}, 4),
    ({'direction': 'LE'}, 4),
    ({'start': 'constant(5)', 'limit': 0, 'step': -1, 'direction': 'GT'}, 5),
    ({'direction': 'NE'}, 3),
    ({'start': 'constant(9)'}, 0),
  ],
)
def test_loops_count_as_often_as_they_turn(arguments, trips):
  assert analyze(looped(**arguments), MESH).flops == trips * 2 * 8**3


def test_a_note_of_xla_wins():
  text = looped().replace(
    'body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  )
  assert analyze(text, MESH).flops == 7 * 2 * 8**3


@pytest.mark.parametrize(
  'arguments',
  [{'start': 'parameter(1)'}, {'step': 0}, {'limit': 7, 'direction': 'NE'}],
)
def test_a_loop_of_unknown_length_raises(arguments):
  with pytest.raises(UnknownLoopError, match='%w'):
    analyze(looped(**arguments), MESH)


def test_a_counter_may_come_from_the_loop_outside():
  """As libtpu hands constants into the loops of its windowed products."""
  outer = """
%outer_body (u: (s32[], f32[8,8], s32[], s32[])) -> (s32[], f32[8,8], s32[], s32[]) {
  %u = (s32[], f32[8,8], s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %x = f32[8,8] get-tuple-element(%u), index=1
  %zero = s32[] get-tuple-element(%u), index=2
  %n = s32[] get-tuple-element(%u), index=3
  %tuple = (s32[], f32[8,8], s32[]) tuple(%zero, %x, %n)
  %w = (s32[], f32[8,8], s32[]) while(%tuple), condition=%cond, body=%body
  %y = f32[8,8] get-tuple-element(%w), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%one, %j)
  ROOT %out = (s32[], f32[8,8], s32[], s32[]) tuple(%next, %y, %zero, %n)
}

%outer_cond (u: (s32[], f32[8,8], s32[], s32[])) -> pred[] {
  %u = (s32[], f32[8,8], s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %last = s32[] constant(5)
  ROOT %c = pred[] compare(%last, %j), direction=GT
}
"""
  body = """
%p = f32[8,8] parameter(0)
%zero = s32[] constant(0)
%six = s32[] constant(6)
%t = (s32[], f32[8,8], s32[], s32[]) tuple(%zero, %p, %zero, %six)
ROOT %o = (s32[], f32[8,8], s32[], s32[]) while(%t), condition=%outer_cond, body=%outer_body
"""
  text = module(body, LOOP.format(step=2, direction='LT'), outer)
  assert analyze(text, MESH).flops == 5 * 3 * 2 * 8**3


def test_of_branches_the_costliest_counts():
  branch = """
%{name} (q: f32[8,8]) -> f32[8,8] {{
  %q = f32[8,8] parameter(0)
  ROOT %r = f32[8,8] {what}
}}
"""
  product = 'dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}'
  body = """
%p = f32[8,8] parameter(0)
%i = s32[] parameter(1)
ROOT %c = f32[8,8] conditional(%i, %p, %p), branch_computations={%cheap, %dear}
"""
  cheap = branch.format(name='cheap', what='negate(%q)')
  text = module(body, cheap, branch.format(name='dear', what=product))
  assert analyze(text, MESH).flops == 2 * 8**3


# --- Collectives.


@pytest.mark.parametrize(
  ('kind', 'sent'),
  [('all-gather', 3 / 4), ('all-reduce', 2 * 3 / 4), ('reduce-scatter', 3 / 4)],
)
def test_rings_send(kind, sent):
  assert wire_bytes(kind, 4, 1000, 1000) == sent * 1000


def test_kinds_axes_and_bytes():
  program = analyze(
    module("""
%p = bf16[16,4] parameter(0)
%ag = bf16[64,4] all-gather(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
%ar = (bf16[16,4], f32[2]) all-reduce(%p, %q), replica_groups={{0,1},{2,3},{4,5},{6,7}}
%q = f32[2] parameter(1)
%all = bf16[16,4] all-reduce(%p), replica_groups={}
%self = bf16[16,4] all-reduce(%p), replica_groups=[8,1]<=[8]
%start = (bf16[16,4], bf16[16,4], u32[]) collective-permute-start(%p), source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3}}
%done = bf16[16,4] collective-permute-done(%start)
ROOT %rs = bf16[8,4] reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}
"""),
    MESH,
  )
  p = 16 * 4 * 2
  found = {(c.kind, c.axis, c.dtype): c for c in program.collectives}
  assert {k: (c.result_bytes, c.wire_bytes, c.count) for k, c in found.items()} == {
    ('all-gather', 'data', 'bf16'): (4 * p, 3 * p, 1),
    ('all-reduce', 'model', 'bf16'): (p, p, 1),
    ('all-reduce', 'model', 'f32'): (8, 8, 1),
    ('all-reduce', 'data+model', 'bf16'): (p, 2 * p * 7 / 8, 1),
    ('collective-permute', 'data', 'bf16'): (p, p, 1),
    ('reduce-scatter', 'model', 'bf16'): (p / 2, p / 2, 1),
  }


def test_a_fused_reduction_that_keeps_a_slice_is_a_reduce_scatter():
  fused = """
%all-reduce-scatter (x: f32[8,16]) -> f32[8,4] {
  %x = f32[8,16] parameter(0)
  %ar = f32[8,16] all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0)
  %zero = s32[] constant(0)
  ROOT %ds = f32[8,4] dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={8,4}
}
"""
  body = """
%p = f32[8,16] parameter(0)
ROOT %f = f32[8,4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter
"""
  program = analyze(module(body, fused), MESH)
  assert rows(program) == {
    ('reduce-scatter', 'data'): (8 * 4 * 4, 8 * 16 * 4 * 3 / 4, 1)
  }


def test_an_asynchronous_chain_counts_once():
  """libtpu repeats a gather in every fusion that carries it on."""
  piece = """
%{name} (x: bf16[2,8]) -> bf16[8,8] {{
  %x = bf16[2,8] parameter(0)
  %ag = bf16[8,8] all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), frontend_attributes={{chain_id="0"}}
  ROOT %c = bf16[8,8] custom-call(%ag), custom_call_target="AsyncCollective{what}"
}}
"""
  body = """
%p = bf16[2,8] parameter(0)
%a = bf16[8,8] fusion(%p), kind=kCustom, calls=%begin
ROOT %b = bf16[8,8] fusion(%p), kind=kCustom, calls=%end
"""
  pieces = [
    piece.format(name='begin', what='Start'),
    piece.format(name='end', what='Done'),
  ]
  program = analyze(module(body, *pieces), MESH)
  assert rows(program) == {('all-gather', 'data'): (128, 96, 1)}


def test_what_megascale_sends_crosses_the_data_centre():
  program = analyze(
    module("""
%p = f32[100,8] parameter(0)
%after = token[] after-all()
%s = (f32[100,8], u32[], token[]) send(%p, %after), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
%ag = f32[200,8] all-gather(%p), replica_groups={{0,2},{1,3}}, dimensions={0}
ROOT %d = token[] send-done(%s)
"""),
    TWO_PODS,
  )
  assert program.wire_bytes('dcn') == 100 * 8 * 4  # two slices: each sends it once
  assert program.wire_bytes('ici', 'data') == 100 * 8 * 4
  assert [c.axis for c in program.collectives if c.network == 'dcn'] == ['pod']


def test_device_numbers_beyond_the_mesh_are_refused():
  text = module("""
%p = f32[8] parameter(0)
ROOT %r = f32[8] all-reduce(%p), replica_groups={{0,9}}
""")
  with pytest.raises(ValueError, match='device 9'):
    analyze(text, MESH)


def test_groups_of_every_pair_of_axes():
  """Against a mesh laid out by NumPy."""
  sizes = {'pod': 2, 'data': 3, 'model': 4}
  ids = np.arange(24).reshape(2, 3, 4)
  for axes in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
    others = [a for a in range(3) if a not in axes]
    groups = ids.transpose(others + axes).reshape(
      -1, int(np.prod([ids.shape[a] for a in axes]))
    )
    written = '{' + ','.join('{' + ','.join(map(str, g)) + '}' for g in groups) + '}'
    text = module(f'ROOT %r = f32[8] all-reduce(%p), replica_groups={written}')
    (instruction,) = hlo.parse(text).computations['main'].values()
    names = tuple(list(sizes)[a] for a in axes)
    assert hlo_groups.axes(instruction, sizes, sizes) == (names, groups.shape[1])


# --- Memory.


@pytest.mark.parametrize(
  ('array', 'size'),
  [
    ('f32[72,100]{1,0:T(8,128)}', 72 * 128 * 4),
    ('f32[100,72]{0,1:T(8,128)}', 72 * 128 * 4),
    ('bf16[3,5,7]{2,1,0:T(8,128)(2,1)}', 3 * 8 * 128 * 2),
    ('f32[10]{0:T(256)}', 256 * 4),
    ('s4[5]', 3),
    ('f8e4m3fn[4,4]', 16),
    ('pred[]', 1),
  ],
)
def test_arrays_are_padded_to_whole_tiles(array, size):
  (parsed,) = hlo.arrays_of(array)
  assert parsed.padded_bytes == size


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match='no whole HLO module'):
    analyze('nothing', MESH)


# --- Real programs of this machine's compiler.


def mesh_of(data, model):
  return Mesh(np.array(jax.devices()[:8]).reshape(data, model), ('data', 'model'))


def compiled(mesh, fn, *arguments):
  """The account of jit(fn); arguments are (shape, partition spec)."""
  values = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in arguments
  ]
  text = jax.jit(fn).lower(*values).compile().as_text()
  return analyze(text, compiled_program.Mesh(dict(mesh.shape), {}))


LAYERS, ROWS, WIDTH, INNER = 5, 64, 128, 256


def mlp_gradient(mesh, remat):
  """Gradient of a scan over layers whose weights lie in shards over `data`."""

  def layer(x, shard):
    w = jax.lax.all_gather(shard, 'data', axis=0, tiled=True)
    return jax.nn.silu(x @ w) @ w.T, ()

  if remat:
    layer = jax.checkpoint(layer)

  def gradient(shards, x):
    loss = lambda w, x: jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)
    return jax.grad(loss, (0, 1))(shards, x)

  specs = P(None, 'data'), P('data')
  mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs)
  shapes = (LAYERS, WIDTH, INNER), (ROWS, WIDTH)
  return compiled(mesh, mapped, *zip(shapes, specs, strict=True))


@functools.cache
def mlp(data, remat):
  return mlp_gradient(mesh_of(data, 8 // data), remat)


@pytest.mark.parametrize('data', [2, 8])
def test_flops_follow_mesh_and_rematerialisation(data):
  """Two products forward; four backward; the first again if nothing is kept."""
  one = 2 * (ROWS // data) * WIDTH * INNER
  assert mlp(data, False).flops == LAYERS * 6 * one
  assert mlp(data, True).flops == LAYERS * 7 * one


@pytest.mark.parametrize('data', [2, 8])
def test_bytes_follow_the_mesh(data):
  """Weights are gathered in both passes; of their gradient each chip gets its shard."""
  weights = 4 * LAYERS * WIDTH * INNER
  share = (data - 1) / data
  found = rows(mlp(data, True))
  assert found == {
    ('all-gather', 'data'): (2 * weights, 2 * weights * share, 2 * LAYERS),
    ('reduce-scatter', 'data'): (weights / data, weights * share, LAYERS),
  }
  assert (
    rows(mlp(data, False))['all-gather', 'data'][0] == weights
  )  # gathered ones kept


def test_saved_activations_are_what_a_forward_loop_stacks():
  kept = 4 * LAYERS * (ROWS // 2) * WIDTH
  assert mlp(2, True).saved_bytes == kept
  assert mlp(2, False).saved_bytes >= kept + 4 * LAYERS * (ROWS // 2) * INNER


def test_numpy_agrees_on_valid_positions():
  """The closed count against a loop over positions."""
  for size, kernel, stride, low, hole in (
    (4, 4, 3, 0, 4),
    (1, 4, 1, 3, 1),
    (7, 3, 2, 1, 2),
  ):
    result = ((size - 1) * hole + 1 + 2 * low - kernel) // stride + 1
    count = 0
    for out in range(result):
      for k in range(kernel):
        place = out * stride - low + k
        count += place >= 0 and place % hole == 0 and place // hole < size
    assert hlo_flops._valid(size, kernel, result, stride, low, hole, 1) == count

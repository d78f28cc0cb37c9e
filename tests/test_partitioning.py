"""Meshes, rule tables and batches against T5X's documented behaviour."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_t5x import partitioning
from palm_t5x.errors import UserError


def test_eight_simulated_devices():
  assert jax.device_count() == 8


@pytest.mark.parametrize(
  'kwargs,shape',
  [
    ({}, (1, 8, 1)),
    ({'num_partitions': 4}, (1, 2, 4)),
    ({'model_parallel_submesh': (2, 1, 1, 1)}, (1, 4, 2)),
    ({'ici_mesh_shape': (4, 2)}, (1, 4, 2)),
    ({'ici_mesh_shape': (1, 2, 2), 'dcn_mesh_shape': (2, 1, 1)}, (2, 2, 2)),
  ],
)
def test_mesh_shape(kwargs, shape):
  mesh = partitioning.PjitPartitioner(**kwargs).mesh
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == ('pod', 'data', 'model')


@pytest.mark.parametrize(
  'kwargs,words',
  [
    ({'num_partitions': 3}, ['num_partitions=3', '8 devices', '[1, 2, 4, 8]']),
    ({'ici_mesh_shape': (4, 4)}, ['16 devices', 'there are 8']),
    ({'ici_mesh_shape': (2, 2, 2, 1)}, ['4 entries']),
  ],
)
def test_wrong_mesh_says_what_would_do(kwargs, words):
  with pytest.raises(UserError) as e:
    _ = partitioning.PjitPartitioner(**kwargs).mesh
  assert all(word in str(e.value) for word in words)


def test_a_mesh_of_6144_is_described_without_devices():
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=(1, 256, 12), dcn_mesh_shape=(2, 1, 1)
  )
  assert partitioner.spec(('batch', 'length', 'embed')) == P(
    ('pod', 'data'), None, None
  )


# T5X's table (docs of standard_logical_axis_rules), with batch over pod and data:
# (activation dims, parameter dims) -> mesh axes of an activation and of two kernels.
@pytest.mark.parametrize(
  'dims,activation,kernel,embedding',
  [
    ((1, 1), (None, None), (None, 'model', None), ('model', None)),
    ((2, 1), (None, 'model'), (None, 'model', None), ('model', None)),
    ((1, 2), (None, None), ('data', 'model', None), ('model', 'data')),
    ((2, 2), (None, 'model'), ('data', 'model', None), ('model', 'data')),
  ],
)
def test_standard_rules(dims, activation, kernel, embedding):
  partitioner = partitioning.PjitPartitioner(
    num_partitions=2, logical_axis_rules=partitioning.standard_logical_axis_rules(*dims)
  )
  spec = partitioner.spec
  assert spec(('batch', 'length', 'embed')) == P(('pod', 'data'), *activation)
  assert spec(('embed', 'heads', 'fused')) == P(*kernel)
  assert spec(('vocab', 'embed')) == P(*embedding)


def test_rules_are_checked_and_can_be_added_to():
  with pytest.raises(UserError, match='1 or 2'):
    partitioning.standard_logical_axis_rules(activation_partitioning_dims=3)
  rules = partitioning.standard_logical_axis_rules(additional_rules=[('new', 'model')])
  assert partitioning.PjitPartitioner(logical_axis_rules=rules).spec(('new',)) == P(
    'model'
  )


@pytest.mark.parametrize('size,micro,fine', [(8, None, True), (12, None, False)])
def test_batch_must_divide(size, micro, fine):
  partitioner = partitioning.PjitPartitioner()
  if fine:
    partitioner.check_batch(size, micro)
    return
  with pytest.raises(UserError) as e:
    partitioner.check_batch(size, micro)
  assert 'BATCH_SIZE=12' in str(e.value) and '8 or 16' in str(e.value)


@pytest.mark.parametrize('partitions', [1, 2, 8])
def test_shard_batch_puts_every_row_in_its_place(partitions):
  partitioner = partitioning.PjitPartitioner(num_partitions=partitions)
  asked = []

  def read(rows):
    asked.append(rows)
    return {'tokens': rows[:, None] * 10 + np.arange(3)}

  batch = partitioner.shard_batch(16, read)
  np.testing.assert_array_equal(
    np.asarray(batch['tokens']), np.arange(16)[:, None] * 10 + np.arange(3)
  )
  assert batch['tokens'].sharding.is_equivalent_to(partitioner.data_sharding, 2)
  assert [len(rows) for rows in asked] == [16], 'each row is read once'


def test_axis_that_does_not_divide_is_named():
  partitioner = partitioning.PjitPartitioner(num_partitions=8)
  shapes = {'kernel': jax.ShapeDtypeStruct((16, 6), np.float32)}
  with pytest.raises(UserError) as e:
    partitioner.shardings({'kernel': ('embed', 'mlp')}, shapes)
  assert 'kernel' in str(e.value) and '8 devices' in str(e.value)

"""What a training loop knows of a model: T5X's contract, for PaLM's decoder.

`BaseModel` is the contract; a model of your own that writes `loss_fn` and
`get_initial_variables` trains. `DecoderOnlyModel` is every model this project ships.
"""

import abc
import functools
import math

import jax
import jax.numpy as jnp

from palm_t5x import decoding, losses, network
from palm_t5x.errors import UserError
from palm_t5x.losses import SpecialLossNormalizingFactor
from palm_t5x.metrics import (
  Ratio,
  hardware_flops_per_token,
  model_flops_per_token,
)


class BaseModel(abc.ABC):
  """The contract (T5X: models.BaseModel). Batches map feature names to arrays."""

  FEATURE_CONVERTER_CLS = None  # the seqio.FeatureConverter that makes its batches

  def __init__(self, optimizer_def):
    self.optimizer_def = optimizer_def

  @abc.abstractmethod
  def loss_fn(self, params, batch, dropout_rng):
    """(loss, metrics): a scalar to minimise, and {name: metrics.Ratio}."""

  @abc.abstractmethod
  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """{'params': tree} for features of `input_shapes`; run under jax.jit."""

  def sum_loss_fn(self, params, batch, dropout_rng):
    """(loss before normalisation, metrics): sums that add up over microbatches."""
    return self.loss_fn(params, batch, dropout_rng)

  def loss_normalizer(self, metrics):
    """What the summed loss and its gradients are divided by, from summed metrics."""
    return jnp.ones((), jnp.float32)

  def eval_fn(self, params, batch):
    """(loss, metrics) without dropout."""
    return self.loss_fn(params, batch, None)

  def param_logical_axes(self):
    """Tree of axis-name tuples like the parameters; by default nothing is sharded."""
    init = functools.partial(self.get_initial_variables, input_shapes={})
    shapes = jax.eval_shape(init, jax.random.key(0))['params']
    return jax.tree.map(lambda s: (None,) * s.ndim, shapes)

  def predict_batch(self, params, batch, rng=None):
    """[B, T] predicted ids."""
    return self.predict_batch_with_aux(params, batch, rng=rng)[0]

  def predict_batch_with_aux(self, params, batch, rng=None, **unused):
    """([B, T] predicted ids, {'scores': [B]})."""
    raise UserError(f'{type(self).__name__} does not define predict_batch_with_aux.')

  def score_batch(self, params, batch, return_intermediates=False):
    """[B] log-likelihood of each row's targets."""
    raise UserError(f'{type(self).__name__} does not define score_batch.')


class BaseTransformerModel(BaseModel):
  """A Flax module with a vocabulary (T5X: models.BaseTransformerModel)."""

  def __init__(
    self,
    module,
    input_vocabulary,
    output_vocabulary,
    optimizer_def,
    decode_fn=None,
    label_smoothing=0.0,
    z_loss=0.0,
    loss_normalizing_factor=None,
  ):
    super().__init__(optimizer_def)
    self.module = module
    self.input_vocabulary = input_vocabulary
    self.output_vocabulary = output_vocabulary
    self._decode_fn = decode_fn
    self._label_smoothing = label_smoothing
    self._z_loss = z_loss
    self._loss_normalizing_factor = losses.normalizing_factor(loss_normalizing_factor)

  @property
  def decode_fn(self):
    """The function of `decoding` that predict_batch searches with."""
    return self._decode_fn


class DecoderOnlyModel(BaseTransformerModel):
  """A decoder that continues its input; PaLM is one (T5X: models.DecoderOnlyModel).

  Batches hold decoder_input_tokens, decoder_target_tokens, decoder_loss_weights, and,
  where examples are packed or have inputs, decoder_segment_ids, decoder_positions and
  decoder_causal_attention (1 on the first token and the inputs): int or float [B, T].
  """

  def __init__(
    self,
    module,
    vocabulary,
    optimizer_def,
    decode_fn=decoding.temperature_sample,
    inputs_bidirectional_attention=False,
    feature_converter_cls=None,
    label_smoothing=0.0,
    z_loss=0.0,
    loss_normalizing_factor=None,
    loss_chunk_length=None,
  ):
    """T5X's arguments, and loss_chunk_length: see `losses.chunked_cross_entropy`."""
    super().__init__(
      module,
      vocabulary,
      vocabulary,
      optimizer_def,
      decode_fn,
      label_smoothing,
      z_loss,
      loss_normalizing_factor,
    )
    self._inputs_bidirectional_attention = inputs_bidirectional_attention
    self._feature_converter_cls = feature_converter_cls
    self._loss_chunk_length = loss_chunk_length

  @property
  def FEATURE_CONVERTER_CLS(self):  # noqa: N802 (T5X's name)
    """seqio.DecoderFeatureConverter, imported on first use, unless one was given."""
    if self._feature_converter_cls is None:
      import seqio

      self._feature_converter_cls = seqio.DecoderFeatureConverter
    return self._feature_converter_cls

  @property
  def config(self):
    """The module's TransformerConfig."""
    return self.module.config

  # -- Parameters --

  def get_initial_variables(self, rng, input_shapes=None, input_types=None):
    """{'params': tree}, which no input shape changes."""
    return self.module.init(rng, jnp.ones((1, 2), jnp.int32))

  def param_logical_axes(self):
    """See `network.param_logical_axes`."""
    return network.param_logical_axes(self.config)

  def num_params(self):
    """Kernels and real embedding rows, as the paper counts (norm scales left out)."""
    shapes = jax.eval_shape(self.get_initial_variables, jax.random.key(0))['params']
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    stored = sum(math.prod(s.shape) for path, s in leaves if path[-1].key != 'scale')
    tables = 1 if self.config.logits_via_embedding else 2
    padding = self.config.vocab_size - self.config.real_tokens
    return stored - tables * padding * self.config.emb_dim

  def flops_per_token(self, length, attention=True):
    """Training FLOPs of one token in a row of `length` (PaLM App. B).

    Without `attention`: those of MFU "without attention".
    """
    cfg = self.config
    shape = cfg.num_layers, cfg.num_heads, cfg.head_dim, length
    return model_flops_per_token(self.num_params(), *shape, attention)

  def hardware_flops_per_token(self, length):
    """The same with what rematerialisation computes again: HFU's (PaLM App. B)."""
    cfg, params = self.config, self.num_params()
    weights, attended = cfg.recomputed
    shape = cfg.num_layers, cfg.num_heads, cfg.head_dim, length
    return hardware_flops_per_token(params, *shape, weights / params, attended)

  # -- Loss --

  def _token_losses(self, params, batch, dropout_rng, weights_BT):
    cfg, tokens = self.config, batch['decoder_input_tokens']
    prefix = None
    if self._inputs_bidirectional_attention:
      prefix = batch.get('decoder_causal_attention')
    hidden_BTD = self.module.apply(
      {'params': params},
      tokens,
      segment_ids_BT=batch.get('decoder_segment_ids'),
      positions_BT=batch.get('decoder_positions'),
      causal_prefix_BT=prefix,
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      method='hidden',
    )
    embedding_VD, scale = network.output_embedding(params, cfg)
    return losses.chunked_cross_entropy(
      hidden_BTD,
      embedding_VD,
      batch['decoder_target_tokens'],
      weights_BT,
      scale=scale,
      z_loss=self._z_loss,
      label_smoothing=self._label_smoothing,
      num_real_tokens=cfg.real_tokens,
      chunk_length=self._loss_chunk_length,
      dtype=cfg.mode,
    )

  def _weights(self, batch):
    weights_BT = batch.get('decoder_loss_weights')
    if weights_BT is None:
      weights_BT = batch['decoder_target_tokens'] > 0
    return jnp.asarray(weights_BT, jnp.float32)

  def sum_loss_fn(self, params, batch, dropout_rng):
    """(weighted sum of token losses, metrics); divide by `loss_normalizer(metrics)`."""
    weights_BT = self._weights(batch)
    used = jnp.mean(weights_BT > 0, dtype=jnp.float32) * weights_BT.size
    if (
      self._loss_normalizing_factor == SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE
    ):
      weights_BT = losses.per_sequence_weights(
        weights_BT, batch.get('decoder_segment_ids')
      )
    loss, tokens = self._token_losses(params, batch, dropout_rng, weights_BT)
    weight = jnp.sum(weights_BT)
    total = lambda name: Ratio(jnp.sum(tokens[name] * weights_BT), weight)
    metrics = {
      'loss': Ratio(loss, weight),
      'cross_ent_loss': total('cross_entropy'),
      'z_loss': total('z_loss'),
      'accuracy': total('correct'),
      'nonpadding_fraction': Ratio(used, jnp.float32(weights_BT.size)),
    }
    return loss, metrics

  def loss_normalizer(self, metrics):
    """fp32 scalar: T5X's loss normalizing factor, from metrics of the whole batch."""
    factor = self._loss_normalizing_factor
    if factor is None or isinstance(factor, float):
      return jnp.float32(factor or 1.0)
    if factor == SpecialLossNormalizingFactor.NUM_TOTAL_TARGET_TOKENS:
      return metrics['nonpadding_fraction'].weight
    weight = metrics['loss'].weight
    return jnp.where(weight > 0, weight, 1.0)

  def loss_fn(self, params, batch, dropout_rng):
    """(normalised loss, metrics)."""
    loss, metrics = self.sum_loss_fn(params, batch, dropout_rng)
    return loss / self.loss_normalizer(metrics), metrics

  def score_batch(self, params, batch, return_intermediates=False):
    """[B] log-likelihood in nats of each row's targets, weighted by the loss weights.

    With return_intermediates: also {'token_scores': [B, T]}, unweighted.
    """
    weights_BT = self._weights(batch)
    _, tokens = self._token_losses(params, batch, None, weights_BT)
    token_scores = -tokens['cross_entropy']
    scores = jnp.sum(token_scores * weights_BT, axis=1)
    return (scores, {'token_scores': token_scores}) if return_intermediates else scores

  # -- Decoding --

  def prefill(self, params, tokens_BT, lengths_B, max_len):
    """Cache of `max_len` positions that holds the prompts, computed in one pass."""
    B, T = tokens_BT.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    prefix = lengths_B if self._inputs_bidirectional_attention else None
    _, cache = self.module.apply(
      {'params': params},
      tokens_BT,
      network.init_cache(self.config, B, max_len),
      positions,
      prefix_lengths_B=prefix,
      fresh=True,
      logits_at_B=jnp.zeros((B,), jnp.int32),
      method='decode',
    )
    return cache

  def decode_step(self, params, cache, tokens_B, positions_B):
    """(logits [B, V] after these tokens, cache): one token for each row."""
    logits, cache = self.module.apply(
      {'params': params},
      tokens_B[:, None],
      cache,
      positions_B[:, None],
      method='decode',
    )
    return logits[:, 0], cache

  def _search(self, params, inputs_BT, prompt_width, lengths_B, decode_fn, **kwargs):
    """decode_fn over the prompts: ([B, n, T] with the prompts shifted out, scores)."""
    cache = self.prefill(
      params, inputs_BT[:, :prompt_width], lengths_B, inputs_BT.shape[1]
    )

    def tokens_to_logits(state):
      return self.decode_step(
        params, state.cache, state.cur_token[:, 0], state.cur_index
      )

    kwargs.setdefault('eos_id', self.output_vocabulary.eos_id)
    sequences, scores = decode_fn(
      inputs=inputs_BT,
      cache=cache,
      tokens_to_logits=tokens_to_logits,
      initial_index=lengths_B - 1,
      cache_offset=1,
      **kwargs,
    )
    return decoding.remove_prefix(sequences, lengths_B - 1), scores

  def predict_batch_with_aux(
    self,
    params,
    batch,
    rng=None,
    return_all_decodes=False,
    num_decodes=1,
    decoder_params=None,
  ):
    """(ids, {'scores'}): continues each row's inputs until [eod] or its length.

    Args:
      params: parameters.
      batch: decoder_input_tokens, and decoder_causal_attention which marks the inputs
        (and the token before them); without it, continues the first token.
      rng: for sampling; T5X's topk=1 default is greedy and needs none.
      return_all_decodes: all of them, likeliest last, instead of the likeliest.
      num_decodes: sequences (or beams) for each row; they share one prefill.
      decoder_params: more keywords of the decode function.

    Returns:
      ids [B, T], or [B, num_decodes, T], left-aligned and 0 after the end; and scores
      of shape [B] or [B, num_decodes].
    """
    tokens_BT = batch['decoder_input_tokens']
    inputs = batch.get('decoder_causal_attention')
    if inputs is None:
      inputs = jnp.zeros_like(tokens_BT).at[:, 0].set(1)
    inputs = jnp.asarray(inputs).astype(tokens_BT.dtype)
    sequences, scores = self._search(
      params,
      tokens_BT * inputs,
      tokens_BT.shape[1],
      jnp.sum(inputs, axis=1),
      self._decode_fn,
      decode_rng=rng,
      num_decodes=num_decodes,
      **(decoder_params or {}),
    )
    if return_all_decodes:
      return sequences, {'scores': scores}
    return sequences[:, -1], {'scores': scores[:, -1]}

  def generate(
    self,
    params,
    tokens_BT,
    lengths_B,
    rng=None,
    *,
    max_decode_steps,
    num_decodes=1,
    decode_fn=None,
    **decoder_params,
  ):
    """Continues prompts: what `infer`, `complete` and training samples call.

    Args:
      params: parameters.
      tokens_BT: prompts, left-aligned, from their first token ([eod]) on.
      lengths_B: tokens of each prompt, 1 or more.
      rng: for sampling.
      max_decode_steps: tokens to generate at most; static.
      num_decodes: continuations of each prompt, from one prefill.
      decode_fn: default decoding.temperature_sample, greedy unless told otherwise.
      **decoder_params: its keywords: temperature, topk, topp, alpha, ...

    Returns:
      ([B, num_decodes, max_decode_steps] ids, 0 after the end; scores
      [B, num_decodes]), likeliest last.
    """
    width = tokens_BT.shape[1]
    prompt = jnp.where(jnp.arange(width) < lengths_B[:, None], tokens_BT, 0)
    inputs = jnp.pad(prompt.astype(jnp.int32), ((0, 0), (0, max_decode_steps)))
    if decode_fn is None:
      decode_fn = decoding.temperature_sample
      decoder_params = {'temperature': 0.0, 'topk': 0} | decoder_params
    sequences, scores = self._search(
      params,
      inputs,
      width,
      lengths_B,
      decode_fn,
      decode_rng=rng,
      num_decodes=num_decodes,
      max_decode_steps=max_decode_steps,
      **decoder_params,
    )
    return sequences[:, :, :max_decode_steps], scores


class EncoderDecoderModel:
  """Refused: this package trains decoders."""

  def __init__(self, *args, **kwargs):
    raise UserError(
      'EncoderDecoderModel: palm_t5x trains decoder-only models. Bind MODEL = '
      "@models.DecoderOnlyModel() (see gin/models/), or use Google's T5X."
    )


def get_input_vocabulary(model):
  """The model's input vocabulary (T5X's name, for Gin)."""
  return model.input_vocabulary


def get_output_vocabulary(model):
  """The model's output vocabulary (T5X's name, for Gin)."""
  return model.output_vocabulary

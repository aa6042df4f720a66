"""What a model is made of, in the field's words. Knows no file format: each architecture reads its own."""

import math
from dataclasses import dataclass


def yarn_attention_factor(factor: float) -> float:
    """What YaRN multiplies cos and sin with, as a rule. Peng et al. 2023, arXiv:2309.00071, equation 22."""
    return 1 + 0.1 * math.log(max(1.0, factor))


@dataclass(frozen=True)
class RopeScaling:
    """How rotations are slowed down so that a model reads on beyond the positions of its first training.

    Attributes
    ----------
    kind : str
        "none"; "linear": all frequencies are divided by factor; "yarn": the slow ones are, the fast ones not, and those
        between in part; "longrope": by factors of their own, which the file holds.
    factor : float
    n_ctx_original : int
        Positions of the first training, in tokens.
    attention_factor : float
        cos and sin are multiplied by it.
    beta_fast, beta_slow : float
        Turns within n_ctx_original that make a frequency fast, and slow.
    rounded : bool
        Whether the dimensions that they mark are rounded to whole ones.
    """

    kind: str = "none"
    factor: float = 1.0
    n_ctx_original: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rounded: bool = True


@dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts: MLPs of which each token uses those that a router scores best.

    Attributes
    ----------
    n_experts, n_used : int
        In a layer, and by a token.
    intermediate_size : int
        Of one expert.
    gating : str
        Weights are a "softmax" over all scores, or "softmax_chosen" over the chosen ones.
    normalise : bool
        Whether a token's weights are divided by their sum.
    scale : float
        Weights are multiplied by it.
    """

    n_experts: int
    n_used: int
    intermediate_size: int
    gating: str = "softmax"
    normalise: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a transformer with grouped-query attention.

    Attributes
    ----------
    architecture : str
        Name of the module in `woolly.models` that knows how the parts go together.
    vocab_size, hidden_size, intermediate_size : int
    n_layers, n_heads, n_kv_heads, head_dim : int
    n_ctx_train : int
        Positions the model was trained for, in tokens.
    rms_norm_eps : float
        Of LayerNorms too, where the model has those.
    rope_theta : float
        Base of the rotation frequencies: dimension pair i of n_rot turns by pos * theta^(-2 i / n_rot).
    rope_dim : int
        n_rot, the dimensions of a head that are rotated.
    rope_pairing : str
        Dimensions that rotate together: "norm" (2 i, 2 i + 1), "neox" (i, i + n_rot / 2).
    rope_scaling : RopeScaling
    attention_scale : float
        Scores are attention_scale * (q . k).
    attention_softcap, logit_softcap : float
        Scores and logits s become cap * tanh(s / cap); 0 where they stay.
    activation : str
        "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
    has_gate : bool
        Whether the MLP is gated: activation(gate h) * (up h), and not activation(up h).
    has_layer_norm : bool
        Norms are LayerNorms, with biases, and not RMSNorms.
    embedding_scale, residual_scale, logit_scale : float
        Embeddings, what each block's two halves add, and logits are multiplied by it.
    sliding_window : int
        Keys that a token sees on layers that slide; 0 where none does.
    global_every : int
        Every so many layers one does not slide; 0 where the architecture has no such period.
    rope_theta_local : float or None
        The base on layers that slide, where it differs.
    experts : ExpertConfig or None
        What stands in place of each layer's MLP, where that is a mixture.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ctx_train: int
    rms_norm_eps: float
    rope_theta: float
    rope_dim: int
    attention_scale: float
    rope_pairing: str = "norm"
    rope_scaling: RopeScaling = RopeScaling()
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    activation: str = "silu"
    has_gate: bool = True
    has_layer_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    sliding_window: int = 0
    global_every: int = 0
    rope_theta_local: float | None = None
    experts: ExpertConfig | None = None

"""What a model is made of, in the field's words. Knows no file format: each architecture reads its own."""

from dataclasses import dataclass


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
    rope_theta : float
        Base of the rotation frequencies: dimension pair i of n_rot turns by pos * theta^(-2 i / n_rot).
    rope_dim : int
        n_rot, the dimensions of a head that are rotated.
    attention_scale : float
        Scores are attention_scale * (q . k).
    activation : str
        "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
    embedding_scale : float
        Embeddings are multiplied by it.
    sliding_window : int
        Keys that a token sees on layers that slide; 0 where none does.
    rope_theta_local : float or None
        The base on layers that slide, where it differs.
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
    activation: str = "silu"
    embedding_scale: float = 1.0
    sliding_window: int = 0
    rope_theta_local: float | None = None

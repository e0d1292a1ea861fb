"""What turns pooled features into class scores."""

# B images, D features, K classes

from torch import nn

from tract_transfer.registry import Registry

HEADS = Registry("HEADS")


@HEADS.register("linear")
def linear(feature_dim: int, num_classes: int, *, zero_init: bool = False) -> nn.Module:
    """(B, D) -> (B, K) by one matrix; `zero_init` starts all scores at 0 (BiT's fine-tuning)."""
    head = nn.Linear(feature_dim, num_classes)
    if zero_init:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return head


@HEADS.register("mlp")
def mlp(
    feature_dim: int, num_classes: int, *, hidden_dim: int = 512, dropout: float = 0.0
) -> nn.Module:
    """(B, D) -> (B, K) over one hidden layer of `hidden_dim` with GELU."""
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, num_classes),
    )

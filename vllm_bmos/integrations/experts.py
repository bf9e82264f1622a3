"""What transformers' modules of feed-forward experts compute; imports nothing of transformers."""

from typing import Any


def is_gated_mlp(experts: Any) -> bool:
    """Whether each expert is down(act(gate(x)) * up(x)): without biases or a gate of its family."""
    gate = getattr(type(experts), "_apply_gate", None)  # transformers' usual one has another name
    return not getattr(experts, "has_bias", False) and (
        getattr(gate, "__name__", "") != "_apply_gate"
    )

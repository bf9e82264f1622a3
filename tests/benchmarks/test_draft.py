"""The made pair: the target walks through its vocabulary, the draft is right as often as asked."""

from pathlib import Path

import torch
from draft import make_pair
from make_model import SHAPES
from safetensors.torch import load_file

from vllm_bmos.checkpoint import Checkpoint


def test_a_made_pair_agrees_after_the_given_share_of_tokens(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    target, draft = make_pair(tmp_path, shape, E=2, acceptance=0.8)
    dense, packed = load_file(target / "model.safetensors"), Checkpoint(draft)

    def follower(embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        # No layer adds anything, and the norm does not change which logit is largest.
        return (embedding.float() @ head.float().T).argmax(-1)

    after = follower(dense["model.embed_tokens.weight"], dense["lm_head.weight"])
    guessed = follower(packed.tensor("model.embed_tokens.weight"), packed.tensor("lm_head.weight"))
    token, seen = 0, set()
    for _ in range(shape.vocab_size):
        token = int(after[token])
        seen.add(token)
    assert len(seen) == shape.vocab_size
    assert abs(float((after == guessed).float().mean()) - 0.8) < 0.05
    assert not dense["model.layers.0.mlp.down_proj.weight"].any()
    assert not packed.tensor("model.layers.0.mlp.down_proj.out_channel_scale").any()
    assert packed.tensor("model.layers.0.mlp.up_proj.out_channel_scale").any()

"""The perplexities that a conversion prints and writes into its model card."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_bmos.integrations.transformers  # noqa: F401 (registers the format)
from converters.hf_to_bmos import main
from tests.converters.models import make_dense
from tests.tiny import add_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog; " * 14  # more than one window


@torch.inference_mode()
def perplexity(path, begin) -> float:
    """exp of the mean negative log-likelihood of all tokens but each window's first."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(path)(TEXT, add_special_tokens=False).input_ids
    window = model.config.max_position_embeddings - len(begin)
    assert len(tokens) > 2 * window
    found = []
    for start in range(0, len(tokens), window):
        part = torch.tensor([begin + tokens[start : start + window]])
        scores = model(part).logits[0].log_softmax(-1)
        found += [-float(scores[i, token]) for i, token in enumerate(part[0, 1:].tolist())]
    return float(torch.tensor(found, dtype=torch.float64).mean().exp())


@pytest.mark.parametrize("begin", [[], [1]], ids=["no BOS", "BOS"])
def test_perplexities_are_printed_and_written_into_the_card(tmp_path, capsys, begin):
    source, target = make_dense(tmp_path / "dense"), tmp_path / "packed"
    add_tokenizer(source, begins=bool(begin))
    (tmp_path / "text.txt").write_text(TEXT)
    assert main([str(source), str(target), "--eval-text", str(tmp_path / "text.txt")]) == 0
    out, card = capsys.readouterr().out, (target / "README.md").read_text()
    for name, path in (("dense", source), ("packed", target)):
        printed = re.search(rf"perplexity of the {name} model on text.txt: (\S+)", out)
        written = re.search(rf"\| perplexity, {name}, on text.txt \| (\S+) \|", card)
        assert printed and written and printed[1] == written[1]
        assert float(printed[1]) == pytest.approx(perplexity(path, begin), rel=1e-3)

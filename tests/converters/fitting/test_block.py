from dataclasses import replace

import pytest
import torch

from converters.fitting import block
from converters.fitting.block import BlockOptions, block_error
from converters.fitting.blocks import BlockModel
from converters.fitting.folder import FitFolder
from converters.options import Options
from converters.sources import open_source
from tests.converters.models import make_dense
from tests.tiny import VOCAB
from vllm_bmos.checkpoint.format import OUT_SCALE, WEIGHT

OPTIONS = BlockOptions(epochs=6, batch=2, latent_lr=0.1, scale_lr=3e-2)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    path = tmp_path_factory.mktemp("block")
    source = open_source(make_dense(path / "dense"), Options(experts=1))
    start = {
        f"{module}.{suffix}": (1.5 if suffix == OUT_SCALE else 1) * tensor  # something to repair
        for module in source.modules
        for suffix, tensor in source.layer(module).tensors.items()
    }
    generator = torch.Generator().manual_seed(0)
    return path, source, start, torch.randint(0, VOCAB, (12, 64), generator=generator)


def run(setting, name, options=OPTIONS, resume=False):
    path, source, start, tokens = setting
    with FitFolder(path / name, {"fit": 1}, resume) as folder:
        return block.fit(
            BlockModel(source), start, tokens[:8], tokens[8:], torch.float16, folder, options
        )


def test_each_block_learns_what_held_out_text_confirms(setting, caplog):
    caplog.set_level("INFO")
    result = run(setting, "whole")
    start = setting[2]
    assert result.keys() == start.keys()
    assert any(not torch.equal(result[n], start[n]) for n in start if n.endswith(WEIGHT))
    lines = [r.getMessage() for r in caplog.records if "held-out error" in r.getMessage()]
    errors = [line.split("error ")[1].split(",")[0].split(" -> ") for line in lines]
    assert len(errors) == 2
    assert all(float(after) < 0.7 * float(before) for before, after in errors), errors


def test_costly_signs_are_farther_from_a_flip(setting, monkeypatch):
    seen, set_margins = [], block.set_margins

    def watched(layers, losses):
        losses = list(losses)
        set_margins(layers, losses)
        seen.append((len(losses), [layer.latent.detach().abs().max() for layer in layers]))

    monkeypatch.setattr(block, "set_margins", watched)
    run(setting, "margins", replace(OPTIONS, epochs=1))
    assert [count for count, _ in seen] == [8, 8]  # the windows of each of two blocks
    assert all(max(margins) > 2 for _, margins in seen)


@pytest.mark.parametrize(("given", "used"), [(None, 0.03), (0.06, 0.06)])
def test_the_rate_of_latent_signs_is_that_of_the_steps_unless_given(
    setting, monkeypatch, caplog, given, used
):
    caplog.set_level("INFO")
    rates, Adam = [], torch.optim.Adam

    def watched(groups, **options):
        rates.append(groups[0]["lr"])
        return Adam(groups, **options)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    monkeypatch.setattr(block, "latent_rate", {3: 0.03}.__getitem__)  # of as many steps
    run(setting, f"rate-{given}", replace(OPTIONS, epochs=1, batch=3, latent_lr=given))
    assert rates == [used, used]  # two blocks
    assert "3 steps a block, each of 3 windows of 64 tokens" in caplog.text
    assert f"learning rate of latent signs: {used}\n" in caplog.text


def test_a_block_of_which_nothing_is_packed_stays(tmp_path):
    ignore = (r"layers\.0\.",)
    source = open_source(make_dense(tmp_path / "dense"), Options(experts=1, ignore=ignore))
    start = {f"{m}.{s}": t for m in source.modules for s, t in source.layer(m).tensors.items()}
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    for resume in (False, True):
        with FitFolder(tmp_path / "packed", {"fit": 1}, resume) as folder:
            model = BlockModel(source)
            result = block.fit(model, start, tokens, tokens, torch.float16, folder, OPTIONS)
        assert result.keys() == start.keys()


def test_a_resumed_fit_gives_the_same_bytes(setting):
    whole = run(setting, "first")
    (setting[0] / "first.fit" / "block" / "block-0001.safetensors").unlink()
    again = run(setting, "first", resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_block_that_gets_worse_stays_as_it_was(setting, caplog):
    caplog.set_level("INFO")
    worse = replace(OPTIONS, epochs=1, latent_lr=30.0, scale_lr=30.0)
    result = run(setting, "worse", worse)
    assert "stays as it was" in caplog.text
    assert all(torch.equal(result[name], tensor) for name, tensor in setting[2].items())


def test_the_error_is_relative_to_each_token():
    torch.manual_seed(0)
    h = torch.nn.functional.normalize(torch.randn(1, 4, 8), dim=-1)
    h[0, 0] *= 1e3  # such as the first token's
    h[0, 1] *= 2
    assert float(block_error(torch.zeros_like(h), h)) == pytest.approx(1)
    wrong = h.clone()
    wrong[0, 1] = 0
    assert float(block_error(wrong, h)) == pytest.approx(0.25, rel=1e-3)


def test_windows_come_in_a_seeded_order():
    options = replace(OPTIONS, epochs=2, batch=3)
    one, same, other = (torch.cat(list(block._batches(8, options, s))) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted([*range(8)] * 2)

"""Mixtures of experts: every feed-forward expert's layers are packed, however they are stored."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import vllm_bmos.integrations.transformers  # noqa: F401 (registers the quantizer)
from converters.hf_to_bmos import main
from converters.moe import check_experts
from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from tests.converters.models import make_dense, sign_bits
from tests.converters.test_models import logits
from tests.tiny import MOE_CONFIGS, add_tokenizer, expert_names, linear_names, random_model
from vllm_bmos.checkpoint import FormatError
from vllm_bmos.checkpoint.verify import verify

IGNORE = (r"\.experts",)
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def stored(path):
    return load_file(path / "model.safetensors")


def weight_of(model, name):
    """A layer's weight in transformers' model, as a view."""
    experts, _, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
    if not rest:
        return model.get_submodule(name).weight.data
    number, leaf = rest.split(".")
    module = model.get_submodule(f"{experts}.experts")
    if leaf in ("w2", "down_proj"):
        return module.down_proj.data[int(number)]
    return module.gate_up_proj.data[int(number)].chunk(2)[leaf in ("w3", "up_proj")]


@pytest.mark.parametrize("arch", MOE_CONFIGS)
def test_experts_are_packed_and_token_routers_stay_dense(tmp_path, arch):
    source = make_dense(tmp_path / "source", arch)
    convert(make_plan(source, Options(experts=3)), tmp_path / "target")
    checkpoint = verify(tmp_path / "target")
    dense, oracle = stored(source), load(source)
    modules = checkpoint.config.modules
    assert set(modules) == {*linear_names(random_model(arch)), *expert_names(dense)}
    gates = [name for name in dense if name.endswith(".gate.weight")]
    assert gates and all(torch.equal(checkpoint.tensor(name), dense[name]) for name in gates)
    for module in modules:
        weight = weight_of(oracle, module)
        packed = checkpoint.tensor(f"{module}.weight_packed")
        assert torch.equal(packed, sign_bits(dense[f"{module}.weight"]))
        assert torch.equal(packed, sign_bits(weight))
        a = checkpoint.tensor(f"{module}.out_channel_scale")[0].float()
        b = checkpoint.tensor(f"{module}.in_channel_scale")[0].float()
        weight.copy_(torch.where(weight >= 0, 1.0, -1.0) * torch.outer(a, b))
    torch.testing.assert_close(
        logits(load(tmp_path / "target")), logits(oracle), rtol=1e-4, atol=1e-3
    )


def make_fused(path, dtype=torch.float32):
    """Qwen3-MoE with its experts in two 3-D weights, as transformers holds them."""
    model = random_model("qwen3-moe").to(dtype)
    model.save_pretrained(path, save_original_format=False)
    experts = {name: t.shape for name, t in stored(path).items() if "experts" in name}
    assert experts == {GATE_UP: (5, 192, 128), DOWN: (5, 128, 96)}
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_3d_weights_become_the_same_checkpoint(tmp_path, dtype):
    make_fused(tmp_path / "fused", dtype)
    make_dense(tmp_path / "single", "qwen3-moe", dtype)
    for name in ("fused", "single"):
        assert main([str(tmp_path / name), str(tmp_path / f"{name}-packed")]) == 0
        assert (
            main(["verify", str(tmp_path / f"{name}-packed"), "--source", str(tmp_path / name)])
            == 0
        )
    fused, single = (stored(tmp_path / f"{name}-packed") for name in ("fused", "single"))
    assert fused.keys() == single.keys()
    assert all(torch.equal(fused[name], single[name]) for name in fused)


def test_ignored_experts_stay_as_they_are(tmp_path):
    source = make_fused(tmp_path / "source")
    convert(make_plan(source, Options(ignore=IGNORE)), tmp_path / "target")
    checkpoint = verify(tmp_path / "target")
    assert not [name for name in checkpoint.config.modules if "experts" in name]
    for name in (GATE_UP, DOWN):
        assert torch.equal(checkpoint.tensor(name), stored(source)[name])


@pytest.mark.parametrize("change", ["transposed", "no down", "halves"])
def test_another_layout_of_3d_weights_is_refused(tmp_path, change):
    source = make_fused(tmp_path / "source")
    tensors = stored(source)
    if change == "transposed":
        tensors[GATE_UP] = tensors[GATE_UP].transpose(1, 2).contiguous()
        tensors[DOWN] = tensors[DOWN].transpose(1, 2).contiguous()
    elif change == "no down":
        del tensors[DOWN]
    else:
        tensors[GATE_UP] = tensors[GATE_UP][:, :96].contiguous()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FormatError, match=r"gate_up_proj and down_proj: expected \[X, 2I, H\]"):
        make_plan(source, Options())


def test_3d_weights_of_a_family_that_was_never_tried_are_refused(tmp_path):
    random_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(FormatError, match=r"can be split for qwen3_moe .* this is 'mixtral'"):
        make_plan(tmp_path, Options())


def test_a_missing_expert_is_named(tmp_path):
    source = make_dense(tmp_path / "source", "mixtral")
    tensors = stored(source)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    del tensors[name]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FormatError, match=f"^{name}: config.json asks for .* found none"):
        make_plan(source, Options())


def test_half_a_block_of_experts_is_refused(tmp_path):
    source = make_dense(tmp_path / "source", "mixtral")
    with pytest.raises(FormatError, match=r"layers\.0\.\S+experts: --ignore leaves some"):
        make_plan(source, Options(ignore=(r"experts\.3\.w2",)))
    plan = make_plan(source, Options(ignore=(r"layers\.0\..*experts",)))
    assert not [name for name in plan.config.modules if "layers.0.block_sparse" in name]
    assert [name for name in plan.config.modules if "layers.1.block_sparse" in name]


@pytest.mark.parametrize("name", ["experts.gate_up_proj_blocks", "experts.7.w4.weight"])
def test_an_unknown_layout_is_refused_by_name_or_ignored(name):
    name = f"model.layers.0.mlp.{name}"
    with pytest.raises(FormatError, match=f"^{name}: feed-forward experts of this layout"):
        check_experts({}, [name], Options())
    check_experts({}, [name], Options(ignore=IGNORE))
    check_experts({}, ["model.layers.0.mlp.shared_experts.up_proj.weight"], Options())


def test_fitted_stages_fit_all_but_the_experts(tmp_path, capfd):
    source, svid, target = (tmp_path / name for name in ("source", "svid", "target"))
    make_dense(source, "mixtral")
    add_tokenizer(source)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    ignore = ("--ignore", IGNORE[0])
    for flags in ((), ignore, ("--dry-run", *ignore)):
        assert main([str(source), str(target), "--stage", "qat", *flags]) == 1
        assert "--stage hessian cannot fit a mixture of experts" in capfd.readouterr().err
        assert not target.exists()
    assert main([str(source), str(svid), "--experts", "1", *ignore]) == 0
    fit = ("--stage", "qat", "--start-from", str(svid), "--experts", "1", "--tokens", "128")
    text = ("--calibration", str(tmp_path / "text.txt"), "--length", "64")
    assert main([str(source), str(target), *fit]) == 1
    assert "--stage qat cannot fit a mixture of experts" in capfd.readouterr().err
    assert main([str(source), str(target), *fit, *text, *ignore]) == 0
    assert verify(target).config.modules == verify(svid).config.modules

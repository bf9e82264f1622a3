from dataclasses import replace

import pytest
import torch

from converters.fitting import distill, svid, training
from converters.fitting.distill import count_flips
from converters.fitting.divergence import divergence, hidden_distance
from converters.fitting.student import TrainableLinear, set_router_units
from converters.fitting.training import DistillOptions, Windows
from converters.options import Options
from converters.sources import open_source
from tests.converters.models import make_dense, make_gguf
from tests.tiny import VOCAB
from vllm_bmos import ops
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT

OPTIONS = DistillOptions(
    tokens=48 * 64, batch=2, length=32, save_steps=3, latent_lr=0.06, scale_lr=3e-3
)


def reference(x, tensors, bias=None):
    return ops.linear(
        x,
        None,
        tensors[WEIGHT],
        tensors[IN_SCALE].unsqueeze(0),
        tensors[OUT_SCALE],
        tensors[ROUTER].unsqueeze(0),
        bias,
        [tensors[OUT_SCALE].shape[1]],
        "reference",
    )


def layer(E, N=24, K=33, spread=0.0, bias=None):
    """A layer whose experts differ by `spread` if it is given."""
    generator = torch.Generator().manual_seed(0)
    tensors = svid.fit(torch.randn(N, K, generator=generator), E)
    for name in (IN_SCALE, OUT_SCALE):
        noise = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] = tensors[name] * (1 + spread * noise)
    if spread:
        tensors[ROUTER] = torch.randn(E, K, generator=generator)
    return tensors, TrainableLinear(tensors, (N, K), bias)


def test_the_rate_of_latent_signs_is_that_of_the_steps_unless_given(tmp_path, caplog):
    caplog.set_level("INFO")
    source = open_source(make_dense(tmp_path / "dense"), Options(experts=1))
    start = {f"{m}.{s}": t for m in source.modules for s, t in source.layer(m).tensors.items()}
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    for given, said in [(None, "0.1 (2 steps)"), (0.06, "0.06 (2 steps)")]:
        options = replace(OPTIONS, tokens=4 * 32, latent_lr=given)
        folder = tmp_path / str(given)
        distill.fit(source, start, tokens, tokens[:1], folder, options, "qat", 1, 0)
        assert f"learning rate of latent signs: {said}" in caplog.text


def test_training_is_one_epoch_of_full_steps_in_that_order(setting, monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "held_out_loss", lambda *_: 1.0)
    real = training.loss_on

    def watched(student, teacher, tokens, options):
        seen.append(tokens)
        return real(student, teacher, tokens, options)

    monkeypatch.setattr(training, "loss_on", watched)
    tokens = setting[3][:3]  # an odd number of windows, two a step
    options = replace(OPTIONS, tokens=4 * 64)
    distill.fit(
        setting[1], setting[2], tokens, tokens, setting[0] / "order", options, "kd-scales", 2, 5
    )
    order = Windows(tokens, 8, seed=5)
    assert torch.equal(torch.cat(seen), torch.stack([order[i]["input_ids"] for i in range(8)]))


@pytest.mark.parametrize("E", [1, 4])
def test_training_starts_from_the_packed_layer(E):
    bias = torch.randn(24)
    tensors, trainable = layer(E, spread=0.3, bias=bias)
    x = torch.randn(2, 5, 33)
    found = trainable(x)
    expected = reference(x.view(10, 33), tensors, bias).view(2, 5, 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("E", [1, 3])
def test_what_is_packed_is_what_was_trained(E):
    _, trainable = layer(E, spread=0.5)
    with torch.no_grad():
        trainable.latent[0, 0] = 0.0
        trainable.latent[3] *= -1
        trainable.factor_in *= 1.5
        trainable.router += torch.randn_like(trainable.router)
        trainable.router_unit.fill_(0.3)
    x = torch.randn(10, 33)
    packed = trainable.pack(torch.float32)
    torch.testing.assert_close(trainable(x), reference(x, packed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("E", [1, 4])
def test_gradients_are_those_of_a_dense_layer_at_the_signs(E):
    _, trainable = layer(E, spread=0.3)
    x, dy = torch.randn(10, 33, requires_grad=True), torch.randn(10, 24)
    trained = [trainable.latent, trainable.factor_in, trainable.factor_out, x]
    trained += [trainable.router] if E > 1 else []
    found = torch.autograd.grad(trainable(x), trained, dy)
    B = torch.where(trainable.latent >= 0, 1.0, -1.0).detach().requires_grad_()
    G = (x @ trainable.R.T).softmax(-1)
    y = ((x * (G @ trainable.S_in)) @ B.T) * (G @ trainable.S_out)
    expected = torch.autograd.grad(y, [B, *trained[1:]], dy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_sign_of_a_new_layer_is_equally_far_from_a_flip():
    _, trainable = layer(2)
    assert torch.equal(trainable.latent.abs(), torch.ones(24, 33))


def test_routers_scale_by_the_usual_size_of_their_inputs():
    _, trainable = layer(4)
    x = 5 * torch.randn(64, 33)
    x[0] *= 1e4
    set_router_units(torch.nn.Sequential(trainable), x)
    assert float(trainable.router_unit) == pytest.approx(0.2 / 33**0.5, rel=0.2)
    with torch.no_grad():
        trainable.router.normal_()
    moved = x[1:] @ (trainable.R - trainable.start_router).T
    assert float(moved.std()) == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("compiled", [False, True])
def test_divergence_is_kl_with_its_gradient(compiled: bool):
    torch.manual_seed(0)
    student = torch.randn(603, 50, dtype=torch.float32, requires_grad=True)
    teacher = 3 * torch.randn(603, 50)
    found = divergence(student, teacher, compiled)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 603
    torch.testing.assert_close(found, expected)
    (want,) = torch.autograd.grad(2 * expected, student)
    (got,) = torch.autograd.grad(2 * found, student)
    torch.testing.assert_close(got, want)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_hidden_distance_is_relative_to_each_token():
    torch.manual_seed(0)
    h = torch.randn(2, 5, 8)
    h[0, 0] *= 1e3
    assert float(hidden_distance([h], [h])) == 0
    assert float(hidden_distance([0 * h, h], [h, h])) == pytest.approx(0.5)
    assert float(hidden_distance([1.1 * h], [h])) == pytest.approx(0.01, rel=1e-3)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    path = tmp_path_factory.mktemp("distill")
    source = open_source(make_dense(path / "dense"), Options(experts=2, scale_dtype="float32"))
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    return path, source, packed_start(source), tokens


def packed_start(source):
    return {
        f"{module}.{suffix}": tensor
        for module in source.modules
        for suffix, tensor in source.layer(module).tensors.items()
    }


def train(setting, name, options=OPTIONS, stage=distill.QAT):
    path, source, start, tokens = setting
    (path / name).mkdir(exist_ok=True)
    # Random tokens have nothing in common, so what is learnt shows on the trained ones only.
    return distill.fit(source, start, tokens, tokens[:2], path / name, options, stage, 2, 0)


def flips(one, other):
    return sum(count_flips(one[name], other[name]) for name in one if name.endswith(WEIGHT))


def test_training_lowers_the_loss_and_flips_signs_only_if_asked(setting, caplog):
    caplog.set_level("INFO")
    start = setting[2]
    trained = train(setting, "signs", replace(OPTIONS, hidden=1.0))
    assert "discarded" not in caplog.text
    assert trained.keys() == start.keys() and flips(trained, start) > 0
    scales = train(setting, "scales", stage=distill.KD_SCALES)
    assert flips(scales, start) == 0
    assert any(not torch.equal(scales[name][:1], start[name][:1]) for name in start)


def test_a_gguf_file_is_trained_from(tmp_path, caplog):
    caplog.set_level("INFO")
    path, _ = make_gguf(tmp_path / "tiny.gguf")
    source = open_source(path, Options(experts=1, scale_dtype="float32"))
    start = packed_start(source)
    tokens = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    trained = train((tmp_path, source, start, tokens), "gguf")
    assert "discarded" not in caplog.text
    assert trained.keys() == start.keys() and flips(trained, start) > 0


def test_experts_are_split_and_trained(setting, caplog, monkeypatch):
    caplog.set_level("INFO")
    merged = []  # no expert helps with random tokens, so merging them is only noted here
    monkeypatch.setattr(distill, "merge_where_useless", lambda *_: merged.append(True))
    trained = train(setting, "experts", stage=distill.EXPERTS)
    assert "discarded" not in caplog.text and "entropy" in caplog.text
    scales = [t for name, t in trained.items() if name.endswith(IN_SCALE)]
    assert all(len(t) == 2 for t in scales)
    assert merged and all(not torch.equal(t[0], t[1]) for t in scales)


def test_an_interrupted_training_continues_with_the_same_bytes(setting, monkeypatch):
    whole = train(setting, "whole")
    assert flips(whole, setting[2]) > 0
    count, real = [0], distill.divergence

    def stop_late(*arguments):
        count[0] += 1
        if count[0] == 2 + 4 + 5:  # two windows are held out, four set margins; the fifth step
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (distill, training):
            patch.setattr(module, "divergence", stop_late)
        train(setting, "stopped")
    assert (setting[0] / "stopped" / "checkpoint-3").is_dir()
    continued = train(setting, "stopped")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_training_is_not_disturbed_by_dropout(setting, monkeypatch):
    seen, real = [], training.loss_on

    def watched(student, *args):
        seen.append(student.training)
        return real(student, *args)

    for module in (distill, training):  # margins, steps
        monkeypatch.setattr(module, "loss_on", watched)
    train(setting, "eval", replace(OPTIONS, tokens=2 * 64))
    assert len(seen) == 4 + 2 and not any(seen)  # four windows set margins


def test_compiled_training_is_the_same_training(setting, monkeypatch):
    compiled_blocks, real = [], distill.compile_blocks

    def watched(model):
        real(model)
        blocks = model.model.layers
        compiled_blocks.append([block._compiled_call_impl is not None for block in blocks])

    monkeypatch.setattr(distill, "compile_blocks", watched)
    few = replace(OPTIONS, tokens=8 * 64)  # later, signs flip by differences in rounding
    plain, compiled = train(setting, "plain", few), train(setting, "c", replace(few, compile=True))
    for name, tensor in plain.items():
        if name.endswith((IN_SCALE, OUT_SCALE)):
            moved, apart = (tensor - other[name] for other in (setting[2], compiled))
            assert float(apart.norm()) < 0.5 * float(moved.norm())  # Adam enlarges rounding
    assert compiled_blocks == [[True, True], [True, True]]  # student and teacher


def test_a_result_that_does_not_help_is_discarded(setting, caplog):
    worse = replace(OPTIONS, latent_lr=30.0, scale_lr=30.0)
    assert train(setting, "worse", worse) is setting[2]
    assert "discarded" in caplog.text

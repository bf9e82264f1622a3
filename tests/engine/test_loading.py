"""Every way in which vLLM reads weights, and reads them again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.compare import (
    NEW_TOKENS,
    PROMPTS,
    Answer,
    answers_after_swap,
    assert_same,
    assert_varied,
    engine,
    generate,
    reference_answers,
    save_state,
    vllm_answers,
)
from tests.tiny import make_packed, random_model

pytestmark = pytest.mark.slow


@pytest.mark.feature("Loading", "safetensors in several files", against="transformers")
def test_sharded_safetensors_give_the_same_answers(
    packed: Path, expected: list[Answer], tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    tensors = load_file(packed / "model.safetensors")
    # The parts of one layer end up in different files.
    parts = [dict(list(tensors.items())[i::3]) for i in range(3)]
    index: dict[str, str] = {}
    for i, part in enumerate(parts, start=1):
        name = f"model-{i:05}-of-00003.safetensors"
        save_file(part, tmp_path / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_same(vllm_answers(tmp_path, "float32"), expected, tolerance=2e-3)


@pytest.mark.feature("Loading", "`--load-format runai_streamer`", against="transformers")
def test_runai_streamer_gives_the_same_answers(packed: Path, expected: list[Answer]) -> None:
    pytest.importorskip("runai_model_streamer")
    found = vllm_answers(packed, "float32", load_format="runai_streamer")
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.feature(
    "Loading",
    "`--load-format fastsafetensors`",
    limit="vLLM asks it for a device `cuda:cpu` on a CPU, for dense models too",
)
def test_fastsafetensors_is_not_for_cpus(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastsafetensors")
    random_model("llama").save_pretrained(tmp_path)
    for path in (packed, tmp_path):
        with pytest.raises(RuntimeError, match="cuda:cpu"):
            vllm_answers(path, "float32", load_format="fastsafetensors")


@pytest.mark.feature("Loading", "`--load-format dummy`", against="the number of tokens asked for")
def test_dummy_weights_need_no_checkpoint(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    answers = vllm_answers(tmp_path, "float32", load_format="dummy")
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * len(PROMPTS)


def test_dummy_weights_of_a_whole_checkpoint(packed: Path) -> None:
    answers = vllm_answers(packed, "float32", load_format="dummy")
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * len(PROMPTS)


def test_logits_in_float32_from_an_lm_head_in_16_bits(packed: Path) -> None:
    overrides = {"head_dtype": "float32"}
    answers = vllm_answers(packed, "bfloat16", hf_overrides=overrides)
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * len(PROMPTS)


@pytest.mark.feature(
    "Loading", "sharded state, saved and loaded (tied embeddings)", against="transformers"
)
def test_sharded_state_comes_back(tmp_path: Path) -> None:
    packed, state = make_packed("llama-tied", tmp_path / "packed"), tmp_path / "state"
    state.mkdir()
    save_state(packed, state)
    found = vllm_answers(state, "float32", load_format="sharded_state")
    assert_varied(found)
    assert_same(found, reference_answers(packed, torch.float32), tolerance=2e-3)


@pytest.mark.feature(
    "Loading",
    "sharded state of a model with an untied lm_head, or of a mixture of experts",
    limit="on a CPU weights that are packed for oneDNN are dropped before they are saved, an "
    "untied lm_head by this plugin (its memory), the rest by vLLM: a dense model's layers are "
    "missing in the same way",
)
def test_vllm_saves_an_incomplete_sharded_state_on_a_cpu(packed: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    random_model("llama").save_pretrained(dense)
    mixture = make_packed("mixtral", tmp_path / "mixture")
    found = (packed, "lm_head.weight"), (dense, "qkv_proj.weight"), (mixture, "moe.gate.weight")
    for path, missing in found:
        state = tmp_path / f"state-{missing}"
        state.mkdir()
        save_state(path, state)
        with pytest.raises(ValueError, match=rf"Missing keys.*{missing}"):
            vllm_answers(state, "float32", load_format="sharded_state")


@pytest.mark.feature("Loading", "`reload_weights` of the same checkpoint", against="transformers")
def test_reloaded_weights_give_the_same_answers(packed: Path, expected: list[Answer]) -> None:
    with engine(packed, "float32") as llm:
        generate(llm, PROMPTS[:1])
        llm.collective_rpc("reload_weights")
        assert_same(generate(llm, PROMPTS), expected, tolerance=2e-3)


@pytest.mark.feature(
    "Faults",
    "checkpoint swapped for another of the same shape, then `reload_weights`",
    against="the answers are the new checkpoint's",
)
@pytest.mark.parametrize("arch", ["llama", "llama-tied"])
def test_reload_serves_the_swapped_checkpoint(arch: str, tmp_path: Path) -> None:
    path = make_packed(arch, tmp_path / "served")
    other = make_packed(arch, tmp_path / "other", seed=1)
    found = answers_after_swap(path, other)
    assert_same(found, reference_answers(other, torch.float32), tolerance=2e-3)


@pytest.mark.feature(
    "Faults",
    "checkpoint truncated, or swapped for one that does not fit, then `reload_weights`",
    against="the reload fails with an error, and nothing wrong is answered after it",
)
@pytest.mark.parametrize("fault", ["truncated", "other experts", "missing shard"])
def test_a_failed_reload_gives_no_wrong_answer(
    fault: str, packed: Path, expected: list[Answer], tmp_path: Path
) -> None:
    path = tmp_path / "served"
    shutil.copytree(packed, path)
    file = path / "model.safetensors"
    with engine(path, "float32") as llm:
        if fault == "truncated":
            # A new file: to cut the one that is mapped would kill the process that reads it.
            whole = file.read_bytes()
            file.unlink()
            file.write_bytes(whole[: len(whole) // 2])
        elif fault == "other experts":
            shutil.rmtree(path)
            make_packed("llama", path, E=2)
        else:
            tensors = load_file(file)
            del tensors["model.layers.1.self_attn.k_proj.weight_packed"]
            file.unlink()
            save_file(tensors, file, metadata={"format": "pt"})
        said = failure(lambda: llm.collective_rpc("reload_weights"))
        assert said.startswith(("FormatError", "SafetensorError")), said
        try:
            found = generate(llm, PROMPTS)
        except Exception:
            found = expected  # an engine that answers no more gives no wrong answer
        assert_same(found, expected, tolerance=2e-3)


def failure(call: Callable[[], Any]) -> str:
    """The repr of what a call raises. The exception itself would keep the engine alive."""
    try:
        call()
    except Exception as error:
        return repr(error)
    raise AssertionError("no error")

import pytest
import torch

from converters.fitting.training import DistillOptions, Windows, last_checkpoint, tokens_of
from vllm_bmos.checkpoint.format import FormatError


def test_a_step_needs_windows_for_every_process():
    options = DistillOptions(tokens=48 * 64, batch=2)
    assert tokens_of(options, 32, 1) == tokens_of(options, 32, 48) == 3072
    assert tokens_of(options, 32, 47) == 47 * 64
    with pytest.raises(FormatError, match=r"--tokens 3072: one step takes 3136, 2 windows of 32"):
        tokens_of(options, 32, 49)


def test_every_pass_over_the_text_has_an_order_of_its_own():
    tokens = torch.arange(40).view(10, 4)
    windows, again = Windows(tokens, 25, seed=3), Windows(tokens, 25, seed=3)
    seen = [int(windows[i]["input_ids"][0]) // 4 for i in range(25)]
    assert len(windows) == 25 and sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20] != list(range(10)) and len(set(seen[20:])) == 5
    assert seen == [int(again[i]["input_ids"][0]) // 4 for i in range(25)]
    other = Windows(tokens, 25, seed=4)
    assert seen != [int(other[i]["input_ids"][0]) // 4 for i in range(25)]


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "broken"
    whole, torn, empty = (folder / f"checkpoint-{n}" for n in (9, 10, 100))
    for path in (whole, torn, empty):
        path.mkdir(parents=True)
    (whole / "trainer_state.json").write_text('{"global_step": 9}')
    (torn / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(folder) == whole
    assert not torn.exists() and not empty.exists() and "checkpoint-10 " in caplog.text
    assert last_checkpoint(tmp_path / "nothing") is None

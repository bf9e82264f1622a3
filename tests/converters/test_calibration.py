import torch

from converters.calibration import Text, sample


def test_text_is_divided_before_it_is_cut():
    class Words:
        def __call__(self, text, **_):
            return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    found = sample([Text("t", "a" * 950 + "b" * 50)], Words(), 4, 2, 10)
    assert not torch.isin(found.train, ord("b")).any() and (found.held_out == ord("b")).all()

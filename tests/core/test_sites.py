import torch

from sfumato.core.sites import stack


def test_pictures_are_stacked_channels_last_with_the_same_values() -> None:
    pictures = [torch.rand(3, 4, 5), torch.rand(4, 5, 3).permute(2, 0, 1)]
    batch = stack(pictures)
    assert torch.equal(batch, torch.stack(pictures))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert stack(pictures[:1]).stride() == (60, 1, 15, 3), "also a batch of one, whose strides torch leaves open"


def test_other_inputs_are_stacked_as_they_are() -> None:
    rows = [torch.rand(7), torch.rand(7)]
    assert torch.equal(stack(rows), torch.stack(rows))

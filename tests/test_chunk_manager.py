"""ChunkManager: against slices that are cut by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasmina_ext import ChunkManager


def bounds(layer_dim, num_chunks):
    """[(start, end)]: sizes that differ by one at most, the larger ones first."""
    sizes = [layer_dim // num_chunks + (chunk < layer_dim % num_chunks) for chunk in range(num_chunks)]
    return [(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(num_chunks)]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(0, 3), max_size=2))
def test_all_of_it_against_slices(layer_dim, num_chunks, leading):
    manager = ChunkManager(layer_dim, num_chunks)
    cut = bounds(layer_dim, num_chunks)
    assert list(zip(manager.chunk_starts.tolist(), manager.chunk_ends.tolist(), strict=True)) == cut
    assert manager.chunk_indices.tolist() == [k for k, (start, end) in enumerate(cut) for _ in range(start, end)]
    assert (manager.chunk_size, manager.remainder) == divmod(layer_dim, num_chunks)
    assert [manager.get_chunk_size(k) for k in range(num_chunks)] == [end - start for start, end in cut]
    x = torch.randn(*leading, layer_dim)
    chunks = manager.split_tensor(x)
    assert all(torch.equal(chunk, x[..., a:b]) for chunk, (a, b) in zip(chunks, cut, strict=True))
    assert torch.equal(manager.concatenate_chunks(chunks), x)
    assert torch.equal(manager.apply_to_chunks(x, lambda chunk: chunk * 2), x * 2)
    numbered = manager.apply_to_chunks(x, lambda chunk, k: chunk + k)
    assert torch.equal(numbered, x + manager.chunk_indices)
    chosen = list(range(0, num_chunks, 2))
    mask = manager.create_chunk_mask(chosen)
    assert mask.tolist() == [k % 2 == 0 for k in manager.chunk_indices.tolist()]
    assert torch.equal(manager.apply_to_chunks(x, torch.neg, chosen), torch.where(mask, -x, x))
    assert torch.equal(manager.parallel_chunk_operation(x, torch.neg), -x)
    sums = manager.parallel_chunk_operation(x, lambda group: group.sum(-1))
    torch.testing.assert_close(sums, torch.stack([x[..., a:b].sum(-1) for a, b in cut], -1))
    mean, variance = manager.get_chunk_statistics(x)
    for k, (a, b) in enumerate(cut):
        if a == b:
            assert mean[..., k].isnan().all() and variance[..., k].isnan().all()
        else:
            torch.testing.assert_close(mean[..., k], x[..., a:b].mean(-1))
            torch.testing.assert_close(variance[..., k], torch.tensor(x[..., a:b].numpy().var(-1, ddof=0)))


def test_chunks_are_views(device):
    manager, x = ChunkManager(10, 3, device), torch.zeros(2, 10, device=device)
    for k, chunk in enumerate(manager.split_tensor(x)):
        chunk.fill_(k)
    assert torch.equal(x, manager.chunk_indices.expand(2, 10).float())


def test_where_the_indices_lie(device):
    manager = ChunkManager(10, 3)
    assert manager.device.type == "cpu" and manager.chunk_starts.device.type == "cpu"
    assert manager.to(device) is manager
    assert ChunkManager(10, 3, device).device == manager.device
    for tensor in (manager.chunk_starts, manager.chunk_ends, manager.chunk_indices, manager.create_chunk_mask(1)):
        assert tensor.device.type == device.type
    assert manager.chunk_starts.dtype == torch.int64
    x = torch.randn(3, 10, device=device)
    assert manager.get_chunk_statistics(x).mean.device == x.device


def test_statistics_are_a_pair_that_is_read_by_name_too():
    x = torch.randn(3, 10)
    statistics = ChunkManager(10, 3).get_chunk_statistics(x)
    mean, variance = statistics
    assert statistics["mean"] is statistics.mean is statistics[0] is mean
    assert statistics["variance"] is statistics.variance is statistics[-1] is variance
    assert dict(statistics).keys() == {"mean", "variance"} and "mean" in statistics and "std" not in statistics
    with pytest.raises(KeyError, match="known are mean, variance"):
        statistics["std"]
    expected = torch.stack([x[:, :4].mean(1), x[:, 4:7].mean(1), x[:, 7:].mean(1)], 1)
    torch.testing.assert_close(statistics["mean"], expected)


@pytest.mark.parametrize("chosen", [[0, 2], (2, 0, 0), torch.tensor([0, 2]), torch.tensor([True, False, True]), {0, 2}])
def test_ways_to_name_chunks(chosen):
    manager = ChunkManager(7, 3)
    assert manager.create_chunk_mask(chosen).tolist() == [True, True, True, False, False, True, True]
    x = torch.ones(7)
    assert manager.apply_to_chunks(x, lambda chunk: chunk + 1, chosen).tolist() == [2, 2, 2, 1, 1, 2, 2]
    assert manager.create_chunk_mask(1).tolist() == [False] * 3 + [True] * 2 + [False] * 2


def test_an_operation_for_each_chunk_may_change_widths():
    x = torch.arange(5.0)
    operations = [lambda chunk: chunk[:1], torch.neg, lambda chunk, scale=3: chunk * scale]
    assert ChunkManager(5, 3).apply_to_chunks(x, operations).tolist() == [0, -2, -3, 12]
    assert ChunkManager(5, 3).parallel_chunk_operation(x, lambda group: group[..., :1]).tolist() == [0, 2, 4]


def test_gradients_pass_and_low_precision_is_summed_in_float32(device):
    x = torch.randn(4, 12, device=device, requires_grad=True)
    ChunkManager(12, 5).get_chunk_statistics(x).variance.sum().backward()
    assert x.grad.shape == x.shape
    half = torch.full((1, 4096), 1.0, device=device, dtype=torch.float16)
    mean, variance = ChunkManager(4096, 1).get_chunk_statistics(half)
    assert mean.dtype == torch.float32 and (mean.item(), variance.item()) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 1), ValueError), ((4, 0), ValueError), ((4, -1), ValueError), ((4.0, 2), TypeError), ((4, True), TypeError)],
)
def test_bad_sizes(arguments, error):
    with pytest.raises(error, match=r"layer_dim|num_chunks"):
        ChunkManager(*arguments)


def test_bad_input():
    manager, x = ChunkManager(10, 3), torch.randn(2, 10)
    for call in (
        lambda: manager.split_tensor(x[:, :9]),
        lambda: manager.split_tensor(torch.tensor(1.0)),
        lambda: manager.get_chunk_statistics(torch.randn(10, 2)),
        lambda: manager.parallel_chunk_operation(torch.randn(4), torch.neg),
    ):
        with pytest.raises(ValueError, match="last dimension must be layer_dim = 10"):
            call()
    with pytest.raises(ValueError, match=r"chunks must be \[4, 3, 3\] features wide, got \[4, 3\]"):
        manager.concatenate_chunks(manager.split_tensor(x)[:2])
    with pytest.raises(ValueError, match="2 operations for 3 chunks"):
        manager.apply_to_chunks(x, [torch.neg, torch.neg])
    for ids in (3, [-1], [0, 7]):
        with pytest.raises(ValueError, match=r"chunk_id must be in \[0, 3\)"):
            manager.create_chunk_mask(ids)
    with pytest.raises(ValueError, match="a mask of chunks must have shape"):
        manager.create_chunk_mask(torch.tensor([True, False]))
    with pytest.raises(TypeError, match="chunk_ids must be integers"):
        manager.create_chunk_mask([0.5])
    with pytest.raises(ValueError, match="chunk_id"):
        manager.get_chunk_size(3)

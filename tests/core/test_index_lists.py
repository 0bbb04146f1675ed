"""Index lists as a backward pass keeps them."""

import pytest
import torch

from modeling_keye.index_lists_keye import pack_index_list, unpack_index_list
from modeling_keye.sparse_attention_keye import Selection, select_tokens


def _selected(selection: Selection, batch: int, num_queries: int, offset: int, key_mask=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    num_keys = offset + num_queries
    q = k = weights = None
    if selection.topk is not None:
        q = torch.randn(batch, num_queries, 2, 8, generator=generator)
        k, weights = torch.randn(batch, num_keys, 8, generator=generator), torch.rand(batch, num_queries, 2)
    return select_tokens(
        selection,
        q,
        k,
        weights,
        batch_size=batch,
        num_queries=num_queries,
        query_offset=offset,
        key_mask=key_mask,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    "selection", [Selection(16, 8, 4), Selection(16), Selection(None, 5, 7), Selection(9, None, 3)]
)
@pytest.mark.parametrize(("num_queries", "offset"), [(1, 0), (1, 90), (33, 0), (33, 200)])
def test_what_is_unpacked_is_what_was_packed(selection, num_queries, offset):
    key_mask = torch.ones(2, offset + num_queries, dtype=torch.bool)
    key_mask[1, : (offset + num_queries) // 3] = False
    indices = _selected(selection, 2, num_queries, offset, key_mask)
    shared, rest = pack_index_list(indices, offset + num_queries)
    assert torch.equal(unpack_index_list(shared, rest, indices.shape[-1]), indices)


def test_queries_without_a_key_and_lists_without_a_shared_key():
    empty = torch.full((1, 3, 4), -1, dtype=torch.int32)
    assert torch.equal(unpack_index_list(*pack_index_list(empty, 5), 4), empty)
    apart = torch.tensor([[[0, 1, -1], [2, 3, 4]]], dtype=torch.int32)
    shared, rest = pack_index_list(apart, 5)
    assert shared.shape == (1, 0) and torch.equal(unpack_index_list(shared, rest, 3), apart)


def test_a_slot_that_a_query_lists_twice_stays_twice():
    twice = torch.tensor([[[0, 0, 3], [1, 3, -1]]], dtype=torch.int32)
    assert torch.equal(unpack_index_list(*pack_index_list(twice, 4), 3), twice)


def test_anchors_are_kept_once_for_all_queries_of_a_run():
    stride, num_queries, offset = 8, 64, 4096
    indices = _selected(Selection(16, 8, stride), 1, num_queries, offset)
    shared, rest = pack_index_list(indices, offset + num_queries)
    assert shared.shape[-1] >= (offset - 8) // stride
    # Per query: its top k, its window, and the anchors that not all queries of the run have.
    assert rest.shape[-1] <= 16 + 9 + num_queries // stride + 2

"""Which rank holds what: arithmetic, without processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import ConfigError, ShapeError, UnsupportedError
from longspan.distributed import (
    IGNORED,
    SequenceLayout,
    Span,
    next_token_targets,
    shard_batch,
)
from longspan.distributed.halo import Reach, fetched_rows, pieces
from longspan.distributed.tiles import local_lengths, tiles


@st.composite
def layouts(draw):
    length = draw(st.integers(0, 60))
    marks = None
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, length), max_size=5))
        marks = (0, *sorted(cuts), length)
    return SequenceLayout(
        length=length,
        ranks=draw(st.integers(1, 5)),
        kind=draw(st.sampled_from(["contiguous", "zigzag"])),
        multiple=draw(st.sampled_from([1, 3, 8])),
        cu_seqlens=marks,
    )


def documents_of(layout):
    """Document number of each token."""
    number = torch.empty(layout.length, dtype=torch.int64)
    for index, (start, stop) in enumerate(layout.documents):
        number[start:stop] = index
    return number


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_every_token_is_somewhere_once(layout):
    held = torch.cat([layout.positions(rank) for rank in range(layout.ranks)])
    assert sorted(held.tolist()) == list(range(layout.length))
    whole = torch.randn(2, layout.length)
    parts = [layout.split(whole, rank) for rank in range(layout.ranks)]
    assert [p.shape[1] for p in parts] == [layout.length_of(r) for r in range(layout.ranks)]
    assert torch.equal(layout.restore(parts), whole)
    for rank in range(layout.ranks):
        assert all(start % layout.multiple == 0 for start, _ in layout.spans(rank))


@given(layouts(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_tiles_cover_every_visible_pair_once(layout, is_causal):
    number = documents_of(layout)
    position = torch.arange(layout.length)
    visible = number[:, None] == number
    if is_causal:
        visible = visible & (position[:, None] >= position)
    for q_rank in range(layout.ranks):
        for k_rank in range(layout.ranks):
            count = torch.zeros(layout.length_of(q_rank), layout.length_of(k_rank))
            columns = layout.positions(k_rank)
            for tile in tiles(layout, q_rank, k_rank, is_causal):
                block = torch.ones(tile.q_stop - tile.q_start, tile.k_stop - tile.k_start)
                count[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += (
                    block.tril() if tile.is_causal else block
                )
                named = torch.cat([torch.arange(a, b) for a, b in tile.columns])
                assert torch.equal(named, columns[tile.k_start : tile.k_stop])
            want = visible[layout.positions(q_rank)][:, columns].float()
            assert torch.equal(count, want)


@given(layouts(), st.integers(0, 4), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_fetched_rows_are_what_is_seen(layout, first, before, after):
    reach = Reach(first, before, after)
    for rank in range(layout.ranks):
        wanted = set()
        rows = 0
        for piece in pieces(layout, rank, reach):
            rows += piece.rows.length
            wanted |= set(range(*piece.first)) | set(range(*piece.near))
        assert rows == layout.length_of(rank)
        needed = set()
        for position in layout.positions(rank).tolist():
            start, stop = layout.document_of(position)
            needed |= set(range(start, min(start + first, stop)))
            needed |= set(range(max(position - before, start), min(position + after + 1, stop)))
        assert needed == wanted
        fetched = fetched_rows(layout, rank, reach)
        assert wanted == {row for span in fetched for row in range(*span)}
        assert list(fetched) == sorted(fetched)


def test_zigzag_shares_causal_work_evenly():
    work = {}
    for kind in ("zigzag", "contiguous"):
        layout = SequenceLayout(length=4096, ranks=4, kind=kind)
        work[kind] = [
            sum(
                (t.q_stop - t.q_start) * (t.k_stop - t.k_start) / (2 if t.is_causal else 1)
                for other in range(4)
                for t in tiles(layout, rank, other, True)
            )
            for rank in range(4)
        ]
    assert max(work["zigzag"]) == min(work["zigzag"])
    assert max(work["contiguous"]) > 6 * min(work["contiguous"])
    # the steps between ranks are one rectangle each
    layout = SequenceLayout(length=4096, ranks=4)
    assert all(len(tiles(layout, 1, other, True)) == 1 for other in (0, 2, 3))


def test_position_ids_restart_in_documents():
    layout = SequenceLayout(length=7, ranks=2, kind="contiguous", cu_seqlens=(0, 2, 2, 7))
    assert layout.position_ids(0).tolist() == [0, 1, 0]
    assert layout.position_ids(1).tolist() == [1, 2, 3, 4]
    assert layout.positions(1).tolist() == [3, 4, 5, 6]


def test_lengths_of_columns():
    lengths = local_lengths(torch.tensor([0, 3, 9], dtype=torch.int32), (Span(1, 4), Span(6, 9)))
    assert lengths.tolist() == [0, 2, 6]
    assert lengths.dtype is torch.int32


def test_targets_and_batches():
    ids = torch.arange(10)[None].repeat(2, 1)
    targets = next_token_targets(ids, key_lengths=torch.tensor([10, 4]))
    assert targets[0].tolist() == [*range(1, 10), IGNORED]
    assert targets[1].tolist() == [1, 2, 3, *[IGNORED] * 7]
    packed = next_token_targets(ids[:1], cu_seqlens=(0, 0, 4, 10))
    assert packed[0].tolist() == [1, 2, 3, IGNORED, 5, 6, 7, 8, 9, IGNORED]
    layout = SequenceLayout(length=10, ranks=2)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = shard_batch(ids, layout, 1, attention_mask=mask)
    assert batch.key_lengths.tolist() == [10, 4]
    assert batch.input_ids[0].tolist() == layout.positions(1).tolist()
    assert batch.targets[0].tolist() == [t + 1 for t in layout.positions(1).tolist()]
    with pytest.raises(UnsupportedError, match="not on the right"):
        shard_batch(ids, layout, 0, attention_mask=mask.flip(1))
    with pytest.raises(ShapeError, match="must be \\(B, 10\\)"):
        shard_batch(ids[:, 1:], layout, 0)
    with pytest.raises(ShapeError, match="packed documents"):
        shard_batch(ids, SequenceLayout(length=10, ranks=2, cu_seqlens=(0, 10)), 0)
    with pytest.raises(ShapeError, match="attention_mask is"):
        shard_batch(ids, layout, 0, attention_mask=mask[:1])


def test_refusals():
    with pytest.raises(ConfigError, match="ranks is 0"):
        SequenceLayout(length=4, ranks=0)
    with pytest.raises(ConfigError, match="Did you mean 'zigzag'"):
        SequenceLayout(length=4, ranks=1, kind="zig-zag")
    for marks in ((0, 3), (1, 4), (0, 3, 2, 4), (0,)):
        with pytest.raises(ConfigError, match="cu_seqlens is"):
            SequenceLayout(length=4, ranks=1, cu_seqlens=marks)
    layout = SequenceLayout(length=4, ranks=2)
    with pytest.raises(ShapeError, match="must be 4, the whole"):
        layout.split(torch.zeros(2, 5), 0)
    with pytest.raises(ShapeError, match="parts have lengths"):
        layout.restore([torch.zeros(3), torch.zeros(1)])

"""HyperAttention over ranks without moving all keys: neighbours, columns, opened clusters.

Chunks are indexed where they lie. A rank fetches the near keys and sinks of its queries, one column
per cluster (or sample) of the chunks before them, chooses, tells the other ranks which clusters its
queries opened, and gets their keys and values. Gradients go back the same ways.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._select import choose_impl
from .._validation import Call, validate
from ..errors import ConfigError, UnsupportedError
from ..hyper.api import implementations
from ..hyper.config import HyperConfig
from ..hyper.impl.common import choose, make_columns
from ..hyper.impl.opened import Pieces
from ..hyper.index.chunks import build_chunk_index
from ..hyper.index.lsh import draw_projections
from ..hyper.plan import ChunkIndex, Columns
from ..types import AttentionOutput, Impl
from .checks import check_local, describe, verified
from .exchange import all_to_all, fetch_rows, take_rows, tie
from .group import ContextGroup
from .halo import Piece, Reach, fetched_rows, pieces
from .hyper_attend import Fetched, attend_fetched
from .layout import SequenceLayout, Span

__all__ = ["hyper_attention_across_ranks"]

_NAME = "hyper_attention_across_ranks"


def hyper_attention_across_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    seed: int = 0,
    config: HyperConfig = HyperConfig(),
    impl: Impl | str = "auto",
) -> AttentionOutput:
    """Causal HyperAttention over a sequence that is spread over ranks, moving what is visited.

    Args:
        query: (B, H, n, D), the tokens that `layout` gives this rank.
        key, value: (B, H_kv, n, D) and (B, H_kv, n, D_v).
        group: the ranks that share the sequence.
        layout: cut between chunks: multiple=config.chunk_size, or a multiple of it.
        is_causal: must be True.
        key_lengths: must be None: a causal query sees no padding on the right anyway.
        scale, enable_gqa, seed, config: as in `hyper_attention`; structure="chunks".
        impl: "auto" or "eager".

    Returns:
        AttentionOutput: output (B, H, n, D_v) and lse (B, H, n), this rank's tokens.

    Raises:
        ShapeError: a tensor is not this rank's share.
        ConfigError: a layout that cuts amid a chunk.
        UnsupportedError: a call that is not causal, packed documents, structure="recursion",
            max_error, or impl="reference": ulysses_attention runs all of them.
        RankError: ranks differ (found before the first exchange), or one stopped.

    Semantics:
        Equals `hyper_attention` of the whole sequence with the same seed on one process, up to the
        order of sums (a tie between two clusters could fall differently). The gradients of keys are
        cast to their dtype before they travel, so that in half precision they are rounded up to
        four times instead of once.

    Cost:
        Bytes received per rank forward, with W = B H_kv (D + D_v): near keys and sinks, W e
        (window + chunk_size + num_sinks) at most for each run of tokens (e bytes per element);
        columns, 4 W / cluster_size for each token before the rank's last (num_samples / chunk_size
        instead of 1 / cluster_size for sampled residuals); one byte per cluster and key head for
        the choice; and W e for each key of the clusters that any query of the rank opened. The
        backward sends the same back, without the choice. The last term is at most all far keys,
        and comes close to that where many queries with different interests share a rank: N keys
        hold N / cluster_size clusters, and n queries of G heads open up to n G num_probes. On the
        text of docs/guide/distributed.md it was 69 to 98 % with two ranks, 43 to 74 % with eight.

    Example:
        layout = SequenceLayout(length=n, ranks=group.size, multiple=config.chunk_size)
        out = hyper_attention_across_ranks(q, k, v, config=config, group=group, layout=layout)[0]
    """
    with verified(_NAME, group) as shared:
        check_local(_NAME, group, layout, {"query": query, "key": key, "value": value})
        _check(config, layout, is_causal, key_lengths)
        call = validate(_NAME, query, key, value, is_causal=True, scale=scale,
                        enable_gqa=enable_gqa)  # fmt: skip
        if choose_impl(_NAME, impl, implementations(call, config)) is Impl.REFERENCE:
            raise UnsupportedError(
                f"{_NAME}: impl='reference' needs all keys in one place; allowed are auto and "
                "eager. Use ulysses_attention, which runs the reference."
            )
        tensors = {"query": call.query, "key": call.key, "value": call.value}
        settings = {"scale": call.scale, "seed": seed, "config": config, "layout": layout}
        shared.update(describe(tensors, settings))
    with torch.autocast(call.query.device.type, enabled=False):
        return _run(call, config, seed, group, layout)


def _check(
    config: Any, layout: SequenceLayout, is_causal: bool, key_lengths: Tensor | None
) -> None:
    if not isinstance(config, HyperConfig):
        raise UnsupportedError(
            f"{_NAME}: config is a {type(config).__name__}; only HyperConfig is allowed. Use "
            "ring_attention or ulysses_attention."
        )
    if key_lengths is not None:
        raise UnsupportedError(
            f"{_NAME}: key_lengths were given; allowed is None. Leave them out, since no query "
            "sees the padding after it, or use ulysses_attention."
        )
    problem = None
    if config.structure != "chunks" or config.max_error is not None:
        problem = (
            f"config has structure={config.structure!r} and max_error={config.max_error}; allowed "
            "are 'chunks' and None, whose index looks at keys alone"
        )
    elif not is_causal:
        problem = "is_causal is False; only causal calls are there"
    elif layout.cu_seqlens is not None:
        problem = "layout has cu_seqlens; packed documents are not there"
    if problem is not None:
        raise UnsupportedError(
            f"{_NAME}: {problem}. Use ulysses_attention, which is exact for every call."
        )
    if layout.ranks > 1 and layout.multiple % config.chunk_size:
        raise ConfigError(
            f"{_NAME}: layout cuts at multiples of {layout.multiple}, amid chunks of "
            f"{config.chunk_size}. Make it with multiple=config.chunk_size."
        )


class _Chunks(NamedTuple):
    """The full chunks of every rank, in numbers of the whole sequence, and how many each needs.

    needed: the far chunks of a rank's queries are 0 .. needed - 1.
    """

    config: HyperConfig
    held: tuple[tuple[Span, ...], ...]
    needed: tuple[int, ...]

    def rows_of(self, rank: int, per_chunk: int) -> tuple[Span, ...]:
        """The rows that a rank holds of a table with so many rows for each chunk."""
        return tuple(Span(a * per_chunk, b * per_chunk) for a, b in self.held[rank] if b > a)

    def wanted(self, per_chunk: int) -> tuple[tuple[Span, ...], ...]:
        """The rows that every rank needs of that table."""
        return tuple((Span(0, n * per_chunk),) if n * per_chunk else () for n in self.needed)

    def of_rank_for(self, holder: int, asker: int) -> tuple[int, ...]:
        """The chunks that one rank holds and another needs, in order."""
        most = self.needed[asker]
        return tuple(c for a, b in self.held[holder] for c in range(a, min(b, most)))


class _Table(NamedTuple):
    """A layout of rows that belong to chunks; what `fetch_rows` asks of a layout."""

    chunks: _Chunks
    per_chunk: int

    def spans(self, rank: int) -> tuple[Span, ...]:
        return self.chunks.rows_of(rank, self.per_chunk)


class _Own(NamedTuple):
    """This rank's chunks, joined: positions count among its tokens, columns have gradients."""

    lookup: ChunkIndex
    columns: Columns


def _run(
    call: Call, config: HyperConfig, seed: int, group: ContextGroup, layout: SequenceLayout
) -> AttentionOutput:
    chunks = _chunks(config, layout)
    own = _index_own(call, config, seed, layout.spans(group.rank))
    columns, lookup = _gather_columns(own, chunks, group)
    globals_ = _gather_globals(call, own, chunks, group)
    reach = Reach(config.num_sinks, _near_before(config), 0)
    wanted = tuple(fetched_rows(layout, rank, reach) for rank in range(group.size))
    near = fetch_rows(torch.cat((call.key, call.value), 3), group, layout, wanted)

    parts = pieces(layout, group.rank, reach)
    starts = [span.start for span in layout.spans(group.rank)]
    queries = [call.query[:, :, part.rows.start : part.rows.stop] for part in parts]
    choices = [
        _choose(rows, call, lookup, config, start, layout.length)
        for rows, start in zip(queries, starts, strict=True)
    ]
    rows_of_clusters = _fetch_opened(call, own, lookup.counts, choices, chunks, group)
    opened = _cut_pieces(rows_of_clusters, call.key.shape[3], config.cluster_size, columns.key)

    results = []
    for part, rows, start, chosen in zip(parts, queries, starts, choices, strict=True):
        far = max((start + part.rows.length - config.window) // config.chunk_size, 0)
        keys, shift, places = _near_keys(near, wanted[group.rank], part, globals_, far)
        keys = keys.flatten(0, 1).to(columns.key.dtype)
        near_key, near_value = torch.split(keys, [call.key.shape[3], call.value.shape[3]], 2)
        fetched = Fetched(
            near_key, near_value, shift, _first_columns(columns, far, config),
            _first_chunks(lookup, far, config, places), opened,
        )  # fmt: skip
        results.append(
            attend_fetched(rows, fetched, chosen, config, call.scale, start, layout.length)
        )
    came = (columns.key, globals_, near, rows_of_clusters.rows)
    if not results:
        empty = tie(call.query.new_zeros((*call.query.shape[:3], call.value.shape[-1])),
                    call.query, *came)  # fmt: skip
        return AttentionOutput(empty, empty.sum(-1).to(columns.key.dtype))
    output = torch.cat([result.output for result in results], 2)
    lse = torch.cat([result.lse for result in results], 2)
    return AttentionOutput(tie(output, *came), tie(lse, *came))


def _near_before(config: HyperConfig) -> int:
    """How far before a chunk's first query its near keys begin: whole chunks."""
    return -(-(config.window - 1) // config.chunk_size) * config.chunk_size


def _columns_per_chunk(config: HyperConfig) -> int:
    if config.residual == "centroid":
        return config.clusters_per_chunk
    return 0 if config.residual == "none" else config.num_samples


def _chunks(config: HyperConfig, layout: SequenceLayout) -> _Chunks:
    size = config.chunk_size
    held, needed = [], []
    for rank in range(layout.ranks):
        spans = layout.spans(rank)
        held.append(tuple(Span(a // size, b // size) for a, b in spans))
        last = spans[-1].stop if spans else 0
        needed.append(max((last - config.window) // size, 0))
    return _Chunks(config, tuple(held), tuple(needed))


def _index_own(call: Call, config: HyperConfig, seed: int, spans: tuple[Span, ...]) -> _Own:
    """The index and the columns of this rank's full chunks."""
    kv_heads, dim = call.key.shape[1], call.key.shape[3]
    planes = None
    if config.index == "lsh":
        planes = draw_projections(seed, kv_heads, dim, config.num_projections, call.key.device)
    base, ordered, indices, columns = 0, 0, [], []
    for span in spans or (Span(0, 0),):
        rows = slice(base, base + span.length)
        part = call._replace(query=call.query[:, :, :0], key=call.key[:, :, rows],
                             value=call.value[:, :, rows])  # fmt: skip
        with torch.no_grad():
            index = build_chunk_index(part.key.detach(), part.value.detach(), config, planes, seed,
                                      span.start // config.chunk_size)  # fmt: skip
        made = make_columns(part, config, index)
        if config.residual != "centroid":  # the cluster, counted from its chunk's first
            made = made._replace(owner=made.owner % config.clusters_per_chunk)
        else:
            made = made._replace(
                owner=(made.owner % config.clusters_per_chunk).expand(made.bias.shape)
            )
        columns.append(made)
        indices.append(index._replace(order=index.order + base, starts=index.starts + ordered,
                                      globals=index.globals + base))  # fmt: skip
        base, ordered = rows.stop, ordered + index.order.shape[2]
    return _Own(
        ChunkIndex(*(torch.cat(parts, 2) for parts in zip(*indices, strict=True))),
        Columns(
            *(None if None in map(_kind, parts) else torch.cat(parts, 2)  # type: ignore[arg-type]
              for parts in zip(*columns, strict=True))
        ),
    )  # fmt: skip


def _kind(item: Any) -> Any:
    return None if item is None else type(item)


def _gather_columns(own: _Own, chunks: _Chunks, group: ContextGroup) -> tuple[Columns, ChunkIndex]:
    """Columns, and counts and means, of all chunks that this rank's queries may find far."""
    config, (lookup, columns) = chunks.config, own
    wide = columns.key.dtype
    fixed = (columns.bias.to(wide).unsqueeze(-1), columns.owner.to(wide).unsqueeze(-1))
    table = [columns.key, columns.value, *fixed]
    if columns.variance is not None:
        table.append(columns.variance)
    per_chunk = _columns_per_chunk(config)
    got = _fetch(torch.cat(table, 3), chunks, per_chunk, group)
    key, value, bias, owner, *variance = torch.split(got, [part.shape[3] for part in table], 3)
    number = torch.arange(key.shape[2], device=key.device) // max(per_chunk, 1)
    named = owner.detach().squeeze(-1).to(torch.int32)
    named = named + (number * config.clusters_per_chunk).to(torch.int32)
    all_columns = Columns(key, value, bias.detach().squeeze(-1), named, *variance or (None,))

    by_mean = config.residual == "centroid" and not config.probe_spread
    guide = [lookup.counts.to(wide).unsqueeze(-1)]
    guide += [] if by_mean else [lookup.mean_key]
    guide += [lookup.variance] if config.probe_spread else []
    with torch.no_grad():
        came = _fetch(torch.cat(guide, 3), chunks, config.clusters_per_chunk, group)
    counts, *rest = torch.split(came, [part.shape[3] for part in guide], 3)
    mean = key.detach() if by_mean else rest[0]
    none = lookup.counts.new_zeros((*counts.shape[:2], 0))
    return all_columns, ChunkIndex(
        order=none, starts=none, counts=counts.squeeze(-1).to(torch.int32), labels=none,
        globals=none.unsqueeze(-1), mean_key=mean, samples=none, sample_bias=none,
        variance=rest[1] if config.probe_spread else mean[:, :, :0],
    )  # fmt: skip


def _gather_globals(call: Call, own: _Own, chunks: _Chunks, group: ContextGroup) -> Tensor:
    """(B, H_kv, chunks, num_globals, D + D_v) of the far chunks."""
    count = chunks.config.num_globals
    both = torch.cat((call.key, call.value), 3)
    at = own.lookup.globals.long().flatten(2).unsqueeze(-1).expand(-1, -1, -1, both.shape[3])
    rows = both.gather(2, at)
    rows = _fetch(rows, chunks, count, group) if count else rows[:, :, :0]
    return rows.reshape(*rows.shape[:2], chunks.needed[group.rank], count, rows.shape[3])


def _fetch(table: Tensor, chunks: _Chunks, per_chunk: int, group: ContextGroup) -> Tensor:
    """The rows of the far chunks, in order, of a table with so many rows for each chunk."""
    return fetch_rows(table, group, _Table(chunks, per_chunk), chunks.wanted(per_chunk))


def _choose(
    query: Tensor, call: Call, lookup: ChunkIndex, config: HyperConfig, start: int, length: int
) -> Tensor:
    """(B, H, n, P): as on one device; the keys themselves are not asked for."""
    no_keys = call.key.new_empty((*call.key.shape[:2], 1, 0)).expand(-1, -1, length, -1)
    with torch.no_grad():
        asked = Call(query.detach(), no_keys, no_keys, None, True, call.scale, start)
        return choose(asked, config, lookup)


class _Rows(NamedTuple):
    """Keys and values of opened clusters, and which are whose.

    rows: (T, D + D_v), cluster by cluster.
    counts: (L,) int64 rows of each; cluster: (L,) int64, group of heads * total + cluster.
    total: clusters of all far chunks. groups: B H_kv.
    """

    rows: Tensor
    counts: Tensor
    cluster: Tensor
    total: int
    groups: int


def _fetch_opened(
    call: Call, own: _Own, counts: Tensor, choices: list[Tensor], chunks: _Chunks,
    group: ContextGroup,
) -> _Rows:  # fmt: skip
    """Ask the ranks that hold them for the clusters that any query here opened."""
    device, groups = call.key.device, call.key.shape[0] * call.key.shape[1]
    total = counts.shape[2]
    opened = torch.zeros((groups, total + 1), dtype=torch.uint8, device=device)
    for chosen in choices:
        picks = chosen.long().reshape(groups, -1)
        opened.scatter_(1, torch.where(picks < 0, total, picks), 1)
    clusters = [_clusters(chunks, holder, group.rank, device) for holder in range(group.size)]
    asks = [opened[:, names] for names in clusters]
    mine = [_clusters(chunks, group.rank, asker, device) for asker in range(group.size)]
    asked = all_to_all(asks, [(groups, names.numel()) for names in mine], group)

    both = torch.cat((call.key, call.value), 3)
    flat = both.reshape(-1, both.shape[3])
    number = _local_numbers(chunks, group.rank, total, device)
    order, starts, sizes = (
        tensor.long().flatten(0, 1)
        for tensor in (own.lookup.order, own.lookup.starts, own.lookup.counts)
    )
    parts = []
    for names, wanted in zip(mine, asked, strict=True):
        head, place = wanted.nonzero(as_tuple=True)
        cluster = number[names[place]]
        size = sizes[head, cluster]
        inside = _ranks_inside(size)
        first = starts[head, cluster].repeat_interleave(size)
        head = head.repeat_interleave(size)
        parts.append(flat.index_select(0, head * both.shape[2] + order[head, first + inside]))

    count = counts.long().flatten(0, 1)
    names_of, sizes_of = [], []
    for names, ask in zip(clusters, asks, strict=True):
        head, place = ask.nonzero(as_tuple=True)
        names_of.append(head * total + names[place])
        sizes_of.append(count[head, names[place]])
    shapes = [(int(size.sum()), both.shape[3]) for size in sizes_of]
    rows = torch.cat(all_to_all(parts, shapes, group))
    return _Rows(rows, torch.cat(sizes_of), torch.cat(names_of), total, groups)


def _clusters(chunks: _Chunks, holder: int, asker: int, device: torch.device) -> Tensor:
    """Clusters that one rank holds and another may open, in numbers of the whole sequence."""
    per_chunk = chunks.config.clusters_per_chunk
    held = torch.tensor(chunks.of_rank_for(holder, asker), dtype=torch.int64, device=device)
    return (held[:, None] * per_chunk + torch.arange(per_chunk, device=device)).flatten()


def _local_numbers(chunks: _Chunks, rank: int, total: int, device: torch.device) -> Tensor:
    """Cluster of the whole sequence -> cluster among this rank's own."""
    per_chunk = chunks.config.clusters_per_chunk
    last = max((span.stop for span in chunks.held[rank]), default=0) * per_chunk
    number = torch.zeros(last, dtype=torch.int64, device=device)
    done = 0
    for span in chunks.held[rank]:
        place = slice(span.start * per_chunk, span.stop * per_chunk)
        number[place] = torch.arange(done, done + place.stop - place.start, device=device)
        done += place.stop - place.start
    return number


def _ranks_inside(counts: Tensor) -> Tensor:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, and so on."""
    ends = counts.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    first = (ends - counts).repeat_interleave(counts)
    return torch.arange(total, device=counts.device) - first


def _cut_pieces(opened: _Rows, dim: int, capacity: int, like: Tensor) -> Pieces:
    """As `make_pieces`, of the clusters that came."""
    device, counts = like.device, opened.counts
    number = (counts + capacity - 1) // capacity
    first = number.cumsum(0) - number
    begin = counts.cumsum(0) - counts
    owner = torch.arange(counts.numel(), device=device).repeat_interleave(number)
    slots = (begin[owner] + _ranks_inside(number) * capacity).unsqueeze(-1)
    slots = slots + torch.arange(capacity, device=device)
    void = slots >= (begin + counts)[owner].unsqueeze(-1)
    rows = opened.rows.to(like.dtype).index_select(0, torch.where(void, 0, slots).flatten())
    rows = rows.view(-1, capacity, opened.rows.shape[1])
    firsts = torch.zeros(opened.groups * opened.total, dtype=torch.int64, device=device)
    numbers = torch.zeros_like(firsts)
    return Pieces(
        keys=rows[..., :dim].contiguous(),
        values=F.pad(rows[..., dim:], (0, 1), value=1.0),
        bias=torch.zeros_like(void, dtype=like.dtype).masked_fill(void, float("-inf")),
        first=firsts.index_copy(0, opened.cluster, first),
        number=numbers.index_copy(0, opened.cluster, number),
        slots=firsts[:0],
    )


def _near_keys(
    near: Tensor, fetched: tuple[Span, ...], part: Piece, globals_: Tensor, far: int
) -> tuple[Tensor, int, Tensor]:
    """Sinks, near keys and globals (B, H_kv, m, D + D_v); the shift of near positions; and the
    places (1, B H_kv, far, num_globals) of the globals."""
    rows = [take_rows(near, fetched, span) for span in (part.first, part.near) if span.length]
    count = part.first.length + part.near.length
    extra = globals_[:, :, :far].flatten(2, 3)
    places = torch.arange(count, count + extra.shape[2], device=near.device, dtype=torch.int32)
    places = places.view(far, globals_.shape[3]).expand(1, near.shape[0] * near.shape[1], -1, -1)
    return torch.cat((*rows, extra), 2), part.first.length - part.near.start, places


def _first_columns(columns: Columns, far: int, config: HyperConfig) -> Columns:
    """Those of the first chunks, heads of all entries in one axis."""
    count = far * _columns_per_chunk(config)
    parts = (None if t is None else t[:, :, :count].flatten(0, 1) for t in columns)
    return Columns(*parts)  # type: ignore[arg-type]


def _first_chunks(lookup: ChunkIndex, far: int, config: HyperConfig, places: Tensor) -> ChunkIndex:
    count = far * config.clusters_per_chunk
    cut = ChunkIndex(*(t[:, :, :count].flatten(0, 1).unsqueeze(0) for t in lookup))
    return cut._replace(globals=places)

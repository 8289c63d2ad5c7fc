"""What each rank checks of models whose sequences are spread over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from context_checks import sum_over_ranks

from longspan import UnsupportedError, WindowConfig
from longspan.distributed import (
    IGNORED,
    SequenceLayout,
    gather_sequence,
    global_mean,
    next_token_targets,
    shard_batch,
    spread_transformer,
)

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
# transformers computes norms and rotations in float32, whatever the model is in
TRANSFORMERS = {"rtol": 1e-6, "atol": 1e-7}


def token_ids(batch, length, vocab=64):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def mean_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def local_loss(group, logits, targets, reduction="sum"):
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return global_mean(total, (targets != IGNORED).sum(), group, reduction=reduction)


def compare_training(
    group, layout, want, model_whole, got, model, loss_whole, loss, tolerance=TOLERANCE
):
    """Logits of this rank, the loss, and gradients summed over ranks."""
    torch.testing.assert_close(got, layout.split(want, group.rank, 1), **tolerance)
    torch.testing.assert_close(loss, loss_whole, **tolerance)
    wanted = torch.autograd.grad(loss_whole, list(model_whole.parameters()))
    mine = torch.autograd.grad(loss, list(model.parameters()))
    for g, w in zip(mine, wanted, strict=True):
        torch.testing.assert_close(sum_over_ranks(g), w, **tolerance)


def check_transformer(group, config, kind, scheme, length=29, marks=None, lengths=None,
                      checkpointing=False):  # fmt: skip
    """The reference transformer: logits, loss and gradients of every parameter."""
    from longspan.models import Transformer, TransformerConfig

    settings = TransformerConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2,
                                 attention=config)  # fmt: skip
    layout = SequenceLayout(length=length, ranks=group.size, kind=kind,
                            cu_seqlens=None if marks is None else tuple(marks))  # fmt: skip
    ids = token_ids(1 if marks else 2, length)
    mask = None
    if lengths is not None:
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    whole, mine = (
        Transformer(settings, gradient_checkpointing=checkpointing).double() for _ in range(2)
    )
    targets = next_token_targets(
        ids, cu_seqlens=layout.cu_seqlens,
        key_lengths=None if lengths is None else torch.tensor(lengths),
    )  # fmt: skip
    if marks is None:
        want = whole(ids)
    else:
        want = whole(ids[0], cu_seqlens=torch.tensor(marks, dtype=torch.int32))[None]
    batch = shard_batch(ids, layout, group.rank, attention_mask=mask)
    with spread_transformer(
        mine, group=group, layout=layout, scheme=scheme, key_lengths=batch.key_lengths
    ):
        got = mine(batch.input_ids)
        loss = local_loss(group, got, batch.targets)
        # rows of padding see other keys with and without key_lengths, but have no targets
        if lengths is not None:
            keep = torch.arange(length) < torch.tensor(lengths)[:, None]
            want = want * keep[..., None]
            got = got * layout.split(keep, group.rank, 1)[..., None]
        compare_training(group, layout, want, whole, got, mine, mean_loss(want, targets), loss)
    torch.testing.assert_close(mine(ids[:, :5]), whole(ids[:, :5]), **TOLERANCE)  # undone
    gathered = gather_sequence(batch.input_ids, group, layout)
    assert torch.equal(gathered, ids)


def check_transformers_model(group, arch, config, kind, scheme, layers="all", lengths=None):
    """A model of transformers: logits, loss and gradients."""
    from longspan.distributed.compat import context_parallel_reason
    from longspan.hf import context_parallel
    from longspan.testing.models import tiny_model

    assert context_parallel_reason() is None
    length = 27
    whole, mine = (
        tiny_model(arch, dtype=torch.float64, window=6).model.requires_grad_() for _ in range(2)
    )
    layout = SequenceLayout(length=length, ranks=group.size, kind=kind)
    ids = token_ids(2, length)
    if config is None:
        want = whole(input_ids=ids, use_cache=False).logits
    else:
        from longspan.hf import patch

        with patch(whole, config, layers):
            want = whole(input_ids=ids, use_cache=False).logits
    batch = shard_batch(ids, layout, group.rank)
    arguments = {} if config is None else {"config": config, "layers": layers}
    with context_parallel(mine, group=group, layout=layout, scheme=scheme, **arguments):
        got = mine(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        with pytest.raises(UnsupportedError, match="key_lengths"):
            mine(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids))
    loss = local_loss(group, got, batch.targets)
    compare_training(group, layout, want, whole, got, mine,
                     mean_loss(want, next_token_targets(ids)), loss, TRANSFORMERS)  # fmt: skip
    again = mine(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(again, whole(input_ids=ids, use_cache=False).logits, **TOLERANCE)


def check_mean_gradients(group):
    """`reduction="mean"`: gradients that are averaged over ranks equal one device's."""
    weight = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    rows = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    mine = rows[group.rank : group.rank + 1] if group.rank < 2 else rows[:0]
    want = torch.autograd.grad((rows[: min(group.size, 2)] @ weight).mean(), weight)[0]
    loss = global_mean((mine @ weight).sum(), torch.tensor(len(mine)), group, reduction="mean")
    grad = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(sum_over_ranks(grad) / group.size, want)


def check_window_config_of_layers(group):
    check_transformers_model(group, "llama", WindowConfig(window=4, num_sinks=1), "contiguous",
                             "ring", layers="last:1")  # fmt: skip

"""Stick-breaking in the reference transformer: no positions, streaming, and it learns."""

from __future__ import annotations

import pytest
import torch

from longspan import StickBreakingConfig
from longspan.models.transformer import Transformer
from longspan.models.transformer_config import TransformerConfig


def model(config=StickBreakingConfig(), **sizes):
    return Transformer(
        TransformerConfig(
            vocab_size=24, width=32, layers=2, heads=2, positions="none", attention=config, **sizes
        )
    )


@pytest.mark.parametrize(
    "config", [StickBreakingConfig(), StickBreakingConfig(window=6, remainder="value")]
)
def test_a_stream_equals_the_whole(config, tmp_path):
    net = model(config).double()
    ids = torch.randint(0, 24, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = net(ids)
    logits, state = [], None
    for part in ids.split([7, 1, 1, 11], 1):
        output = net.forward_chunk(part, state)
        logits.append(output.logits)
        state = output.final_state
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-12, rtol=1e-12)
    state.save(tmp_path)
    again = net.forward_chunk(ids[:, :1], net.load_state(tmp_path)).logits
    torch.testing.assert_close(again, net.forward_chunk(ids[:, :1], state).logits)


def test_packed_documents_equal_separate_ones():
    net = model().double()
    ids = torch.randint(0, 24, (17,), generator=torch.Generator().manual_seed(0))
    packed = net(ids, cu_seqlens=torch.tensor([0, 5, 17], dtype=torch.int32))
    for start, stop in ((0, 5), (5, 17)):
        torch.testing.assert_close(packed[start:stop], net(ids[None, start:stop])[0])


@pytest.mark.slow
def test_it_learns_to_recall_the_latest_value_of_a_key():
    # key value key value ... query: the answer is the value that followed the key last
    torch.manual_seed(0)
    net = model()
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)

    def batch(count):
        keys = torch.randint(0, 4, (count, 6), generator=generator)
        values = torch.randint(4, 24, (count, 6), generator=generator)
        asked = torch.gather(keys, 1, torch.randint(0, 6, (count, 1), generator=generator))
        latest = 5 - (keys.flip(1) == asked).int().argmax(1, keepdim=True)
        ids = torch.cat((torch.stack((keys, values), 2).flatten(1), asked), 1)
        return ids, torch.gather(values, 1, latest)[:, 0]

    for _ in range(400):
        ids, answer = batch(64)
        loss = torch.nn.functional.cross_entropy(net(ids)[:, -1], answer)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        ids, answer = batch(200)
        correct = (net(ids)[:, -1].argmax(-1) == answer).float().mean()
    assert correct > 0.8, f"{float(correct):.2f} correct; guessing a value in sight gives 0.2"

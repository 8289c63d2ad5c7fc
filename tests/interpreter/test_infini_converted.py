"""A converted transformers model on the kernels: whole, streamed, and its gradients."""

from __future__ import annotations

import torch
import transformers

from longspan.hf import convert_infini, make_cache


def model():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(7)
    return transformers.LlamaForCausalLM(config).eval()


def test_converted_model_on_kernels_equals_plain_torch():
    net = model()
    ids = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(3))
    found = {}
    for impl in ("eager", "triton"):
        with convert_infini(net, 8, impl=impl, gate_start=0.0):
            logits = net(ids, use_cache=False).logits
            logits.square().mean().backward()
            cache = make_cache(net)
            with torch.no_grad():
                parts = [net(c, past_key_values=cache).logits for c in ids.split([9, 1, 10], 1)]
            gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
            found[impl] = (logits.detach(), torch.cat(parts, 1), gradients)
            net.zero_grad()
    whole, streamed, gradients = found["triton"]
    torch.testing.assert_close(whole, found["eager"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, found["eager"][2][name], rtol=1e-3, atol=1e-5)
    assert gradients["model.layers.0.self_attn.longspan_gate"].abs().min() > 0

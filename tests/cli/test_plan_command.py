import json

import pytest

from longspan.eval.calibrate import LayerCost, order_layers, within_budget
from longspan.hf import LayerPlan

SMALL = "hyper:window=8,chunk_size=16,cluster_size=4,num_probes=1"


def cost(layer, harm, saved):
    return LayerCost(layer=layer, harm=harm, exact_ms=10.0, changed_ms=10.0 - saved)


def test_order_is_harm_per_millisecond_saved():
    costs = [cost(0, 0.4, 4.0), cost(1, 0.1, 0.5), cost(2, 0.0, -1.0), cost(3, 0.05, 5.0)]
    ordered = order_layers(costs)
    assert [c.layer for c in ordered] == [3, 0, 1, 2]
    assert [c.layer for c in within_budget(ordered, 0.5)] == [3, 0]
    assert within_budget(ordered, 0.01) == []


def test_plan_is_written_and_can_be_patched(longspan, folder, book, tmp_path):
    out = tmp_path / "plan.json"
    code, text, _ = longspan(
        "plan", "--model", folder, "--text", book, "--attention", SMALL, "--tokens", 120,
        "--documents", 2, "--layers", 2, "--curve", "0,2,4", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert "2 of 4 layers changed" in text
    plan = LayerPlan.load(out)
    data = json.loads(out.read_text())["calibration"]
    assert len(data["layers"]) == 4
    assert sorted(plan.configs) == sorted(c["layer"] for c in data["layers"][:2])
    assert all(c["harm"] > 0 and c["changed_ms"] > 0 for c in data["layers"])
    losses = [point["loss"] for point in data["curve"]]
    assert losses[0] == pytest.approx(data["exact_loss"])
    assert len(set(losses)) == 3


def test_plan_within_a_budget_of_nothing_changes_nothing(longspan, folder, book, tmp_path):
    out = tmp_path / "plan.json"
    code, text, _ = longspan(
        "plan", "--model", folder, "--text", book, "--attention", SMALL, "--tokens", 60,
        "--documents", 1, "--budget", 0, "--out", out,
    )  # fmt: skip
    assert code == 0
    assert "0 of 4 layers changed" in text
    assert LayerPlan.load(out).configs == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--documents", 0], "--documents: 0 came. Allowed: 1 or more"),
        (["--budget", "-1"], "--budget: -1.0 came"),
        (["--layers", 9], "9 came. Allowed: 0 to 4"),
        (["--attention", "hypr"], "Did you mean 'hyper'"),
    ],
)
def test_refusals(longspan, folder, book, tmp_path, arguments, message):
    code, _, messages = longspan("plan", "--model", folder, "--text", book, "--tokens", 40,
                                 "--out", tmp_path / "p.json", *arguments)  # fmt: skip
    assert code == 2
    assert message in " ".join(messages.split())

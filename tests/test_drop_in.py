"""The code of docs/drop_in.md, on numbers made by the paper's code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from torch import nn

IMPORTS, CALLS, LAYER = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[1] / "docs/drop_in.md").read_text(),
    flags=re.DOTALL,
)


def golden(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(DATA / f"{name}.npz").items()}


@pytest.fixture
def names() -> dict[str, Any]:
    """What the page imports."""
    found: dict[str, Any] = {}
    exec(IMPORTS, found)
    return found


def test_losses_and_controller(names):
    logits, hidden = golden("gated_dkd"), golden("rcka")
    steps = json.loads((DATA / "controller.json").read_text())
    for key in ("student_logits", "student_hidden"):
        (logits if key in logits else hidden)[key].requires_grad_()
    names["controller"] = names["AdaptiveIBController"](**steps["args"])
    names |= logits | hidden | {"merge_size": int(hidden["merge_size"])}
    exec(CALLS, names)
    for loss, leaf, expected in (
        ("gdkd", "student_logits", logits),
        ("rcka", "student_hidden", hidden),
    ):
        assert names[loss].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
        (grad,) = torch.autograd.grad(names[loss], names[leaf])
        torch.testing.assert_close(grad, expected["grad"], rtol=1e-4, atol=1e-7)
    controller = names["AdaptiveIBController"](**steps["args"])
    assert [controller.update(x) for x in steps["gdkd"]] == steps["beta"]
    assert names["beta"] == names["AdaptiveIBController"](**steps["args"]).update(
        names["gdkd"].item()
    )


def test_layer(names):
    expected = golden("fake_quant_w4g128")
    rows, columns = expected["weight"].shape
    names["linear"] = nn.Linear(columns, rows, bias=False)
    exec(LAYER, names)
    layer = names["layer"]
    layer.load_state_dict({key: expected[key] for key in ("weight", "log_scale")})
    # With the identity as input the output is the weight's transpose, and so is its gradient.
    out = layer(torch.eye(columns)).t()
    out.backward(expected["grad_out"])
    torch.testing.assert_close(out.detach(), expected["fake_quantized"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, expected["grad_weight"], rtol=1e-5, atol=1e-6)
    scales = expected["grad_log_scale"]
    torch.testing.assert_close(layer.log_scale.grad, scales, rtol=1e-4, atol=1e-4)

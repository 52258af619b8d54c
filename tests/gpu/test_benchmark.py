"""The benchmark of GPUs at toy sizes, where its models and rows lie on one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import gpu
from rankalign.models import load as models


def test_every_row_of_ours(tmp_path: Path) -> None:
    assert models.device().type == "cuda"
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--shapes", "1.5b", "--repeats", "1", "--out", str(out)])  # TRL on a real card is TRL's affair
    file = json.loads(out.read_text())
    assert file["machine"]["card"] == torch.cuda.get_device_properties(0).name
    rows = {(row["what"].split(",")[0], row["who"]): row for row in file["rows"]}
    assert [who for (_, who), row in rows.items() if "seconds" in row and "TRL" not in who and who != "Liger"] == [
        *("ours", "ours", "engine hf, dynamic", "engine hf, CUDA graph", "transformers generate"),
        *("tree rows", "--layout padded", "tree rows, --torch_compile") * 2,
    ]
    tree, padded = (rows["1.5b DPO step", who]["value"] for who in ("tree rows", "--layout padded"))
    assert abs(tree - padded) < 1e-2 * padded  # bfloat16

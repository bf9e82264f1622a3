"""What the converter prints: a plan's table, a conversion's summary, a checkpoint's layers."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from converters.fitting import FITTED_STAGES
from converters.plan import Plan
from vllm_bmos.checkpoint.container import spec_bytes
from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, REQUIRED, WEIGHT
from vllm_bmos.checkpoint.reader import Checkpoint
from vllm_bmos.checkpoint.writer import plan_shards


def plan_report(plan: Plan, stage: str) -> str:
    """The plan as a table of tensor classes, before anything is written.

    Args:
        plan: of the conversion.
        stage: of the command line.
    """
    config = plan.config
    shards = len(plan_shards(plan.specs, plan.options.max_shard_size))
    by = stage if stage in FITTED_STAGES else config.provenance["stage"]
    lines = [
        f"source      {plan.source.path} ({plan.source.kind})",
        f"stage       {by}, E = {config.num_experts}, scales in {config.scale_dtype}",
        f"output      {shards} file{'s' if shards > 1 else ''}, {plan.bytes:,} bytes of tensors",
        f"side files  {', '.join(plan.side_files) or 'none'}",
        "",
        f"{'class':28}{'count':>7}{'source bytes':>18}{'packed bytes':>18}",
    ]
    for name, count, before, after in _classes(plan):
        lines.append(f"{name:28}{count:7}{before:18,}{after:18,}")
    return "\n".join(lines)


def _classes(plan: Plan) -> Iterable[tuple[str, int, int, int]]:
    """(class, tensors or layers, source bytes, packed bytes), the total last."""
    classes: dict[str, list[int]] = {}
    for job in plan.jobs:
        row = classes.setdefault(tensor_class(job.name, job.packs), [0, 0, 0])
        for column, value in enumerate((1, job.source_bytes, job.bytes)):
            row[column] += value
    for name, (count, before, after) in sorted(classes.items()):
        yield name, count, before, after
    yield "total", len(plan.jobs), plan.source_bytes, plan.bytes


def tensor_class(name: str, packed: bool) -> str:
    """A word for what a tensor or packed layer is."""
    if packed:
        return "packed linear layers"
    if "embed" in name or name.startswith(("wte", "wpe")):
        return "embeddings"
    if "lm_head" in name:
        return "output head"
    if "norm" in name:
        return "norms"
    return "biases" if name.endswith(".bias") else "other dense tensors"


def conversion_report(plan: Plan, target: Path, zeros: dict[str, int]) -> str:
    """What was written, and which zeros of the source became +1.

    In a fitted layer a zero has no sign to lose, so only the sum is told. A binary source's zero
    was neither +1 nor -1 in the reference, so every tensor that has some is named.
    """
    on_disk = sum(file.stat().st_size for file in target.iterdir())
    lines = []
    if plan.source.stage is None:
        lines = [f"{module}.weight: {n} x 0 became +1" for module, n in sorted(zeros.items())]
    weights = sum(N * K for N, K in plan.source.modules.values())
    packed = sum(job.bytes for job in plan.jobs if job.packs)
    lines += [
        f"packed {len(plan.source.modules)} layers at {8 * packed / weights:.3f} bits per weight; "
        f"{sum(zeros.values())} of {weights:,} weights were 0 and became +1",
        f"{plan.source_bytes / 1e6:,.1f} MB -> {on_disk / 1e6:,.1f} MB "
        f"({plan.source_bytes / on_disk:.2f}x) in {target}",
    ]
    return "\n".join(lines)


def inspection(path: Path, as_json: bool, entropy: Mapping[str, float]) -> str:
    """Every packed layer's shape, bits per weight and spread of its experts.

    Args:
        path: a packed checkpoint.
        as_json: whether to return JSON instead of a table.
        entropy: mean router entropy in bits by layer, if it was measured.
    """
    checkpoint = Checkpoint(path)
    layers = [inspect_layer(checkpoint, module) for module in checkpoint.config.modules]
    for row in layers:
        if row["name"] in entropy:
            row["router_entropy"] = entropy[row["name"]]
    if as_json:
        return json.dumps({"config": checkpoint.config.to_dict(), "layers": layers}, indent=2)
    config = checkpoint.config
    lines = [
        f"{path}: format version {config.format_version}, E = {config.num_experts}, scales in "
        f"{config.scale_dtype}, {json.dumps(config.provenance)}",
        f"{'layer':48}{'N':>7}{'K':>7}{'bits/weight':>13}{'spread in':>11}{'spread out':>11}"
        + (f"{'router bits':>13}" if entropy else ""),
    ]
    for row in layers:
        lines.append(
            f"{row['name']:48}{row['N']:7}{row['K']:7}{row['bits_per_weight']:13.3f}"
            f"{row['in_spread']:11.4f}{row['out_spread']:11.4f}"
            + (f"{row.get('router_entropy', math.nan):13.3f}" if entropy else "")
        )
    return "\n".join(lines)


def inspect_layer(checkpoint: Checkpoint, module: str) -> dict[str, Any]:
    """Numbers of one packed layer."""
    N, K = checkpoint.shapes[module]
    size = sum(spec_bytes(checkpoint.specs[f"{module}.{suffix}"]) for suffix in REQUIRED)
    packed = checkpoint.tensor(f"{module}.{WEIGHT}").numpy()
    return {
        "name": module,
        "N": N,
        "K": K,
        "bits_per_weight": 8 * size / (N * K),
        "positive": int(_BIT_COUNTS[packed].sum()) / (N * K),
        "in_spread": expert_spread(checkpoint.tensor(f"{module}.{IN_SCALE}")),
        "out_spread": expert_spread(checkpoint.tensor(f"{module}.{OUT_SCALE}")),
    }


def expert_spread(scales: torch.Tensor) -> float:
    """How far experts [E, channels] differ: RMS distance from their mean over the RMS scale."""
    values = scales.double()
    size = math.sqrt(float(values.square().mean()))
    distance = math.sqrt(float((values - values.mean(dim=0)).square().mean()))
    return distance / size if size else 0.0


_BIT_COUNTS = torch.tensor([value.bit_count() for value in range(256)]).numpy()

"""Compares a packed checkpoint with its source, by converting that again in memory."""

from pathlib import Path

import torch

from converters.fitting import STAGES
from converters.options import Options
from converters.pipeline import cast_scale
from converters.plan import REPACK, Job, Plan, make_plan
from vllm_bmos.checkpoint.format import SCALES, TORCH_DTYPES, FormatError
from vllm_bmos.checkpoint.reader import Checkpoint
from vllm_bmos.checkpoint.writer import hash_extent, sha256_of


def compare(checkpoint: Checkpoint, source: Path) -> str:
    """Check that a checkpoint is what its source becomes.

    Signs, carried tensors and side files must be equal. So must scales that the source holds;
    computed scales may differ by a rounding, since another machine may add in another order.

    Returns:
        What was compared, in a sentence.

    Raises:
        FormatError: naming the first tensor, key or file that differs.
    """
    config = checkpoint.config
    stage = config.provenance.get("stage")
    known = isinstance(stage, str) and stage in STAGES
    options = Options(
        experts=config.num_experts,
        stage=str(stage) if known else "svid",
        ignore=config.ignore,
        scale_dtype=config.scale_dtype,
    )
    plan = make_plan(source, options)
    _compare_names(checkpoint, plan)
    exact = known or stage == REPACK
    for job in plan.jobs:
        if job.packs and exact:
            _compare_layer(checkpoint, plan, job)
        elif not job.packs:
            found = sha256_of(plan.source.store.chunks(job.name))
            if found != hash_extent(checkpoint.extents[job.name]):
                raise FormatError(f"{job.name}: its bytes differ from the source's.")
    for name, data in plan.side_files.items():
        file = checkpoint.path / name
        if not file.is_file() or file.read_bytes() != data:
            raise FormatError(f"{file} is missing or differs from the source's.")
    if exact:
        return "signs, scales, carried tensors and side files match the source"
    return (
        f"carried tensors and side files match the source; the layers were fitted by stage "
        f"{stage!r}, which the weights alone do not determine"
    )


def _compare_names(checkpoint: Checkpoint, plan: Plan) -> None:
    """The plan and the checkpoint must agree on the model, the tensors and their shapes."""
    expected = plan.specs
    for name in sorted(expected.keys() | checkpoint.specs.keys()):
        if expected.get(name) != checkpoint.specs.get(name):
            raise FormatError(
                f"{name}: the source gives {expected.get(name) or 'no such tensor'}, the "
                f"checkpoint has {checkpoint.specs.get(name) or 'none'}."
            )
    for key in sorted(plan.source.config.keys() | checkpoint.model_config.keys()):
        if key != "quantization_config" and plan.source.config.get(
            key
        ) != checkpoint.model_config.get(key):
            raise FormatError(
                f"config.json: {key}: the source gives {plan.source.config.get(key)!r}, the "
                f"checkpoint has {checkpoint.model_config.get(key)!r}."
            )


def _compare_layer(checkpoint: Checkpoint, plan: Plan, job: Job) -> None:
    for suffix, tensor in plan.source.layer(job.name).tensors.items():
        name = f"{job.name}.{suffix}"
        found = checkpoint.tensor(name)
        if suffix in SCALES:
            tensor = cast_scale(name, tensor, TORCH_DTYPES[job.specs[name].dtype])
            if plan.source.stage is not None:
                rounding = torch.finfo(found.dtype).eps
                if torch.allclose(found.float(), tensor.float(), rtol=2 * rounding, atol=0):
                    continue
        if not torch.equal(found, tensor):
            raise FormatError(f"{name}: its values differ from what the source gives.")

"""Packed layers alone, in one file: a fit without the model that it was fitted to.

    python converters/hf_to_bmos.py extract PACKED FILE.safetensors
    python converters/hf_to_bmos.py SRC DST --layers FILE.safetensors

A fit takes hours and its layers a bit per weight; embeddings and norms take more room and are the
source's. The file holds the layers' tensors by their names in a checkpoint, and the checkpoint's
quantization_config as JSON in the header's metadata.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from converters.locked import TargetError
from converters.options import Options
from converters.plan import Plan, make_plan
from converters.sources.fitted import FittedSource
from vllm_bmos.checkpoint.container import read_extents, read_tensor
from vllm_bmos.checkpoint.format import BinaryMosConfig, FormatError, owner_of
from vllm_bmos.checkpoint.reader import Checkpoint
from vllm_bmos.checkpoint.writer import write_bytes

KEY = "quantization_config"


def extract(packed: Path, file: Path) -> int:
    """Write a checkpoint's packed layers into one file; its biases stay with the source.

    Returns:
        The file's size in bytes.

    Raises:
        FormatError: if the checkpoint is damaged, or keeps norms in its layers (OneBit's).
        TargetError: if the file exists.
    """
    checkpoint = Checkpoint(packed)
    if checkpoint.config.output_norm is not None:
        raise FormatError(f"{packed}: layers that end in a norm cannot be extracted.")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs if owner_of(name)}
    if os.path.lexists(file):
        raise TargetError(f"{file} exists already. Delete it or choose another name.")
    data = save(tensors, {KEY: json.dumps(checkpoint.config.to_dict())})
    write_bytes(file, data)
    return len(data)


def plan_with_layers(path: Path, file: Path, options: Options) -> Plan:
    """Plan a conversion of the dense model at `path` whose layers are those of a file.

    Experts, scales' dtype and ignored layers are the file's.

    Raises:
        FormatError: if the file is damaged, or its layers are not the source's.
    """
    config = _read_config(file)
    options = replace(
        options,
        experts=config.num_experts,
        ignore=config.ignore,
        scale_dtype=config.scale_dtype,
    )
    plan = make_plan(path, options)
    if plan.source.stage is None:
        raise FormatError(f"--layers {file}: {path} is binary already; give a dense model.")
    extents = read_extents(file)
    wanted = {name: spec for name, spec in plan.specs.items() if owner_of(name)}
    found = {name: extent.spec for name, extent in extents.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise FormatError(
                f"--layers {file}: {name}: expected {wanted.get(name, 'no such tensor')} for "
                f"{path}, found {found.get(name, 'none')}. It is of another model or damaged."
            )
    source = FittedSource(plan.source, str(config.provenance.get("stage")))
    source.tensors = {name: read_tensor(extent) for name, extent in extents.items()}
    record = {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    provenance = {**plan.config.provenance, **config.provenance, "layers": record}
    provenance |= {key: plan.config.provenance[key] for key in ("source", "source_name")}
    return replace(plan, source=source, config=replace(plan.config, provenance=provenance))


def _read_config(file: Path) -> BinaryMosConfig:
    read_extents(file)  # refuses what is damaged, in a sentence
    with safe_open(file, framework="pt") as handle:
        text = (handle.metadata() or {}).get(KEY)
    if text is None:
        raise FormatError(
            f"--layers {file}: its metadata has no {KEY}. Make it with `hf_to_bmos.py extract`."
        )
    try:
        return BinaryMosConfig.from_dict(json.loads(text))
    except json.JSONDecodeError:
        raise FormatError(f"--layers {file}: {KEY} in its metadata is not JSON.") from None

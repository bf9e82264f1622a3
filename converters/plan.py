"""A conversion, planned and validated whole before anything is written."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import vllm_bmos
from converters.options import Options
from converters.side_files import side_files, source_license
from converters.sources import Source, open_source
from vllm_bmos.checkpoint.container import spec_bytes
from vllm_bmos.checkpoint.format import (
    BIAS,
    CONFIG_FILE,
    BinaryMosConfig,
    FormatError,
    TensorSpec,
    check_linear,
    linear_specs,
    owner_of,
)

REPACK = "repack"  # the stage of a source whose layers are binary already
# What the run finds for the provenance: zeros of the weights, stages whose training did not help,
# and processes that trained together.
FOUND = ZEROS, DISCARDED, PROCESSES = "zeros_to_plus_one", "discarded", "processes"


@dataclass(frozen=True)
class Job:
    """One unit of work: a layer to pack, or a tensor to carry over.

    Attributes:
        name: the module or the tensor.
        packs: whether this is a layer to pack.
        specs: what it writes, by full name.
        source_bytes: what it reads.
    """

    name: str
    packs: bool
    specs: dict[str, TensorSpec]
    source_bytes: int

    @property
    def bytes(self) -> int:
        """What it writes."""
        return sum(map(spec_bytes, self.specs.values()))


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will write, except the tensors' data.

    Attributes:
        source: the opened source.
        options: what the user asked for.
        jobs: the work, in the order of the output files.
        config: the result's quantization_config; its provenance lacks only what converting finds.
        side_files: name and content of each.
    """

    source: Source
    options: Options
    jobs: list[Job]
    config: BinaryMosConfig
    side_files: dict[str, bytes]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the result."""
        return {name: spec for job in self.jobs for name, spec in job.specs.items()}

    @property
    def bytes(self) -> int:
        """Data of all tensors of the result."""
        return sum(job.bytes for job in self.jobs)

    @property
    def source_bytes(self) -> int:
        """Data of all tensors of the source."""
        return sum(job.source_bytes for job in self.jobs)

    def with_provenance(self, facts: dict[str, Any]) -> "Plan":
        """This plan, with more in its provenance."""
        provenance = {**self.config.provenance, **facts}
        return replace(self, config=replace(self.config, provenance=provenance))

    def model_config(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """config.json of the result, with what converting added to the provenance."""
        quantization = self.config.to_dict()
        quantization["provenance"] = {**quantization["provenance"], **provenance}
        return {**self.source.config, "quantization_config": quantization}

    def fingerprint(self) -> str:
        """Changes with the source's files, the options or the tool; a resumed run compares it."""
        files = [(file.name, *_identity(file)) for file in self.source.store.files]
        side = {name: hashlib.sha256(data).hexdigest() for name, data in self.side_files.items()}
        content = [asdict(self.options), self.model_config({}), self.specs, files, side]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_plan(path: Path, options: Options) -> Plan:
    """Open a source, check it against the format, and plan its conversion. Writes nothing.

    Raises:
        FormatError: in a sentence that names what is missing or wrong.
    """
    source = open_source(path, options)
    config = BinaryMosConfig(
        num_experts=source.experts,
        modules=tuple(source.modules),
        scale_dtype=source.scale_dtype,
        ignore=options.ignore,
        output_norm=source.output_norm,
        provenance={
            "tool": f"vllm-bmos {vllm_bmos.__version__}",
            "source": source.kind,
            "source_name": path.resolve().name,
            "stage": source.stage or REPACK,
        },
    )
    source.license = source_license(source)
    jobs = sorted(_jobs(source), key=lambda job: _natural(job.name))
    plan = Plan(source, options, jobs, config, side_files(source))
    specs = plan.specs
    for module in config.modules:
        check_linear(module, specs, config)
    for name in source.carried:
        if owner_of(name) is not None:
            raise FormatError(f"{name}: the source's name clashes with the packed format.")
    try:
        texts = [source.config, config.to_dict(), list(specs)]
        json.dumps(texts, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{path}: its name, config or a tensor's name holds {error.object[error.start]!a}, "
            "which UTF-8 does not have. Rename it."
        ) from None
    except ValueError:
        raise FormatError(f"{path / CONFIG_FILE} holds NaN or infinity. Correct it.") from None
    return plan


def _jobs(source: Source) -> list[Job]:
    stored, jobs = source.store.specs, []
    for module, (N, K) in source.modules.items():
        specs = linear_specs(N, K, source.experts, source.scale_dtype)
        used = [stored[f"{module}.{suffix}"] for suffix in source.suffixes]
        full = {f"{module}.{suffix}": spec for suffix, spec in specs.items()}
        jobs.append(Job(module, True, full, sum(map(spec_bytes, used))))
    for name in source.carried:
        jobs.append(Job(name, False, {name: stored[name]}, spec_bytes(stored[name])))
    return jobs


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10, and a layer's bias beside its signs."""
    name = name.removesuffix(f".{BIAS}")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns

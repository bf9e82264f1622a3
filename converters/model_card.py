"""The README.md of a packed checkpoint: where it came from, how large it is, how to serve it."""

import re
from collections.abc import Mapping

from converters.fitting import STAGES
from converters.plan import Plan
from vllm_bmos.checkpoint.reader import inside

README = "README.md"
_FRONT_MATTER_BYTES = 64 << 10


def model_card(plan: Plan, perplexities: Mapping[str, float], text_name: str = "") -> str:
    """The model card of a plan's result.

    Args:
        plan: the plan that was run.
        perplexities: by model ("dense", "packed"), if they were measured.
        text_name: name of the text that they were measured on.
    """
    provenance = plan.config.provenance
    weights = sum(N * K for N, K in plan.source.modules.values())
    packed = sum(job.bytes for job in plan.jobs if job.packs)
    rows = {
        "source": f"{provenance['source_name']} ({provenance['source']})",
        "stage": provenance["stage"],
        "experts": plan.config.num_experts,
        "packed layers": f"{len(plan.source.modules)}, {8 * packed / weights:.3f} bits per weight",
        "tensors": f"{plan.source_bytes / 1e6:,.1f} MB -> {plan.bytes / 1e6:,.1f} MB",
        "made with": provenance["tool"],
    }
    for name, value in perplexities.items():
        rows[f"perplexity, {name}, on {text_name}"] = f"{value:.2f}"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    warning = f"\n{_WARNING}\n" if provenance["stage"] in STAGES else ""
    return (
        f"---\nlicense: {source_license(plan)}\nlibrary_name: vllm\n"
        "tags:\n- binarymos\n- 1-bit\n---\n\n"
        f"# {provenance['source_name']}, packed for BinaryMoS\n\n"
        "The linear layers of this model are 1-bit signs with token-adaptive scales (BinaryMoS, "
        f"arXiv 2406.12311).\n{warning}\n| | |\n| --- | --- |\n{table}\n\n"
        "The source's licence applies to this model as well.\n\n"
        "## Serve it\n\n"
        "With vllm-bmos installed (its README says how, on a CPU and on a GPU):\n\n"
        "    vllm serve <this directory>\n"
    )


_WARNING = (
    "**This model was converted from its weights alone and not fitted: its text is garbage. It is "
    "a start for fitting, not a model to use.**"
)


def source_license(plan: Plan) -> str:
    """The licence that the source's own model card or GGUF metadata names, or "other"."""
    named = plan.source.license
    readme = plan.source.files / README
    if named is None and readme.is_file():
        with inside(plan.source.files, README).open("rb") as file:
            head = file.read(_FRONT_MATTER_BYTES).decode(errors="replace")
        matter = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
        found = re.search(r"^license:\s*([\w.+-]+)\s*$", matter[1] if matter else "", re.MULTILINE)
        named = found[1] if found else None
    return named or "other"

"""The README.md of a packed checkpoint: where it came from, how large it is, how to serve it."""

from collections.abc import Mapping

from converters.fitting import STAGES
from converters.plan import DISCARDED, Plan


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
    discarded = provenance.get(DISCARDED, [])
    if discarded:
        rows["without effect"] = f"{', '.join(discarded)}: the loss on held-out text did not fall"
    for name, value in perplexities.items():
        rows[f"perplexity, {name}, on {text_name}"] = f"{value:.2f}"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    stages = provenance.get("stages") or [provenance["stage"]]
    kept = stages[: len(stages) - len(discarded)]
    warning = f"\n{_WARNING}\n" if not kept or kept[-1] in STAGES else ""
    return (
        f"---\nlicense: {plan.source.license or 'other'}\nlibrary_name: vllm\n"
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

"""The two models of a training: the dense teacher, and the student whose layers are binary."""

from typing import Any

import torch

from converters.fitting.distributed import device
from converters.fitting.layer import layer_of
from converters.fitting.precision import model_dtype
from converters.fitting.student import make_student
from converters.sources import Source
from converters.structure import name_on_disk

Tensors = dict[str, torch.Tensor]


def load_dense(source: Source, dtype: torch.dtype, use_cache: bool) -> Any:
    """The whole dense model, in evaluation mode and without gradients.

    Keys and values are kept if `use_cache`, as only writing text needs.
    """
    import transformers

    from converters.sources.gguf import GgufSource

    options: dict[str, Any] = {"dtype": dtype}
    from_gguf = isinstance(source, GgufSource)
    if from_gguf:
        options["gguf_file"] = source.path.name
        if hasattr(transformers, "GgufConfig"):  # versions that may leave weights in GGUF's blocks
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.files, **options)
    if from_gguf and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # else the Trainer refuses it
    model.config.use_cache = use_cache
    return model.eval().requires_grad_(False)


def load_student(source: Source, start: Tensors) -> Any:
    """The dense model with trainable layers that begin as `start`."""
    student = load_dense(source, model_dtype(), use_cache=False)
    names = module_names(student, source)
    make_student(student, {name: layer_of(start, disk) for disk, name in names.items()})
    return student.to(device())


def compile_blocks(model: Any) -> None:
    """Have torch compile the decoder blocks, in place; one compilation serves them all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)


def pack_student(student: Any, source: Source) -> Tensors:
    """The packed layers' tensors by full name."""
    dtype = getattr(torch, source.scale_dtype)
    result: Tensors = {}
    for disk, name in module_names(student, source).items():
        packed = student.get_submodule(name).pack(dtype)
        result |= {f"{disk}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}
    return result


def module_names(model: Any, source: Source) -> dict[str, str]:
    """Name on disk -> name in the model, of every packed layer."""
    found = {}
    for name, _ in model.named_modules():
        disk = name_on_disk(name, model.base_model_prefix, source.modules)
        if disk is not None:
            found[disk] = name
    return found

"""vLLM runs an exported model (`rtpurbo export`): an entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It names a model class for every supported family, and imports none of them;
nothing of vLLM's own is replaced, and models that are not ours never meet this package again. Our kind of cache names itself
where it is first met (`cache`): in the process that builds the model, and in the scheduler's, which is sent it.
"""

from __future__ import annotations

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
"""Families of vLLM's own models that the plugin can make sparse."""


def register() -> None:
    """Tell vLLM of our models; may be called any number of times."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for family in ARCHITECTURES:
        name = f"RTPurbo{family}ForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"{__name__}.model:{name}")

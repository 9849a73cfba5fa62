"""vLLM runs an exported model (`rtpurbo export`): an entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It names a model class for every supported family and a kind of cache;
nothing of vLLM's own is replaced, and models that are not ours never meet this package again.
"""

from __future__ import annotations

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
"""Families of vLLM's own models that the plugin can make sparse."""


def register() -> None:
    """Tell vLLM of our models and our cache; may be called any number of times.

    Raises:
        ImportError: the installed vLLM lacks one of the hooks (its version is outside of 0.29 to 0.33).
    """
    from vllm import ModelRegistry

    from . import cache  # noqa: F401  # names its kind of cache

    known = ModelRegistry.get_supported_archs()
    for family in ARCHITECTURES:
        name = f"RTPurbo{family}ForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"{__name__}.model:{name}")

"""What other engines take: requests, arguments and files, without torch and without a server's code.

The formats, and where they were read, are in the documentation of the Rust modules ``output::vllm``, ``output::lmdeploy``,
``output::sglang`` and ``output::parquet``. For many images: ``Encoder.write_parquet``.
"""

from ._imagehere import (
    lmdeploy_arguments,
    sglang_arguments,
    vllm_chat_body,
    vllm_completion_body,
    vllm_encoder_cache,
    vllm_prompt_embeds,
)

__all__ = [
    "lmdeploy_arguments",
    "sglang_arguments",
    "vllm_chat_body",
    "vllm_completion_body",
    "vllm_encoder_cache",
    "vllm_prompt_embeds",
]

"""ExLlamaV2 alone, for comparison: run by benchmarks/gpu.py with the engine's own interpreter.

    python -m benchmarks.bare_exllamav2 FOLDER CONTEXT CACHE_MODE [--link]

Prints one JSON object: stock load time, prompt and decode tokens per second with the
settings that Turntable's adapter uses (scratch, chunk, attention), and with --link the
host-to-device link in bytes per second.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("EXLLAMA_NO_XFORMERS", "1")

PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 2048, 256, 3


def main(arguments: list[str]) -> int:
    """Load with the library's own loader, and time prompts and tokens with its own generator."""
    import torch
    from exllamav2 import ExLlamaV2, ExLlamaV2Config, ExLlamaV2Tokenizer, attn
    from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler

    from modules.engines.attention import correct
    from modules.engines.exllamav2 import CACHES, MAX_DQ_ELEMENTS, MAX_OUTPUT_TOKENS
    from modules.engines.fastload import time_link

    folder, context, mode = arguments[0], int(arguments[1]), arguments[2]
    correct(attn.ExLlamaV2Attention)
    config = ExLlamaV2Config(folder)
    config.arch_compat_overrides(quiet=True)
    config.max_seq_len, config.max_input_len = context, 2048
    config.max_output_len, config.max_dq_size = MAX_OUTPUT_TOKENS, MAX_DQ_ELEMENTS
    model = ExLlamaV2(config)
    began = time.perf_counter()
    model.load()
    torch.cuda.synchronize()
    stock_load_s = time.perf_counter() - began
    cache = CACHES[mode](model, max_seq_len=context)
    generator = ExLlamaV2DynamicGenerator(
        model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config), paged=attn.has_flash_attn_with_paged,
        max_chunk_size=2048, max_batch_size=1,
    )  # fmt: skip
    generator.warmup()
    prompts, decodes = [], []
    for number in range(ROUNDS + 1):
        ids = torch.randint(5, 250, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(number))
        job = ExLlamaV2DynamicJob(
            input_ids=ids, max_new_tokens=DECODE_TOKENS, gen_settings=ExLlamaV2Sampler.Settings.greedy()
        )
        generator.enqueue(job)
        last = {}
        while generator.num_remaining_jobs():
            for result in generator.iterate():
                last = result if result["eos"] else last
        if number:  # the first round tunes
            prompts.append(PROMPT_TOKENS / last["time_prefill"])
            decodes.append((last["new_tokens"] - 1) / last["time_generate"])
    figures = {
        "stock_load_s": stock_load_s, "prompt_tokens_per_s": sorted(prompts)[ROUNDS // 2],
        "decode_tokens_per_s": sorted(decodes)[ROUNDS // 2], "allocated": torch.cuda.memory_allocated(0),
        "peak_allocated": torch.cuda.max_memory_allocated(0),
    }  # fmt: skip
    if "--link" in arguments:
        figures["link_bytes_per_s"] = time_link(0)
        figures["card"] = torch.cuda.get_device_name(0)
        figures["torch"] = torch.__version__
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""ExLlamaV2 alone, for comparison: run by benchmarks/gpu.py with the engine's own interpreter.

    python -m benchmarks.bare_exllamav2 FOLDER CONTEXT CACHE_MODE ROUNDS DECODE_TOKENS [--link]

Prints one JSON object: stock load time, prompt and decode tokens per second with the
settings that Turntable's adapter uses (scratch, chunk, attention), the bytes of the
weights that go to the card, and with --link the host-to-device link in bytes per second.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("EXLLAMA_NO_XFORMERS", "1")

PROMPT_TOKENS = 2048


def main(arguments: list[str]) -> int:
    """Load with the library's own loader, and time prompts and tokens with its own generator."""
    import torch
    from exllamav2 import ExLlamaV2, ExLlamaV2Config, ExLlamaV2Tokenizer, ExLlamaV2VisionTower, attn
    from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler

    from modules.engines.attention import correct
    from modules.engines.exllamav2 import CACHES, MAX_DQ_ELEMENTS, MAX_OUTPUT_TOKENS
    from modules.engines.fastload import lay_out, time_link

    folder, mode = arguments[0], arguments[2]
    context, rounds, decode_tokens = (int(arguments[place]) for place in (1, 3, 4))
    correct(attn.ExLlamaV2Attention)
    config = ExLlamaV2Config(folder)
    config.arch_compat_overrides(quiet=True)
    config.max_seq_len, config.max_input_len = context, 2048
    config.max_output_len, config.max_dq_size = MAX_OUTPUT_TOKENS, MAX_DQ_ELEMENTS
    planned = [*([ExLlamaV2VisionTower(config)] if config.vision_model_type else []), ExLlamaV2(config)]
    rest = [99999.0]
    for one in planned:
        rest = one.set_device_map(rest)
    device_bytes = lay_out(planned).device_size
    del planned
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
    for number in range(rounds + 1):
        ids = torch.randint(5, 250, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(number))
        job = ExLlamaV2DynamicJob(
            input_ids=ids, max_new_tokens=decode_tokens, gen_settings=ExLlamaV2Sampler.Settings.greedy()
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
        "stock_load_s": stock_load_s, "prompt_tokens_per_s": sorted(prompts)[rounds // 2],
        "decode_tokens_per_s": sorted(decodes)[rounds // 2], "allocated": torch.cuda.memory_allocated(0),
        "peak_allocated": torch.cuda.max_memory_allocated(0), "device_bytes": device_bytes,
    }  # fmt: skip
    if "--link" in arguments:
        figures["link_bytes_per_s"] = time_link(0)
        figures["card"] = torch.cuda.get_device_name(0)
        figures["torch"] = torch.__version__
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

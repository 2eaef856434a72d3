"""
One model in one engine of vLLM, in a process of its own: reads what to serve as JSON on its command line, and prints
what it measured as JSON. `throughput.py` starts it.
"""

import json
import os
import sys
import time
from typing import Any

# Read by vLLM when it is imported: the engine is to run here, where its steps can be timed.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
)

from vllm import LLM, SamplingParams  # noqa: E402

MARK = "MEASURED "


class Steps:
    """What an engine's steps take, in seconds of the clock and of this process' work, and what is in them."""

    def __init__(self, llm: LLM):
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.rows: list[dict[str, float]] = []
        schedule = self.scheduler.schedule

        def noted(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.rows.append(
                {
                    "clock": time.perf_counter(),
                    "work": time.process_time(),
                    "tokens": output.total_num_scheduled_tokens,
                    "requests": len(output.num_scheduled_tokens),
                    "running": len(self.scheduler.running),
                    "preempted": len(output.preempted_req_ids or ()),
                }
            )
            return output

        self.scheduler.schedule = noted

    def summary(self, kind: str) -> dict[str, float]:
        """`kind`: "clock" or "work"."""
        pairs = list(zip(self.rows, self.rows[1:], strict=False))
        decoding = [(b[kind] - a[kind], a["tokens"]) for a, b in pairs if a["tokens"] == a["requests"] > 0]
        seconds, tokens = (sum(each) for each in zip(*decoding, strict=True)) if decoding else (0.0, 0)
        first = next((b[kind] for a, b in pairs if a["tokens"] == a["requests"] > 0), self.rows[-1][kind])
        return {
            "decoding tokens/s": tokens / seconds if seconds else 0.0,
            "time per token": seconds / len(decoding) if decoding else 0.0,
            "prompt": first - self.rows[0][kind],
        }


def measure(model: str, memory: int, max_len: int, chunk: int, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Serve `prompts` at once, then the first one alone."""
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=max_len,
        enforce_eager=True,
        max_num_seqs=max(len(prompts), 1),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=memory,
        max_num_batched_tokens=chunk,
        skip_tokenizer_init=True,
    )
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    result: dict[str, Any] = {"blocks": pool.block_pool.num_gpu_blocks}
    llm.generate([{"prompt_token_ids": prompts[0][:64]}], settings, use_tqdm=False)  # warm
    for name, batch in (("alone", prompts[:1]), ("together", prompts)):
        steps = Steps(llm)
        clock, work = time.perf_counter(), time.process_time()
        llm.generate([{"prompt_token_ids": prompt} for prompt in batch], settings, use_tqdm=False)
        seconds = {"clock": time.perf_counter() - clock, "work": time.process_time() - work}
        result[name] = {
            "seconds": seconds,
            "at once": max(row["running"] for row in steps.rows),
            "preemptions": sum(row["preempted"] for row in steps.rows),
            **{kind: steps.summary(kind) for kind in seconds},
        }
    return result


if __name__ == "__main__":
    print(MARK + json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)

"""
One model in one engine of vLLM, in a process of its own, which `contenders.py` starts: what to serve comes as JSON on
its command line, then a line of JSON on its standard input for each measurement, answered by a line of its output.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

# Read by vLLM when it is imported: the engine is to run here, where its steps can be timed.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
)

from vllm import LLM, SamplingParams  # noqa: E402

from . import MARK  # noqa: E402


class Steps:
    """What an engine's steps take, in seconds of the clock and of this process' work, and what is in them."""

    def __init__(self, llm: LLM):
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.rows: list[dict[str, float]] = []
        self.schedule = self.scheduler.schedule

    def __enter__(self) -> "Steps":
        self.scheduler.schedule = self._noted
        return self

    def __exit__(self, *error) -> None:
        self.scheduler.schedule = self.schedule

    def _noted(self, *args, **kwargs):
        output = self.schedule(*args, **kwargs)
        self.rows.append(
            {
                "clock": time.perf_counter(),
                "work": time.process_time(),
                "tokens": output.total_num_scheduled_tokens,
                "requests": len(output.num_scheduled_tokens),
                "running": len(self.scheduler.running),
                "preempted": len(output.preempted_req_ids or ()),
                "blocks": self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks(),
            }
        )
        return output

    def summary(self, kind: str) -> dict[str, float]:
        """`kind`: "clock" or "work"."""
        pairs = list(zip(self.rows, self.rows[1:], strict=False))
        decoding = [(b[kind] - a[kind], a["tokens"]) for a, b in pairs if a["tokens"] == a["requests"] > 0]
        seconds, tokens = (sum(each) for each in zip(*decoding, strict=True)) if decoding else (0.0, 0)
        first = next((b[kind] for a, b in pairs if a["tokens"] == a["requests"] > 0), self.rows[-1][kind])
        return {
            "decoding tokens/s": tokens / seconds if seconds else 0.0,
            "time per token": statistics.median([each for each, _ in decoding]) if decoding else 0.0,
            "time to first token": first - self.rows[0][kind],
        }


class Served:
    """An engine of one model."""

    def __init__(self, model: str, memory: int, max_len: int, chunk: int, sequences: int, block: int | None):
        self.llm = LLM(
            model,
            dtype="float32",
            max_model_len=max_len,
            enforce_eager=True,
            max_num_seqs=sequences,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=memory,
            max_num_batched_tokens=chunk,
            block_size=block,
            skip_tokenizer_init=True,
        )
        pool = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        self.block_bytes = memory / pool.num_gpu_blocks

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Read all `prompts` at once, and write `new` tokens after each."""
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        with Steps(self.llm) as steps:
            clock, work = time.perf_counter(), time.process_time()
            self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
            seconds = {"clock": time.perf_counter() - clock, "work": time.process_time() - work}
        return {
            "seconds": seconds,
            "at once": max(row["running"] for row in steps.rows),
            "preemptions": sum(row["preempted"] for row in steps.rows),
            "bytes": max(row["blocks"] for row in steps.rows[-2:]) * self.block_bytes,  # held at the end
            **{kind: steps.summary(kind) for kind in seconds},
        }


def main() -> None:
    served = Served(**json.loads(sys.argv[1]))
    print(MARK + "{}", flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps(served.measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

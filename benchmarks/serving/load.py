"""vLLM's OpenAI server, and its own benchmark as the client: many requests of mixed lengths, which come at once."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from testing.loopback import free_port

from .contenders import CONCURRENCY, Contender

NAME = "model"
PREEMPTIONS = "vllm:num_preemptions_total"


class Server:
    """Of one contender, with a client beside it that asks all questions at once; `scratch` is a folder."""

    def __init__(self, contender: Contender, scratch: Path):
        self.contender, self.scratch = contender, scratch
        self.log = scratch / "server.log"

    def __enter__(self) -> "Server":
        self.address = f"http://127.0.0.1:{free_port()}"
        settings = self.contender.settings
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.contender.model)]
        command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2]]
        command += ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"]
        command += ["--max-model-len", str(settings["max_len"]), "--max-num-seqs", str(settings["sequences"])]
        command += ["--max-num-batched-tokens", str(settings["chunk"])]
        command += ["--kv-cache-memory-bytes", str(settings["memory"])]
        command += [] if settings["block"] is None else ["--block-size", str(settings["block"])]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        while not self.answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.contender.model}: no server.\n{self.log.read_text()[-2000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait()

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health").status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def preemptions(self) -> int:
        with urllib.request.urlopen(f"{self.address}/metrics") as page:
            lines = page.read().decode().splitlines()
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(PREEMPTIONS + "{"))

    def measure(self, questions: list[tuple[str, str]]) -> dict[str, Any]:
        """
        Ask for texts as long as the second of each pair, and return what vLLM's benchmark says.

        Raises:
            RuntimeError: if not all are answered.
        """
        data = self.scratch / "questions.json"
        turns = [{"conversations": [{"value": question}, {"value": answer}]} for question, answer in questions]
        data.write_text(json.dumps(turns), encoding="utf-8")
        number = str(len(questions))
        command = [sys.executable, "-m", "benchmarks.serving.client", "--backend", "openai", "--model", NAME]
        command += ["--base-url", self.address, "--endpoint", "/v1/completions", "--temperature", "0"]
        command += [
            "--tokenizer",
            str(self.contender.model),
            "--dataset-name",
            "sharegpt",
            "--dataset-path",
            str(data),
        ]
        command += ["--num-prompts", number, "--max-concurrency", number, "--ignore-eos", "--disable-tqdm"]
        command += ["--save-result", "--result-dir", str(self.scratch), "--result-filename", "result.json"]
        before = self.preemptions()
        run = subprocess.run(command, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        path = self.scratch / "result.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.unlink(missing_ok=True)
        if result.get("completed") != len(questions):
            raise RuntimeError(f"{self.contender.model}: not all was answered.\n{(run.stdout + run.stderr)[-2000:]}")
        return {
            "concurrency": float(CONCURRENCY.findall(self.log.read_text())[-1]),
            "preemptions": self.preemptions() - before,
            "clock": {
                "requests/s": result["request_throughput"],
                "tokens/s": result["output_throughput"],
                "time to first token": result["median_ttft_ms"] / 1000,
                "time per token": result["median_tpot_ms"] / 1000,
            },
        }


def environment() -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

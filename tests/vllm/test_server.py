"""The OpenAI server with the `openai` client: one process of vLLM's own, as users start it."""

import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from testing.loopback import free_port
from testing.tiny import text_tokenizer

from .serving import PLAN, save_tiny

MODEL = "tiny"
NEW_TOKENS = 16


class Server:
    """vLLM's, of one model."""

    def __init__(self, path, log, *options: str):
        self.port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port), *options]
        # oneDNN keeps a thousand kernels, one for each number of tokens and shape of weights: 400 MiB after 2,000
        # requests, of vLLM's dense models as of these, among which nothing else could be seen.
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
        }
        self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=300
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 900
        while True:
            try:
                self.client.models.list()
                return
            except openai.APIConnectionError:
                assert time.monotonic() < deadline and self.process.poll() is None
                time.sleep(0.5)

    def metric(self, name: str) -> float:
        """A number of `/metrics`, summed over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    def wait_for_nothing(self) -> None:
        """Until no request runs, waits or holds anything."""
        deadline = time.monotonic() + 60
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        while sum(map(self.metric, names)):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def worker_memory(self) -> int:
        """Bytes that the process holds which has the model and the cache."""
        (worker,) = [pid for pid in children(self.process.pid) if "Worker" in command_of(pid)]
        with open(f"/proc/{worker}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        own = [int(each) for each in file.read().split()]
    return own + [each for child in own for each in children(child)]


def command_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    save_tiny(root / "model", "llama", PLAN)
    tokenizer = text_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(root / "model")
    with open(root / "log", "w") as log:
        found = Server(
            root / "model", log, "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16",
            "--max-num-batched-tokens", "256", "--kv-cache-memory-bytes", str(8 << 20), "--enforce-eager",
        )  # fmt: skip
        try:
            found.wait()
            yield found
        finally:
            found.close()


def complete(server: Server, prompt: str, **options):
    settings = {"model": MODEL, "max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return server.client.completions.create(prompt=prompt, **{**settings, **options})


def test_completions_streams_and_logprobs(server):
    prompt = "The tide came in before noon. " * 8
    # By number, since bytes that are no character alone all look the same.
    by_number = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    whole = complete(server, prompt, logprobs=3, extra_body=by_number).choices[0]
    found = whole.logprobs.tokens, whole.logprobs.top_logprobs
    assert len(whole.logprobs.tokens) == NEW_TOKENS
    assert all(top[token] == max(top.values()) for token, top in zip(*found, strict=True))
    parts = [part.choices[0].text for part in complete(server, prompt, stream=True)]
    assert len(parts) > 1 and "".join(parts) == whole.text
    several = complete(server, prompt, n=3, temperature=1, logprobs=0).choices  # a seed fails on vLLM's CPUs
    assert [len(choice.logprobs.tokens) for choice in several] == [NEW_TOKENS] * 3
    assert len({choice.text for choice in several}) == 3
    stop = whole.text[3:5]
    assert complete(server, prompt, stop=[stop]).choices[0].text == whole.text[: whole.text.index(stop)]


def test_chat(server):
    messages = [{"role": "user", "content": "When was it back?"}]
    options = {"model": MODEL, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer = server.client.chat.completions.create(**options).choices[0].message.content
    parts = server.client.chat.completions.create(**options, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer
    assert complete(server, "user: When was it back?\n").choices[0].text == answer


def test_structured_output(server):
    choice = {"ignore_eos": False, "structured_outputs": {"choice": ["red", "blue"]}}
    assert complete(server, "The buoy is ", extra_body=choice).choices[0].text in ("red", "blue")


def test_many_at_once(server):
    prompts = [f"{number} boats left. " * (1 + number % 20) for number in range(32)]
    alone = [complete(server, prompt).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        at_once = list(pool.map(lambda prompt: complete(server, prompt).choices[0].text, prompts))
    assert at_once == alone


def test_clients_that_go_away_leave_nothing(server):
    for _ in range(4):
        stream = complete(server, "The tide " * 20, stream=True, max_tokens=300)
        next(iter(stream))
        stream.close()
    server.wait_for_nothing()


@pytest.mark.tools
def test_nothing_is_left_of_many_requests(server):
    def one(number: int) -> None:
        complete(server, "ab" * (1 + (number * 37) % 200), max_tokens=1 + (number * 13) % 24)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(100)))
        server.wait_for_nothing()
        before = server.worker_memory()
        list(pool.map(one, range(500)))
    server.wait_for_nothing()
    assert server.worker_memory() < before + (64 << 20)

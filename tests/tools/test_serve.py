"""`transformers serve` and `transformers chat`: one server, started from a plain shell, answers for both models."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosa_hf import ConversionConfig, convert_model
from testing.loopback import free_port
from testing.tiny import byte_tokenizer, tiny_base

from .conftest import plain_shell, shell_environment

pytestmark = pytest.mark.tools
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

MESSAGES = [{"role": "user", "content": "The tide came in before noon. What did the boat do, and when was it back?"}]
PROMPT = "The tide came in before noon. A boat with two men went out to the red buoy"
NEW_TOKENS = 8


def client_of(port: int, process: subprocess.Popen | None = None) -> "openai.OpenAI":
    """A client of the server at a port, once that answers."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    deadline = time.monotonic() + 120
    while True:
        try:
            client.models.list()
            return client
        except openai.APIConnectionError:
            assert time.monotonic() < deadline and (process is None or process.poll() is None)
            time.sleep(0.2)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator["openai.OpenAI"]:
    """Of a server that was told to trust the code beside models, and knows of no package."""
    root, port = tmp_path_factory.mktemp("server"), free_port()
    command = ["transformers", "serve", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**shell_environment(), "HF_MODULES_CACHE": str(root / "modules"), "HF_HOME": str(root / "home")}
    with open(root / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield client_of(port, process)
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module", params=["original", "converted"])
def folder(request, folders) -> Path:
    return getattr(folders, request.param)


def generated(folder: Path, **inputs) -> str:
    """What the model in memory writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if "messages" in inputs:
        tokens = tokenizer.apply_chat_template(
            inputs["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokens = tokenizer(inputs["prompt"], return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_completions(client, folder):
    request = {"model": str(folder), "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer = client.chat.completions.create(**request)
    text = answer.choices[0].message.content
    assert text == generated(folder, messages=MESSAGES) and answer.usage.completion_tokens == NEW_TOKENS
    *chunks, last = client.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert last.choices[0].finish_reason == answer.choices[0].finish_reason == "length"


def test_completions(client, folder):
    request = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer = client.completions.create(**request)
    assert answer.choices[0].text == generated(folder, prompt=PROMPT)
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_responses(client, folder):
    request = {"model": str(folder), "input": MESSAGES, "max_output_tokens": NEW_TOKENS, "temperature": 0}
    answer = client.responses.create(**request, stream=False)  # which the server takes for true otherwise
    assert answer.output_text == generated(folder, messages=MESSAGES) and answer.status == "completed"
    events = list(client.responses.create(**request, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text and events[-1].type == "response.completed"


def test_both_models_are_listed(client, folders):
    for folder in folders:
        client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=1)
    assert {str(folder) for folder in folders} <= {model.id for model in client.models.list()}


def test_chat(client, folder, monkeypatch):
    """`transformers chat`, driven through its standard input: a question, and that it need not go on."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # or it would not reach this server either
    flags = ["do_sample=False", f"max_new_tokens={NEW_TOKENS}"]
    shell = plain_shell("transformers", "chat", folder, client.base_url, *flags, input="What did it do?\nn\n!exit\n")
    assert f"{NEW_TOKENS} tokens in" in shell.stdout and "Generation stopped after reaching" in shell.stdout


@pytest.fixture(scope="module")
def batching_client() -> Iterator["openai.OpenAI"]:
    """Of a server with continuous batching."""
    from transformers.cli.serve import Serve

    port = free_port()
    server = Serve(
        continuous_batching=True,
        device="cpu",
        host="127.0.0.1",
        port=port,
        cb_num_blocks=16,
        cb_max_batch_tokens=128,
        non_blocking=True,
    )
    try:
        yield client_of(port)
    finally:
        server.kill_server()


@pytest.mark.parametrize("stream", [False, True])
def test_continuous_batching_is_refused(batching_client, folders, stream):
    """The reason reaches the client, at every endpoint, and the server lives on."""
    model = str(folders.converted)
    for create, request in (
        (batching_client.chat.completions.create, {"messages": MESSAGES}),
        (batching_client.completions.create, {"prompt": PROMPT}),
        (batching_client.responses.create, {"input": MESSAGES}),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            create(**request, model=model, stream=stream)
        assert error.value.status_code == 503
        reason = error.value.response.json()["error"]
        assert "does not support continuous batching" in reason and "serve without `--continuous-batching`" in reason
    request = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer = batching_client.completions.create(**request, model=str(folders.original))
    assert answer.choices[0].text == generated(folders.original, prompt=PROMPT)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tool_calls_and_reasoning_are_found(family):
    """Which the server knows by model type: in what a converted model writes as in what its original does."""
    from transformers.cli.serving.utils import parse_assistant_message

    original, tokenizer = tiny_base(family, vocab_size=260), byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    converted = convert_model(original, ConversionConfig(sparsity=1))
    written = '<think>\nWhen?\n</think>\n\nAt four.<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    prompt = "<|im_start|>assistant\n"
    ids = tokenizer(written)["input_ids"]
    ours, theirs = (
        parse_assistant_message(tokenizer, model, ids, tokenizer(prompt)["input_ids"], cleaned_content=written)
        for model in (converted, original)
    )
    assert ours == theirs
    assert (ours[2] is not None and ours[2][0].name == "clock") == (family == "qwen3")

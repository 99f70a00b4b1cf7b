"""Synthetic models: GGUF files with the shape of a real model, seeded random weights and a byte-level tokenizer.

Speed, memory and KV bytes are those of the published shape; the text is noise in printable ASCII. Invariant: the same
preset and seed give the same bytes, and a file is at its place only when complete. One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from appliance.errors import ModelError, UsageError
from appliance.ops.files import replaced
from appliance.ops.synth_shape import SHAPES, Shape
from appliance.ops.synth_tiny import TINY, tiny_tensors

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 256 and up. The last one ends a turn."""

CHOSEN_LOGIT_STD = 8.0
"""Of printable characters. All other tokens have logits near 0, and so are next to never chosen, also among 150,000."""
ATTENTION_SCALE = 0.3
FFN_SCALE = 0.1
"""Of what a layer adds to the residual, against an embedding of 1: random layers at full scale amplify rounding."""
SCORE_SCALE = 1.4
"""Of queries and keys: how much attention prefers some tokens to others."""

Q8_BLOCK = 32
_UNIFORM_INT8_STD = 73.3


PRESETS = ("tiny", *SHAPES)
DEFAULT_PRESET = "qwen2.5-0.5b"


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: row-major shape, and how to make its data when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[np.float32] | NDArray[np.uint8]]
    quantised: bool = False
    """Q8_0, made as raw blocks."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In elements, or in bytes of Q8_0 blocks."""
        if not self.quantised:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // Q8_BLOCK * (Q8_BLOCK + 2))

    @property
    def nbytes(self) -> int:
        return prod(self.stored_shape) * (1 if self.quantised else 4)


def synth(preset: str, out: Path, seed: int = 0, on_progress: Callable[[float], None] | None = None) -> Path:
    """Write the preset's model to `out`, replacing what is there. Returns `out`."""
    if preset not in PRESETS:
        raise UsageError(f'no synthetic model "{preset}"; there are: {", ".join(PRESETS)}')
    if preset == "tiny":
        shape, tensors = TINY, [Tensor(n, a.shape, lambda a=a: a) for n, a in tiny_tensors(seed)]  # type: ignore[misc]
    else:
        shape = SHAPES[preset]
        tensors = list(_tensors(shape, np.random.default_rng(seed)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as temporary:
            writer = _header(preset, shape, temporary)
            with closing(writer):
                _write(writer, tensors, on_progress)
    except OSError as error:
        raise ModelError(f"{out}: {error.strerror}") from None
    return out


def _write(writer: gguf.GGUFWriter, tensors: list[Tensor], on_progress: Callable[[float], None] | None) -> None:
    for tensor in tensors:
        dtype = np.dtype(np.uint8 if tensor.quantised else np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.quantised else None
        writer.add_tensor_info(tensor.name, tensor.stored_shape, dtype, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    for tensor in tensors:
        writer.write_tensor_data(tensor.make())
        done += tensor.nbytes
        if on_progress:
            on_progress(done / total)


def default_model(home: Path, on_progress: Callable[[float], None] | None = None) -> Path:
    """The model for trying things out, written into the home's models once."""
    path = home / "models" / f"{DEFAULT_PRESET}.gguf"
    return path if path.exists() else synth(DEFAULT_PRESET, path, on_progress=on_progress)


def _header(preset: str, shape: Shape, path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"synthetic {preset}")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embd)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if preset == "tiny" else gguf.LlamaFileType.MOSTLY_Q8_0)
    special_end = 256 + len(SPECIAL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [*byte_characters(), *SPECIAL_TOKENS, *(f"[PAD{i}]" for i in range(special_end, shape.vocab))]
    )
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * 256
        + [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
        + [gguf.TokenType.UNUSED] * (shape.vocab - special_end)
    )
    writer.add_token_merges(["þ ÿ"])  # the loader wants one: two bytes that valid UTF-8 never holds
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(special_end - 1)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return writer


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def printable() -> NDArray[np.intp]:
    """Token ids of printable ASCII."""
    return np.arange(32, 127)


def _tensors(shape: Shape, random: np.random.Generator) -> Iterator[Tensor]:
    """Variance-preserving random layers; rows of tokens never to be chosen are near zero."""

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0, loud: bool = False) -> Tensor:
        std = scale / np.sqrt(columns)
        return Tensor(
            name, (rows, columns), lambda: _q8(random, rows, columns, std, printable() if loud else None), True
        )

    def vector(name: str, size: int, value: float) -> Tensor:
        return Tensor(name, (size,), lambda: np.full(size, value, np.float32))

    embd, kv = shape.embd, shape.kv_heads * shape.head_dim
    yield matrix("token_embd.weight", shape.vocab, embd, np.sqrt(embd), loud=shape.tied)
    for i in range(shape.layers):
        yield vector(f"blk.{i}.attn_norm.weight", embd, 1.0)
        for name, rows, scale in (("q", embd, SCORE_SCALE), ("k", kv, SCORE_SCALE), ("v", kv, 1.0)):
            yield matrix(f"blk.{i}.attn_{name}.weight", rows, embd, scale)
            if shape.qkv_bias:
                yield vector(f"blk.{i}.attn_{name}.bias", rows, 0.0)
        yield matrix(f"blk.{i}.attn_output.weight", embd, embd, ATTENTION_SCALE)
        yield vector(f"blk.{i}.ffn_norm.weight", embd, 1.0)
        yield matrix(f"blk.{i}.ffn_gate.weight", shape.ffn, embd)
        yield matrix(f"blk.{i}.ffn_up.weight", shape.ffn, embd)
        yield matrix(f"blk.{i}.ffn_down.weight", embd, shape.ffn, FFN_SCALE)
    # Random signs: without them a tied matrix makes every token choose itself again.
    std = CHOSEN_LOGIT_STD / np.sqrt(embd)
    yield Tensor("output_norm.weight", (embd,), lambda: (std * random.choice((-1, 1), embd)).astype(np.float32))
    if not shape.tied:
        yield matrix("output.weight", shape.vocab, embd, np.sqrt(embd), loud=True)


def _q8(
    random: np.random.Generator, rows: int, columns: int, std: float, loud_rows: NDArray[np.intp] | None
) -> NDArray[np.uint8]:
    """Q8_0 blocks drawn directly: a half-precision scale and 32 uniform int8 values each."""
    blocks = columns // Q8_BLOCK
    data = np.frombuffer(bytearray(random.bytes(rows * blocks * (Q8_BLOCK + 2))), np.uint8)
    np.maximum(data.view(np.int8), -127, out=data.view(np.int8))
    scales = np.full(rows, std / _UNIFORM_INT8_STD, np.float16)
    if loud_rows is not None:
        quiet = np.ones(rows, bool)
        quiet[loud_rows] = False
        scales[quiet] /= 64
    data.reshape(rows, blocks, Q8_BLOCK + 2)[:, :, :2] = scales.view(np.uint8).reshape(rows, 1, 2)
    return data.reshape(rows, blocks * (Q8_BLOCK + 2))

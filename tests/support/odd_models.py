"""Small random GGUF files of architectures whose state is not plain KV rows of one cache."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from appliance.ops.synth import byte_characters

EMBD, FFN, HEAD, VOCAB = 64, 64, 32, 257


def sliding(path: Path, window_tokens: int) -> Path:
    """gemma3 with six layers, five of them with a sliding window."""
    writer = _writer(path, "gemma3", 6)
    writer.add_sliding_window(window_tokens)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    shapes = {
        "attn_norm": (EMBD,),
        "attn_q": (2 * HEAD, EMBD),
        "attn_k": (HEAD, EMBD),
        "attn_v": (HEAD, EMBD),
        "attn_output": (EMBD, 2 * HEAD),
        "post_attention_norm": (EMBD,),
        "attn_k_norm": (HEAD,),
        "attn_q_norm": (HEAD,),
        "ffn_norm": (EMBD,),
        "ffn_gate": (FFN, EMBD),
        "ffn_up": (FFN, EMBD),
        "ffn_down": (EMBD, FFN),
        "post_ffw_norm": (EMBD,),
    }
    return _write(writer, path, {f"blk.{i}.{name}.weight": shape for i in range(6) for name, shape in shapes.items()})


def recurrent(path: Path) -> Path:
    """mamba with two layers."""
    inner, state, rank, kernel = 2 * EMBD, 8, 4, 4
    writer = _writer(path, "mamba", 2)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    shapes = {
        "attn_norm.weight": (EMBD,),
        "ssm_in.weight": (2 * inner, EMBD),
        "ssm_conv1d.weight": (inner, kernel),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (EMBD, inner),
    }
    return _write(writer, path, {f"blk.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()})


def _writer(path: Path, arch: str, layers: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(4096)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*byte_characters(), "<|end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["þ ÿ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    return writer


def _write(writer: gguf.GGUFWriter, path: Path, layers: dict[str, tuple[int, ...]]) -> Path:
    random = np.random.default_rng(0)
    everything = {"token_embd.weight": (VOCAB, EMBD), "output_norm.weight": (EMBD,), **layers}
    for name, shape in everything.items():
        values = random.standard_normal(shape) / np.sqrt(shape[-1])
        if "norm" in name:
            values = np.ones(shape)
        if "ssm_a" in name:
            values = -np.abs(values)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

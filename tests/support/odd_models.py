"""Small random GGUF files: architectures whose state is not plain KV rows of one cache, and one that costs next to nothing."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from appliance.ops.synth import CHAT_TEMPLATE, byte_characters

EMBD, FFN, HEAD, VOCAB, EXPERTS = 64, 64, 32, 257, 4


def shallow(path: Path) -> Path:
    """llama with one layer of two heads, and a chat template: tens of thousands of tokens are read in seconds."""
    writer = _writer(path, "llama", 1, context_tokens=65_536)
    _add_attention(writer)
    writer.add_rope_dimension_count(HEAD)
    writer.add_chat_template(CHAT_TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (EMBD,),
        **_attention(),
        "ffn_norm.weight": (EMBD,),
        "ffn_gate.weight": (FFN, EMBD),
        "ffn_up.weight": (FFN, EMBD),
        "ffn_down.weight": (EMBD, FFN),
    }
    return _write(writer, path, {f"blk.0.{name}": shape for name, shape in shapes.items()})


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


def sinks(path: Path, window_tokens: int) -> Path:
    """gpt-oss with four layers: every other one with a sliding window, all with attention sinks and experts."""
    writer = _writer(path, "gpt-oss", 4)
    writer.add_sliding_window(window_tokens)
    _add_attention(writer)
    _add_experts(writer)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (EMBD,),
        "post_attention_norm.weight": (EMBD,),
        **_attention(),
        **{
            f"attn_{name}.bias": (rows,) for name, rows in (("q", 2 * HEAD), ("k", HEAD), ("v", HEAD), ("output", EMBD))
        },
        "attn_sinks.weight": (2,),
        "ffn_gate_inp.weight": (EXPERTS, EMBD),
        "ffn_gate_inp.bias": (EXPERTS,),
        **_experts(),
        **{f"ffn_{name}_exps.bias": (EXPERTS, rows) for name, rows in (("gate", FFN), ("up", FFN), ("down", EMBD))},
    }
    layers = {f"blk.{i}.{name}": shape for i in range(4) for name, shape in shapes.items()}
    return _write(writer, path, {"output.weight": (VOCAB, EMBD), **layers})


def latent(path: Path) -> Path:
    """deepseek2 with two layers of multi-head latent attention: its cache has one row per token and no V."""
    rope, rank, heads = 16, 32, 2
    writer = _writer(path, "deepseek2", 2)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(HEAD + rope)
    writer.add_value_length_mla(HEAD)
    writer.add_q_lora_rank(rank)
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(2)
    writer.add_vocab_size(VOCAB)
    _add_experts(writer)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    shapes = {
        "attn_norm": (EMBD,),
        "attn_kv_a_norm": (rank,),
        "attn_q_a": (rank, EMBD),
        "attn_q_a_norm": (rank,),
        "attn_q_b": (heads * (HEAD + rope), rank),
        "attn_kv_a_mqa": (rank + rope, EMBD),
        "attn_k_b": (heads, rank, HEAD),
        "attn_v_b": (heads, HEAD, rank),
        "attn_output": (EMBD, heads * HEAD),
        "ffn_norm": (EMBD,),
        "ffn_gate": (FFN, EMBD),
        "ffn_up": (FFN, EMBD),
        "ffn_down": (EMBD, FFN),
    }
    return _write(writer, path, {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()})


def hybrid(path: Path, arch: str = "qwen3next") -> Path:
    """qwen3next or qwen35 with four layers: three gated delta nets, one with attention. qwen35 has positions of several parts."""
    state, groups, rank, kernel = 32, 1, 2, 4
    writer = _writer(path, arch, 4)
    _add_attention(writer)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(rank * state)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_ssm_group_count(groups)
    writer.add_rope_dimension_count(HEAD)
    experts = arch == "qwen3next"
    if experts:
        _add_experts(writer)
    else:
        writer.add_rope_dimension_sections([6, 5, 5, 0])
    mixed = 2 * groups * state + rank * state
    linear: dict[str, tuple[int, ...]] = {
        "attn_qkv.weight": (mixed, EMBD),
        "attn_gate.weight": (rank * state, EMBD),
        "ssm_conv1d.weight": (mixed, kernel),
        "ssm_dt.bias": (rank,),
        "ssm_a": (rank,),
        "ssm_norm.weight": (state,),
        "ssm_out.weight": (EMBD, rank * state),
    }
    if experts:
        linear["ssm_ba.weight"] = (2 * rank, EMBD)
    else:
        linear |= {"ssm_alpha.weight": (rank, EMBD), "ssm_beta.weight": (rank, EMBD)}
    attention = {
        **_attention(),
        "attn_q.weight": (4 * HEAD, EMBD),
        "attn_q_norm.weight": (HEAD,),
        "attn_k_norm.weight": (HEAD,),
    }
    dense = {"ffn_gate.weight": (FFN, EMBD), "ffn_up.weight": (FFN, EMBD), "ffn_down.weight": (EMBD, FFN)}
    shared = {name.replace(".weight", "_shexp.weight"): shape for name, shape in dense.items()}
    mixture = {"ffn_gate_inp.weight": (EXPERTS, EMBD), "ffn_gate_inp_shexp.weight": (EMBD,), **_experts(), **shared}
    layers: dict[str, tuple[int, ...]] = {}
    for i in range(4):
        parts = {
            "attn_norm.weight": (EMBD,),
            "post_attention_norm.weight": (EMBD,),
            **(attention if i == 3 else linear),
            **(mixture if experts else dense),
        }
        layers |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    return _write(writer, path, layers)


def _add_attention(writer: gguf.GGUFWriter) -> None:
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)


def _attention() -> dict[str, tuple[int, ...]]:
    shapes = {"q": (2 * HEAD, EMBD), "k": (HEAD, EMBD), "v": (HEAD, EMBD), "output": (EMBD, 2 * HEAD)}
    return {f"attn_{name}.weight": shape for name, shape in shapes.items()}


def _add_experts(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(FFN)
    writer.add_expert_shared_feed_forward_length(FFN)


def _experts() -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (EXPERTS, FFN, EMBD), "up": (EXPERTS, FFN, EMBD), "down": (EXPERTS, EMBD, FFN)}
    return {f"ffn_{name}_exps.weight": shape for name, shape in shapes.items()}


def _writer(path: Path, arch: str, layers: int, context_tokens: int = 4096) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(context_tokens)
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

"""The README.md of an exported folder."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from dash_megatron.config import Config
from dash_megatron.data.blend import parse_blend
from dash_megatron.hf import probe
from dash_megatron.hf.config import is_plain_llama

_CHAT = """
It has a chat template, and generation stops where the answer ends:

```python
message = {"role": "user", "content": "..."}
inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```
"""


def model_card(
    config: Config,
    step: int,
    metrics: dict[str, Any],
    report: probe.Report,
    dtype: torch.dtype,
    terms: str | None,
    chat: bool = False,
) -> str:
    """Write what the model is, how to load it, how exactly it was checked, and how it was trained.

    Of paths it has the last part only: others need not know how folders are named here.

    Args:
        terms: the license, as the Hugging Face hub writes it; None names none.
        metrics: the last logged line up to the checkpoint, or nothing.
        chat: whether the folder has a chat template.
    """
    license_line = f"license: {terms}\n" if terms else ""
    name = str(dtype).removeprefix("torch.")
    rounding = f" Rounding to {name} changes them by {report.rounding:.2%}." if report.rounding else ""
    settings = yaml.safe_dump(_without_paths(config), sort_keys=False)
    selects = bool(config.attention.sparse_layers(config.model.layers))
    attention = "DashAttention (arXiv 2605.18753)" if selects else "full attention"
    trust = "" if is_plain_llama(config) else ", trust_remote_code=True"
    same = (
        f"selected the same chunks in {report.where}, and\ntheir logits"
        if report.where
        else "gave logits that"
    )
    return f"""---
{license_line}library_name: transformers
pipeline_tag: text-generation
tags: [{"dash-attention, " if selects else ""}long-context]
---

# Weights after step {step}

A Llama-shaped decoder with {attention}, weights in {name}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is, or the model's name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
# training read no token that a tokenizer adds by itself
inputs = tokenizer("The beginning", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{_CHAT if chat else ""}
{_facts(config, metrics, terms, selects)}

{_without_our_code(config, selects)}

On {report.num_tokens} random tokens this folder and the training model {same} differed by at most {report.logits_difference:.1e} (float64 arithmetic on these weights).{rounding}

## Last metrics

| metric | value |
| --- | --- |
{_metrics_rows(metrics)}

## Training configuration

```yaml
{settings}```
"""


def _facts(config: Config, metrics: dict[str, Any], terms: str | None, selects: bool) -> str:
    facts = [
        "It needs torch, transformers from 5.5 on and safetensors.",
        f"It was trained on rows of {config.data.seq_length:,} tokens; longer texts are computed, but were not learnt.",
        f"The license of the weights is {terms}." if terms else "The license of the weights is not named.",
    ]
    density = metrics.get("density")
    if selects and density is not None:
        facts.append(
            f"At the last logged step a token attended to {density:.0%} of the chunks of {config.attention.chunk_size} tokens up "
            "to its own."
        )
    if selects:
        facts += [
            "On CUDA, where the package `dash_megatron` is installed, attention goes through its kernels. Elsewhere the folder's own "
            "file computes it in plain torch, which saves no time over full attention.",
            "Caches may be dynamic or static. There are no attention weights to return.",
        ]
    return "\n".join(f"- {fact}" for fact in facts)


def _without_our_code(config: Config, selects: bool) -> str:
    """Whether the folder has a model file, and what becomes of it where that is not run."""
    if is_plain_llama(config):
        return "It is a plain Llama, which transformers loads with no code of this folder."
    parts = {
        "the summary queries (`indexer_q`)": selects,
        "the router's projections (`indexer_q_proj`, `indexer_k_proj`)": selects
        and config.attention.router_projections,
        "`q_norm`, `k_norm`": config.model.qk_norm,
        "the biases of `q_proj`, `k_proj`, `v_proj`": config.model.qkv_bias,
        "the factors on routing scores (`indexer_log_scaling`)": selects and config.attention.learned_scaling,
    }
    ignored = " and ".join(name for name, there in parts.items() if there)
    unread = f" without {ignored}" if ignored else ""
    return (
        f"`modeling_dash.py` in this folder computes the model. Without `trust_remote_code=True` transformers refuses to load it. "
        f"`LlamaForCausalLM`, asked for by\nname, warns and loads a dense Llama{', which attends to everything' if selects else ''}"
        f"{unread}. Its outputs are not those of training."
    )


def _metrics_rows(metrics: dict[str, Any]) -> str:
    rows = [
        f"| {key} | {value:.6g} |"
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return "\n".join(rows) or "| none logged | |"


def _without_paths(config: Config) -> dict[str, Any]:
    tree: dict[str, Any] = config.model_dump(mode="json", exclude={"run_dir": True, "logging": {"wandb"}})
    for name in ("train", "valid"):
        tree["data"][name] = [
            ("" if weight is None else f"{weight:g} ") + _last(prefix)
            for weight, prefix in parse_blend(tree["data"][name])
        ]
    shortened: dict[str, Any] = _shorten(tree)
    return shortened


def _shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorten(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shorten(part) for part in value]
    return _last(value) if isinstance(value, str) else value


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]

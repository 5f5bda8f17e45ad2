"""Continue a text with an exported model. Needs torch, transformers >= 5.5 and safetensors, nothing of this repository.

python examples/generate.py runs/quickstart/hf --prompt "def read_lines(path):"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", help="folder of `python -m dash_megatron convert to-hf`")
parser.add_argument("--prompt", required=True, help="text to continue; empty starts a document")
parser.add_argument(
    "--chat",
    action="store_true",
    help="the prompt is a user's message; prints the answer of a fine-tuned model",
)
parser.add_argument("--max-new-tokens", type=int, default=100)
parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy: always the argmax")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--device", default="cpu", help="cuda uses the kernels of dash_megatron where it is installed"
)
options = parser.parse_args()
if not (Path(options.folder) / "config.json").is_file():
    parser.error(
        f"{options.folder} has no config.json; give a folder of `python -m dash_megatron convert to-hf`"
    )

tokenizer = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(options.folder, trust_remote_code=True).to(options.device)
if options.chat:
    message = [{"role": "user", "content": options.prompt}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
else:
    ids = tokenizer(options.prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
inputs = torch.tensor([ids], device=options.device)
drawn = {"do_sample": False}
if options.temperature:
    # from all tokens, as `python -m dash_megatron sample` draws: the same seed gives the same text
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
torch.manual_seed(options.seed)
output = model.generate(
    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=options.max_new_tokens, **drawn
)
shown = output[0][len(ids) :] if options.chat else output[0]
print(tokenizer.decode(shown, skip_special_tokens=True))

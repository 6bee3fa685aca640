"""Trains the tokenizer of the bundled base, and writes it with the model's configuration.

python -m qlora.bundled.tokenizer --corpus corpus/train.jsonl --out qlora/bundled/base
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.bundled.corpus import read

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 2048
PAD, EOS = "<|pad|>", "</s>"  # ids 0 and 1; documents have no bos

# byte-level BPE joins a blank to the word after it, so the blank after "Answer:" is part of the answer's first token;
# the generation prompt ends before it, and so its tokens are a prefix of those of the conversation
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] | trim + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS,
    "model_max_length": 512,
    "pad_token": PAD,
    "padding_side": "right",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": None,
}

# 3.7M parameters, 7.5 MB in bf16; all widths are multiples of 64, the NF4 block size
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 704,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

GENERATION_CONFIG: dict[str, Any] = {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0}


def train(texts: Iterable[str]) -> "Tokenizer":
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) with VOCAB_SIZE tokens.

    Each digit is a token, so that a small model can learn to copy and compute numbers.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write the files that `AutoTokenizer` and `AutoConfig` need."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    configs = {"tokenizer_config": TOKENIZER_CONFIG, "config": CONFIG, "generation_config": GENERATION_CONFIG}
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m qlora.bundled.tokenizer", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus/train.jsonl"), help="train.jsonl of qlora.bundled.corpus"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    arguments = parser.parse_args()
    tokenizer = train(read(arguments.corpus))
    write(tokenizer, arguments.out)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()

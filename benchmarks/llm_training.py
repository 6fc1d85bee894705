# SPDX-License-Identifier: Apache-2.0
"""
Training the LLM recommender: one pass per history with supervision at all positions, beside E4SRec's formulation with
one prompt per prefix of a history; supervised positions per second with the same backbone, prompt, item head and loss.

    all positions                our default: one pass per history, the prompt's keys and values computed once
    last position                one prompt per prefix, the prompt's keys and values computed once
    one whole prompt per prefix  as E4SRec: shuffled prefixes are rows, each with its whole prompt, 128 to a step

    python benchmarks/llm_training.py --dataset FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import write_result
from crm_training import add_shared_options, common_arguments, in_turns, load, own_command
from datasets import Dataset
from peers.turns import Turns, ratios, show, take_turns
from peft import LoraConfig
from transformers import set_seed

from llmd4rec_hf import LLMRecommender, MutualDistillArguments, MutualDistillTrainer, SequenceCollator
from llmd4rec_hf.models import build_tiny_llm
from llmd4rec_hf.models.prompt import DEFAULT_PROMPT
from llmd4rec_hf.models.recommender import sequence_lengths


VARIANTS = ("all positions", "last position", "one whole prompt per prefix")
E4SREC_STEP = 128  # prompts of one optimizer step, E4SRec's default
MAX_LENGTH, TINY_WIDTH = 50, 256
PROMPTS = {
    "default": DEFAULT_PROMPT,
    # What E4SRec's Alpaca template comes to.
    "e4srec": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nGiven the user's purchase history, predict next possible item to be purchased.\n"
    "{history}\n### Response:\n",
}


class OnePromptPerPrefix(LLMRecommender):
    """E4SRec's step: every row is one prompt, read as a whole and supervised at its end alone."""

    def encode(self, item_ids, attention_mask=None):
        rows, last = torch.arange(len(item_ids)), sequence_lengths(item_ids, attention_mask) - 1
        hidden = self.encode_last(item_ids, attention_mask)
        return hidden.new_zeros(*item_ids.shape, hidden.shape[-1]).index_put((rows, last), hidden)

    def _run_after_prefix(self, tokens):
        prefix = self._prompt(self.config.prefix_ids)
        inputs = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, prefix.shape[1] :]


class LastLabelCollator(SequenceCollator):
    """Labels at the last position of each row alone."""

    def __call__(self, features):
        batch = super().__call__(features)
        last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
        batch["labels"][torch.arange(batch["labels"].shape[1]) != last] = -100
        return batch


def prefixes_of(train) -> Dataset:
    """One row per supervised position: the history up to it and the item itself."""
    rows = [
        items[max(0, end - MAX_LENGTH - 1) : end] for items in train["item_ids"] for end in range(2, len(items) + 1)
    ]
    return Dataset.from_dict({"item_ids": rows, "length": list(map(len, rows)), "row_id": list(range(len(rows)))})


def make_llm(model_class, num_items: int, supervision: str, options) -> LLMRecommender:
    """The model on its backbone: a small Llama of random weights, or the one that was asked for."""
    set_seed(0)
    backbone, tokenizer = options.llm, None
    if backbone is None:
        backbone, tokenizer = build_tiny_llm(list(PROMPTS.values()), hidden_size=TINY_WIDTH)
    return model_class.from_backbone(
        backbone,
        num_items,
        tokenizer=tokenizer,
        prompt=PROMPTS[options.prompt],
        supervision=supervision,
        max_length=MAX_LENGTH,
        peft_config=LoraConfig(r=16, lora_alpha=16) if options.lora else None,
    )


def train(options) -> None:
    """The worker of one variant."""
    facts, vocabulary, splits = load(options.dataset)
    shared = common_arguments(options.folder, options.bf16)
    if options.variant == VARIANTS[2]:
        model = make_llm(OnePromptPerPrefix, len(vocabulary), "last_position", options)
        args = MutualDistillArguments(
            per_device_train_batch_size=options.prompts_per_pass,
            gradient_accumulation_steps=max(1, E4SREC_STEP // options.prompts_per_pass),
            length_bucketing=False,
            **shared,
        )
        rows, collator = prefixes_of(splits["train"]), LastLabelCollator(MAX_LENGTH)
    else:
        model = make_llm(LLMRecommender, len(vocabulary), options.variant.replace(" ", "_"), options)
        args, rows, collator = MutualDistillArguments(**shared), splits["train"], None
    turns = Turns(
        batch_size=args.per_device_train_batch_size,
        batches_per_step=args.gradient_accumulation_steps,
        batch_of="prompts" if options.variant == VARIANTS[2] else "histories",
        prompt_tokens=len(model.config.prefix_ids) + len(model.config.suffix_ids),
    )
    in_turns(MutualDistillTrainer, turns)(model, args, rows, data_collator=collator).train()


def main() -> None:
    """Measure, print ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, seconds=4, repeats=5)
    parser.add_argument("--llm", help="folder or Hub id of the backbone (default: a small Llama of random weights)")
    parser.add_argument("--lora", action="store_true", help="train LoRA of all linear layers, not the whole backbone")
    parser.add_argument("--prompt", default="default", choices=PROMPTS, help="of all variants (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="all variants")
    parser.add_argument(
        "--prompts_per_pass", type=int, default=16, help="of the variant that is as E4SRec (default: %(default)s)"
    )
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        train(options)
    words = ["--prompt", options.prompt, "--prompts_per_pass", str(options.prompts_per_pass)]
    words += ["--llm", options.llm] if options.llm else []
    words += [f"--{name}" for name in ("lora", "bf16") if getattr(options, name)]
    with tempfile.TemporaryDirectory() as name:
        commands = {variant: own_command(options, Path(name), *words, "--variant", variant) for variant in VARIANTS}
        results = take_turns(commands, options.seconds, options.repeats, options.threads)
    found = ratios(results, VARIANTS[2])
    show(results, found, "positions")
    setting = {
        "llm": options.llm and Path(options.llm).name or f"Llama of width {TINY_WIDTH}",
        "prompt": options.prompt,
    }
    setting |= {"lora": options.lora, "bf16": options.bf16}
    result = {"dataset": load(options.dataset)[0], "setting": setting, "ratios": found, "variants": results}
    backbone = f"_{Path(options.llm).name}" if options.llm else ""
    prompt = f"_{options.prompt}_prompt" if options.prompt != "default" else ""
    write_result(f"llm_training{backbone}{prompt}", result)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""
Train a conventional recommender (CRM) and an LLM recommender against each other.

    accelerate launch examples/train.py --output_dir runs/demo
    accelerate launch examples/train.py --dataset interactions.csv --items items.csv --llm Qwen/Qwen2.5-0.5B \
        --item_text --lora_r 16 --load_in_4bit --output_dir runs/mine

Every field of `TrainingArguments` can be set for one side, with the prefix `--crm_` or `--llm_`:
`--crm_num_train_epochs 60 --llm_learning_rate 3e-4`. Run again with the same `--output_dir`, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import yaml
from rich.console import Console
from rich.logging import RichHandler


# Before the libraries are imported: some log at import.
logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logger = logging.getLogger("llmd4rec_hf")
logger.setLevel(logging.INFO)

import datasets  # noqa: E402
from accelerate import PartialState  # noqa: E402
from transformers import HfArgumentParser, set_seed  # noqa: E402

from llmd4rec_hf import (  # noqa: E402
    CRMArguments,
    GRU4RecConfig,
    GRU4RecModel,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
)
from llmd4rec_hf.command_line import column_pair, one_line_errors, script_parser, whole_number  # noqa: E402
from llmd4rec_hf.data import PreparedData, load_prepared, make_demo, prepare  # noqa: E402
from llmd4rec_hf.data.formats import format_names  # noqa: E402
from llmd4rec_hf.data.prepared import SPLITS, is_prepared  # noqa: E402
from llmd4rec_hf.errors import ConfigurationError  # noqa: E402
from llmd4rec_hf.evaluation.report import summary_table  # noqa: E402
from llmd4rec_hf.evaluation.results import cautions  # noqa: E402
from llmd4rec_hf.hub import push_run  # noqa: E402
from llmd4rec_hf.models import build_tiny_llm  # noqa: E402
from llmd4rec_hf.models.prompt import DEFAULT_PROMPT  # noqa: E402
from llmd4rec_hf.mutual_distillation import CRM_TEACHERS, FRESH_STUDENTS  # noqa: E402


FLOORS = ("popularity", "item_knn")
DATA_OPTIONS = ("items", "format", "columns", "item_columns", "text_template", "split", "min_rating", "k_core")
SIDES = {"crm": CRMArguments, "llm": MutualDistillArguments}
EXAMPLES = Path(__file__).parent
DEMO_CONFIG = EXAMPLES / "configs" / "demo.yaml"


def build_parser() -> argparse.ArgumentParser:
    """The options that are not training arguments of one side."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    flag = partial(add, action=argparse.BooleanOptionalAction, default=False)
    add("--config", metavar="FILE.yaml", help="options in a file; those on the command line win")
    add("--dataset", default="demo", help="demo, a file, a folder, a Hub id, or what prepare.py wrote")
    add("--items", help="catalogue with item_id, title, ...; that of the log's folder by default")
    add("--format", default="auto", choices=format_names(), metavar="NAME", help=f"one of {', '.join(format_names())}")
    add(
        "--columns",
        nargs="+",
        type=column_pair,
        metavar="OURS=THEIRS",
        help="user_id, item_id, timestamp, rating, ...",
    )
    add("--item_columns", nargs="+", type=column_pair, metavar="OURS=THEIRS", help="item_id, title")
    add("--text_template", metavar="TEXT", help='an item in words, such as "{title} ({brand})"')
    add("--split", default="leave_one_out", choices=list(SPLITS))
    add("--min_rating", type=float, metavar="R", help="leave out interactions rated lower")
    add("--k_core", type=whole_number, default=0, metavar="K", help="keep users and items with K interactions or more")
    add("--crm", default="sasrec", help="sasrec, gru4rec, or the folder of a trained one")
    add("--hidden_size", type=int, default=64, help="width of the CRM's item vectors")
    add("--crm_layers", type=int, help="layers of the CRM; its own default if not given")
    add("--dropout", type=float, default=0.5, help="of the CRM")
    add("--max_length", type=int, default=50, help="longest history that the models read")
    add("--llm", default="tiny", help="tiny, or the folder or Hub id of a transformers model")
    flag("--load_in_4bit", help="load the LLM in 4 bits (NF4, double quantisation)")
    add("--lora_r", type=int, default=16, help="rank of the LoRA adapter; 0 trains the whole LLM, as tiny always does")
    add("--llm_dropout", type=float, default=0.1, help="of soft tokens and of hidden states before the item head")
    flag("--item_text", help="titles join items in the LLM")
    flag("--title_vectors", help="the CRM begins with item vectors made of titles; goes with --item_text")
    add("--prompt", default=DEFAULT_PROMPT, help="text around {history}")
    add("--supervision", default="all_positions", choices=["all_positions", "last_position"], help="of the LLM")
    add("--rounds", type=int, default=3, help="most rounds")
    flag("--controls", default=True, help="also train without distillation")
    add("--refresh", default="copy", choices=["copy", "off"], help="the LLM's item vectors at every round")
    add("--fresh_students", default="none", choices=list(FRESH_STUDENTS), help="who starts anew in every round")
    add("--crm_teachers", default="llm", choices=list(CRM_TEACHERS), help="the LLM, or also the CRM of the last round")
    add("--output_dir", required=True, help="where the run lives")
    add("--seed", type=whole_number, default=42)
    flag("--use_cpu", help="even if there is an accelerator")
    flag("--push_to_hub", help="push both models when the run is over")
    add("--hub_model_id", metavar="USER/NAME", help="repositories USER/NAME-crm and USER/NAME-llm")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, CRMArguments, MutualDistillArguments]:
    """Options, and both sides' training arguments."""
    parser = build_parser()
    config = _config_of(argv)
    if config is not None:
        # The file's words come first, so that the command line's win; as words they are read like any others.
        argv = _words_of(config) + argv
    options, rest = parser.parse_known_args(argv)
    if options.push_to_hub and not options.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id USER/NAME")
    if options.title_vectors and not options.item_text:
        parser.error("--title_vectors needs --item_text: the titles are those that the LLM reads")
    return options, *(_side_arguments(parser, options, rest, side) for side in SIDES)


def _config_of(argv: list[str]) -> str | Path | None:
    """The configuration file, which may hold what the parser requires."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dataset", default="demo")
    options, _ = parser.parse_known_args(argv)
    return options.config or (DEMO_CONFIG if options.dataset == "demo" else None)


def _words_of(config: str | Path) -> list[str]:
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"Cannot read the configuration {config}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigurationError(f"The configuration {config} must hold `option: value` lines.")
    words = []
    for name, value in content.items():
        if isinstance(value, bool) and not name.startswith(tuple(SIDES)):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", json.dumps(value)]
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _side_arguments(parser, options, words: list[str], side: str):
    """The words with a side's prefix, read as its training arguments."""
    mine: list[str] = []
    target = None
    for word in words:
        if word.startswith("--"):
            prefix = next((name for name in SIDES if word.startswith(f"--{name}_")), None)
            if prefix is None:
                parser.error(f"unknown option {word}")
            target = mine if prefix == side else []
            word = word.replace(f"{prefix}_", "", 1)
        if target is None:
            parser.error(f"{word!r} belongs to no option")
        target.append(word)
    shared = ["--output_dir", str(Path(options.output_dir) / "phases"), "--use_cpu", str(options.use_cpu)]
    side_parser = HfArgumentParser(SIDES[side], allow_abbrev=False, usage=f"train.py --{side}_FIELD VALUE ...")
    try:
        arguments, unknown = side_parser.parse_args_into_dataclasses([*shared, *mine], return_remaining_strings=True)
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"The {side.upper()}'s training arguments (--{side}_...): {error}") from error
    if unknown and unknown[0].startswith("--"):
        parser.error(f"unknown training argument --{side}_{unknown[0].removeprefix('--')}")
    if unknown:
        parser.error(f"{unknown[0]!r} belongs to no option")
    return arguments


def load_data(options) -> PreparedData:
    """The log, its sequences, vocabulary and card: prepared now and kept, or prepared before."""
    source, items = options.dataset, options.items
    if source == "demo":
        source, items = make_demo(seed=0)
    elif is_prepared(source):
        prepared = load_prepared(source)
        _refuse_data_options(options, prepared.card["prepared"])
        return prepared
    return prepare(
        source,
        items,
        format=options.format,
        columns=dict(options.columns or []),
        item_columns=dict(options.item_columns or []),
        text_template=options.text_template,
        split=options.split,
        min_rating=options.min_rating,
        k_user=options.k_core,
        k_item=options.k_core,
    )


def _refuse_data_options(options, prepared: dict) -> None:
    """Options of preparing do nothing for a folder that is prepared, unless they are those it was prepared with."""
    default = build_parser().get_default
    cores = {prepared.get(name, 0) for name in ("k_user", "k_item")}
    prepared = {**prepared, "k_core": cores.pop() if len(cores) == 1 else None}
    given = [name for name in DATA_OPTIONS if getattr(options, name) not in (default(name), prepared.get(name))]
    if given:
        words = ", ".join(f"--{name}" for name in given)
        raise ConfigurationError(
            f"{options.dataset} is prepared already, so {words} would have no effect: leave them out, or run "
            "prepare.py again with them."
        )


def dataset_facts(card: dict) -> dict:
    """What results and report say of the data."""
    floors = card.get("floors", {})
    return {
        **card["log"],
        "cold_test_targets": card["test"]["cold_targets"],
        **{f"test_ndcg@10_of_{rule}": floors[rule]["ndcg@10"] for rule in FLOORS if rule in floors},
    }


def build_crm(options, vocabulary: ItemVocabulary) -> RecommenderModel:
    """The conventional recommender."""
    shape = {
        "num_items": len(vocabulary),
        "hidden_size": options.hidden_size,
        "max_length": options.max_length,
        "dropout": options.dropout,
    }
    if options.crm_layers is not None:
        shape["num_layers"] = options.crm_layers
    if options.crm == "sasrec":
        return SASRecModel(SASRecConfig(**shape))
    if options.crm == "gru4rec":
        return GRU4RecModel(GRU4RecConfig(**shape))
    try:
        return RecommenderModel.from_pretrained(options.crm)
    except ConfigurationError as error:
        raise ConfigurationError(f"--crm {options.crm}: neither sasrec, gru4rec nor a trained CRM. {error}") from error


def build_llm(options, vocabulary: ItemVocabulary, item_dim: int) -> LLMRecommender:
    """The LLM recommender: a real one with an adapter, or a tiny one trained as a whole."""
    if options.item_text and vocabulary.texts is None:
        raise ConfigurationError("--item_text needs a catalogue with titles: give --items FILE.")
    settings = {
        "prompt": options.prompt,
        "supervision": options.supervision,
        "max_length": options.max_length,
        "dropout": options.llm_dropout,
        "item_texts": vocabulary.texts if options.item_text else None,
        # Beside the prepared data: the next run over the same titles reads what this one encoded.
        "item_text_cache": Path(datasets.config.HF_DATASETS_CACHE) / "llmd4rec_hf" / "item_text",
    }
    if options.llm == "tiny":
        # The prompt's words are repeated until the tokenizer finds them worth a token each.
        backbone, tokenizer = build_tiny_llm([*(vocabulary.texts or []), *[options.prompt] * 100])
        return LLMRecommender.from_backbone(backbone, len(vocabulary), item_dim, tokenizer=tokenizer, **settings)
    if options.lora_r:
        from peft import LoraConfig

        settings["peft_config"] = LoraConfig(
            r=options.lora_r, lora_alpha=options.lora_r, lora_dropout=0.05, target_modules="all-linear"
        )
    if options.load_in_4bit:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    return LLMRecommender.from_backbone(options.llm, len(vocabulary), item_dim, **settings)


def run(argv: list[str], console: Console) -> dict:
    """Data, models, rounds, report, push."""
    options, crm_args, llm_args = parse(argv)
    data = load_data(options)
    vocabulary = data.vocabulary
    set_seed(options.seed)
    crm = build_crm(options, vocabulary)
    llm = build_llm(options, vocabulary, item_dim=crm.item_matrix().shape[1])
    if options.title_vectors:
        crm.set_item_vectors(llm.title_vectors())
    config = MutualDistillationConfig(
        output_dir=options.output_dir,
        rounds=options.rounds,
        controls=options.controls,
        refresh=options.refresh,
        fresh_students=options.fresh_students,
        crm_teachers=options.crm_teachers,
        seed=options.seed,
        dataset_name=Path(options.dataset).name,
        dataset_facts=dataset_facts(data.card),
        split=data.card["prepared"]["split"],
    )
    results = MutualDistillation(llm, crm, data.sequences, vocabulary, config, llm_args, crm_args).run()
    if PartialState().is_main_process:
        console.print(summary_table(results))
        for caution in cautions(results):
            console.print(f"Caution. {caution}")
        console.print(f"Models, results.json, report.md and report.png are in {options.output_dir}")
        if options.push_to_hub:
            repositories = push_run(options.output_dir, options.hub_model_id)
            console.print(f"Pushed to {' and '.join(repositories)}")
    return results


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    with one_line_errors():
        run(sys.argv[1:] if argv is None else argv, Console())


if __name__ == "__main__":
    main()

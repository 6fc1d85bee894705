# SPDX-License-Identifier: Apache-2.0
"""
Write a trained CRM as a file that runs without this package, and check that it says the same.

    python examples/export_onnx.py --model runs/demo/crm --output_dir deploy
    python examples/export_onnx.py --model USER/NAME-crm --output_dir deploy --format torch --k 50

One graph goes from histories to the best items: any number of histories, any length, seen items left out inside. The
folder also gets the item vocabulary; serve.py answers requests from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from llmd4rec_hf import RecommenderModel
from llmd4rec_hf.command_line import one_line_errors, script_parser, whole_number
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.export import Ranker, export_model


TOLERANCE = 1e-5


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="SOURCE", help="a folder or Hub id of a CRM")
    add("--output_dir", required=True, metavar="FOLDER", help="gets the graph, vocabulary.json and export.json")
    add("--format", default="onnx", choices=["onnx", "torch"], help="ONNX or torch.export (%(default)s by default)")
    add("--k", type=int, default=100, help="length of each list, the most a request can ask for (%(default)s)")
    add(
        "--check",
        type=whole_number,
        default=64,
        metavar="N",
        help="histories to compare with the model (%(default)s)",
    )
    return parser


def outputs_of(path: Path, item_ids: torch.Tensor, seen: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the exported graph answers."""
    if path.suffix == ".pt2":
        recommended, scores = torch.export.load(path).module()(item_ids=item_ids, seen=seen)
        return recommended.numpy(), scores.detach().numpy()
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigurationError("onnxruntime is missing: pip install 'llmd4rec-hf[export]', or --check 0.") from error
    session = onnxruntime.InferenceSession(path)
    return tuple(session.run(None, {"item_ids": item_ids.numpy(), "seen": seen.numpy()}))


@torch.no_grad()
def largest_difference(model: RecommenderModel, path: Path, k: int, rows: int) -> float:
    """Largest difference of a score between graph and model, for histories of all lengths."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    seen = torch.randint(1, config.num_items + 1, (rows, config.max_length), generator=generator)
    lengths = torch.randint(1, config.max_length + 1, (rows, 1), generator=generator)
    seen[torch.arange(config.max_length) >= lengths] = 0
    item_ids = seen[:, : int(lengths.max())]
    _, expected = Ranker(model.cpu().float().eval(), padded=False, k=min(k, config.num_items))(item_ids, seen)
    _, found = outputs_of(path, item_ids, seen)
    expected, left = expected.numpy(), np.isfinite(found)
    if not (left == np.isfinite(expected)).all():
        return float("inf")
    return float(np.abs(expected[left] - found[left]).max(initial=0.0))


def run(options: argparse.Namespace, console: Console) -> None:
    """Export and check."""
    model = RecommenderModel.from_pretrained(options.model)
    path = export_model(model, options.output_dir, options.format, k=options.k)
    console.print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    if options.check:
        difference = largest_difference(model, path, options.k, options.check)
        if not difference <= TOLERANCE:
            raise ConfigurationError(
                f"The scores of {path} differ from the model's by {difference:.1e}: do not use it."
            )
        console.print(
            f"Scores of {options.check} random histories differ from the model's by {difference:.1e} at most"
        )


def main(argv: list[str] | None = None) -> None:
    """Command line: errors a user can mend are one line and exit code 1."""
    options = build_parser().parse_args(argv)
    with one_line_errors():
        run(options, Console())


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""
The teacher cache for teachers of two widths: bytes per position against dense scores in half precision, KL through the
cache against KL from the live teacher's scores, and positions read per second in the order of training. Weights are
random, which fills a teacher's whole width; a third teacher has dimensions of falling size, as training leaves them,
and is narrowed within the error that CRMTrainer allows by default.

    python benchmarks/cache.py --dataset FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import TRAINED_POWER, make_teacher, write_result
from crm_training import load

from llmd4rec_hf import CRMArguments, SASRecModel, SequenceCollator, TeacherCache
from llmd4rec_hf.training.sampler import LengthBucketSampler


BATCH_SIZE, TEMPERATURE = 256, 2.0
# Width, how fast the size of its dimensions falls (as a power of their number), allowed error.
TEACHERS = ((64, 0.0, 0.0), (1024, 0.0, 0.0), (1024, TRAINED_POWER, CRMArguments.teacher_max_error))


def batches_of(train, count: int):
    """Batches of rows in the order of training, collated."""
    order = list(LengthBucketSampler(train["length"], BATCH_SIZE))
    columns = train.select_columns(["item_ids", "row_id"])
    collator = SequenceCollator()
    for first in range(0, min(count * BATCH_SIZE, len(order)), BATCH_SIZE):
        yield collator(columns.__getitems__(order[first : first + BATCH_SIZE]))


def softened_kl(scores: torch.Tensor, teacher_scores: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each position, in nats."""
    student, teacher = (F.log_softmax(values.double() / TEMPERATURE, dim=1) for values in (scores, teacher_scores))
    return (teacher.exp() * (teacher - student)).sum(dim=1)


@torch.no_grad()
def kl_error(cache: TeacherCache, teacher: SASRecModel, student: SASRecModel, batches) -> dict[str, float]:
    """
    Largest difference of a position's KL, and of the mean of a batch, from the live teacher's: relative, and of the
    mean also in nats. And the mean of exp(entropy) of the softened teacher, in items, without which small differences
    would say little.
    """
    single, mean, nats, breadth = 0.0, 0.0, 0.0, []
    for batch in batches:
        mask = batch["labels"] != -100
        scores = student.encode(batch["item_ids"])[mask] @ student.item_matrix()[1:].T
        hidden = cache.lookup(batch["row_id"], batch["labels"], batch["attention_mask"]).float()
        live_scores = teacher.encode(batch["item_ids"])[mask] @ teacher.item_matrix()[1:].T
        live = softened_kl(scores, live_scores)
        cached = softened_kl(scores, hidden @ cache.item_matrix[1:].float().T)
        single = max(single, ((cached - live).abs() / live).max().item())
        mean = max(mean, (cached.mean() / live.mean() - 1).abs().item())
        nats = max(nats, (cached.mean() - live.mean()).abs().item())
        breadth.append(torch.distributions.Categorical(logits=live_scores / TEMPERATURE).perplexity().mean().item())
    perplexity = sum(breadth) / len(breadth)
    return {"position": single, "batch_mean": mean, "batch_mean_nats": nats, "teacher_perplexity": perplexity}


def reading_speed(cache: TeacherCache, batches: list) -> float:
    """Positions per second of lookups, the second time that they are made."""
    for _ in range(2):
        start = time.perf_counter()
        positions = sum(len(cache.lookup(b["row_id"], b["labels"], b["attention_mask"])) for b in batches)
        seconds = time.perf_counter() - start
    return positions / seconds


def measure(train, num_items: int, width: int, power: float, max_error: float, folder: Path) -> dict:
    """One teacher."""
    teacher = make_teacher(num_items, width, power)
    start = time.perf_counter()
    cache = TeacherCache.build(teacher, train, folder, max_error=max_error)
    seconds = time.perf_counter() - start
    positions = cache.manifest["positions"]
    sizes = {name: (cache.directory / name).stat().st_size for name in cache.manifest["files"]}
    shards = sum(sizes[name] for name in cache.manifest["shards"])
    dense = 2 * num_items
    batches = list(batches_of(train, 100))
    return {
        "width": width,
        "max_error": max_error,
        "stored_width": cache.manifest["hidden_size"],
        "reduction": cache.manifest["reduction"],
        "positions": positions,
        "bytes_per_position": shards / positions,
        "bytes_per_position_with_item_matrix": sum(sizes.values()) / positions,
        "dense_fp16_bytes_per_position": dense,
        "times_smaller": dense * positions / shards,
        "times_smaller_with_item_matrix": dense * positions / sum(sizes.values()),
        "kl_error": kl_error(cache, teacher, make_teacher(num_items, 32), batches[:3]),
        "positions_read_per_second": reading_speed(cache, batches),
        "positions_written_per_second": positions / seconds,
    }


def main() -> None:
    """Measure, print ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="demo", help="folder or file of a log (default: the built-in data)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts, vocabulary, splits = load(options.dataset)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for teacher in TEACHERS:
            results.append(measure(splits["train"], len(vocabulary), *teacher, Path(folder, "cache")))
            show(results[-1])
    write_result("cache", {"dataset": facts, "teachers": results})


def show(result: dict) -> None:
    """Print one teacher's figures."""
    print(
        f"\nteacher of width {result['width']}, {result['positions']:,} positions, stored in {result['stored_width']}"
    )
    print(
        f"  1/{result['times_smaller']:.1f} of dense fp16 scores ({result['bytes_per_position']:.0f} bytes a position)"
    )
    print(f"  1/{result['times_smaller_with_item_matrix']:.1f} with item matrix and index")
    errors = result["kl_error"]
    print(f"  KL off by {errors['position']:.1e} (a position), {errors['batch_mean']:.1e} (mean of a batch), relative")
    print(f"  and by {errors['batch_mean_nats']:.1e} nats (mean of a batch)")
    if result["reduction"]:
        print("  scores off by {score_error:.3f} nats, KL to the teacher {kl:.1e}".format(**result["reduction"]))
    print(f"  the softened teacher's perplexity: {errors['teacher_perplexity']:,.0f} items")
    print(f"  {result['positions_read_per_second']:,.0f} positions read per second")


if __name__ == "__main__":
    main()

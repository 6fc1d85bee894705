# SPDX-License-Identifier: Apache-2.0
"""Everything on a device other than the CPU, pretended where there is none: the same numbers, and nothing mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_loss import assert_same, dense, problem
from peft import LoraConfig
from pretended_device import DEVICE, DeviceTensor, pretended_device, waits
from trained import losses, train
from transformers import set_seed

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    GRU4RecConfig,
    GRU4RecModel,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    RecommenderEnsemble,
    SequenceCollator,
    TeacherCache,
    distillation_loss,
    target_ranks,
)
from llmd4rec_hf.distillation import ListedScores, draw_negatives, sampled_distillation_loss
from llmd4rec_hf.models import build_tiny_llm


@pytest.fixture
def device():
    with pretended_device() as device:
        yield device


def test_the_device_refuses_what_a_gpu_would(device):
    here, there = torch.ones(2, 2, device=device), torch.ones(2, 2)
    assert isinstance(here @ here, DeviceTensor) and (here @ here).device == DEVICE
    assert (here + torch.tensor(1.0)).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert here[torch.tensor([0])].device == DEVICE
    for mixture in (
        lambda: here @ there,
        lambda: here.add_(there),
        lambda: torch.mm(there, there, out=here),
        lambda: there[torch.tensor([0], device=device)],
        lambda: here.normal_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="aten"):
            mixture()
    with pytest.raises(TypeError, match="to numpy"):
        here.numpy()


def test_gradients_go_from_one_device_to_the_other(device):
    leaf = torch.ones(3, requires_grad=True)
    on_device = leaf.to(device)
    (on_device.to("cpu") * 2 + (on_device * on_device).to("cpu")).sum().backward()
    assert not isinstance(leaf.grad, DeviceTensor) and leaf.grad.tolist() == [4.0, 4.0, 4.0]


def on(device, *tensors):
    return [
        tensor.detach().float().to(device) if tensor.is_floating_point() else tensor.to(device) for tensor in tensors
    ]


def loss_on(device, given, chunk_size=None, **options):
    """The loss of a problem that is on the device, brought back to the CPU with its gradients."""
    hidden, items, labels, *teacher = on(device, *vars(given).values())
    hidden.requires_grad_(), items.requires_grad_()
    result = distillation_loss(hidden, items, labels, *teacher, chunk_size=chunk_size, **options)
    grads = torch.autograd.grad(result.loss, (hidden, items))
    assert all(isinstance(value, DeviceTensor) for value in (*vars(result).values(), *grads))
    for name, value in vars(result).items():
        setattr(result, name, value.to("cpu"))
    return result, [grad.to("cpu") for grad in grads]


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("weighting", ["rank", "confidence", "none"])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "shifted"])
def test_the_loss(device, scale, weighting, chunk_size):
    given = problem(seed=4, scale=scale)
    options = {"weighting": weighting, "temperature": 2.0, "kl_weight": 0.7}
    actual, grads = loss_on(device, given, chunk_size, **options)
    assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-4, atol=1e-5)


def test_the_loss_in_bf16(device):
    given = problem(seed=4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual, grads = loss_on(device, given)
    expected = dense(given)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-2)
    for grad, value in zip(grads, expected.grads, strict=True):
        assert 0 < (grad - value).norm() <= 2e-2 * value.norm()


def lists_of(given) -> ListedScores:
    log_probs = (given.teacher_hidden @ given.teacher_items.T)[:, 1:].log_softmax(dim=1)
    best = log_probs.topk(3)
    return ListedScores(best.indices + 1, best.values.float())


def test_the_loss_with_lists(device):
    given = problem(seed=5)
    lists, inputs = lists_of(given), (given.hidden, given.items, given.labels)
    expected = distillation_loss(*on("cpu", *inputs), teacher_lists=lists)
    lists = ListedScores(*on(device, lists.ids, lists.log_probs))
    actual = distillation_loss(*on(device, *inputs), teacher_lists=lists)
    for name in ("loss", "kl", "teacher_ranks"):
        torch.testing.assert_close(getattr(actual, name).to("cpu"), getattr(expected, name))


def test_the_loss_over_a_sample(device):
    given = problem(seed=6, ignored=())
    negatives = draw_negatives(len(given.items) - 1, 6, (0, 0))
    rows = torch.cat([negatives, given.labels])
    parts = [given.hidden, given.items[rows], given.labels, given.teacher_hidden, given.teacher_items[rows]]
    found = {}
    for place in ("cpu", device):
        hidden, items, labels, *teacher = on(place, *parts)
        options = {"negatives": negatives.to(place), "num_items": len(given.items) - 1}
        result = sampled_distillation_loss(hidden.requires_grad_(), items, labels, *teacher, **options)
        (gradient,) = torch.autograd.grad(result.loss, hidden)
        found[place] = [value.to("cpu") for value in (result.loss, result.kl, result.student_ranks, gradient)]
    for actual, expected in zip(found[device], found["cpu"], strict=True):
        torch.testing.assert_close(actual, expected)


def test_ranks(device):
    given = problem(seed=7, ignored=())
    seen = torch.randint(0, 18, (len(given.labels), 4), generator=torch.Generator().manual_seed(0))
    inputs = (given.hidden, given.items, given.labels)
    expected = target_ranks(*on("cpu", *inputs), seen=seen, chunk_size=3)
    actual = target_ranks(*on(device, *inputs), seen=seen.to(device), chunk_size=3)
    assert actual.device == device and actual.tolist() == expected.tolist()


@pytest.mark.parametrize("max_error", [0.0, 0.01], ids=["wide", "narrowed"])
def test_the_cache_of_a_wide_teacher(device, max_error, make_crm, splits, tmp_path):
    """In 16 bits, and by a projection."""
    batch = SequenceCollator(max_length=6)([splits["train"][row] for row in (3, 0, 8)])
    found = {}
    for place in ("cpu", device):
        teacher = make_crm(1, hidden_size=160).to(place)
        cache = TeacherCache.build(teacher, splits["train"], tmp_path / str(place)[:3], max_error=max_error)
        assert cache.is_reduced == (max_error > 0)
        here = [batch[name].to(place) for name in ("row_id", "labels", "attention_mask")]
        hidden = cache.lookup(*here)
        assert hidden.device == torch.device(place)
        found[place] = hidden @ cache.item_matrix.to(place).T
    torch.testing.assert_close(found[device].to("cpu"), found["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "llm", "prompted", "ensemble"])
def test_recommending(device, kind, make_crm, make_llm, vocabulary):
    made = {"sasrec": make_crm, "llm": make_llm}
    made["gru4rec"] = lambda: GRU4RecModel(GRU4RecConfig(num_items=12, hidden_size=8, max_length=6))
    made["prompted"] = lambda: make_llm(supervision="last_position", item_texts=vocabulary.texts)
    made["ensemble"] = lambda: RecommenderEnsemble([make_crm(), make_llm()])
    model = made[kind]().eval()
    model.vocabulary = vocabulary
    history = [vocabulary.item_ids[:4], vocabulary.item_ids[2:3]]

    def answers():
        some = vocabulary.item_ids[3:9]
        yield model.recommend(history, k=3)
        yield model.recommend(history, k=2, filter_seen=False, candidates=some)
        yield model.similar_items(some[:2], k=2)

    expected = list(answers())
    model.to(device)
    for actual, one in zip(answers(), expected, strict=True):
        assert actual.ids == one.ids
        np.testing.assert_allclose(actual.scores, one.scores, rtol=1e-4)


def test_an_llm_on_a_backbone_that_is_there_already(device, vocabulary):
    """As one in 4 bits is: what is built beside it goes there too."""

    def build(place):
        set_seed(0)
        backbone, tokenizer = build_tiny_llm(vocabulary.texts, hidden_size=16, num_layers=1)
        parts = {"tokenizer": tokenizer, "item_texts": vocabulary.texts, "max_length": 6}
        return LLMRecommender.from_backbone(backbone.to(place), 12, 8, **parts).eval()

    history, found = torch.tensor([[1, 2, 3]]), {}
    for place in ("cpu", device):
        model = build(place)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(place)}
        with torch.no_grad():
            found[place] = model.encode(history.to(place)) @ model.item_matrix().T, model.title_vectors()
    for actual, expected in zip(found[device], found["cpu"], strict=True):
        torch.testing.assert_close(actual.to("cpu"), expected)


@pytest.mark.parametrize(
    ("teaching", "settings"),
    [
        ("nobody", {}),
        ("model", {}),
        ("lists", {}),
        ("model", {"num_sampled_items": 5}),
        ("model", {"bf16": True}),
    ],
    ids=["alone", "model", "lists", "sample", "bf16"],
)
def test_training(teaching, settings, make_crm, walks, make_arguments, splits):
    """The same losses, and the same evaluation afterwards."""

    def run(place: str, use_cpu: bool) -> list[float]:
        args = make_arguments(place[:3], use_cpu=use_cpu, num_train_epochs=1, dataloader_pin_memory=False, **settings)
        trainer = train(make_crm(), args, splits, {"nobody": None, "model": make_crm(1), "lists": walks}[teaching])
        assert trainer.model.device == torch.device(place)
        return [*losses(trainer), trainer.evaluate()["eval_ndcg@10"]]

    expected = run("cpu", use_cpu=True)
    with pretended_device() as device:
        actual = run(str(device), use_cpu=False)
    assert actual == pytest.approx(expected, rel=1e-2 if "bf16" in settings else 1e-5)


@pytest.mark.parametrize(("teaching", "expected"), [(False, 4), (True, 5)], ids=["alone", "with a teacher"])
def test_a_step_rarely_waits(device, teaching, expected, make_crm, make_arguments, splits):
    """For the packed positions twice, for what the labels and the exponents span, and for which rows a teacher has."""
    args = make_arguments(use_cpu=False, num_train_epochs=1, dataloader_pin_memory=False)
    found = []

    class Watched(CRMTrainer):
        def compute_loss(self, *args, **kwargs):
            waits.clear()
            loss = super().compute_loss(*args, **kwargs)
            found.append(len(waits))
            return loss

    Watched(make_crm(), args, splits["train"], teacher=make_crm(1) if teaching else None).train()
    assert set(found) == {expected}


def numbers(results: dict) -> list[float]:
    found = []
    for side in ("crm", "llm", "crm_without_distillation", "llm_without_distillation"):
        found += [value for part in ("validation", "test") for value in results["final"][side][part].values()]
    return found


def test_the_whole_method(make_crm, make_llm, splits, vocabulary, tmp_path):
    """Both directions, titles and an adapter, caches, checkpoints, controls, tests."""
    quick = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "disable_tqdm": True, "learning_rate": 1e-2}
    quick["dataloader_pin_memory"] = False

    def run(name: str, **settings) -> dict:
        config = MutualDistillationConfig(str(tmp_path / name), rounds=1)
        llm_args = MutualDistillArguments("-", **quick, **settings)
        crm_args = CRMArguments("-", **quick, **settings)
        lora = LoraConfig(r=2, target_modules="all-linear")
        llm = make_llm(dropout=0.0, peft_config=lora, item_texts=vocabulary.texts)
        return MutualDistillation(llm, make_crm(), splits, vocabulary, config, llm_args, crm_args).run()

    expected = run("cpu", use_cpu=True)
    with pretended_device():
        actual = run("device")
    assert numbers(actual) == pytest.approx(numbers(expected), rel=1e-6)

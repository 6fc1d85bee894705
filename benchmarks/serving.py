# SPDX-License-Identifier: Apache-2.0
"""
What an exported recommender gains over the model it was exported from, each on one core: time of a request by its
number of histories (median, 99th percentile), requests per second, and the same through the HTTP service.

    python benchmarks/serving.py
    python benchmarks/serving.py --items 100000 --requests 500

Histories are random, of 1 to 50 items; k is 10, seen items are left out. The runtimes take turns, so that a machine
whose speed drifts slows all of them alike.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import write_result

from llmd4rec_hf import ItemVocabulary, SASRecConfig, SASRecModel
from llmd4rec_hf.export import export_model


SERVICE = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
K, MAX_LENGTH = 10, 50


def make_model(num_items: int) -> SASRecModel:
    """A SASRec of the usual size; what it has learned does not matter here."""
    torch.manual_seed(0)
    model = SASRecModel(SASRecConfig(num_items=num_items, hidden_size=64, max_length=MAX_LENGTH))
    model.vocabulary = ItemVocabulary(np.arange(1, num_items + 1))
    return model.eval()


def load_service():
    """examples/serve.py as a module."""
    spec = importlib.util.spec_from_file_location("serve", SERVICE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module
    spec.loader.exec_module(module)
    return module


def make_requests(count: int, histories: int, num_items: int) -> list[list[list[int]]]:
    """Random histories of 1 to 50 items."""
    random = np.random.default_rng(0)
    return [
        [random.integers(1, num_items + 1, random.integers(1, MAX_LENGTH + 1)).tolist() for _ in range(histories)]
        for _ in range(count)
    ]


def measure(answer: dict, requests: list) -> dict:
    """Times of each way to answer, in turns, after ten requests that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in answer}
    for index, request in enumerate(requests):
        for name, function in answer.items():
            start = time.perf_counter()
            function(request)
            if index >= 10:
                times[name].append(time.perf_counter() - start)
    return {name: summary(values, len(requests[0])) for name, values in times.items()}


def summary(seconds: list[float], histories: int) -> dict:
    """Milliseconds and rates."""
    median, late = np.quantile(seconds, [0.5, 0.99]).tolist()
    rate = len(seconds) / sum(seconds)
    return {
        "p50_ms": round(median * 1e3, 3),
        "p99_ms": round(late * 1e3, 3),
        "requests_per_second": round(rate, 1),
        "histories_per_second": round(rate * histories, 1),
    }


def of_program(path: Path):
    """The torch.export program behind the same interface, ids and all."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def answer(histories):
        rows = [torch.tensor(history) for history in histories]
        seen = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        recent = torch.nn.utils.rnn.pad_sequence([row[-MAX_LENGTH:] for row in rows], batch_first=True)
        recommended, scores = module(item_ids=recent, seen=seen)
        return recommended[:, :K].tolist(), scores[:, :K].tolist()

    return answer


class Client:
    """The HTTP service in a process on the first core, and a connection to it."""

    def __init__(self, folder: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(SERVICE), "--folder", folder, "--port", str(port)]
        self.process = subprocess.Popen(command)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, {min(os.sched_getaffinity(0))})
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(600):
            try:
                self.connection.connect()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the service has not started within a minute")

    def __call__(self, histories: list) -> dict:
        body = json.dumps({"histories": histories, "k": K})
        self.connection.request("POST", "/recommend", body, {"content-type": "application/json"})
        answer = self.connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == 200, content
        return content

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=12_101, help="catalogue, that of Amazon Beauty by default")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--histories", type=int, nargs="+", default=[1, 32], help="per request")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(options.items)
    result: dict = {"items": options.items, "hidden_size": 64, "k": K, "requests": options.requests, "times": {}}
    with tempfile.TemporaryDirectory() as folder:
        result["megabytes"] = {
            path.name: round(path.stat().st_size / 1e6, 2)
            for path in (export_model(model, folder, "torch"), export_model(model, folder, "onnx"))
        }
        onnx = load_service().ExportedRecommender(Path(folder))
        service = Client(folder)
        answer = {
            "eager": lambda histories: model.recommend(histories, K),
            "torch.export": of_program(Path(folder, "recommender.pt2")),
            "onnxruntime": lambda histories: onnx.recommend(histories, K),
            "http service": service,
        }
        try:
            for histories in options.histories:
                requests = make_requests(options.requests, histories, options.items)
                measured = measure(answer, requests)
                result["times"][f"{histories} per request"] = measured
                for name, values in measured.items():
                    print(f"{histories:4d} {name:14s} {values}")
        finally:
            service.close()
    name = "serving" if options.items == parser.get_default("items") else f"serving_{options.items}"
    write_result(name, result)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""
Answer requests for recommendations over HTTP, from a folder that export_onnx.py wrote.

    python examples/serve.py --folder deploy --port 8000
    curl localhost:8000/recommend -H content-type:application/json -d '{"histories": [["B00001", "B00017"]], "k": 5}'

Needs fastapi, numpy, onnxruntime and uvicorn (the extra `serve`), and neither torch nor this package: to deploy it,
copy this file, serve.html and the folder. A page to try it is at http://localhost:8000, all requests are at /docs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt


FORMAT_VERSION = 2
MOST_HISTORIES, MOST_ITEMS = 256, 2000
PAGE = Path(__file__).with_name("serve.html")


class Unanswerable(ValueError):
    """A request that is well-formed and has no answer."""


class ExportedRecommender:
    """
    An exported graph and its vocabulary, on external item ids.

    Args:
        folder (`Path`): holds `recommender.onnx`, `vocabulary.json` and `export.json`.
        threads (`int`, *optional*, defaults to 1): threads of one request.
    """

    def __init__(self, folder: Path, threads: int = 1):
        facts, vocabulary = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("export.json", "vocabulary.json")
        )
        if facts["format_version"] != FORMAT_VERSION or facts["format"] != "onnx" or facts["k"] is None:
            raise ValueError(f"no ONNX graph with top-k in format {FORMAT_VERSION}: export it again by export_onnx.py")
        if _content_hash(vocabulary) != facts["vocabulary"]:
            raise ValueError("vocabulary.json is not the one that was exported with the graph: export both again")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "recommender.onnx", options)
        self.most, self.max_length = facts["k"], facts["max_length"]
        self.item_ids, self.titles = vocabulary["item_ids"], vocabulary["texts"]
        # 12 and "12" name the same item.
        self.internal = {str(item): index for index, item in enumerate(self.item_ids, start=1)}

    def recommend(self, histories: list[list], k: int = 10, filter_seen: bool = True, skip_unknown: bool = False):
        """Per history a list of `{"item_id", "score", "title"}`, best first. Raises `Unanswerable`."""
        rows = [self._encode(history, index, skip_unknown) for index, history in enumerate(histories)]
        answers = iter(self._answer([row for row in rows if row], k, filter_seen))
        return [next(answers) if row else [] for row in rows]

    def _answer(self, rows: list[list[int]], k: int, filter_seen: bool) -> list[list[dict]]:
        if not rows:
            return []
        inputs = {"item_ids": _pad([row[-self.max_length :] for row in rows])}
        inputs["seen"] = _pad(rows) if filter_seen else np.zeros((len(rows), 1), np.int64)
        recommended, scores = self.session.run(None, inputs)
        return [
            [self._describe(item, score) for item, score in zip(*row, strict=True) if item]
            for row in zip(recommended[:, :k].tolist(), scores[:, :k].tolist(), strict=True)
        ]

    def search(self, text: str, limit: int) -> list[dict]:
        """Items whose id or title holds a text."""
        text, found = text.lower(), []
        for index, item in enumerate(self.item_ids):
            if text in str(item).lower() or (self.titles and text in self.titles[index].lower()):
                found.append({"item_id": item, "title": self.titles[index] if self.titles else None})
                if len(found) == limit:
                    break
        return found

    def _encode(self, history: list, index: int, skip_unknown: bool) -> list[int]:
        row = [self.internal.get(str(item), 0) for item in history]
        if 0 in row and not skip_unknown:
            raise Unanswerable(f"history {index}: unknown item {history[row.index(0)]!r}; skip_unknown leaves it out")
        if not row and not skip_unknown:
            raise Unanswerable(f"history {index} is empty: there is nothing to recommend from")
        return [item for item in row if item]

    def _describe(self, item: int, score: float) -> dict:
        title = self.titles[item - 1] if self.titles else None
        item_id = self.item_ids[item - 1]
        # A page's numbers are floats: it would send back another id. As text it is taken too.
        if isinstance(item_id, int) and abs(item_id) > 2**53:
            item_id = str(item_id)
        return {"item_id": item_id, "score": score, "title": title}


def _content_hash(vocabulary: dict) -> str:
    """What the package's `ItemVocabulary.content_hash` is."""
    return hashlib.sha256(json.dumps([vocabulary["item_ids"], vocabulary["texts"]]).encode()).hexdigest()


def _pad(rows: list[list[int]]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, items in zip(padded, rows, strict=True):
        row[: len(items)] = items
    return padded


class Request(BaseModel):
    """What `POST /recommend` takes; anything else is refused."""

    model_config = ConfigDict(extra="forbid")
    histories: list[list[StrictInt | str]] = Field(min_length=1, max_length=MOST_HISTORIES)
    k: int = Field(10, ge=1)
    filter_seen: bool = True
    skip_unknown: bool = False


class Item(BaseModel):
    """A recommended or a found item."""

    item_id: int | str
    title: str | None
    score: float | None = None


class Response(BaseModel):
    """What `POST /recommend` gives: a list per history, best first, shorter than `k` where fewer items are left,
    and empty for a history of which `skip_unknown` leaves nothing."""

    recommendations: list[list[Item]]


def build_app(recommender: ExportedRecommender) -> FastAPI:
    """The service."""
    app = FastAPI(title="Recommendations", description="Next items for histories of anybody.")

    # FastAPI's own answer repeats the request, which may hold what JSON cannot say.
    @app.exception_handler(RequestValidationError)
    def refuse(_, error: RequestValidationError) -> JSONResponse:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        text = "; ".join(problems).encode("ascii", "backslashreplace").decode()
        return JSONResponse({"detail": text}, status_code=422)

    # Plain functions: they run in threads, so that one request does not hold up another.
    @app.post("/recommend")
    def recommend(request: Request) -> Response:
        if request.k > recommender.most:
            raise HTTPException(422, f"k is {request.k}, and this model was exported for at most {recommender.most}")
        longest = max(map(len, request.histories))
        if longest > MOST_ITEMS:
            raise HTTPException(413, f"a history holds {longest} items; send the newest {MOST_ITEMS}")
        try:
            found = recommender.recommend(**request.model_dump())
        except Unanswerable as error:
            raise HTTPException(422, str(error)) from error
        return Response(recommendations=found)

    @app.get("/items")
    def items(query: str = "", limit: int = 8) -> list[Item]:
        return recommender.search(query, min(max(limit, 1), 100))

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok", "items": len(recommender.item_ids), "most_k": recommender.most}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "All requests are at <a href=docs>/docs</a>."

    return app


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port, a number below 65536")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Command line: a folder that cannot be served is one line and exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", required=True, type=Path, help="what export_onnx.py wrote")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 answers other machines too (%(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of one request (%(default)s)")
    options = parser.parse_args(argv)
    try:
        recommender = ExportedRecommender(options.folder, options.threads)
    except Exception as error:  # a missing or damaged file, in any of three libraries' words
        print(f"error: cannot serve {options.folder}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    uvicorn.run(build_app(recommender), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()

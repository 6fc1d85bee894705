# SPDX-License-Identifier: Apache-2.0
"""From a saved CRM to an HTTP service: exported by one script, served by the other."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from llmd4rec_hf import ItemVocabulary, SASRecConfig, SASRecModel


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve.py"
pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SASRecModel:
    model = SASRecModel(SASRecConfig(num_items=20, hidden_size=8, max_length=4))
    model.vocabulary = ItemVocabulary(list(range(100, 120)), [f"thing {n}" for n in range(100, 120)])
    model.save_pretrained(tmp_path_factory.mktemp("crm"))
    model.eval().name = str(tmp_path_factory.getbasetemp() / "crm0")
    return model


@pytest.fixture(scope="module")
def folder(model, load_script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    load_script("export_onnx").main(["--model", model.name, "--output_dir", str(folder), "--k", "15"])
    return folder


@pytest.fixture(scope="module")
def service(folder):
    """A function from path and body to status and answer. The process finds neither torch nor this package."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    block = "import sys, runpy; sys.modules.update(torch=None, transformers=None, llmd4rec_hf=None);"
    code = f"{block} runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code, "--folder", str(folder), "--port", str(port)])

    def ask(path: str, body=None, raw: bytes | None = None):
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read().decode()
                return answer.status, json.loads(content) if "json" in answer.headers["content-type"] else content
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "the service has died"
                time.sleep(0.1)
        yield ask
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_it_recommends_what_the_model_does(service, model, filter_seen):
    histories = [[101], [119, "103", 101, 110, 111, 100], [105, 105]]
    status, answer = service("/recommend", {"histories": histories, "k": 7, "filter_seen": filter_seen})
    expected = model.recommend([[int(item) for item in row] for row in histories], 7, filter_seen=filter_seen)
    assert status == 200
    for row, ids, scores in zip(answer["recommendations"], expected.ids, expected.scores, strict=True):
        assert [item["item_id"] for item in row] == ids
        assert [item["score"] for item in row] == pytest.approx(scores, abs=1e-5)
        assert row[0]["title"] == f"thing {ids[0]}"


def test_fewer_items_than_asked_for(service):
    status, answer = service("/recommend", {"histories": [list(range(100, 117))], "k": 15})
    assert status == 200
    assert sorted(item["item_id"] for item in answer["recommendations"][0]) == [117, 118, 119]


def test_unknown_items_can_be_skipped(service):
    asked = {"histories": [["x", 101]], "k": 3}
    assert service("/recommend", {**asked, "skip_unknown": True}) == service(
        "/recommend", {"histories": [[101]], "k": 3}
    )
    status, answer = service("/recommend", {"histories": [["x"], [101], []], "k": 3, "skip_unknown": True})
    assert status == 200
    assert [len(row) for row in answer["recommendations"]] == [0, 3, 0]
    assert service("/recommend", {"histories": [["x"]], "skip_unknown": True}) == (200, {"recommendations": [[]]})


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"histories": [[101], ["x"]]}, 422, "history 1: unknown item 'x'"),
        ({"histories": [[101], []]}, 422, "history 1 is empty"),
        ({"histories": []}, 422, "at least 1 item"),
        ({"histories": [[101]], "k": 16}, 422, "exported for at most 15"),
        ({"histories": [[101]], "k": 0}, 422, "greater than or equal to 1"),
        ({"histories": [[101]] * 257}, 422, "at most 256 items"),
        ({"histories": [[101] * 2001]}, 413, "send the newest 2000"),
        ({"histories": [[None]]}, 422, "valid"),
        ({"histories": [[True]]}, 422, "valid"),
        ({"histories": "101"}, 422, "valid list"),
        ({"history": [101]}, 422, "Field required"),
        ({"histories": [[101]], "n": 3}, 422, "Extra inputs"),
    ],
)
def test_bad_requests_are_told_why(service, body, status, message):
    found, answer = service("/recommend", body)
    assert found == status
    assert message in json.dumps(answer["detail"])


def test_other_bad_requests(service):
    assert service("/recommend", raw=b"not json")[0] == 422
    # What Python writes and JSON does not know, and half a character.
    assert service("/recommend", raw=b'{"histories": [[NaN]]}')[0] == 422
    assert service("/recommend", raw=b'{"histories": [[101]], "k": Infinity}')[0] == 422
    assert service("/recommend", raw=b'{"histories": [[101]], "\\ud800": 1}')[0] == 422
    assert service("/recommend")[0] == 405
    assert service("/nowhere")[0] == 404
    # And it still works.
    assert service("/health") == (200, {"status": "ok", "items": 20, "most_k": 15})


def test_the_page_and_its_search(service):
    status, page = service("/")
    assert status == 200 and "What comes next" in page
    found = service("/items?query=thing%20107&limit=3")[1]
    assert found == [{"item_id": 107, "title": "thing 107", "score": None}]


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def rewritten(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_vocabulary_that_is_not_the_graphs(load_script, copied, fails):
    for item_ids in (list(range(100, 119)), list(range(200, 220))):
        rewritten(copied / "vocabulary.json", item_ids=item_ids)
        message = "vocabulary.json is not the one that was exported with the graph: export both again"
        fails(load_script("serve").main, ["--folder", str(copied)], message)


def test_an_export_of_an_older_release(load_script, copied, fails):
    rewritten(copied / "export.json", format_version=1)
    fails(load_script("serve").main, ["--folder", str(copied)], "in format 2: export it again by export_onnx.py")


@pytest.mark.parametrize("damage", ["missing", "torn", "torch"])
def test_a_folder_that_cannot_be_served(load_script, copied, fails, damage):
    if damage == "missing":
        (copied / "vocabulary.json").unlink()
    elif damage == "torn":
        (copied / "recommender.onnx").write_bytes((copied / "recommender.onnx").read_bytes()[:1000])
    else:
        rewritten(copied / "export.json", format="torch")
    fails(load_script("serve").main, ["--folder", str(copied)], "cannot serve")


def test_export_to_torch_and_bad_input(model, load_script, make_llm, vocabulary, tmp_path, capsys, fails):
    main = load_script("export_onnx").main
    main(["--model", model.name, "--output_dir", str(tmp_path / "out"), "--format", "torch"])
    assert "differ from the model's by" in " ".join(capsys.readouterr().out.split())
    llm = make_llm()
    llm.vocabulary = vocabulary
    llm.save_pretrained(tmp_path / "llm")
    fails(main, ["--model", str(tmp_path / "llm"), "--output_dir", str(tmp_path / "x")], "deploy the CRM")
    fails(main, ["--model", model.name, "--output_dir", str(tmp_path / "x"), "--k", "0"], "k must be at least 1")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("export_onnx", ["--output_dir", "x", "--model", "x", "--check", "-1"], "'-1' is not a whole number"),
        ("serve", ["--folder", "x", "--port", "65536"], "'65536' is no port"),
        ("serve", ["--folder", "x", "--port", "http"], "'http' is no port"),
    ],
)
def test_numbers_that_cannot_be(load_script, capsys, name, words, message):
    with pytest.raises(SystemExit):
        load_script(name).main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "recommend", "compare", "export_onnx", "serve"])
def test_help_reads_well(load_script, name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as stop:
        load_script(name).main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"python examples/{name}.py" in printed
    assert len(printed.splitlines()) < 50

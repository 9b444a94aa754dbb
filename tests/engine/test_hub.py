"""Hub ids, against a small hub on 127.0.0.1: what is fetched of a repository, and what is not."""

import ast
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import tilewise
from tilewise import hub as tilewise_hub
from tilewise.cli import main
from tilewise.errors import CheckpointError, ConfigError
from tilewise.families import family_of
from tilewise.pretrained import inspect
from tilewise.text import train_tokenizer

ID = "me/tiny"
MAIN, NEXT = "1" * 40, "2" * 40  # commits
RAW = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAVED = {
    "config.json",
    "model.safetensors",
    "sha256.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Hub(ThreadingHTTPServer):
    """The part of the hub's protocol that huggingface_hub uses to read.

    root: holds the repositories. sent: {file: bytes of it that went out}. commits: asked of a file.
    head: the commit of main, which moves on once it was told when `moves` is set. Weights are sent
    by another address, as from a store of large files.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.head, self.moves, self.ranges = root, MAIN, False, True
        self.broken: set[str] = set()
        self.sent: dict[str, int] = {}
        self.commits: set[str] = set()
        self.calls, self.told_store = 0, False
        self.said_size: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def store(self) -> str:
        return f"http://localhost:{self.server_port}/store"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.calls += 1
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[0] == "api":
            self.api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "store":
            self.server.told_store |= "Authorization" in self.headers
            self.file(self.server.root / "/".join(parts[1:]))
        else:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def api(self, repository: str, rest: list[str]) -> None:
        folder = self.server.root / repository
        if not folder.is_dir():
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
            return
        commit = rest[1] if rest and rest[1] != "main" else self.server.head
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in paths]
        if rest[:1] == ["tree"]:
            pairs = zip(paths, names, strict=True)
            answer: Any = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
                for path, name in pairs
            ]
        else:
            answer = {
                "id": repository,
                "sha": commit,
                "siblings": [{"rfilename": n} for n in names],
            }
            self.server.head = NEXT if self.server.moves else commit
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def resolve(self, repository: str, commit: str, name: str) -> None:
        self.server.commits.add(commit)
        path = self.server.root / repository / name
        about = {"X-Repo-Commit": commit, "ETag": f'"{name}-{commit}"'.replace("/", "-")}
        if name in self.server.broken:
            self.reply(500, about)
        elif not path.is_file():
            self.reply(404, {"X-Error-Code": "EntryNotFound"} | about)
        elif name.endswith(".safetensors"):
            about["X-Linked-Etag"], about["X-Linked-Size"] = about["ETag"], str(path.stat().st_size)
            self.reply(302, about | {"Location": f"{self.server.store}/{repository}/{quote(name)}"})
        else:
            self.file(path, about)

    def file(self, path: Path, about: dict[str, str] | None = None) -> None:
        data, status, more = path.read_bytes(), 200, dict(about or {})
        wanted = self.headers.get("Range") if self.server.ranges else None
        if wanted:
            begin, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(begin) : int(last or len(data)) + 1]
            if not part:
                self.reply(416, more)
                return
            size = self.server.said_size or len(data)
            more["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{size}"
            data, status = part, 206
        try:
            self.reply(status, more, data)
        except ConnectionError:  # they have read enough
            return
        if self.command == "GET":
            name = str(path.relative_to(self.server.root / ID))
            self.server.sent[name] = self.server.sent.get(name, 0) + len(data)

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "hub" / ID).mkdir(parents=True)
    server = Hub(tmp_path / "hub")
    use_hub(monkeypatch, server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    assert not server.told_store  # the token


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def repository(hub: Hub) -> Path:
    """A tiny GPT-2 with a tokenizer on the hub."""
    family = family_of(RAW)
    torch.manual_seed(0)
    network = tilewise.build(family.config_from(RAW, set()))
    folder = hub.root / ID
    tilewise.Model(network, train_tokenizer(["hello hub"]), RAW).save(folder)
    return folder


def shard(folder: Path, *names: str) -> None:
    """Puts the weights into files of these names and an index."""
    tensors = load_file(folder / WEIGHTS)
    placed = {tensor: names[i % len(names)] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: v for t, v in tensors.items() if placed[t] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    (folder / WEIGHTS).unlink()


def clutter(folder: Path) -> None:
    """Files that lie in repositories and are never read."""
    weights = (folder / WEIGHTS).read_bytes() if (folder / WEIGHTS).exists() else b"0" * 9000
    for name in (
        "model.fp16.safetensors", "pytorch_model.bin", "README.md", "notes.txt", "results.json",
        "original/model.safetensors", "original/config.json", "onnx/tokenizer.json",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(weights)


def sizes(folder: Path, names: set[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def header_size(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def same_model(one: tilewise.Model, two: tilewise.Model) -> bool:
    ids = torch.tensor([[1, 5, 8, 20]])
    return one.config == two.config and torch.equal(one(ids).logits, two(ids).logits)


# ---- load --------------------------------------------------------------------------------------


def test_load_fetches_what_it_reads(hub: Hub, repository: Path) -> None:
    clutter(repository)
    (repository / "consolidated.safetensors").write_bytes((repository / WEIGHTS).read_bytes())
    shard_index = {"weight_map": {"x": "model-1.safetensors"}}  # open_weights takes the single file
    (repository / INDEX).write_text(json.dumps(shard_index))
    (repository / "generation_config.json").write_text('{"num_beams": 3}')
    (repository / "chat_template.jinja").write_text("{{ messages }}")
    model = tilewise.load(ID, verify=True)
    expected = sizes(repository, SAVED | {INDEX, "generation_config.json", "chat_template.jinja"})
    assert hub.sent == expected
    assert model.generation_defaults == {"num_beams": 3}
    assert same_model(model, tilewise.load(repository))
    assert model.tokenizer is not None and model.tokenizer.encode(["hub"])
    tilewise.load(ID)
    assert hub.sent == expected  # nothing twice


def test_an_index_beside_a_single_file_is_not_read(hub: Hub, repository: Path) -> None:
    (repository / INDEX).write_text("damaged")
    assert same_model(tilewise.load(ID), tilewise.load(repository))


def test_load_fetches_the_shards_of_the_index(hub: Hub, repository: Path) -> None:
    expected = tilewise.load(repository)
    names = ("model-00001-of-00002.safetensors", "odd [*]?.safetensors")
    shard(repository, *names)
    clutter(repository)
    (repository / "consolidated.safetensors").write_bytes(b"not these")
    (repository / "odd x.safetensors").write_bytes(b"nor these")
    assert same_model(tilewise.load(ID), expected)
    assert hub.sent == sizes(repository, (SAVED - {WEIGHTS}) | {INDEX, *names})


def test_load_fetches_consolidated_weights_where_there_are_no_others(
    hub: Hub, repository: Path
) -> None:
    expected = tilewise.load(repository)
    (repository / WEIGHTS).rename(repository / "consolidated.safetensors")
    clutter(repository)
    assert same_model(tilewise.load(ID), expected)
    names = (SAVED - {WEIGHTS}) | {"consolidated.safetensors"}
    assert hub.sent == sizes(repository, names)


def test_every_tokenizer_file_is_fetched() -> None:
    """The names of files in tilewise.text are those that hub.py lists."""
    texts = Path(tilewise_hub.__file__).parent / "text"
    words = {
        node.value
        for file in texts.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    endings = (".json", ".txt", ".model", ".spm", ".jinja")
    names = {word for word in words if word.endswith(endings) and " " not in word}
    assert len(names) > 10 and names <= set(tilewise_hub.SETTINGS)


def test_all_files_are_of_one_commit(hub: Hub, repository: Path) -> None:
    hub.moves = True
    shard(repository, "a.safetensors", "b.safetensors")
    inspect(ID)
    assert hub.commits == {MAIN} and hub.head == NEXT
    hub.commits.clear()
    tilewise.load(ID)
    assert hub.commits == {NEXT}


def test_no_weights_are_fetched_for_a_model_that_cannot_be_read(hub: Hub, repository: Path) -> None:
    (repository / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ConfigError, match="abacus"):
        tilewise.load(ID)
    assert WEIGHTS not in hub.sent


def test_a_flipped_bit_is_found(hub: Hub, repository: Path) -> None:
    data = bytearray((repository / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (repository / WEIGHTS).write_bytes(data)
    tilewise.load(ID)
    with pytest.raises(CheckpointError, match=f"not as they were saved.*{WEIGHTS}"):
        tilewise.load(ID, verify=True)


# ---- inspect -----------------------------------------------------------------------------------


def test_info_fetches_headers_alone(hub: Hub, repository: Path) -> None:
    clutter(repository)
    (repository / "consolidated.safetensors").write_bytes((repository / WEIGHTS).read_bytes())
    result = CliRunner().invoke(main, ["info", ID, "--json"])
    assert result.exit_code == 0, result.output
    config, tensors = inspect(repository)
    told = json.loads(result.stdout)
    assert told["tensors"] == len(tensors)
    assert told["config"] == json.loads(json.dumps(config.to_dict()))
    sent = sizes(repository, SAVED) | {WEIGHTS: header_size(repository / WEIGHTS)}
    assert hub.sent == sent
    assert sent[WEIGHTS] < (repository / WEIGHTS).stat().st_size / 4
    found = inspect(ID)
    assert found[0] == config
    assert {n: (i.dtype, i.shape, i.begin, i.end) for n, i in found[1].items()} == {
        n: (i.dtype, i.shape, i.begin, i.end) for n, i in tensors.items()
    }
    assert {str(info.file) for info in found[1].values()} == {f"{ID}/{WEIGHTS}"}


def test_inspect_reads_the_headers_of_shards(hub: Hub, repository: Path) -> None:
    expected = inspect(repository)
    names = {f"part{i}.safetensors" for i in range(5)}
    shard(repository, *sorted(names))
    config, tensors = inspect(ID)
    assert config == expected[0] and tensors.keys() == expected[1].keys()
    headers = {name: header_size(repository / name) for name in names}
    assert hub.sent == sizes(repository, (SAVED - {WEIGHTS}) | {INDEX}) | headers


def test_inspect_reads_a_consolidated_header(hub: Hub, repository: Path) -> None:
    (repository / WEIGHTS).rename(repository / "consolidated.safetensors")
    inspect(ID)
    size = header_size(repository / "consolidated.safetensors")
    assert hub.sent["consolidated.safetensors"] == size


def test_inspect_uses_weights_of_the_cache(hub: Hub, repository: Path) -> None:
    for names in ((), ("a.safetensors", "b.safetensors")):
        if names:
            shard(repository, *names)
            hub.head = NEXT
        tilewise.load(ID)
        sent = dict(hub.sent)
        config, tensors = inspect(ID)
        assert (config, tensors.keys()) == (inspect(repository)[0], inspect(repository)[1].keys())
        assert hub.sent == sent


def test_inspect_hangs_up_on_a_hub_without_ranges(hub: Hub, repository: Path) -> None:
    hub.ranges = False
    tensors = load_file(repository / WEIGHTS) | {"more": torch.zeros(2**23)}
    save_file(tensors, repository / WEIGHTS)
    assert inspect(ID)[1].keys() == tensors.keys()
    assert WEIGHTS not in hub.sent  # never to its end


def test_inspect_has_the_configuration_of_load(hub: Hub, repository: Path) -> None:
    """A head of its own in the file of a tied model counts, wherever the weights can be read."""
    tensors = load_file(repository / WEIGHTS)
    embedding = next(v for n, v in tensors.items() if n.endswith("wte.weight"))
    for head, ties in ((embedding.clone(), True), (embedding + 1, False)):
        save_file(tensors | {"lm_head.weight": head}, repository / WEIGHTS)
        if ties:
            loaded, inspected = tilewise.load(repository).config, inspect(repository)[0]
        else:
            with pytest.warns(UserWarning, match="lm_head.weight.*differs") as told:
                loaded, inspected = tilewise.load(repository).config, inspect(repository)[0]
            assert {warning.filename for warning in told} == {__file__}
        assert loaded == inspected and loaded.tie_embeddings is ties
    assert inspect(ID)[0].tie_embeddings is True  # config.json's word
    with pytest.warns(UserWarning, match="differs"):
        tilewise.load(ID)
        assert inspect(ID)[0].tie_embeddings is False


# ---- what goes wrong ---------------------------------------------------------------------------


def refused(match: str, source: str = ID) -> None:
    """Both load and inspect say so, in one error."""
    for function in (inspect, tilewise.load):
        with pytest.raises(CheckpointError, match=match) as caught:
            function(source)
        assert "safetensors library" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "../x.safetensors", "a/b.safetensors", "*", "x.bin", 5])
def test_an_index_that_names_no_file(hub: Hub, repository: Path, name: Any) -> None:
    shard(repository, "a.safetensors")
    (repository / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    refused("not a file name of this folder|only .safetensors files are read")
    assert not any(file.endswith((".safetensors", ".bin")) for file in hub.sent)


@pytest.mark.parametrize("name", ["*.safetensors", "[a].safetensors", "gone.safetensors"])
def test_an_index_whose_file_is_missing(hub: Hub, repository: Path, name: str) -> None:
    shard(repository, "a.safetensors")
    (repository / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    refused("missing")
    assert "a.safetensors" not in hub.sent  # a name is no pattern


def test_an_index_that_contradicts_its_files(hub: Hub, repository: Path) -> None:
    shard(repository, "a.safetensors", "b.safetensors")
    placed = json.loads((repository / INDEX).read_text())["weight_map"]
    moved = placed | {name: "b.safetensors" for name in list(placed)[:1]}
    (repository / INDEX).write_text(json.dumps({"weight_map": moved}))
    refused("is damaged: (it holds|the index promises)")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (2**60).to_bytes(8, "little") + b"{}" * 20,
        (99).to_bytes(8, "little") + b"{}" * 20,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}and more",
        (16).to_bytes(8, "little") + b'{"a":1,"a":2}   ',
    ],
)
def test_a_damaged_header(hub: Hub, repository: Path, data: bytes) -> None:
    (repository / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{ID}/{WEIGHTS}"):
        inspect(ID)
    with pytest.raises(CheckpointError, match="is damaged"):
        tilewise.load(ID)


def test_a_header_cut_short_or_of_another_size(hub: Hub, repository: Path) -> None:
    for said in ("*", "-1", "1e9", "9" * 4000, "100", str(2**50)):
        hub.said_size = said
        with pytest.raises(CheckpointError, match=f"{ID}/{WEIGHTS} is damaged"):
            inspect(ID)


def test_a_repository_without_weights(hub: Hub, repository: Path) -> None:
    (repository / WEIGHTS).unlink()
    refused(f"^{ID} has no {WEIGHTS} and no {INDEX}: is it a checkpoint")
    (repository / "pytorch_model.bin").write_bytes(b"pickle")
    hub.head = NEXT
    refused(f"only 'pytorch_model.bin'.*never read here(.|\n)*{ID}")
    assert "pytorch_model.bin" not in hub.sent


def test_a_repository_without_a_config(hub: Hub, repository: Path) -> None:
    (repository / "config.json").unlink()
    refused("has no config.json")
    assert WEIGHTS not in hub.sent


def test_a_repository_of_other_files_alone(hub: Hub, repository: Path) -> None:
    for file in list(repository.iterdir()):
        file.unlink()
    (repository / "model.gguf").write_bytes(b"GGUF")
    refused(f"^{ID} has no config.json: is it a checkpoint")
    assert not hub.sent


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"null", b"[]", b"{}", b'{"id": "me/tiny"}', b"[" * 100_000]
)
def test_an_answer_that_is_not_a_hubs(
    hub: Hub, repository: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "api", lambda self, *_: self.reply(200, {}, answer))
    refused(f"^{ID}")


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    refused("me/nothing is no folder here, and the hub gave none: .*Not Found", "me/nothing")


def test_a_hub_that_fails(hub: Hub, repository: Path) -> None:
    hub.broken = {WEIGHTS}
    refused(f"{ID}: the hub did not .*weights.*500")
    shard(repository, "a.safetensors")
    hub.broken, hub.head = {"a.safetensors"}, NEXT
    with pytest.raises(CheckpointError, match="a.safetensors: the hub did not give.*500"):
        inspect(ID)


# ---- without a network -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "shards", "consolidated"])
@pytest.mark.parametrize("how", ["offline", "offline, files of unknown number", "unreachable"])
def test_a_second_load_without_a_network(
    hub: Hub, repository: Path, kind: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if kind == "shards":
        shard(repository, "a.safetensors", "b.safetensors")
    if kind == "consolidated":
        (repository / WEIGHTS).rename(repository / "consolidated.safetensors")
    model = tilewise.load(ID)
    calls = hub.calls
    if how.startswith("offline, "):  # as when others filled the cache, file by file
        shutil.rmtree(tmp_path / "cache/models--me--tiny/trees", ignore_errors=True)
    if how.startswith("offline"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        use_hub(monkeypatch, "http://127.0.0.1:9")
    assert same_model(tilewise.load(ID), model)
    assert inspect(ID)[0] == model.config
    assert hub.calls == calls


def test_headers_of_weights_that_are_not_cached_need_a_network(
    hub: Hub, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect(ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("(?i)offline")
    refused("the hub gave none", "me/other")

"""The command line as a user meets it: processes, exit codes, streams, JSON.

Each process that imports torch takes seconds, so one run is asked for several things.
"""

import dataclasses
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import tilewise
from tilewise.cli import main
from tilewise.config import ModelConfig
from tilewise.generation.options import DEFAULT_NEW_TOKENS, GenerationOptions
from tilewise.text import train_tokenizer
from tilewise_kernels.bench_cases import CASES

TEXTS = ["half past three", "two hundred and six", "the first of May"]
JAPANESE = "\u5e74\u6708\u65e5\u5348\u5f8c\u6642\u5206"
MAIN = "from tilewise.cli import main; main(prog_name='tilewise')"


def process(*arguments: str, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        capture_output=True, timeout=120, env=environment, **more,
    )  # fmt: skip


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def one_json(stdout: str):
    """The document, after making sure that there is nothing else."""
    return json.loads(stdout)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained Seq2Seq that answers in Japanese characters."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([*TEXTS, JAPANESE])
    config = ModelConfig(
        model_type="tilewise-transformer", vocab_size=tokenizer.vocab_size, hidden_size=16,
        num_heads=2, ffn_size=32, encoder_layers=1, decoder_layers=1, max_positions=64,
        norm_position="post", final_norm=False, positions="sinusoidal", scale_embedding=True,
        pad_token_id=0, eos_token_id=(2,), decoder_start_token_id=1,
    )  # fmt: skip
    network = tilewise.build(config)
    with torch.no_grad():
        network.decoder.lm_head.weight[-len(JAPANESE) :] *= 3  # prefer the last tokens
    path = tmp_path_factory.mktemp("models") / "seq2seq"
    tilewise.Model(network, tokenizer).save(path)
    return path


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS)
    config = ModelConfig(
        model_type="gpt2", vocab_size=tokenizer.vocab_size, hidden_size=16, num_heads=2,
        ffn_size=32, decoder_layers=1, max_positions=64, activation="gelu_tanh",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "gpt2"
    tilewise.Model(tilewise.build(config), tokenizer).save(path)
    return path


# -- help and usage ------------------------------------------------------------------------------


COMMANDS = ("info", "bench", "generate", "translate", "score", "embed", "fill-mask", "convert")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_does_not_import_torch(command: list[str]) -> None:
    """That is what keeps it under a second: torch alone takes longer than that."""
    code = f"""
import sys
from tilewise.cli import main
try:
    main([*{command!r}, "--help"])
finally:
    heavy = sorted({{"torch", "numpy", "tokenizers"}} & set(sys.modules))
    print("imported:", heavy, file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0 and "Usage:" in done.stdout
    assert done.stderr.strip() == "imported: []"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command"),
        (["bench", "convolution"], "is not one of 'softmax', 'attention'"),
        (["bench", "attention", "--shape", "2x8x512"], "attention takes BxHxSqxSkxD"),
        (["bench", "softmax", "--shape", "0x4"], "...xN"),
        (["bench", "layer_norm", "--causal"], "layer_norm has no option causal"),
        (["bench", "attention", "--shape", "1x8x4x4x8", "--heads-kv", "3"], "must divide"),
        (["bench", "--shape", "8x8"], "need an OP"),
        (["bench", "decode_attention", "--direction", "both"], "without gradients"),
        (["bench", "softmax", "--device", "tpu"], "pass cpu, cuda"),
        (["bench", "softmax", "--shape", "99999999x99999999"], "beyond any memory"),
        (["generate", "hello"], "Missing option '--model'"),
        (["generate", "--model", "x", "--num-beams", "0", "hello"], "--num-beams"),
        (["translate", "--file", "/no/such/file"], "does not exist"),
        (["translate", "--file", "-", "and a text"], "not both"),
    ],
)
def test_wrong_usage_exits_2_and_says_why(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split()) and done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "./no/such/folder", "hello"], "./no/such/folder"),
        (["bench", "softmax", "--shape", "4x4", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_our_errors_exit_1_in_one_line(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


# -- translate and generate ----------------------------------------------------------------------


def test_translate_answers_in_order_from_every_source(folder: Path, tmp_path: Path) -> None:
    model = tilewise.load(folder)
    expected = model.generate(TEXTS, num_beams=4, max_new_tokens=8).texts
    common = ("translate", "--model", str(folder), "--max-new-tokens", "8", "--device", "cpu")
    lines = "\n".join(TEXTS) + "\n"
    file = tmp_path / "texts.txt"
    file.write_text(lines, encoding="utf-8")
    for done in (
        run(*common, *TEXTS),
        run(*common, "--batch-size", "1", "--file", str(file)),
        run(*common, "--file", "-", stdin=lines),
        run(*common, stdin=lines),
    ):
        assert done.exit_code == 0 and done.stderr == ""
        assert done.stdout.splitlines() == expected


def test_translate_n_best_prints_scores_best_first(folder: Path) -> None:
    done = run("translate", "--model", str(folder), "--n-best", "6", "--max-new-tokens", "5",
               "--device", "cpu", TEXTS[0])  # fmt: skip
    scores = [float(line.split("\t")[0]) for line in done.stdout.splitlines()]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)


def test_blank_lines_stay_where_they_are(folder: Path) -> None:
    common = ("translate", "--model", str(folder), "--max-new-tokens", "4", "--device", "cpu")
    done = run(*common, stdin=f"{TEXTS[0]}\r\n\n{TEXTS[1]}")
    lines = done.stdout.split("\n")
    assert len(lines) == 4 and lines[1] == "" and lines[0] and lines[2]


def test_json_is_one_document_with_consistent_numbers(folder: Path) -> None:
    done = run("translate", "--json", "--model", str(folder), "--n-best", "2",
               "--length-penalty", "0.5", "--max-new-tokens", "6", "--device", "cpu",
               stdin=f"{TEXTS[0]}\n\n{TEXTS[1]}\n")  # fmt: skip
    document = one_json(done.stdout)
    assert [entry["input"] for entry in document] == [TEXTS[0], "", TEXTS[1]]
    assert [len(entry["outputs"]) for entry in document] == [2, 0, 2]
    for entry in document:
        for output in entry["outputs"]:
            assert len(output["ids"]) == len(output["token_log_probs"]) > 0
            mean = sum(output["token_log_probs"]) / len(output["ids"]) ** 0.5
            assert output["score"] == pytest.approx(mean, abs=1e-4)


def test_generate_continues_a_prompt(decoder_folder: Path) -> None:
    model = tilewise.load(decoder_folder)
    expected = model.generate(TEXTS, num_beams=2, max_new_tokens=5, num_return_sequences=2).texts
    common = ("generate", "--model", str(decoder_folder), "--num-beams", "2", "--device", "cpu",
              "--num-return-sequences", "2", "--max-new-tokens", "5")  # fmt: skip
    assert run(*common, *TEXTS).stdout.splitlines() == expected
    document = one_json(run(*common, "--json", *TEXTS).stdout)
    assert [o["text"] for entry in document for o in entry["outputs"]] == expected
    assert all(len(o["ids"]) == 5 for entry in document for o in entry["outputs"])


@pytest.mark.parametrize("command", ["generate", "translate"])
def test_help_shows_the_defaults_there_are(command: str) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    assert "given are the model's own (generation_config.json), else as shown" in text
    ours = {field.name: field.default for field in dataclasses.fields(GenerationOptions)}
    ours |= {"max_new_tokens": DEFAULT_NEW_TOKENS, "num_beams": 1 if command == "generate" else 4}
    checked = []
    for option in main.commands[command].params:
        shown = re.search(r"\[default: ([^],]*)", getattr(option, "help", None) or "")
        if option.name in ours and shown:
            assert shown[1] == str(ours[option.name]).lower()
            checked.append(option.name)
    assert len(checked) == (8 if command == "generate" else 7)


def test_defaults_are_the_models_own(folder: Path, decoder_folder: Path, tmp_path: Path) -> None:
    own = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "min_new_tokens": 5,
           "length_penalty": 0.3}  # fmt: skip
    for command, source in (("generate", decoder_folder), ("translate", folder)):
        copy = shutil.copytree(source, tmp_path / command)
        (copy / "generation_config.json").write_text(json.dumps(own))
        beams = {"num_beams": 4, "num_return_sequences": 1} if command == "translate" else {}
        expected = tilewise.load(source).generate(TEXTS, **own | beams)
        document = one_json(run(command, "--model", str(copy), "--json", *TEXTS).stdout)
        found = [output for entry in document for output in entry["outputs"]]
        assert [output["text"] for output in found] == expected.texts
        assert all(len(output["ids"]) == 5 for output in found)
        scores = expected.sequences_scores.tolist()
        assert [output["score"] for output in found] == pytest.approx(scores, abs=1e-5)


def test_translate_wants_a_sequence_to_sequence_model(decoder_folder: Path) -> None:
    done = run("translate", "--model", str(decoder_folder), "hello")
    assert done.exit_code == 1 and "use tilewise generate" in done.stderr


def test_more_beams_than_tokens_is_refused(folder: Path) -> None:
    done = run("translate", "--model", str(folder), "--num-beams", "999", TEXTS[0])
    assert done.exit_code == 1 and "num_beams" in done.stderr and "999" in done.stderr


def test_bytes_that_are_not_utf8_are_refused(folder: Path) -> None:
    done = run("translate", "--model", str(folder), stdin=b"caf\xe9\n")
    assert done.exit_code == 1 and "not UTF-8 text (byte 3)" in done.stderr


# -- streams -------------------------------------------------------------------------------------


def test_japanese_survives_an_ascii_locale(folder: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ("translate", "--model", str(folder), "--n-best", "4", "--max-new-tokens", "12")
    done = process(*arguments, TEXTS[2], env=ascii_only)
    assert done.returncode == 0 and done.stderr == b""
    assert any(char in JAPANESE for char in done.stdout.decode("utf-8"))


def test_what_an_encoding_lacks_is_escaped(folder: Path) -> None:
    arguments = ("translate", "--model", str(folder), "--n-best", "4", "--max-new-tokens", "12")
    western = CliRunner(charset="latin-1")
    plain = western.invoke(main, [*arguments, TEXTS[2]])
    assert plain.exit_code == 0 and re.search(r"\\u[0-9a-f]{4}", plain.stdout)
    document = one_json(western.invoke(main, [*arguments, "--json", TEXTS[2]]).stdout)
    assert any(char in JAPANESE for o in document[0]["outputs"] for char in o["text"])


def test_a_reader_that_leaves_is_no_traceback(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MAIN, "translate", "--model", str(folder), *TEXTS]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(timeout=60) == 1
    child.stderr.close()


def test_a_full_disk_is_one_line(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MAIN, "translate", "--model", str(folder), TEXTS[0]]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, timeout=60, env=environment
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_traceback(folder: Path, closed: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    texts = [] if closed == "0<&-" else [TEXTS[0]]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", MAIN,
         "translate", "--model", str(folder), *texts],
        capture_output=True, timeout=60, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert (done.stdout != b"") == (closed == "2>&-")


def test_interruption_exits_130(tmp_path: Path) -> None:
    """Ctrl-C while it reads: opening the pipe for writing waits until it has opened it too."""
    pipe = tmp_path / "texts"
    os.mkfifo(pipe)
    catching = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + MAIN
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", catching, "translate", "--file", str(pipe)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    with open(pipe, "wb"):
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert stdout == b"" and b"Traceback" not in stderr


def on_terminal(*arguments: str, stdout: int | None) -> tuple[str, str]:
    """(what a terminal of 80 columns gets, stdout): stderr goes there, None: stdout too."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TQDM_MININTERVAL": "0"}
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stdin=subprocess.DEVNULL,
        stdout=follower if stdout is None else stdout, stderr=follower, env=environment,
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            part = os.read(leader, 4096)
        except OSError:  # Linux's end of a terminal
            break
        if not part:
            break
        seen += part
    os.close(leader)
    out = b"" if child.stdout is None else child.stdout.read()
    assert child.wait(timeout=60) == 0
    return seen.decode(), out.decode()


def visible(raw: str) -> list[str]:
    """The lines that stay on a terminal, where what follows a carriage return overwrites."""
    lines = []
    for line in raw.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_progress_counts_texts_on_a_terminal(decoder_folder: Path) -> None:
    arguments = ("score", "--model", str(decoder_folder), "--device", "cpu", *TEXTS)
    plain = run(*arguments)
    assert re.fullmatch(r"perplexity [\d.]+ of 3 texts\n", plain.stderr)
    seen, out = on_terminal(*arguments, stdout=subprocess.PIPE)
    counts = [int(count) for count in re.findall(r"\r(\d+)text \[", seen)]
    assert list(dict.fromkeys(counts)) == [0, 1, 2, 3]
    assert visible(seen) == [plain.stderr.strip(), ""]
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS


def test_progress_and_results_on_one_terminal(folder: Path) -> None:
    arguments = ("translate", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "8",
                 "--num-beams", "4", *TEXTS)  # fmt: skip
    seen, _ = on_terminal(*arguments, stdout=None)
    assert re.findall(r" 1/3 \[", seen) and re.findall(r" 3/3 \[", seen)
    assert visible(seen) == [*run(*arguments).stdout.splitlines(), ""]


# -- info and bench ------------------------------------------------------------------------------


def test_info_names_what_every_op_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # as a user runs it
    document = one_json(run("info", "--json").stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert document["cpu"]["threads"] == torch.get_num_threads()
    assert (document["native"]["missing"] is None) == bool(document["native"]["build"])
    on_cpu = {(op["op"], op["dtype"]): op for op in document["ops"] if op["device"] == "cpu"}
    assert {op for op, _ in on_cpu} == set(CASES)
    assert on_cpu["attention", "float32"]["implementation"] == "native"
    assert "cpu" in on_cpu["attention", "float32"]["others"]["triton"]
    text = run("info").stdout
    assert all(op in text for op in CASES) and torch.__version__ in text


def test_bench_prints_a_table_and_the_same_as_json(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot = tmp_path / "plot.svg"
    arguments = ("bench", "softmax", "--shape", "4x64x64", "--mask", "--no-compile",
                 "--time-budget", "0.05", "--device", "cpu")  # fmt: skip
    text = run(*arguments).stdout
    assert text.startswith("softmax 4x64x64 float32 mask") and text.count("=> ") == 3
    done = run(*arguments, "--json", "--plot", str(plot))
    document = one_json(done.stdout)
    (result,) = document["results"]
    assert result["shape"] == [4, 64, 64] and result["options"]["mask"] is True
    assert result["roof"]["bandwidth"] > 0 and set(result["verdicts"]) == {
        "forward", "backward", "both",
    }  # fmt: skip
    ran = [row["ran"] for row in result["rows"] if row["chosen"]]
    assert len(ran) == 1 and f"; {ran[0]} really ran" in text
    assert plot.read_bytes().lstrip().startswith(b"<?xml")


@pytest.mark.parametrize(("name", "words"), [("x.xyz", "must end in"), ("no/x.png", "no folder")])
def test_a_plot_that_cannot_be_written_is_refused_before_measuring(
    monkeypatch, tmp_path: Path, name: str, words: str
) -> None:
    monkeypatch.setattr(sys.modules["tilewise.cli.bench"], "_need_matplotlib", lambda: None)
    done = run("bench", "softmax", "--plot", str(tmp_path / name))
    assert done.exit_code == 2 and words in " ".join(done.stderr.split()) and done.stdout == ""


def test_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("bench", "softmax", "--shape", "4x4", "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 1 and "pip install 'tilewise[bench]'" in done.stderr

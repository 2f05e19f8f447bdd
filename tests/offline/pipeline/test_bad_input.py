"""Bad input to ``resq quantize``: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offline import cli
from offline.pack import writer
from offline.pipeline import workfolder

Flags = Callable[..., list[str]]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Run the command, check that it fails cleanly, and return its sentence."""

    def run(arguments: list[str]) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        monkeypatch.setattr("sys.argv", ["resq", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resq: ")]
        assert len(lines) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return lines[0]

    return run


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unsupported_architecture(model_copy: Path, flags: Flags, refused: Callable[[list[str]], str]) -> None:
    edit_config(model_copy, architectures=["BertModel"], model_type="bert")
    sentence = refused(flags(model_copy))
    assert "BertModel" in sentence
    assert "LlamaForCausalLM" in sentence


def test_missing_shard(model_copy: Path, flags: Flags, refused: Callable[[list[str]], str]) -> None:
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(model_copy / "model.safetensors"), "model-1.safetensors"),
    }
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_copy / "model.safetensors").unlink()
    assert "model-1.safetensors" in refused(flags(model_copy))


def test_truncated_shard(model_copy: Path, flags: Flags, refused: Callable[[list[str]], str]) -> None:
    shard = model_copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    sentence = refused(flags(model_copy))
    assert "model.safetensors" in sentence
    assert "truncated" in sentence


def test_nan_weight_is_named(model_copy: Path, flags: Flags, refused: Callable[[list[str]], str]) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    assert name in refused(flags(model_copy))


def test_nan_in_lm_head_is_named_before_calibration(
    model_copy: Path, flags: Flags, refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(model_copy, tie_word_embeddings=False)
    tensors = load_file(model_copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("offline.pipeline.run.collect_moments", None)
    assert "lm_head.weight" in refused(flags(model_copy))


def test_wrong_shape_is_named(model_copy: Path, flags: Flags, refused: Callable[[list[str]], str]) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    assert name in refused(flags(model_copy))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_calibration_set(
    name: str, tiny_model: Path, flags: Flags, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("\n")
    assert name in refused(flags(tiny_model, "--dataset", str(tmp_path / name)))


def test_fewer_calibration_tokens_than_the_hidden_size(
    tiny_model: Path, flags: Flags, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("def f(x):\n    return x\n")
    sentence = refused(flags(tiny_model, "--dataset", str(tmp_path / "short.txt")))
    assert "hidden size 64" in sentence


def test_unreachable_hub_dataset(
    tiny_model: Path, flags: Flags, refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert "wikitext2" in refused(flags(tiny_model, "--dataset", "wikitext2"))


def test_output_folder_exists(
    tiny_model: Path, flags: Flags, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(flags(tiny_model))


@pytest.mark.parametrize("wrapped", [False, True], ids=["oserror", "safetensors"])
@pytest.mark.parametrize("module", [workfolder, writer], ids=["work folder", "checkpoint"])
def test_full_disk(
    module: object,
    wrapped: bool,
    tiny_model: Path,
    flags: Flags,
    refused: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        if wrapped:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    assert "no space left" in refused(flags(tiny_model))


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--low-bits", "2"], "--low-bits 2: no kernel serves 2-bit weights; give 4 or 8, or measure"),
        (["--low-bits", "5"], "--low-bits"),
        (["--high-bits", "16"], "--high-bits"),
        (["--kv-bits", "5"], "--kv-bits"),
        (["--kv-bits", "four"], "--kv-bits"),
        (["--kv-bits", "4,4"], "--kv-bits lists 2 layers, but the model has 3"),
        (["--high-fraction", "0.9"], "--high-fraction"),
        (["--ignore-layers", "model.layers.9"], "matches no linear layer"),
        (["--ignore-layers", "model.layers.0.self_attn.q_proj"], "fused layer"),
        (["--max-tp", "7"], "max-tp"),
        (["--lm-head-bits", "6"], "--lm-head-bits"),
        (["--lm-head-bits", "8", "--ignore-layers", "lm_head"], "--lm-head-bits 8 and --ignore-layers lm_head"),
        (["--lm-head-bits", "4", "--ignore-layers", "lm_head"], "--lm-head-bits 4 and --ignore-layers lm_head"),
        (["--lm-head-bits", "4", "--method", "lqer"], "--lm-head-bits 4 belongs to --method resq"),
    ],
)
def test_unsupported_flag_value(
    extra: list[str], word: str, tiny_model: Path, flags: Flags, refused: Callable[[list[str]], str]
) -> None:
    assert word in refused(flags(tiny_model, *extra))


def test_model_that_is_no_folder(flags: Flags, refused: Callable[[list[str]], str], tmp_path: Path) -> None:
    assert "no such folder" in refused(flags(tmp_path / "absent"))


def test_already_quantized_model(model_copy: Path, flags: Flags, refused: Callable[[list[str]], str]) -> None:
    edit_config(model_copy, quantization_config={"quant_method": "awq"})
    assert "already quantized (awq)" in refused(flags(model_copy))

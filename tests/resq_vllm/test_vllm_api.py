"""What the plugin assumes of each vLLM symbol. A failure here names what a new vLLM release has changed."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from vllm.config import CompilationConfig

from resq_vllm import vllm_api
from resq_vllm.errors import ResQError


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(vllm_api.SYMBOLS))
def test_symbol_exists(name: str) -> None:
    assert getattr(vllm_api, name) is not None


def test_quantization_config_hooks() -> None:
    base = vllm_api.QuantizationConfig
    assert base.__abstractmethods__ == {
        "get_name",
        "get_supported_act_dtypes",
        "get_min_capability",
        "get_config_filenames",
        "from_config",
        "get_quant_method",
    }
    assert parameters(base.get_quant_method) == ["self", "layer", "prefix"]
    assert parameters(base.maybe_update_config)[:3] == ["self", "model_name", "hf_config"]
    assert parameters(base.apply_vllm_mapper) == ["self", "hf_to_vllm_mapper"]
    assert ".k_scale" in base._ignore_unexpected_suffixes


def test_linear_method_contract() -> None:
    base = vllm_api.LinearMethodBase
    assert base.__abstractmethods__ == {"create_weights", "apply"}
    assert parameters(base.create_weights) == [
        "self",
        "layer",
        "input_size_per_partition",
        "output_partition_sizes",
        "input_size",
        "output_size",
        "params_dtype",
        "extra_weight_attrs",
    ]
    assert parameters(base.apply) == ["self", "layer", "x", "bias"]


def test_compile_options_of_the_model_reach_inductor() -> None:
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    # Read when the model has been built, so after create_weights of its layers.
    source = inspect.getsource(TorchCompileWithNoGuardsWrapper.__init__)
    assert "options = vllm_config.compilation_config.inductor_compile_config" in source
    assert "options=options" in source


def test_linear_base_keeps_its_prefix_for_error_messages() -> None:
    assert "self.prefix = prefix" in inspect.getsource(vllm_api.LinearBase.__init__)


def test_lm_head_contract() -> None:
    head = vllm_api.ParallelLMHead
    assert parameters(head.weight_loader) == ["self", "param", "loaded_weight"]
    made = inspect.getsource(head.__mro__[1].__init__)
    assert "self.prefix = prefix" in made
    assert "weight_loader=self.weight_loader" in made
    assert "self.input_size = self.input_size_per_partition = embedding_dim" in made


def test_unquantized_head_contract() -> None:
    method = vllm_api.UnquantizedEmbeddingMethod
    assert parameters(method.apply) == ["self", "layer", "x", "bias"]
    assert parameters(method.process_weights_after_loading) == ["self", "layer"]
    # All that it does with loaded weights is to have the CPU's product re-lay a copy, which ours goes without.
    source = inspect.getsource(method.process_weights_after_loading)
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=False)" in source
    assert source.count("\n") <= 6
    embedding = vllm_api.VocabParallelEmbedding
    assert issubclass(vllm_api.ParallelLMHead, embedding)
    assert "resolve_quant_method(quant_config, self, prefix=prefix)" in inspect.getsource(embedding.__init__)
    assert "layer.weight = embed_tokens.weight" in inspect.getsource(method.tie_weights)


def test_logits_processor_asks_the_method() -> None:
    import vllm.model_executor.layers.logits_processor as logits_processor

    source = inspect.getsource(logits_processor.LogitsProcessor)
    assert "lm_head.quant_method.apply(" in source
    assert "logits[..., : self.org_vocab_size]" in source
    # vLLM's code for the head of a --quantization method reads no weight of it where dtypes agree.
    assert source.index("lm_head.quant_method.apply(") < source.index("lm_head.weight")


def test_parameter_classes_take_dims_and_a_loader() -> None:
    assert issubclass(vllm_api.ModelWeightParameter, vllm_api.ChannelQuantScaleParameter.__mro__[1])
    for cls in (vllm_api.ModelWeightParameter, vllm_api.ChannelQuantScaleParameter):
        for loader in ("load_column_parallel_weight", "load_row_parallel_weight", "load_qkv_weight"):
            assert callable(getattr(cls, loader))


def test_attention_attributes_that_the_kv_method_reads() -> None:
    source = inspect.getsource(vllm_api.Attention.__init__)
    before_kv_method = source[: source.index("_init_kv_cache_quant(self")]
    for attribute in (
        "attn_backend",
        "impl",
        "backend",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "sliding_window",
        "has_sink",
        "use_mm_prefix",
        "attn_type",
        "kv_cache_dtype",
        "kv_cache_torch_dtype",
        "kv_sharing_target_layer_name",
        "layer_name",
    ):
        assert f"self.{attribute} =" in before_kv_method or f"self.{attribute}:" in before_kv_method, attribute


def test_attention_asks_the_swapped_backend_for_its_page() -> None:
    assert "return self.attn_backend" in inspect.getsource(vllm_api.Attention.get_attn_backend)
    assert parameters(vllm_api.AttentionBackend.customize_spec) == ["spec"]
    assert {"state_content_bytes", "dtype", "block_size"} <= {f.name for f in fields(vllm_api.AttentionSpec)}


def test_attention_backend_contract() -> None:
    base = vllm_api.AttentionBackend
    assert base.__abstractmethods__ == {"get_name", "get_impl_cls", "get_builder_cls"}
    assert parameters(base.get_supported_kernel_block_sizes) == ["kv_cache_spec"]
    assert vllm_api.KVCacheLayout.LBHNC is not None
    assert vllm_api.MultipleOf(16).base == 16
    assert vllm_api.AttentionBackendEnum.CUSTOM is not None


def test_metadata_builder_contract() -> None:
    base = vllm_api.AttentionMetadataBuilder
    assert parameters(base.__init__) == ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"]
    assert parameters(base.build) == ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]
    assert {
        "query_start_loc",
        "seq_lens",
        "num_actual_tokens",
        "block_table_tensor",
        "slot_mapping",
        "causal",
    } <= {f.name for f in fields(vllm_api.CommonAttentionMetadata)}


def test_cuda_graph_contract() -> None:
    base, support = vllm_api.AttentionMetadataBuilder, vllm_api.AttentionCGSupport
    assert parameters(base.get_cudagraph_support) == ["vllm_config", "kv_cache_spec"]
    assert support.ALWAYS.value > support.UNIFORM_BATCH.value > support.NEVER.value
    # A capture builds as every step does, from what it is given.
    assert parameters(base.build_for_cudagraph_capture) == ["self", "common_attn_metadata"]
    assert "self.build(" in inspect.getsource(base.build_for_cudagraph_capture)
    assert parameters(base._init_reorder_batch_threshold)[:3] == [
        "self",
        "reorder_batch_threshold",
        "supports_spec_as_decode",
    ]
    assert base.reorder_batch_threshold is None
    assert parameters(vllm_api.split_decodes_and_prefills)[:2] == ["common_attn_metadata", "decode_threshold"]
    assert {"num_reqs", "max_query_len", "max_seq_len"} <= {f.name for f in fields(vllm_api.CommonAttentionMetadata)}


def test_both_runners_capture_with_the_longest_context() -> None:
    from vllm.v1.worker.gpu.model_states import default
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for source, condition in (
        (inspect.getsource(GPUModelRunner._build_attention_metadata), "if for_cudagraph_capture:"),
        (inspect.getsource(default), "if for_capture:"),
    ):
        branch = source[source.index(condition) :]
        assert "max_seq_len = self.max_model_len" in branch[: branch.index("else:")]


def test_both_runners_ask_the_backend_for_layout_and_page() -> None:
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import attn_utils

    for module in (gpu_model_runner, attn_utils):
        source = inspect.getsource(module)
        assert "cache_config.get_resolved_kv_cache_layout()" in source
        assert "customize_attention_spec(" in source
    assert parameters(vllm_api.AttentionBackend.get_preferred_block_size) == ["default_block_size"]


def test_compiler_pass_contract() -> None:
    """resq_vllm.fusion_gpu: where a pass is handed in, and what of the graph it may rely on."""
    import vllm.ir.ops  # noqa: F401  (registers them)
    from vllm.compilation import backends
    from vllm.compilation.passes import pass_manager
    from vllm.model_executor.layers.activation import SiluAndMul

    assert {"mode", "inductor_compile_config"} <= {f.name for f in fields(CompilationConfig)}
    assert vllm_api.CompilationMode.VLLM_COMPILE > vllm_api.CompilationMode.NONE
    assert vllm_api.current_platform.pass_key == "post_grad_custom_post_pass"
    assert {"uuid", "hash_source"} <= set(dir(vllm_api.InductorPass))
    added = inspect.getsource(backends.VllmBackend.configure_post_pass)
    assert "self.pass_manager.add(" in added
    assert "self.inductor_config = deepcopy(" in inspect.getsource(backends.VllmBackend.__init__)
    # The pass runs before RMSNorm's op is lowered, and what it leaves behind is cleaned up.
    order = inspect.getsource(pass_manager.PostGradPassManager.__call__)
    assert order.index("pass_(graph)") < order.index("self.ir_lowering(graph)") < order.index("fix_functionalization")
    assert str(torch.ops.vllm_ir.rms_norm.default._schema).startswith(
        "vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor"
    )
    assert str(torch.ops.vllm_ir.fused_add_rms_norm.default._schema).startswith(
        "vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, "
        "SymInt? variance_size=None) -> (Tensor, Tensor)"
    )
    assert "F.silu(x[..., :d]) * x[..., d:]" in inspect.getsource(SiluAndMul.forward_native)


def test_platform_questions() -> None:
    for name in ("is_cpu", "is_cuda", "get_device_name", "get_device_capability"):
        assert callable(getattr(vllm_api.current_platform, name))
    from vllm.platforms.interface import DeviceCapability

    assert (DeviceCapability(9, 0).major, DeviceCapability(9, 0).minor) == (9, 0)


def test_settings_that_the_packed_cache_refuses() -> None:
    from vllm.config import ModelConfig, ParallelConfig, SchedulerConfig

    names = {f.name for f in fields(ParallelConfig)}
    assert {"decode_context_parallel_size", "prefill_context_parallel_size"} <= names
    assert isinstance(ModelConfig.rswa_window, property)
    assert "max_num_seqs" in {f.name for f in fields(SchedulerConfig)}


def test_attention_impl_contract() -> None:
    base = vllm_api.AttentionImpl
    assert parameters(base.forward) == [
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ]
    import vllm.model_executor.layers.attention.attention as attention

    # A backend that packs in forward() is not asked to before.
    assert "not self.attn_backend.forward_includes_kv_cache_update" in inspect.getsource(attention.Attention.forward)


def test_kv_cache_method_contract() -> None:
    assert parameters(vllm_api.BaseKVCacheMethod.create_weights) == ["self", "layer"]


def test_small_functions() -> None:
    assert parameters(vllm_api.set_weight_attrs) == ["weight", "weight_attrs"]
    assert vllm_api.extract_layer_index("model.layers.7.self_attn.attn") == 7
    assert parameters(vllm_api.get_layers_from_vllm_config)[:2] == ["vllm_config", "layer_type"]
    assert vllm_api.current_platform.is_cpu()
    assert not vllm_api.current_platform.is_cuda()
    assert vllm_api.AttentionType.DECODER == "decoder"
    assert {"quant_config", "load_config", "cache_config"} <= {f.name for f in fields(vllm_api.VllmConfig)}
    for function in (vllm_api.get_tensor_model_parallel_rank, vllm_api.get_tensor_model_parallel_world_size):
        assert parameters(function) == []
    assert parameters(vllm_api.get_current_vllm_config) == []


def test_installed_version_is_a_tested_one(caplog: pytest.LogCaptureFixture) -> None:
    assert vllm_api.vllm_version().startswith(vllm_api.TESTED_VERSIONS)
    with caplog.at_level(logging.WARNING):
        vllm_api.check_version()
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0+cpu", "dev"])
def test_other_version_warns_once(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    lines: list[str] = []
    monkeypatch.setattr(vllm_api, "log_once", lambda level, message: lines.append(message))
    monkeypatch.setattr(vllm_api, "vllm_version", lambda: version)
    vllm_api.check_version()
    assert len(lines) == 1
    assert version in lines[0]
    assert "0.32 and 0.33" in lines[0]


def test_unknown_symbol_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = vllm_api.Nonsense


def test_symbol_that_vllm_moved_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vllm_api.SYMBOLS, "Moved", "vllm.config")
    with pytest.raises(ResQError, match=r"vLLM .* has no vllm.config.Moved, which resq-vllm needs: install vLLM 0.32"):
        _ = vllm_api.Moved
    monkeypatch.setitem(vllm_api.SYMBOLS, "Moved", "vllm.no_such_module")
    with pytest.raises(ResQError, match=r"has no vllm.no_such_module"):
        _ = vllm_api.Moved


def test_missing_vllm_is_one_sentence() -> None:
    code = (
        "import sys\n"
        "class NoVllm:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vllm':\n"
        "            raise ModuleNotFoundError('No module named vllm', name='vllm')\n"
        "sys.meta_path.insert(0, NoVllm())\n"
        "from resq_vllm.errors import ResQError\n"
        "try:\n"
        "    import resq_vllm.plugin\n"
        "except ResQError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vLLM is not installed: install vLLM 0.32 or 0.33" in done.stdout


def test_attention_by_name_as_the_decoder_op_calls_it() -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    found = inspect.getsource(vllm_api.get_attention_context)
    assert "return attn_metadata, attn_layer, kv_cache, layer_slot_mapping" in found
    op = vllm_api.unified_attention_with_output
    assert parameters(op)[:5] == ["query", "key", "value", "output", "layer_name"]
    assert "_resolve_layer_name(layer_name)" in inspect.getsource(op)  # a plain name will do
    # With torch before 2.11 names are strings.
    name = _encode_layer_name("a.b")
    assert isinstance(name, vllm_api.LayerNameType)
    assert (name if isinstance(name, str) else name.value) == "a.b"


def test_kv_connectors_are_served_layer_by_layer_in_the_attention_op() -> None:
    from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer

    assert "has_kv_transfer_group()" in inspect.getsource(maybe_transfer_kv_layer)
    assert vllm_api.has_kv_transfer_group() is False


def test_rotary_embedding_turns_halves_by_a_cache_of_cosines_and_sines() -> None:
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    names = ["positions", "query", "key", "head_size", "rotary_dim", "cos_sin_cache", "is_neox_style"]
    assert parameters(RotaryEmbedding.forward_static) == names

"""What `make test` leaves to `make test-all`: whole files, and tests, by the seconds that `--durations=0` gave them.

They take two thirds of the time: children with transformers or torch.compile to start, processes that talk to each
other, compilers, gradcheck of everything. Each op and module has other tests, which stay.
"""

FILES = (
    "test_build.py",
    "test_cuda_sass.py",
    "test_examples.py",
    "test_nf4_distributed.py",
    "test_nf4_gemm_sass.py",
    "test_peft_suite.py",
    "test_peft_training.py",
    "test_transformers_distributed.py",
    "test_triton_compile.py",
)
TESTS = {
    "test_benchmarks.py": (
        "test_bench_of_a_shape_that_a_peer_cannot_run",
        "test_quick_run_records_what_the_figures_depend_on",
    ),
    "test_benchmarks_backends.py": ("test_the_command_goes_on_where_it_stopped",),
    "test_bnb_backend.py": (
        "test_a_peftkern_that_cannot_be_imported_does_no_harm",
        "test_an_unknown_bitsandbytes_is_left_alone",
        "test_it_can_be_turned_off",
        "test_other_settings_are_refused",
    ),
    "test_cli_compare.py": (
        "test_a_process_says_why_it_failed",
        "test_digits_keep_the_old_task",
        "test_each_method_in_its_own_process",
    ),
    "test_docs.py": ("test_python_runs",),
    "test_isa.py": ("test_symbols",),
    "test_lora_qkv.py": ("test_reference_gradients",),
    "test_methods.py": ("test_compiles_without_graph_breaks",),
    "test_nf4_gemm_host.py": ("test_cmake_tells_the_kernels_what_is_compiled", "test_kernels", "test_lanes"),
    "test_nf4_linear.py": ("test_accuracy_of_inputs_with_a_mean",),
    "test_peft_accelerate.py": ("test_compiles_without_a_graph_break",),
    "test_peft_layers.py": ("test_the_plugin_counts",),
    "test_peft_wider.py": (
        "test_each_of_several_adapters_has_a_mask_of_its_own",
        "test_no_more_graph_breaks_than_peft_s",
    ),
    "test_prefix_attention.py": ("test_no_prefix_and_rows_that_see_nothing", "test_reference_gradients"),
    "test_prompt_tuning.py": ("test_generation_is_peft_s",),
    "test_transformers_quantizer.py": ("test_without_bitsandbytes",),
    "test_triton.py": ("test_interpreted",),
}


def is_slow(file: str, test: str) -> bool:
    """Whether a test function of a file of tests/ is left out; `test` without its parameters."""
    return file in FILES or test in TESTS.get(file, ())

"""Reading, overriding and checking configs, and the page generated from them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from dash_megatron.config import Config, ConfigError, config_from_dict, load_config
from dash_megatron.config.section import section_of
from docs.tools.configuration import render_reference

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "run_dir": "run",
    "model": {"layers": 4, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96},
    "data": {"seq_length": 128},
    "training": {"steps": 100, "global_batch": 8},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def test_overrides_apply_in_order_and_read_as_yaml(path: Path) -> None:
    config = load_config(
        path,
        ["optimizer.lr=3e-4", "data.train=[a, 0.3 b]", "optimizer.lr=1e-4", "attention.full_layers=[0,3]"],
    )
    assert config.optimizer.lr == 1e-4
    assert config.data.train == ("a", "0.3 b")
    assert config.attention.full_layers == (0, 3)


def test_a_section_that_is_null_is_filled_by_overrides(path: Path) -> None:
    path.write_text(yaml.safe_dump({**MINIMAL, "logging": {"wandb": None}, "optimizer": None}))
    config = load_config(path, ["logging.wandb.project=p", "optimizer.lr=1e-4"])
    assert config.logging.wandb is not None
    assert (config.logging.wandb.project, config.optimizer.lr) == ("p", 1e-4)
    with pytest.raises(ConfigError, match=r"optimizer=None must be a section, such as optimizer\.lr=\.\.\."):
        load_config(path)


def test_a_file_may_merge_sections_but_not_name_one_twice(path: Path) -> None:
    text = path.read_text()
    path.write_text(f"{text}optimizer: &o {{<<: {{lr: 1.0, grad_clip: 2.0}}, lr: 3.0}}\n")
    optimizer = load_config(path).optimizer
    assert (optimizer.lr, optimizer.grad_clip) == (3.0, 2.0)
    path.write_text(f"{text}training: {{steps: 5, global_batch: 2}}\n")
    with pytest.raises(
        ConfigError, match=r"(?s)--config .*the key 'training' stands twice.*line \d+, column 1"
    ):
        load_config(path)


def test_what_yaml_takes_for_a_date_or_a_number_of_base_8_is_what_it_says(path: Path) -> None:
    config = load_config(path, ["run_dir=2024-01-31", "training.steps=0100", "model.vocab_size=0x200"])
    assert (config.run_dir, config.training.steps, config.model.vocab_size) == ("2024-01-31", 100, 512)


def test_what_python_cannot_read_of_valid_yaml_is_an_error_of_the_config(path: Path) -> None:
    for value in ("1" * 5000, "[" * 3000):
        with pytest.raises(ConfigError, match="the value is not valid YAML"):
            load_config(path, [f"training.steps={value}"])


def test_configs_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(pydantic.ValidationError):
        config.optimizer.lr = 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layerss=3", "model.layerss=3 is not a known key; did you mean model.layers?"),
        ("model={on: 3}", "model has the key True, which is not text and not a known key"),
        ("training.lr=3", "did you mean optimizer.lr?"),
        ("modle.layers=3", "did you mean model?"),
        ("seed=3", "did you mean training.seed?"),
        ("training.gradient_clip=1", "did you mean optimizer.grad_clip?"),
        ("parallel.tensor_parallel=2", "did you mean parallel.tensor?"),
        ("training.data.train=[x]", "did you mean data?"),
        # what a run has no key for is no reason to guess one
        (
            "parallel.data=2",
            "parallel.data=2 is not a known key; the keys of parallel are tensor, sequence, context, context_comm; see",
        ),
        ("training.warmup=3", "the keys of training are steps, global_batch, micro_batch, precision, seed"),
        (
            "typo=3",
            "typo=3 is not a known key; the keys of the top level are run_dir, model, attention, data,",
        ),
        ("model.layers=three", "model.layers='three'"),
        ("data.train=/data/web", "data.train='/data/web' must be a list: write data.train=[/data/web]"),
        ("data.train=", "data.train=None must be a list: write data.train=[...]"),
        ("evaluation.tasks=needle,copy", "must be a list: write evaluation.tasks=[needle,copy]"),
        (
            "model.kv_heads=3",
            "model.heads=4 must be a multiple of model.kv_heads=3; 4 = 1 x 3 + 1; try model.kv_heads=2",
        ),
        ("model.hidden_size=66", "model.hidden_size=66 must be a multiple of model.heads=4"),
        ("model.head_dim=15", "model.head_dim=15 must be even: RoPE rotates pairs; try model.head_dim=16"),
        ("model.hidden_size=60", "model.head_dim=15 = model.hidden_size=60 / model.heads=4 must be even"),
        ("attention.alpha=1.0", "attention.alpha=1.0"),
        ("attention.chunk_size=48", "attention.chunk_size=48"),
        ("attention.kind=sparse", "attention.kind='sparse'"),
        ("attention.sigma=.inf", "attention.sigma"),
        ("attention.full_layers=[4]", "names layer 4, but model.layers=4: layers are counted from 0 to 3"),
        (
            "attention.scaling_factor=[1.0, 2.0]",
            "attention.scaling_factor lists 2 numbers and must list model.layers=4",
        ),
        ("attention.local_chunks=-1", "attention.local_chunks=-1"),
        ("training.seed=4294967296", "training.seed=4294967296: Input should be less than 4294967296"),
        ("model.layers=1000000000", "model.layers=1000000000: Input should be less than 65536"),
        ("data.seq_length=99999999999999999999", "Input should be less than 2147483648"),
        ("attention.query_pool=0", "attention.query_pool=0"),
        ("attention.length_scaling=0.3", "attention.length_scaling=0.3 was taken out"),
        ("attention.query_pool=129", "attention.query_pool=129"),
        ("attention.scaling_factor=0", "attention.scaling_factor=0.0 must be above 0"),
        ("attention.scaling_factor=[1, 1, -1, 1]", "must be above 0"),
        ("attention.scaling_factor=big", "attention.scaling_factor='big'"),
        ("model.rope_scaling={rope_type: dynamic}", "model.rope_scaling.rope_type='dynamic'"),
        ("model.rope_scaling={rope_type: linear}", "model.rope_scaling: rope_type=linear needs ['factor']"),
        (
            "model.rope_scaling={rope_type: linear, factor: 2, truncate: true}",
            "rope_type=linear does not use ['truncate']; remove",
        ),
        (
            "model.rope_scaling={rope_type: longrope, original_max_position_embeddings: 9, factor: 2, "
            "short_factor: [1.0], long_factor: [1.0]}",
            "model.rope_scaling.short_factor has 1 numbers and must have model.head_dim / 2 = 8",
        ),
        (
            "schedule.warmup_steps=101",
            "schedule.warmup_steps=101 must not exceed training.steps=100; shorten it",
        ),
        (
            "schedule={kind: wsd, warmup_steps: 50, decay_steps: 51}",
            "schedule.warmup_steps=50 + schedule.decay_steps=51 = 101 must not exceed training.steps=100; shorten them",
        ),
        ("evaluation.every=5", "evaluation.every=5 needs data.valid, which is empty"),
        ("data.seq_length_curriculum={10: 128}", "must say which length the run begins with, at step 0"),
        ("data.seq_length_curriculum={}", "must say which length the run begins with, at step 0"),
        ("data.seq_length_curriculum={0: 48, 9: 128}", "48 must divide data.seq_length=128"),
        ("data.seq_length_curriculum={0: 256, 9: 128}", "256 must divide data.seq_length=128"),
        ("data.seq_length_curriculum={0: 0, 9: 128}", "0 must divide data.seq_length=128"),
        (
            "data.seq_length_curriculum={0: 32, 9: 128}",
            "32 must be a multiple of attention.chunk_size=64, so that no cut shortens a chunk, such as {0: 64, 10: 128}",
        ),
        ("data.seq_length_curriculum={0: 128, 9: 64}", "must end with data.seq_length=128"),
        ("data.seq_length_curriculum={0: 64, 100: 128}", "at step 100, but training.steps=100"),
        ("data.seq_length_curriculum={first: 64}", "data.seq_length_curriculum.first"),
        (
            "evaluation.tasks=[copy, niah]",
            "evaluation.tasks=['copy', 'niah'] names niah; the known ones are needle, ",
        ),
        ("evaluation.tasks_every=5", "evaluation.tasks_every=5 needs evaluation.tasks, which is empty"),
        (
            "evaluation={tasks: [copy], tasks_every: 5}",
            "evaluation.tasks_every=5 needs data.valid, which is empty; name a validation set or set evaluation.tasks_every=0",
        ),
        ("evaluation.task_lengths=[128, 129]", "129 must be at least 2 and at most data.seq_length=128"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas=(0.9, 1.0) must both lie in [0, 1)"),
        ("zero.options={stage: 2}", "zero.options={'stage': 2} must not set ['stage']"),
        (
            "zero.options={zero_quantized_gradients: true}",
            "must not set ['zero_quantized_gradients']: DeepSpeed's kernel reads every gradient as float16, and here they are "
            "float32 or bfloat16; remove it",
        ),
        ("zero.stage=4", "zero.stage=4"),
        ("optimizer.lr", "override 'optimizer.lr' must read section.key=value"),
        ("run_dir.x=1", "run_dir is a value, not a section"),
        (
            "logging.wandb=true",
            "logging.wandb=True must be a section, such as logging.wandb.project=NAME; its keys are project, entity",
        ),
        (
            "attention.nsa=[1]",
            "attention.nsa=[1] must be a section, such as attention.nsa.kernel_size=...; its keys are kernel_size",
        ),
        ("attention.nsa.windw=64", "did you mean attention.nsa.window?"),
        ("zero.options=[1]", "zero.options=[1] must be a mapping; write zero.options={overlap_comm: true}"),
        (
            "data.seq_length_curriculum={0: x}",
            "data.seq_length_curriculum[0]='x' must be a whole number, written in digits; write "
            "data.seq_length_curriculum={0: 2048, 1000: 8192}",
        ),
        ("optimizer.betas=0.9", "optimizer.betas=0.9 must be a list; write optimizer.betas=[0.9, 0.95]"),
        ("optimizer.betas=[1]", "optimizer.betas=[1] has too few entries; write optimizer.betas=[0.9, 0.95]"),
        (
            "run_dir=2024",
            "run_dir=2024 must be text: write '2024', and on the command line \"'2024'\"",
        ),
        ("run_dir=~/run", "run_dir=~/run begins with ~, which only a shell expands; write it out"),
        ("run_dir=$SCRATCH/run", "run_dir=$SCRATCH/run begins with $, which only a shell expands"),
        ("run_dir=''", "run_dir='': String should have at least 1 character"),
        ("model.layers=true", "model.layers=True: Input should be a whole number, not true"),
        ("model.vocab_size=yes", "model.vocab_size=True: Input should be a whole number, not true"),
        ("zero.stage=on", "zero.stage=True: Input should be a whole number, not true"),
        (
            "attention.full_layers=[0, off]",
            "full_layers=[0, False]: Input should be a whole number, not false",
        ),
        ("data.seq_length_curriculum={off: 64, 9: 128}", "Input should be a whole number, not false"),
        ("optimizer.lr=true", "optimizer.lr=True: Input should be a number, not true"),
        ("optimizer.betas=[0.9, no]", "optimizer.betas=[0.9, False]: Input should be a number, not false"),
        (
            "attention.target_density={0: [true, 1, 1, 1]}",
            "attention.target_density={0: [True, 1, 1, 1]}: Input should be a number, not true",
        ),
        ("faults.loss_spike=false", "faults.loss_spike=False: Input should be a number, not false"),
        ("training.steps=1:30", "training.steps='1:30' must be a whole number, written in digits"),
        ("training.steps=16K", "training.steps='16K' must be a whole number, written in digits"),
        ("training.steps=9999999999", "training.steps=9999999999: Input should be less than 2147483648"),
        ("model={layers: 2, layers: 3}", "the key 'layers' stands twice, and the first would be lost"),
        ("data.train=[[a]]", "data.train[0]=['a'] must be text"),
    ],
)
def test_a_wrong_setting_names_field_value_and_rule(override: str, message: str, path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["{0: 1.0, 5: [x]}", "[x]", "x"])
def test_a_value_of_none_of_several_types_is_told_once_with_how_to_write_each(value: str, path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"attention.target_density={value}"])
    assert str(error.value) == (
        f"attention.target_density={yaml.safe_load(value)!r} is of a wrong type; write attention.target_density=0.25 or "
        "attention.target_density=[0.25, 0.5, ...] or attention.target_density={0: 1.0, 2000: 0.25}; "
        "see docs/configuration.md"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logging.profile_steps=[0, 1]"], "[0, 1] must be the first and the last of at most 20 steps"),
        (["logging.profile_steps=[3, 2]"], "[3, 2] must be the first and the last of at most 20 steps"),
        (["logging.profile_steps=[1, 21]"], "such as [5, 6]"),
        (["training.steps=8", "logging.profile_steps=[9, 11]"], "must end by training.steps=8; try [6, 8]"),
        (["parallel.tensor=4"], "model.kv_heads=2 must be a multiple of parallel.tensor=4"),
        (
            ["parallel.tensor=2", "model.ffn_hidden_size=97"],
            "model.ffn_hidden_size=97 must be a multiple of parallel.tensor=2: each process holds as many columns; "
            "try parallel.tensor=1",
        ),
        (["parallel.tensor=2", "model.vocab_size=97"], "model.vocab_size=97 must be a multiple"),
        (["parallel.sequence=true"], "parallel.sequence=true needs parallel.tensor > 1"),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "data.seq_length=127"],
            "data.seq_length=127 must be a multiple of 2 (parallel.context=1 x parallel.tensor=2) with "
            "parallel.sequence; try 126",
        ),
        (
            ["parallel.context=2"],
            "data.seq_length=128 must be a multiple of 256 (2 x parallel.context=2 x attention.chunk_size=64)",
        ),
        (
            ["parallel.context=2", "parallel.tensor=2", "parallel.context_comm=a2a", "data.seq_length=256"],
            "model.kv_heads=2 / parallel.tensor=2 = 1 must be a multiple of parallel.context=2",
        ),
        (
            [
                "parallel.context=2",
                "parallel.context_comm=sparse",
                "attention.kind=full",
                "data.seq_length=256",
            ],
            "parallel.context_comm=sparse with parallel.context=2 must be a2a: the other exchanges serve DashAttention "
            "alone, but attention.kind=full",
        ),
        (
            ["parallel.context=2", "attention.full_layers=[1]", "data.seq_length=256"],
            "attention.full_layers=[1] need all keys of a sequence on one process; use parallel.context_comm=a2a",
        ),
        (
            ["parallel.context=4", "parallel.context_comm=a2a", "attention.kind=full", "data.seq_length=512"],
            "which deals out whole kv heads; use parallel.context=2",
        ),
        (["parallel.tensor=2", "zero.stage=0"], "zero.stage=0 must be 1, 2 or 3 with parallel.tensor=2"),
        (
            ["parallel.tensor=2", "zero.stage=3", "zero.options={zero_hpz_partition_size: 2}"],
            "must not set ['zero_hpz_partition_size'] with parallel.tensor=2",
        ),
    ],
)
def test_a_wrong_layout_names_field_value_and_rule(overrides: list[str], message: str, path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert message in str(error.value)


def test_a_density_below_what_is_always_on_is_an_error_that_says_what_fits(path: Path) -> None:
    # of 32 chunks, 5 tokens' chunks see 1 to 5, and 27 see their own, the 4 before, and one selected
    always = (1 + 2 + 3 + 4 + 5 + 27 * 6) / (32 * 33 / 2)
    known = ["data.seq_length=2048", "attention.local_chunks=4"]
    for target in (
        f"{always - 1e-3}",
        f"[1.0, 1.0, {always - 1e-3}, 1.0]",
        f"{{0: 1.0, 9: {always - 1e-3}}}",
    ):
        with pytest.raises(
            ConfigError, match=r"at least 0\.3353 with attention\.local_chunks=4.*local_chunks=3"
        ):
            load_config(path, [*known, f"attention.target_density={target}"])
    assert (
        load_config(path, [*known, f"attention.target_density={always + 1e-3}"]).attention.local_chunks == 4
    )
    with pytest.raises(ConfigError, match=r"must be at least 0\.3353 .* one that is selected; ask for more$"):
        load_config(path, [*known, "attention.target_density=0.01"])  # as no number of them makes it fit
    # the least that a message names is accepted
    assert load_config(path, [*known, "attention.target_density=0.3353"]).attention.target_density == 0.3353
    # at once, however many chunks there are
    many = ["data.seq_length=2147483647", "attention.local_chunks=20000000"]
    with pytest.raises(ConfigError, match=r"use attention\.local_chunks=1721900$"):
        load_config(path, [*many, "attention.target_density=0.1"])
    # layers that share a budget may divide it otherwise
    shared = ["attention.density_budget=model", f"attention.target_density=[0.01, 1.0, 1.0, {always}]"]
    assert load_config(path, [*known, *shared]).attention.density_budget == "model"
    # a layer that does not route has no target to reach
    full = ["attention.full_layers=[1]", f"attention.target_density=[{always}, 0.01, 1.0, 1.0]"]
    assert load_config(path, [*known, *full]).attention.full_layers == (1,)
    # without local chunks, no target that was accepted before is refused
    assert load_config(path, ["attention.target_density=0.01"]).attention.target_density == 0.01


def test_processes_that_share_a_model_are_one_data_parallel_rank(path: Path) -> None:
    split = ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "data.seq_length=256"]
    config = load_config(path, split)
    assert [config.data_parallel_size(world_size) for world_size in (4, 8)] == [1, 2]
    assert config.accumulation_steps(8) == 4
    told = r"x parallel.context=2 = 4 must divide the 6 .* lower parallel.tensor or parallel.context$"
    with pytest.raises(ValueError, match=told):
        config.accumulation_steps(6)


def test_a_missing_key_and_a_missing_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"training is missing and has no default; set it in the YAML or as training=value; see docs",
    ):
        config_from_dict({name: value for name, value in MINIMAL.items() if name != "training"})
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(tmp_path / "list.yaml")


def test_a_global_batch_that_does_not_split_states_the_arithmetic(path: Path) -> None:
    config = load_config(path, ["training.micro_batch=2"])
    assert [config.accumulation_steps(world_size) for world_size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        ValueError, match=r"global_batch=8 must be a multiple of 6 = .*micro_batch=2 x 3 .*; try 6"
    ):
        config.accumulation_steps(3)


def test_lengths_hold_from_their_step_on(path: Path) -> None:
    data = load_config(path, ["data.seq_length_curriculum={7: 128, 0: 64}"]).data
    assert [data.context_length_at(step) for step in (0, 6, 7, 99)] == [64, 64, 128, 128]
    assert load_config(path).data.context_length_at(0) == 128
    # full attention has no chunks
    load_config(path, ["data.seq_length_curriculum={0: 2, 9: 128}", "attention.kind=full"])


def test_the_resolved_config_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(
        path,
        [
            "attention.full_layers=[1]",
            "zero.options={overlap_comm: false}",
            "data.seq_length_curriculum={0: 64, 9: 128}",
        ],
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(resolved) == config


def test_the_quickstart_is_fine_tuned_with_the_shape_of_its_weights() -> None:
    base, tuned = (
        load_config(ROOT / "configs" / f"{name}.yaml") for name in ("quickstart", "finetune_quickstart")
    )
    assert tuned.training.init_from == base.run_dir
    # conversations are so short that a target would be out of reach: the factors stay where the base's went
    factors = {"target_density": None, "scaling_factor": tuned.attention.scaling_factor}
    assert (tuned.model, tuned.attention) == (base.model, base.attention.model_copy(update=factors))
    assert (tuned.data.tokenizer, tuned.data.seq_length) == (base.data.tokenizer, base.data.seq_length)


def test_every_field_has_a_docstring() -> None:
    for name, field in Config.model_fields.items():
        section = field.annotation
        fields = getattr(section, "model_fields", {name: field})
        assert all(inner.description for inner in fields.values()), name


def keys_below(section: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_of(field)
        yield from [prefix + name] if inner is None else keys_below(inner, f"{prefix}{name}.")


def test_every_key_has_one_line_of_evidence() -> None:
    page = (ROOT / "docs" / "configuration-evidence.md").read_text()
    listed = re.findall(r"^\| `([\w.]+)` \| \S.*\|$", page, re.MULTILINE)
    assert listed == list(dict.fromkeys(listed))
    assert set(listed) == set(keys_below(Config)), (
        "docs/configuration-evidence.md lacks keys, or lists unknown ones"
    )


def test_the_configuration_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == render_reference(), "run `make docs`"

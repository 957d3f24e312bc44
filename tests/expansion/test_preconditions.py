"""What cannot be expanded in place is refused with a remedy, and whatever fails leaves the model as it was."""

import random
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

import statex
from common import EXPANDED, base_type, logits, make_gla, make_mamba2, mixer, tokens
from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM, GLAModel
from statex.models.mamba2 import StatexMamba2ForCausalLM

MAKERS = {"gla": make_gla, "mamba2": make_mamba2}
TARGETS = {"statex_gla": ["q_proj"], "mamba2": ["in_proj"]}


def adapters(model):
    return LoraConfig(target_modules=TARGETS[base_type(model)])


def with_adapters(model):
    return get_peft_model(model, adapters(model)), "adapters"


def inside_peft(model):
    get_peft_model(model, adapters(model))
    return model, "adapters"


def add_adapter(model):
    inject_adapter_in_model(adapters(model), model)  # what the method of that name does, with any version of PEFT
    return model, "adapters"


def compiled(model):
    return torch.compile(model), "compile"


def compiled_in_place(model):
    model.compile()
    return model, "compile"


def a_compiled_layer(model):
    model.get_submodule(layers_of(model))[1].compile()
    return model, "compile"


def layers_of(model):
    return f"{model.base_model_prefix}.layers"


def quantised(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model, "quantise"


def integers(model):
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight, dtype=torch.int8), requires_grad=False)
    return model, "quantise"


def data_parallel(model):
    return nn.DataParallel(model), "wrap"


def partly_on_meta(model):
    model.get_submodule(layers_of(model))[1].to("meta")
    return model, "load it onto one device"


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")
    return model, "load it onto one device"


def parametrised(model):
    nn.utils.parametrizations.weight_norm(mixer(model).get_submodule(TARGETS[base_type(model)][0]))
    return model, "from_pretrained"


def another_mixer(model):
    mixer(model).__class__ = type("MyMixer", (type(mixer(model)),), {"__module__": "my_package"})
    return model, "mixer of your own"


def base_model(model):
    return model.base_model, "AutoModelForCausalLM"


def around(model):
    return nn.Sequential(model), "before anything is wrapped around it"


MADE_OTHERWISE = [
    with_adapters, inside_peft, add_adapter, compiled, compiled_in_place, a_compiled_layer, quantised, integers,
    data_parallel, partly_on_meta, offloaded, parametrised, another_mixer, base_model, around,
]  # fmt: skip


def everything(model):
    """Each module with its class, and each tensor, by name and identity; and what the configuration says."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    tensors = {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
    return modules, tensors, id(model.config), type(model.config), model.config.to_dict()


def assert_refused(model, wrapped, remedy):
    before = everything(model)
    for change in (lambda: statex.expand(wrapped, every=1, factor=2), lambda: statex.reinitialize(wrapped, [EXPANDED])):
        with pytest.raises(statex.UserError, match=remedy):
            change()
        assert everything(model) == before


@pytest.mark.parametrize("make_otherwise", MADE_OTHERWISE, ids=lambda one: one.__name__)
@pytest.mark.parametrize("family", MAKERS)
def test_a_model_that_cannot_be_changed_in_place_is_refused(family, make_otherwise):
    model = MAKERS[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped, remedy = make_otherwise(model)
    assert_refused(model, wrapped, remedy)


@pytest.fixture
def process_group(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def distributed_data_parallel(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def fully_sharded(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize("wrap", [distributed_data_parallel, sharded, fully_sharded], ids=lambda one: one.__name__)
@pytest.mark.parametrize("family", MAKERS)
def test_a_model_in_parallel_training_is_refused(family, wrap, process_group):
    model = MAKERS[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = wrap(model)
    assert_refused(model, wrapped, "as from_pretrained gives it, then")


class OwnMamba2(Mamba2ForCausalLM):
    """A user's class that transformers' own does not know of."""


def test_a_subclass_that_cannot_hold_a_plan_is_refused():
    model = OwnMamba2(make_mamba2().config)
    assert_refused(model, model, "derive your class from .*StatexMamba2ForCausalLM")


class OwnStatexMamba2(StatexMamba2ForCausalLM):
    """A user's class that can."""

    def twice(self, ids):
        return 2 * logits(self, ids)


class OwnGLA(GLAForCausalLM):
    """Likewise."""

    def twice(self, ids):
        return 2 * logits(self, ids)


def own_mamba2():
    return OwnStatexMamba2(StatexMamba2Config(**make_mamba2().config.to_diff_dict() | {"model_type": "statex_mamba2"}))


def own_gla():
    return OwnGLA(make_gla().config)


@pytest.mark.parametrize("make", [own_mamba2, own_gla])
def test_a_subclass_that_can_hold_a_plan_keeps_its_class(make, tmp_path):
    model = make().eval()
    own = type(model)
    statex.expand(model, layers=[EXPANDED], factor=2, init="inherit")
    assert type(model) is own
    model.save_pretrained(tmp_path)
    loaded = own.from_pretrained(tmp_path).eval()
    assert type(loaded) is own
    assert torch.equal(loaded.twice(tokens()), 2 * logits(model, tokens()))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(ours) is own.__mro__[1]
    assert torch.equal(logits(ours, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("change", ["expand", "reinitialize"])
@pytest.mark.parametrize("family", MAKERS)
def test_a_failure_on_the_way_leaves_the_model_as_it_was(family, change, monkeypatch):
    model = MAKERS[family]()
    before, wanted = everything(model), logits(model, tokens())
    put, calls = type(model).set_submodule, []

    def fails_at_the_second(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        put(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "set_submodule", fails_at_the_second)
    with pytest.raises(MemoryError):
        statex.expand(model, every=1, factor=2) if change == "expand" else statex.reinitialize(model, [0, 1])
    assert len(calls) == 2
    assert everything(model) == before
    assert torch.equal(logits(model, tokens()), wanted)


def test_a_failure_while_the_class_changes_leaves_the_model_as_it_was(monkeypatch):
    model = make_mamba2()
    before, wanted = everything(model), logits(model, tokens())
    adopt = StatexMamba2ForCausalLM.adopt

    def interrupted(changed):
        adopt(changed)
        raise KeyboardInterrupt

    monkeypatch.setattr(StatexMamba2ForCausalLM, "adopt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statex.expand(model, every=1)
    assert everything(model) == before
    assert torch.equal(logits(model, tokens()), wanted)
    monkeypatch.undo()
    statex.expand(model, every=1)
    assert type(model) is StatexMamba2ForCausalLM


@pytest.mark.parametrize("family", MAKERS)
def test_every_generator_is_left_as_it_was(family, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    for change in (lambda m: statex.expand(m, every=1, factor=2), lambda m: statex.reinitialize(m, [EXPANDED])):
        model = MAKERS[family]()
        seeded.clear()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        change(model)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
        assert seeded == []


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("fields", [{"factor": 2**31 - 1}, {"factor": 10**9}])
def test_mixers_larger_than_the_memory_are_refused(family, fields):
    model = MAKERS[family]()
    before = everything(model)
    with pytest.raises(statex.UserError, match=r"factor = \d+: makes mixers of .* GiB"):
        statex.expand(model, every=1, init="preserve", **fields)
    assert everything(model) == before


@pytest.mark.parametrize("seed", [-1, 2**32, 2**62, 1.5])
def test_seeds_that_no_generator_takes_are_refused(seed):
    model = make_mamba2()
    before = everything(model)
    for change in (lambda: statex.expand(model, every=1, seed=seed), lambda: statex.reinitialize(model, [0], seed)):
        with pytest.raises(statex.UserError, match="seed = "):
            change()
        assert everything(model) == before


@pytest.mark.parametrize("layers", [None, [], {0}, [True], ["0"], [0, 0], 0])
def test_layers_that_cannot_be_reinitialised_are_refused(layers):
    model = make_gla()
    before = everything(model)
    with pytest.raises(statex.UserError, match=r"layers"):
        statex.reinitialize(model, layers)
    assert everything(model) == before


@pytest.mark.parametrize("init", ["reinit", "inherit", "preserve"])
@pytest.mark.parametrize("family", MAKERS)
def test_what_was_frozen_stays_frozen(family, init):
    model = MAKERS[family]()
    names = [name for name, _ in mixer(model).named_parameters()]
    frozen = names[::2]
    for name in frozen:
        mixer(model).get_parameter(name).requires_grad_(False)
    norm = statex.FAMILIES[base_type(model)].norm_path.format(EXPANDED)
    model.get_submodule(norm).requires_grad_(False)
    statex.expand(model, layers=[EXPANDED], init=init, factor=2)
    after = {name: parameter.requires_grad for name, parameter in mixer(model).named_parameters()}
    assert after == {name: name not in frozen for name in after}
    assert not any(parameter.requires_grad for parameter in model.get_submodule(norm).parameters())


def a_forward_hook(mixer):
    mixer.register_forward_hook(lambda *_: None)


def a_hook_inside(mixer):
    next(iter(mixer.children())).register_forward_pre_hook(lambda *_: None)


def a_backward_hook(mixer):
    mixer.register_full_backward_hook(lambda *_: None)


def a_hook_of_a_tensor(mixer):
    next(mixer.parameters()).register_hook(lambda _: None)


def a_hook_after_gradients(mixer):
    next(mixer.parameters()).register_post_accumulate_grad_hook(lambda _: None)


@pytest.mark.parametrize(
    "register", [a_forward_hook, a_hook_inside, a_backward_hook, a_hook_of_a_tensor, a_hook_after_gradients]
)
@pytest.mark.parametrize("family", MAKERS)
def test_hooks_that_would_be_lost_are_refused(family, register):
    model = MAKERS[family]()
    register(mixer(model))
    before = everything(model)
    for change in (lambda: statex.expand(model, layers=[EXPANDED]), lambda: statex.reinitialize(model, [EXPANDED])):
        with pytest.raises(statex.UserError, match=r"has hooks .*; remove them, expand the model, and") as caught:
            change()
        assert str(caught.value.value).startswith(statex.FAMILIES[base_type(model)].mixer_path.format(EXPANDED))
        assert everything(model) == before
    statex.expand(model, layers=[0 if EXPANDED else 1])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_activation_that_the_expanded_mixer_lacks_is_refused_by_the_plan(activation):
    model = make_mamba2(hidden_act=activation)
    before = everything(model)
    for plan in (
        lambda: statex.plan_expansion(model, statex.ExpansionConfig(every=1)),
        lambda: statex.plan_expansion(model.config, statex.ExpansionConfig(every=1)),
        lambda: statex.expand(model, every=1),
        lambda: statex.reinitialize(model, [EXPANDED]),
    ):
        with pytest.raises(statex.UserError, match="hidden_act") as caught:
            plan()
        assert caught.value.value == activation
        assert everything(model) == before
    with pytest.raises(Exception, match="SiLU only") as caught:
        StatexMamba2Config(hidden_act=activation)
    statex.expand(make_mamba2(hidden_act="swish"), every=1)


def test_something_that_is_not_a_model_is_refused():
    for wrong in (GLAModel(GLAConfig(**make_gla().config.to_diff_dict())), nn.Linear(2, 2)):
        with pytest.raises(statex.UserError):
            statex.expand(wrong)


@pytest.mark.parametrize("model", [None, "x", torch.nn.Module, 3])
def test_something_that_is_not_a_module_is_refused(model):
    with pytest.raises(statex.UserError, match="model = "):
        statex.expand(model, every=1)
    with pytest.raises(statex.UserError, match="model = "):
        statex.plan_expansion(model, statex.ExpansionConfig(every=1))


@pytest.mark.parametrize("config", ["paper-gla", {"every": 1}, 3])
def test_something_that_is_not_an_expansion_config_is_refused(config):
    with pytest.raises(statex.UserError, match="is not an ExpansionConfig"):
        statex.expand(make_gla(), config)

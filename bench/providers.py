"""Providers: the same model with the same weights, run by different code.

``reference`` and ``fast`` are this package's two implementations. The others are:

    *-compiled           the whole forward pass through torch.compile
    *-blocks-compiled    each block compiled on its own (identical blocks are compiled once)
    fast-graphs          a training step whose passes are one CUDA graph (train.cuda_graphs), or a sampling
                         step whose guided pass is one (GraphedModel)
    fast-in-turn         a training step in which each pass has its own backward pass (train.passes)
    fast-lean            a training step with bfloat16 weights and moments, and float32 weights in the
                         optimiser (train.weights, train.moments), or a sampling step of a bfloat16 model
    fast-float8          the matrix products of the blocks in float8 (use_float8, train.float8)
    fast-float8-torchao  the same by torchao
    official             the code of a checkout (--official)
    diffusers            the DiT of the diffusers library

A provider shares one module with its variants; variants with compiled blocks share only its parameters.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffusers_dit
import official
from mdt_fast import doctor
from mdt_fast.config import ModelConfig, Switches
from mdt_fast.errors import UserError, nearest
from mdt_fast.models import Transformer, compile_for_training, zoo
from mdt_fast.models.compiling import RECOMPILE_LIMIT
from mdt_fast.models.float8 import use_float8
from mdt_fast.presets import PRESETS

NAMES = (
    "reference", "reference-blocks-compiled", "reference-compiled",
    "fast", "fast-blocks-compiled", "fast-compiled", "fast-graphs",
    "fast-in-turn", "fast-in-turn-compiled", "fast-in-turn-graphs",
    "fast-lean", "fast-lean-compiled", "fast-lean-graphs", "fast-lean-in-turn", "fast-lean-in-turn-graphs",
    "fast-float8", "fast-float8-blocks-compiled", "fast-float8-graphs",
    "fast-lean-float8", "fast-lean-float8-graphs",
    "fast-float8-torchao", "fast-float8-torchao-blocks-compiled", "fast-float8-torchao-graphs",
    "official", "diffusers",
)  # fmt: skip
PRECISIONS = "lean-float8", "float8-torchao", "lean", "float8"
"""Longer names first, because they contain the shorter ones and are matched against a provider's name."""
MASK_RATIO = 0.3
DECODE_LAYERS = {"MDTv2_S_2": 6}
"""Where the published recipe differs from the constructor's default."""


NARROW = "narrow"
"""The layers of MDTv2-XL/2 on 16 tokens of width 64. A step launches as many kernels as one of XL/2, but they
take next to no time, so that it measures the host's share of an XL/2 step."""


class Skip(Exception):
    """A provider that cannot run here; the message says why."""


def model_config(name: str) -> ModelConfig:
    """The published recipe of a factory (mask ratio 0.3), the model of a preset, or ``narrow``. Raises
    ``UserError`` if ``name`` is unknown."""
    if name in PRESETS:
        return PRESETS[name].model
    if name == NARROW:
        return replace(model_config("MDTv2_XL_2"), input_size=8, hidden_size=64, num_heads=4)
    if name not in zoo.FACTORIES:
        known = [*zoo.FACTORIES, *PRESETS, NARROW]
        raise UserError(f"--model: unknown model {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    if name.startswith("DiT"):
        return zoo.model_config(name)
    overrides: dict[str, Any] = {"mask_ratio": MASK_RATIO}
    if name in DECODE_LAYERS:
        overrides["decode_layer"] = DECODE_LAYERS[name]
    return zoo.model_config(name, **overrides)


def make_weights(config: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """Seeded initial weights, drawn on ``device``, with noise in place of zeros.

    A freshly initialised model outputs zero whatever it computes, so comparing providers would show nothing.
    The weights stay on the device because copying those of a large model from the host for every provider of
    a case takes seconds.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            module = zoo.build_model(config, implementation="reference").to(device)
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    return module.state_dict()


class Modules:
    """One module per implementation and precision, built on ``device`` with the shared weights when it is
    first requested. ``switches`` apply to the fast implementation."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        checkout: official.Official | None,
        switches: Switches | None = None,
    ):
        self.config, self.device, self.checkout = config, device, checkout
        self.switches = Switches() if switches is None else switches
        self.weights = make_weights(config, device)
        self._made: dict[str, nn.Module] = {}

    def get(self, implementation: str, precision: str = "") -> nn.Module:
        """The module, with its weights reset to the shared ones. ``precision`` is empty or one of
        ``PRECISIONS``. Raises ``Skip`` if the module cannot be built here."""
        key = f"{implementation}-{precision}"
        if key not in self._made:
            with self.device:  # drawing weights there saves seconds for large models
                module = self._build(implementation).to(self.device)
            if "lean" in precision:
                module.bfloat16()
            if "float8" in precision:
                try:
                    use_float8(module, "torchao" if "torchao" in precision else "kernels")
                except UserError as error:
                    raise Skip(str(error)) from None
            self._made[key] = module
        module = self._made[key]
        module.load_state_dict(self.weights)
        return module

    def _build(self, implementation: str) -> Any:
        if implementation == "diffusers":
            try:
                return diffusers_dit.build(self.config)
            except UserError as error:
                raise Skip(str(error)) from None
        if implementation == "fast":
            module = zoo.build_model(self.config)
            module.set_switches(self.switches)
            return module
        if implementation != "official":
            return zoo.build_model(self.config, implementation=implementation)
        if self.checkout is None:
            raise Skip("no checkout of the official code given (--official PATH)")
        try:
            return official.build(self.checkout, self.config)
        except UserError as error:
            raise Skip(str(error)) from None


@dataclass(frozen=True)
class Provider:
    """A provider's name, its module and its entry points: one pass, one guided pass and, where the module
    supports it, both passes of a training step at once."""

    name: str
    module: nn.Module
    forward: Callable[..., Tensor]
    forward_with_cfg: Callable[..., Tensor]
    both: Callable[..., tuple[Tensor, Tensor]] | None = None

    @property
    def compiled(self) -> bool:
        return self.name.endswith("-compiled")

    @property
    def graphed(self) -> bool:
        return self.name.endswith("-graphs")

    @property
    def in_turn(self) -> bool:
        return in_turn(self.name)

    @property
    def precision(self) -> str:
        return precision(self.name)

    @property
    def implementation(self) -> str:
        return implementation(self.name)


def make(name: str, modules: Modules) -> Provider:
    """Build the provider ``name``. Raises ``Skip`` with the reason if it cannot run here."""
    if name.endswith("-compiled") and (reason := compile_obstacle(modules.device)):
        raise Skip(reason)
    if name.endswith("-graphs") and modules.device.type != "cuda":
        raise Skip("CUDA graphs need a GPU")
    module = modules.get(implementation(name), precision(name))
    both = None if in_turn(name) else getattr(module, "training_step_outputs", None)
    calls = [module, module.forward_with_cfg, both]
    if name.endswith("-blocks-compiled"):
        twin = blocks_compiled(module)
        calls = [twin, twin.forward_with_cfg, both and twin.training_step_outputs]
        calls = [call and partial(_alike, module, twin, call) for call in calls]
    elif name.endswith("-compiled"):
        calls = [None if call is None else torch.compile(call) for call in calls]
    return Provider(name, module, *calls)


def blocks_compiled(module: nn.Module) -> Any:
    """A copy of ``module`` that shares its parameters and has each block compiled separately."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    if isinstance(twin, Transformer):
        compile_for_training(twin, "block")
        return twin
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for block in [block for some in twin.modules() if isinstance(some, nn.ModuleList) for block in some]:
        block.compile(fullgraph=True)
    return twin


def _alike(module: nn.Module, twin: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``twin``'s ``call``, after setting ``twin`` to the training or evaluation mode of ``module``."""
    if twin.training != module.training:
        twin.train(module.training)
    return call(*args, **kwargs)


def implementation(name: str) -> str:
    """The implementation whose module a provider runs."""
    for suffix in ("-compiled", "-blocks", "-graphs", "-in-turn", *(f"-{each}" for each in PRECISIONS)):
        name = name.removesuffix(suffix)
    return name


def in_turn(name: str) -> bool:
    """Whether each pass of a training step has its own backward pass."""
    return "-in-turn" in name


def precision(name: str) -> str:
    """The precision in a provider's name, one of ``PRECISIONS`` or empty. ``lean``: weights and optimiser
    moments in bfloat16; ``float8``: the blocks' matrix products in float8."""
    return next((each for each in PRECISIONS if f"-{each}" in name), "")


def compile_obstacle(device: torch.device) -> str | None:
    """The reason why ``torch.compile`` cannot work on ``device``, or None."""
    if device.type == "cpu" and doctor.cpp_compiler() is None:
        return (
            "torch.compile on the CPU needs a C++ compiler, and neither g++ nor clang++ was found (see CXX)"
        )
    if device.type == "cuda" and doctor.distribution_version("triton") is None:
        return "torch.compile on a GPU needs triton, which is not installed"
    return None


def load_checkout(path: Path | None) -> official.Official | None:
    return None if path is None else official.load(path)


def check_names(names: list[str]) -> None:
    """Raise ``UserError`` if a provider does not exist."""
    for name in names:
        if name not in NAMES:
            raise UserError(
                f"--providers: unknown provider {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}"
            )
